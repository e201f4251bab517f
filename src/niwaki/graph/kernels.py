"""Kernels on the meta device run once a shape: networks repeat their layers, and kernels there are slow Python."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from niwaki.graph.layouts import META, TENSORS, Unnamed, guessed

PLAIN = frozenset({float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format})

EMPTY = torch.Size([0]), (1,)
"""Shape and steps of a tensor of nothing."""
Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]


class Kernels:
    """Calls operators; what one made of these shapes and settings, it is taken to make of them again.

    Only on the meta device, where a result is nothing but a shape, and only for operators of ATen that write nothing
    and give new tensors. Lives as long as one trace, or one cut. What plain arithmetic tells is neither asked nor
    remembered.
    """

    def __init__(self) -> None:
        self.known: dict[Any, Layout | tuple[Layout, ...]] = {}
        self.pure: dict[int, tuple[Any, bool]] = {}
        """Operators by their ids, which are found sooner than they are, and whether each is pure."""

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = guessed(func, args, kwargs)
        if result is not None:
            return result
        number = id(func)
        if number not in self.pure:
            self.pure[number] = func, is_pure(func)
        key = _call(number, args, kwargs) if self.pure[number][1] else None
        layout = None if key is None else self.known.get(key)
        if layout is not None:
            return _made(layout) if type(layout[0]) is torch.Size else tuple(map(_made, layout))  # type: ignore[arg-type]
        result = func(*args, **kwargs)
        made = None if key is None else _layouts(result, args, kwargs)
        if made is not None:
            self.known[key] = made
        return result


def _made(layout: Layout) -> Tensor:
    return torch.empty_strided(layout[0], layout[1], dtype=layout[2], device=META)


def like_input(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a batch normalisation gives outside training: a tensor like its contiguous input, and two empty ones."""
    kind = x.dtype
    like = torch.empty_strided(x.shape, x.stride(), dtype=kind, device=META)
    return (
        like,
        torch.empty_strided(*EMPTY, dtype=kind, device=META),
        torch.empty_strided(*EMPTY, dtype=kind, device=META),
    )


@cache
def is_pure(func: Any) -> bool:
    """Whether the schema promises new tensors that depend on nothing but the arguments' shapes and settings."""
    schema = func._schema
    named = [*schema.arguments, *schema.returns]
    return (
        func.namespace == "aten"
        and bool(schema.returns)
        and all(str(value.type) == "Tensor" for value in schema.returns)
        and all(value.alias_info is None for value in named)
        and not {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
    )


def _call(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        named = tuple([(name, _argument(value)) for name, value in kwargs.items()]) if kwargs else ()
        return number, tuple([_argument(value) for value in args]), named
    except Unnamed:
        return None


def _argument(value: Any) -> Any:
    kind = type(value)
    if kind in TENSORS:
        # a number among tensors of no axes promotes types in a way that its shape and type do not show
        if not value.is_meta or value.layout is not torch.strided or not value.shape:
            raise Unnamed
        return value.shape, value.stride(), value.dtype
    if kind is int or value is None:
        return value
    if kind is list or kind is tuple:
        for item in value:
            if type(item) is not int:
                return tuple([_argument(item) for item in value])
        return tuple(value)
    if kind in PLAIN:
        return kind, value  # 1, 1.0 and True are equal, and give results of different types
    raise Unnamed


def _layouts(result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Layout | tuple[Layout, ...] | None:
    tensors = [result] if isinstance(result, Tensor) else list(result)
    for tensor in tensors:
        if type(tensor) is not Tensor or not tensor.is_meta or tensor.layout is not torch.strided:
            return None
    given = [
        item
        for value in (*args, *kwargs.values())
        for item in (value if isinstance(value, (list, tuple)) else (value,))
    ]
    memory = {item.untyped_storage()._cdata for item in given if isinstance(item, Tensor)}
    own = {tensor.untyped_storage()._cdata for tensor in tensors}
    if len(own) < len(tensors) or memory & own or any(tensor.storage_offset() for tensor in tensors):
        return None  # some kernels give back what they were given, whatever their schema says
    layouts = tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors)
    return layouts[0] if isinstance(result, Tensor) else layouts
