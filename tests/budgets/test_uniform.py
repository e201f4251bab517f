"""The same share of every group, by hand."""

import torch  # noqa: F401
from costed import chain, chosen

from niwaki import Budget
from niwaki.budgets import Uniform

SHAPE = (1, 2)
EIGHT, FOUR = [float(i) for i in range(8)], [10.0, 40.0, 20.0, 30.0]


def test_half_of_every_group_whatever_the_scales() -> None:
    """2 -> 8 -> 4 -> 1, scores 0 ... 7 and 10 ... 40: each group keeps its upper half."""
    plan = chosen(chain(2, 8, 4, 1), SHAPE, [EIGHT, FOUR], Budget(keep=0.5, of="units"), how=Uniform())
    assert plan.kept == {"0": (4, 5, 6, 7), "1": (1, 3)}


def test_shares_that_do_not_divide_fill_up() -> None:
    """Keep 7 of 12: ranks/size 1/8 ... 8/8 and 1/4 ... 4/4; the five lowest are 1/8, 2/8 = 1/4, 3/8, 4/8 =
    2/4: one of the ties stays.
    """
    plan = chosen(chain(2, 8, 4, 1), SHAPE, [EIGHT, FOUR], Budget(keep=7, of="units"), how=Uniform())
    assert plan.promised["units"] == 7
    assert {name: len(keep) for name, keep in plan.kept.items()} in ({"0": 4, "1": 3}, {"0": 5, "1": 2})


def test_equal_scores_keep_the_lower_index() -> None:
    plan = chosen(chain(2, 8, 4, 1), SHAPE, [[1.0] * 8, [1.0] * 4], Budget(keep=0.5, of="units"), how=Uniform())
    assert plan.kept == {"0": (0, 1, 2, 3), "1": (0, 1)}


def test_scores_of_different_groups_are_never_compared() -> None:
    base = chosen(chain(2, 8, 4, 1), SHAPE, [EIGHT, FOUR], Budget(keep=0.5, of="macs"), how=Uniform())
    scaled = chosen(
        chain(2, 8, 4, 1), SHAPE, [[1e6 * v for v in EIGHT], FOUR], Budget(keep=0.5, of="macs"), how=Uniform()
    )
    assert base.kept == scaled.kept
