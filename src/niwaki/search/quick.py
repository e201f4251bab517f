"""Convolutions of a forward that is seen call by call, made faster, with the same numbers but for rounding.

Weights are laid out with their channels last, which what the convolution puts out follows; and a batch norm in
evaluation mode, which alone reads what a convolution puts out, is folded into it: its scale and shift become the
convolution's own. Both are worked out once for each change of the weights.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_weights

CONVOLUTION = torch.ops.aten.convolution.default
NORM = torch.ops.aten.native_batch_norm.default
EMPTY = torch.ops.aten.empty.memory_format
"""What the norm's own call asks for before it: it reads nothing."""
KINDS = (torch.float32, torch.float64)
"""Of fewer bits, the order of sums is no longer rounding."""


@final
@dataclass(eq=False)
class Quick:
    """One convolution, and the norm behind it where there is one that can be folded in."""

    weight: Tensor
    bias: Tensor | None
    norm: tuple[Any, ...] = ()
    """Scale, shift, mean and variance (the first two may be None), and what is added to the variance."""
    after: int | None = None
    """Which call the norm is."""
    _ready: dict[bool, tuple[tuple[int, ...], Tensor, Tensor | None]] = field(default_factory=dict)

    @classmethod
    def of(cls, func: Any, args: Any, before: Callable[[Tensor], bool]) -> "Quick | None":
        """The one that this call is; None for other calls, other devices than CPUs, and weights worked out on the way.

        Args:
            before: whether a tensor was there before the forward.
        """
        if func is not CONVOLUTION or len(args) < 9 or args[6]:
            return None
        given, weight, bias = args[:3]
        if not all(t is None or (before(t) and not t.is_inference()) for t in (weight, bias)):
            return None
        fits = weight.device.type == "cpu" and weight.dtype in KINDS and given.dtype == weight.dtype
        return cls(weight, bias) if fits else None

    def follow(self, number: int, args: Any, before: Callable[[Tensor], bool]) -> None:
        """Call `number` is a norm of what this puts out."""
        if len(args) < 8 or args[5]:
            return
        held = args[1:5]
        if all(t is None or (before(t) and not t.is_inference() and t.dtype == self.weight.dtype) for t in held):
            self.norm, self.after = (*held, args[7]), number

    def __call__(self, args: Any, *, folded: bool) -> Tensor:
        weight, bias = self._weights(folded)
        return CONVOLUTION(args[0], weight, bias, *args[3:])

    def _weights(self, folded: bool) -> tuple[Tensor, Tensor | None]:
        parts = (self.weight, self.bias, *(self.norm[:4] if folded else ()))
        versions = tuple(-1 if t is None else t._version for t in parts)
        known = self._ready.get(folded)
        if known is None or known[0] != versions:
            weight, bias = self.weight.detach(), self.bias
            if folded:
                scale, shift, mean, variance, more = self.norm
                weight, bias = fuse_conv_bn_weights(weight, bias, mean, variance, more, scale, shift)
            if weight.dim() == 4:
                weight = weight.contiguous(memory_format=torch.channels_last)
            known = self._ready[folded] = (versions, weight.detach(), None if bias is None else bias.detach())
        return known[1:]
