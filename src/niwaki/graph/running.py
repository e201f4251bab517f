"""The surroundings of a traced forward: what is switched off, what is watched, what is put back."""

import contextlib
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from niwaki.graph.recorder import Recorder, Watch
from niwaki.graph.skeleton import walk


def watch(recorder: Recorder, *, meta: bool) -> contextlib.AbstractContextManager[Any]:
    """Inside, tensors that leave torch are seen, where they can."""
    return contextlib.nullcontext() if meta else Watch(recorder)


@contextlib.contextmanager
def quiet(model: nn.Module, modules: Iterable[tuple[str, nn.Module]] | None = None) -> Iterator[None]:
    """Fused kernels that hide their parts off, random states kept. `modules` are its own, where somebody has them."""
    fast = torch.backends.mha.get_fastpath_enabled()
    backends = (torch.backends.mkldnn, torch.backends.cudnn)
    enabled = [backend.enabled for backend in backends]
    states = random.getstate(), np.random.get_state()
    torch.backends.mha.set_fastpath_enabled(False)
    recurrent = any(isinstance(module, nn.RNNBase) for _, module in modules or walk(model))
    if recurrent:  # whole layers as one call, on real tensors
        for backend in backends:
            backend.enabled = False  # type: ignore[attr-defined]
    try:
        with torch.random.fork_rng(devices=list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for backend, was in zip(backends, enabled, strict=True):
            backend.enabled = was  # type: ignore[attr-defined]
        random.setstate(states[0])
        np.random.set_state(states[1])
