"""After the cut, without training: statistics and constants set right."""

from collections.abc import Iterable
from typing import Any, overload

from torch import nn

from niwaki.errors import InputError
from niwaki.plan import Plan
from niwaki.repair.batch_norm import BatchNormStatistics
from niwaki.repair.constants import FoldedConstants
from niwaki.verbs import callable_module

__all__ = ["BatchNormStatistics", "FoldedConstants", "repair"]

_DEFAULT = BatchNormStatistics()


@overload
def repair(small: nn.Module, batches: Iterable[Any], *, how: BatchNormStatistics = ...) -> int: ...
@overload
def repair(
    small: nn.Module, batches: Iterable[Any], *, how: FoldedConstants, model: nn.Module | None, plan: Plan | None
) -> tuple[str, ...]: ...
def repair(
    small: nn.Module,
    batches: Iterable[Any],
    *,
    how: BatchNormStatistics | FoldedConstants = _DEFAULT,
    model: nn.Module | None = None,
    plan: Plan | None = None,
) -> int | tuple[str, ...]:
    """Repair a cut model in place from batches of inputs.

    Args:
        model, plan: what `small` was cut from and by, for `FoldedConstants`; batch norm needs neither.

    Returns:
        How many batches were used; of `FoldedConstants` the layers that could not take their constant.

    Raises:
        InputError: `how` needs the model and the plan and they are missing, or it is no repair.
    """
    if isinstance(how, BatchNormStatistics):
        return how(small, batches)
    if not isinstance(how, FoldedConstants):
        raise InputError(
            f"repair(how={how!r})",
            found=f"{type(how).__name__}; known: BatchNormStatistics, FoldedConstants",
            do="pass an instance from niwaki.repair",
        )
    if model is None or plan is None:
        raise InputError(
            "fold constants",
            found="no model" if model is None else "no plan",
            do="niwaki.repair(small, batches, how=FoldedConstants(), model=model, plan=plan)",
        )
    return how(model, small, plan, batches=batches)


callable_module(__name__)
