"""Modules that are left out: what stands in their place hands its input on."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from niwaki.graph.skeleton import ATOMS


class PassThrough(nn.Module):
    """Puts out its first argument, whatever else it is given; in a tuple of one where the module it replaces did.

    Plain settings of that module (a stride, the kind of an attention) stay readable on it.
    """

    def __init__(self, original: nn.Module, puts_out: str) -> None:
        super().__init__()
        for name, value in vars(original).items():
            if type(value) in ATOMS and not name.startswith("_"):
                setattr(self, name, value)
        self.puts_out = puts_out

    def forward(self, x: Any, *_: Any, **__: Any) -> Any:
        return (x,) if self.puts_out == "tuple" else x

    def extra_repr(self) -> str:
        return "a block was left out here"


def leave_out_(model: nn.Module, dropped: Mapping[str, str]) -> None:
    """Replace the modules at these paths, wherever they are held, in place.

    Raises:
        AttributeError: there is no such module.
    """
    if not dropped:
        return
    stand_ins = {
        model.get_submodule(path): PassThrough(model.get_submodule(path), out) for path, out in dropped.items()
    }
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child in stand_ins:
                module._modules[name] = stand_ins[child]
