"""A mode in which every floating number is a double, whatever a forward asks for."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

WIDER = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}


class Wide(TorchDispatchMode):
    """Calls that ask for a narrower type get doubles, and so do narrow constants that meet them.

    A forward that casts (`x.float()`), or makes coordinates in single precision, would mix types in a model of doubles
    or round in the middle: behind a rounding, equal numbers that differ in the last bit differ by 1e-7.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        listed = func._schema.arguments
        written = {a.name for a in listed if a.alias_info is not None and a.alias_info.is_write}
        given = [item if listed[i].name in written else widened(item) for i, item in enumerate(args)]
        named = {name: item if name in written else widened(item) for name, item in (kwargs or {}).items()}
        if func.overloadpacket.__name__ == "_grouped_mm" and given[1].dim() == 3:
            return _grouped(given[0], given[1], named["offs"] if "offs" in named else given[2])
        result = func(*given, **named)
        return result if written else widened(result)


def widened(value: Any) -> Any:
    """Narrow types as wide ones, narrow tensors copied into wide ones; inside lists and tuples too."""
    if isinstance(value, Tensor):
        return value.to(WIDER[value.dtype]) if value.dtype in WIDER else value
    if isinstance(value, torch.dtype):
        return WIDER.get(value, value)
    if isinstance(value, (list, tuple)):
        return type(value)([widened(item) for item in value])
    return value


def _grouped(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Each run of rows times its matrix, as the grouped kernels compute it, which have none for doubles."""
    parts = rows.tensor_split(ends[:-1].cpu().long())
    return torch.cat([part @ matrix for part, matrix in zip(parts, matrices, strict=True)])
