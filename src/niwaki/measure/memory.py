"""How much memory a forward pass takes at its peak."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from niwaki.measure.measurement import Measurement, Meter, device_name, evaluating, storage_of
from niwaki.units import device_of, run, tensors_in


class _Live(TorchDispatchMode):
    """Follows the storages that calls make until they are freed."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known = known
        self.live: dict[int, int] = {}
        self.watched: dict[int, Any] = {}
        self.now = self.peak = 0
        self.odd: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            if tensor.layout is torch.strided and storage_of(tensor) not in self.live:
                self.known.add(storage_of(tensor))  # there before any call made it: a constant of the model's own
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            if tensor.layout is not torch.strided:
                self.odd.add(str(func.overloadpacket))
            elif storage_of(tensor) not in self.live and storage_of(tensor) not in self.known:
                self.follow(tensor)
        self.peak = max(self.peak, self.now)
        return result

    def follow(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), storage_of(tensor)
        self.live[key] = storage.nbytes()
        self.now += self.live[key]

        def freed(_: Any) -> None:
            self.now -= self.live.pop(key, 0)
            self.watched.pop(key, None)

        self.watched[key] = weakref.ref(storage, freed)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


@contextmanager
def _plainly(model: nn.Module) -> Iterator[None]:
    """Attention and recurrent layers as plain products."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    libraries: tuple[Any, ...] = (torch.backends.mkldnn, torch.backends.cudnn) if recurrent else ()
    enabled = [library.enabled for library in libraries]
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for library in libraries:
            library.enabled = False
        with sdpa_kernel([SDPBackend.MATH]):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for library, before in zip(libraries, enabled, strict=True):
            library.enabled = before


@contextmanager
def _uncollected() -> Iterator[None]:
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@final
@dataclass(frozen=True)
class Memory(Meter):
    """Bytes of parameters, buffers, inputs and all that calls have made, where they are most; PyTorch eager.

    Storages count in full from the call that makes them until they are freed. What a kernel takes for itself while it
    runs is not seen, nor what an allocator keeps in reserve.
    """

    fused: bool = True
    """Attention and recurrent layers by the fused kernels that PyTorch picks; without, by plain products, which is what
    a plan's promise counts."""

    @property
    def name(self) -> str:
        return "memory"

    def __call__(self, model: nn.Module, example: Any) -> Measurement:
        state = {
            storage_of(t): t.untyped_storage().nbytes()
            for t in (*model.parameters(), *model.buffers(), *tensors_in(example))
            if t.layout is torch.strided
        }
        mode = _Live(set(state))
        with evaluating(model), _uncollected(), nullcontext() if self.fused else _plainly(model), mode:
            run(model, example)
        return Measurement(
            name=self.name,
            value=float(sum(state.values()) + mode.peak),
            unit="bytes",
            definition="storages of parameters, buffers, inputs and of what the calls of one forward pass on the "
            "example made, at the peak, PyTorch eager; not what kernels take for themselves"
            + ("" if self.fused else "; attention and recurrent layers by plain products"),
            device=device_name(device_of(model)),
            uncounted=tuple(sorted(mode.odd)),
        )
