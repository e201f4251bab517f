"""Tensors whose numbers are known although the forward runs without any: what a model makes of its own constants."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CONSTANT_LIMIT = 1 << 22
"""Integer tensors up to this many elements are computed along, so that gathers by them are movement."""
NUMBERS_LIMIT = 1 << 12
"""Real tensors that no parameter has a part in are computed along up to this size, so that forwards may read them."""

MADE = frozenset({"arange", "scalar_tensor", "tril_indices", "triu_indices", "zeros", "ones", "full"})
"""Operators that make a tensor of nothing but numbers."""


def countable(tensor: Tensor) -> bool:
    """Whether a tensor that is known may be computed along."""
    if tensor.dtype.is_complex:
        return False
    return tensor.numel() <= (NUMBERS_LIMIT if tensor.dtype.is_floating_point else CONSTANT_LIMIT)


def memory_of(tensor: Tensor) -> int:
    """What tells whether tensors lie in the same memory."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


def computed(
    name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: list[Tensor], known: list[Tensor]
) -> list[Tensor] | None:
    """What a call gives in place of `outputs` where its tensors are those `known`, or None where that is not sure."""
    if not all(map(countable, outputs)) or torch.Tag.nondeterministic_seeded in func.tags or func._schema.is_mutable:
        return None
    if not outputs[0].is_meta:
        return [tensor.detach() for tensor in outputs]
    if not known and name not in MADE:
        return None
    try:
        with torch.utils._python_dispatch._disable_current_modes(), torch.no_grad():
            following = iter(known).__next__
            swapped = _swap(args, following)
            named = {k: _swap(v, following) for k, v in kwargs.items()}
            if "device" in named and named["device"] is not None:
                named["device"] = torch.device("cpu")
            answers = tensors_of(func(*swapped, **named))
    except Exception:  # not computable beside the trace: it stays unknown, which is safe
        return None
    return answers if [a.shape for a in answers] == [tensor.shape for tensor in outputs] else None


def tensors_of(value: Any) -> list[Tensor]:
    """Tensors among arguments or results of an operator, in order: those nest in lists and tuples only."""
    if isinstance(value, Tensor):
        return [value]
    found: list[Tensor] = []
    if isinstance(value, (list, tuple)):
        for item in value:
            kind = type(item)
            if kind is int or kind is bool or kind is float or item is None:
                continue
            if isinstance(item, Tensor):
                found.append(item)
            elif isinstance(item, (list, tuple)):
                found += tensors_of(item)
    return found


def _swap(value: Any, following: Callable[[], Any]) -> Any:
    """`value` with every tensor in it replaced by the following one of something, in the order of `tensors_of`."""
    kind = type(value)
    if kind is int or kind is bool or kind is float or value is None:
        return value
    if isinstance(value, Tensor):
        return following()
    if isinstance(value, (list, tuple)):
        return kind([_swap(item, following) for item in value])
    return value


def written_by(
    slots: tuple[tuple[int | None, str], ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Tensor]:
    """The tensors that a call writes to, at these places (and by these names) of its arguments."""
    found: list[Tensor] = []
    for place, name in slots:
        found += tensors_of(kwargs.get(name, args[place] if place is not None and place < len(args) else None))
    return found
