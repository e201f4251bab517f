"""After the cut, without training: statistics and constants set right."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from niwaki.repair.batch_norm import BatchNormStatistics
from niwaki.repair.constants import FoldedConstants
from niwaki.verbs import callable_module

__all__ = ["BatchNormStatistics", "FoldedConstants", "repair"]

_DEFAULT = BatchNormStatistics()


def repair(model: nn.Module, batches: Iterable[Any], *, how: BatchNormStatistics = _DEFAULT) -> int:
    """Repair a cut model in place from batches of inputs; returns how many batches were used."""
    return how(model, batches)


callable_module(__name__)
