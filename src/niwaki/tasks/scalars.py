"""What a function of losses may give: checked where it was given, before anything is made of it."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from niwaki.errors import InputError


def scalars(found: Any, *, where: str) -> dict[str, Tensor]:
    """Losses by name: a tensor alone is "loss".

    Raises:
        InputError: neither a scalar tensor of floats nor several of them by name.
    """
    parts = {"loss": found} if isinstance(found, Tensor) else found
    wrong = ""
    if not isinstance(parts, Mapping):
        wrong = f"{type(found).__name__} {found!r}" if isinstance(found, (int, float)) else type(found).__name__
    elif not parts:
        wrong = "no loss at all"
    else:
        for name, one in parts.items():
            if not isinstance(name, str):
                wrong = f"the name {name!r}, no text"
            elif not isinstance(one, Tensor):
                wrong = f"{name}, a {type(one).__name__}"
            elif one.numel() != 1:
                wrong = f"{name}, a tensor of {'x'.join(map(str, one.shape))} numbers"
            elif not one.is_floating_point():
                wrong = f"{name}, of {str(one.dtype).removeprefix('torch.')}"
            if wrong:
                break
    if wrong:
        do = "return one scalar tensor (`error.mean()`, not `.item()`), or a dictionary with one for each task"
        raise InputError("the losses of a network on a batch", found=wrong, where=where, do=do)
    return {name: one.reshape(()) if one.dim() else one for name, one in parts.items()}


def place_of(function: Any) -> str:
    """Name, file and line of a function, as far as it has them."""
    inner = inspect.unwrap(getattr(function, "func", function))
    code = getattr(inner, "__code__", None)
    name = getattr(inner, "__qualname__", type(inner).__name__)
    return name if code is None else f"{name}, {code.co_filename}:{code.co_firstlineno}"
