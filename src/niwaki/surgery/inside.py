"""What the modules inside two networks put out, call by call: for the judge, where outputs alone do not tell."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.units import agrees, run, tensors_in

Inside = dict[tuple[str, int], Tensor]
"""By the module's path and the number of its call."""


@contextmanager
def hooked(model: nn.Module, note: Callable[[tuple[str, int], Tensor], Tensor | None]) -> Iterator[None]:
    """`note` sees each tensor that a module inside `model` puts out, and may give another in its place."""
    calls: Counter[str] = Counter()

    def hook_of(path: str) -> Any:
        def hook(module: nn.Module, given: Any, output: Any) -> Tensor | None:
            calls[path] += 1
            return note((path, calls[path]), output) if isinstance(output, Tensor) else None

        return hook

    handles = [module.register_forward_hook(hook_of(path)) for path, module in model.named_modules() if path]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def inside(model: nn.Module, inputs: Any) -> Inside:
    """Copies of what every call of every module puts out: a later call may write to it."""
    seen: Inside = {}

    def note(key: tuple[str, int], output: Tensor) -> None:
        seen[key] = output.detach().clone()

    with hooked(model, note):
        run(model, inputs)
    return seen


def steadied(model: nn.Module, inputs: Any, right: Inside, tolerance: float) -> tuple[list[Tensor], float, float]:
    """Outputs of `model` when what its modules put out is set to `right` wherever it is the same but for rounding.

    What is sorted, picked or suppressed hangs on the last bit where scores tie: two networks that compute the same put
    out other boxes. Also gives the largest difference that was taken for rounding, and the largest value it stood by.
    """
    worst = scale = 0.0

    def note(key: tuple[str, int], output: Tensor) -> Tensor | None:
        nonlocal worst, scale
        wanted = right.get(key)
        if wanted is None or wanted.shape != output.shape or wanted.dtype != output.dtype or not output.numel():
            return None
        if not output.dtype.is_floating_point:
            return None
        size, gap = float(wanted.abs().max()), float((wanted - output).abs().max())
        if not agrees(gap, size, tolerance):
            return None
        worst, scale = max(worst, gap), max(scale, size)
        return wanted.clone()

    with torch.no_grad(), hooked(model, note):
        outputs = tensors_in(run(model, inputs))
    return outputs, worst, scale
