"""What was done to a model, remembered beside it and not on it."""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from torch import nn


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


_done: "weakref.WeakKeyDictionary[nn.Module, Surgery]" = weakref.WeakKeyDictionary()


def remember(model: nn.Module, surgery: Surgery) -> None:
    _done[model] = surgery


def surgery_of(model: nn.Module) -> Surgery:
    """The surgery a model went through; an uncut model's is empty."""
    return _done.get(model, Surgery("eager"))
