"""What was done to a model, remembered beside it and not on it."""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

from torch import Tensor, nn

from niwaki.errors import InputError


@final
@dataclass(frozen=True, eq=False)
class Surgery:
    """How a model came to be cut: enough to do the same to a fresh copy without tracing."""

    door: str
    """"eager" or "exported"."""
    mends: tuple[Mapping[str, Any], ...] = ()
    """Attributes of modules that were set: module path, attribute, value."""
    scaled: tuple[Mapping[str, Any], ...] = ()
    """Slices of parameters that were scaled so that what depended on the old width keeps its value."""
    graph: Mapping[str, Any] | None = None
    """The rewritten graph, for the exported door."""
    biases: tuple[str, ...] = ()
    """Modules that had no bias and were given one after the cut (folded constants)."""

    def to_json(self) -> dict[str, Any]:
        """Plain data, as surgery.json holds it."""
        return {
            "door": self.door,
            "mends": [dict(m) for m in self.mends],
            "scaled": [dict(s) for s in self.scaled],
            "graph": self.graph,
            "biases": list(self.biases),
        }


_done: "weakref.WeakKeyDictionary[nn.Module, Surgery]" = weakref.WeakKeyDictionary()


def remember(model: nn.Module, surgery: Surgery) -> None:
    _done[model] = surgery


def find_surgery(model: nn.Module) -> Surgery | None:
    """The surgery this very model went through; None for one that was not cut here, and for copies of one that was."""
    return _done.get(model)


def surgery_of(model: nn.Module) -> Surgery:
    """The surgery this very model went through.

    Raises:
        InputError: it is not known: the model was not cut here, or is a copy of one that was.
    """
    surgery = find_surgery(model)
    if surgery is None:
        raise InputError(
            f"what was done to a {type(model).__name__}",
            found="no surgery is known: it was not cut in this process, or it is a copy of a model that was",
            do="give the model that cut(), compress() or load() returned",
        )
    return surgery


def add_bias(model: nn.Module, path: str) -> nn.Parameter:
    """Give the layer at `path` a bias of zeros, and remember it: a reloaded model has to have it, too."""
    layer = model.get_submodule(path)
    weight: Tensor = layer.weight  # type: ignore[assignment]
    bias = nn.Parameter(weight.detach().new_zeros(weight.shape[0]), requires_grad=weight.requires_grad)
    layer.bias = bias
    surgery = find_surgery(model) or Surgery("eager")
    if path not in surgery.biases:
        remember(model, replace(surgery, biases=(*surgery.biases, path)))
    return bias
