"""Pointwise calls, known by their ATen tag: operands meet index by index."""

from typing import Any

import torch
from torch import Tensor

from niwaki.graph.labels import varying
from niwaki.graph.rules.registry import Call, rule
from niwaki.graph.values import Labels, covers, join

MISSING_TAG = (
    "hardswish",
    "hardswish_",
    "hardtanh",
    "hardtanh_",
    "hardsigmoid",
    "relu6",
    "celu",
    "selu",
    "prelu",
    "_prelu_kernel",
    "where",
    "floor_divide",
    "masked_fill",
    "masked_fill_",
    "copy",
    "copy_",
    "fill",
    "fill_",
    "zero_",
    "lerp",
    "lerp_",
    "addcmul",
    "addcdiv",
    "rsub",
    "log_sigmoid_forward",
    "softplus",
    "mish",
    "mish_",
    "silu_",
    "clamp_min",
    "clamp_max",
    "bernoulli",
    "bernoulli_",
    "uniform_",
    "normal_",
    "random_",
    "exponential_",
    "log_normal_",
    "isin",
    "erfinv",
    "rrelu_with_noise",
    "threshold",
    "threshold_",
    "fake_quantize_per_tensor_affine",
    "complex",
    "polar",
    "logaddexp",
    "nan_to_num",
    "frexp",
    "elu_",
    "leaky_relu",
    "leaky_relu_",
    "gelu_",
    "relu_",
    "sigmoid_",
    "tanh_",
    "isclose",
    "_foreach_mul_",
)
"""Pointwise operators that carry no pointwise tag in some supported release of torch."""

_zero: dict[Any, bool] = {}


def is_pointwise(func: Any, name: str) -> bool:
    if torch.Tag.pointwise in func.tags or name in MISSING_TAG:
        return True
    packets = [func.overloadpacket, getattr(torch.ops.aten, name.removesuffix("_"), func.overloadpacket)]
    return any(
        torch.Tag.pointwise in getattr(packet, overload).tags for packet in packets for overload in packet.overloads()
    )


def meet(call: Call) -> Labels:
    """All tensor operands meet index by index."""
    tensors = [t for t in (*call.args, *call.kwargs.values()) if isinstance(t, Tensor)]
    values = [call.value(t) for t in tensors]
    if len(values) == 1 and values[0].parameter is None and values[0].shape == call.shape:
        fields = values[0].fields
        if not fields:
            return ()
        if len(fields) == 1 and varying(fields[0]):
            own = values[0].zero and not call.space.is_free(fields[0], zero=True)
            call.zero = keeps_zero(call, [own])
            return fields
    operands = [(value.shape, value.get(call.space), value.why) for value in values]
    result = join(call.space, operands, call.shape)
    # unit by unit: an operand is zero only where units of its own are gone
    listed = [labels for _, labels, _ in operands]
    call.zero = bool(result) and all(
        keeps_zero(call, [v.zero and covers(call.space, f, (r,)) for v, f in zip(values, listed, strict=True)])
        for r in result
    )
    return result


def keeps_zero(call: Call, zeros: list[bool]) -> bool:
    """Whether the operator gives zero where the flagged operands are zero: asked of the operator itself."""
    if not any(zeros):
        return False
    if call.name in ("copy_", "copy"):
        return zeros[-1]
    plain = tuple(a if isinstance(a, (int, float, bool, str, type(None))) else type(a).__name__ for a in call.args)
    extra = tuple((k, v) for k, v in call.kwargs.items() if isinstance(v, (int, float, bool, str)))
    key = (call.func, tuple(zeros), plain, extra)
    if key not in _zero:
        flags = iter(zeros)

        def probe(item: Any) -> Any:
            if not isinstance(item, Tensor):
                return item
            flag = next(flags)
            if item.dtype == torch.bool:
                return torch.tensor([True, False])
            if not item.dtype.is_floating_point:
                return torch.tensor([0 if flag else 1] * 2)
            return torch.tensor([0.0, 0.0] if flag else [0.7, -0.3], dtype=torch.float64)

        try:
            with torch.utils._python_dispatch._disable_current_modes():
                args = [probe(item) for item in call.args]
                kwargs = {k: probe(v) for k, v in call.kwargs.items() if k not in ("device", "dtype", "layout", "out")}
                result = call.func(*args, **kwargs)
            _zero[key] = bool((result == 0).all())
        except Exception:  # an operator that can't be asked on plain numbers keeps nothing
            _zero[key] = False
    return _zero[key]


for _name in MISSING_TAG:
    rule(_name)(meet)


@rule("glu")
def glu(call: Call) -> Labels:
    """Halves of one axis meet: `a * sigmoid(b)`."""
    value = call.value(call["self"])
    axis = call["dim"] % len(value.shape)
    half = value.shape[axis] // 2
    call.zero = value.zero
    if half == 1:  # what is left has no axis to lose
        for labels in value.get(call.space):
            if labels.shape[axis] > 1:
                call.fix(labels, "a gated pair of single channels")
        return tuple(f for f in value.get(call.space) if f.shape[axis] == 1)
    pieces = []
    for part in (slice(0, half), slice(half, None)):
        fields = tuple(
            labels[(slice(None),) * axis + (part,)] if labels.shape[axis] > 1 else labels
            for labels in value.get(call.space)
        )
        pieces.append((call.shape, fields, value.why))
    return join(call.space, pieces, call.shape)
