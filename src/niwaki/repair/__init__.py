"""After the cut, without training: statistics and constants set right, lost channels rebuilt from those that stay.

`repair` mends a model that was cut. Blocks that rebuild channels work on tensors: filters in, a `Mixing` out, which
`mix` puts into the weight of the layer that reads them.
"""

from collections.abc import Iterable
from typing import Any, overload

from torch import nn

from niwaki.errors import InputError
from niwaki.plan import Plan
from niwaki.repair.activation_space import ActivationSpace
from niwaki.repair.batch_norm import BatchNormStatistics
from niwaki.repair.coloured import Coloured
from niwaki.repair.constants import FoldedConstants
from niwaki.repair.diagonal import Diagonal
from niwaki.repair.filter_space import FilterSpace
from niwaki.repair.filters import Composite, Filters, InnerProducts, folded, inner_products, untrained
from niwaki.repair.least_squares import LeastSquares
from niwaki.repair.merge import Merge
from niwaki.repair.mixing import Mixing, mix
from niwaki.repair.moments import Gaussians
from niwaki.repair.neuron_merging import NeuronMerging
from niwaki.verbs import callable_module

__all__ = [
    "ActivationSpace",
    "BatchNormStatistics",
    "Coloured",
    "Composite",
    "Diagonal",
    "FilterSpace",
    "Filters",
    "FoldedConstants",
    "Gaussians",
    "InnerProducts",
    "LeastSquares",
    "Merge",
    "Mixing",
    "NeuronMerging",
    "folded",
    "inner_products",
    "mix",
    "repair",
    "untrained",
]

_DEFAULT = BatchNormStatistics()


@overload
def repair(small: nn.Module, batches: Iterable[Any], *, how: BatchNormStatistics = ...) -> int: ...
@overload
def repair(
    small: nn.Module,
    batches: Iterable[Any],
    *,
    how: FoldedConstants | LeastSquares,
    model: nn.Module | None,
    plan: Plan | None,
) -> tuple[str, ...]: ...
def repair(
    small: nn.Module,
    batches: Iterable[Any],
    *,
    how: BatchNormStatistics | FoldedConstants | LeastSquares = _DEFAULT,
    model: nn.Module | None = None,
    plan: Plan | None = None,
) -> int | tuple[str, ...]:
    """Repair a cut model in place from batches of inputs.

    Args:
        model, plan: what `small` was cut from and by; batch norm needs neither.

    Returns:
        How many batches were used; of `FoldedConstants` and `LeastSquares` the layers that could not be changed.

    Raises:
        InputError: `how` needs the model and the plan and they are missing, or it is no repair.
    """
    if isinstance(how, BatchNormStatistics):
        return how(small, batches)
    if not isinstance(how, FoldedConstants | LeastSquares):
        raise InputError(
            f"repair(how={how!r})",
            found=f"{type(how).__name__}; known: BatchNormStatistics, FoldedConstants, LeastSquares",
            do="pass an instance from niwaki.repair",
        )
    if model is None or plan is None:
        raise InputError(
            "fold constants" if isinstance(how, FoldedConstants) else "refit layers",
            found="no model" if model is None else "no plan",
            do=f"niwaki.repair(small, batches, how={type(how).__name__}(), model=model, plan=plan)",
        )
    return how(model, small, plan, batches=batches)


callable_module(__name__)
