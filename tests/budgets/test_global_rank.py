"""One ranking over the network, by hand."""

import numpy as np
import pytest
from costed import chain, chosen

import niwaki
from niwaki import Budget
from niwaki.budgets import GlobalRank
from niwaki.budgets.rule import Atoms

SHAPE = (1, 2)


def atoms(scores: list[float], pools: list[int], saves: list[float] | None = None) -> Atoms:
    n = len(scores)
    return Atoms(
        units=tuple(np.array([i]) for i in range(n)),
        score=np.array(scores),
        pool=np.array(pools),
        width=np.ones(n, np.int64),
        saves={"macs": np.array(saves or [1.0] * n), "params": np.array(saves or [1.0] * n), "units": np.ones(n)},
        least=np.ones(max(pools) + 1, np.int64),
        pools=tuple(str(p) for p in range(max(pools) + 1)),
    )


@pytest.mark.parametrize(
    ("normalise", "expected"),
    [  # pools (1, 3) and (10, 30, 20): means 2 and 20, largest 3 and 30, sums 4 and 60
        ("none", [1, 3, 10, 30, 20]),
        ("mean", [0.5, 1.5, 0.5, 1.5, 1.0]),
        ("max", [1 / 3, 1.0, 1 / 3, 1.0, 2 / 3]),
        ("sum", [0.25, 0.75, 1 / 6, 0.5, 1 / 3]),
        ("lamp", [1 / 10, 1, 1 / 14, 1, 4 / 13]),  # squares 1, 9 and 1, 9, 4 (times 100): 1 / (1 + 9), 4 / (4 + 9)
        ("rest", [2 / 10, 1, 3 / 14, 1, 8 / 13]),  # means of the same sums
    ],
)
def test_normalisations_by_hand(normalise: str, expected: list[float]) -> None:
    found = GlobalRank(normalise=normalise)(atoms([1, 3, 10, 30, 20], [0, 0, 1, 1, 1]))
    assert found.tolist() == pytest.approx(expected)


def test_per_cost_by_hand() -> None:
    """Scores 1, 1, 1 that save 1, 2, 3 multiply-adds (mean 2): worth 2, 1, 2/3 each."""
    found = GlobalRank(normalise="none", per="macs")(atoms([1, 1, 1], [0, 0, 0], [1, 2, 3]))
    assert found.tolist() == pytest.approx([2.0, 1.0, 2 / 3])


def test_a_pool_of_zeros_is_not_divided_by_zero() -> None:
    pools = atoms([0, 0, 2, 4], [0, 0, 1, 1])
    assert GlobalRank(normalise="mean")(pools).tolist() == pytest.approx([0, 0, 2 / 3, 4 / 3])
    assert GlobalRank(normalise="max")(pools).tolist() == pytest.approx([0, 0, 0.5, 1])


def test_lamp_by_hand() -> None:
    """Of equal ones the first is the highest: 4, 4, 1, 0 are 1, 1/2, 1/33 (of 16, 16 and 1) and 0. Pools in any order,
    of any size and scale; one of zeros stays at 0."""
    found = GlobalRank(normalise="lamp")(atoms([4, 1e9, 4, 0, 1, 2e9, 0, 0], [2, 0, 2, 1, 2, 0, 2, 1]))
    assert found.tolist() == pytest.approx([1, 1 / 5, 1 / 2, 0, 1 / 33, 1, 0, 0], rel=1e-12)


def test_rest_is_a_loop_that_normalises_anew_after_each_unit() -> None:
    """Squares 1, 1, 100 are 1/34, 2/101 and 1 of the mean of what is left: the second goes right behind the first. Any
    pools: in the order in which the least of all goes, where each square is divided by its pool's mean at the time."""
    found = GlobalRank(normalise="rest")(atoms([1, 10, 1], [0, 0, 0]))
    assert found.tolist() == pytest.approx([1 / 34, 1, 1 / 34]) and found[2] < found[0] < found[1]
    random = np.random.default_rng(0)
    scores, pools = random.exponential(size=60) ** 2, random.integers(0, 4, 60)
    scores[pools == 3] *= 1e6
    order, left = [], list(range(60))
    while left:
        means = {pool: np.mean([scores[i] ** 2 for i in left if pools[i] == pool]) for pool in set(pools[left])}
        order.append(min(left, key=lambda i: scores[i] ** 2 / means[pools[i]]))
        left.remove(order[-1])
    ranks = GlobalRank(normalise="rest")(atoms(scores.tolist(), pools.tolist()))
    most = [max(ranks[order[: k + 1]]) for k in range(60)]  # a pool alone at its best unit is at 1, whenever that goes
    assert np.argsort(ranks, kind="stable").tolist()[:56] == order[:56] and most == sorted(most)


def test_lamp_leaves_the_best_of_every_pool() -> None:
    """2 -> 4 -> 4 -> 1 with squares 1 ... 16 in one scale and in another: without floors the pools go alike."""
    values = [[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]]
    for keep, stay in ((6, (1, 2, 3)), (4, (2, 3)), (2, (3,))):
        plan = chosen(chain(2, 4, 4, 1), SHAPE, values, Budget(keep=keep, of="units"), how=GlobalRank(normalise="lamp"))
        assert plan.kept == {"0": stay, "1": stay}


def test_dead_units_do_not_lift_the_others_of_their_pool() -> None:
    """Two pools alike but for three dead units: their live units are worth the same, unless the mean is the scale."""
    pools = atoms([4, 3, 2, 0, 0, 0, 4, 3, 2], [0] * 6 + [1] * 3)
    assert GlobalRank()(pools).tolist() == [1, 0.75, 0.5, 0, 0, 0, 1, 0.75, 0.5]
    assert GlobalRank(normalise="mean")(pools)[2] > GlobalRank(normalise="mean")(pools)[7]  # the worst above a middling


def test_without_normalisation_the_small_group_goes_first() -> None:
    """2 -> 4 -> 4 -> 1: scores 1 ... 4 and 10 ... 40; four of eight go: all but the floor of the first,
    one of the second.
    """
    values = [[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]]
    plan = chosen(chain(2, 4, 4, 1), SHAPE, values, Budget(keep=4, of="units"), how=GlobalRank(normalise="none"))
    assert plan.kept == {"0": (3,), "1": (1, 2, 3)}
    evened = chosen(chain(2, 4, 4, 1), SHAPE, values, Budget(keep=4, of="units"), how=GlobalRank())
    assert evened.kept == {"0": (2, 3), "1": (2, 3)}


def test_equal_scores_keep_the_lower_index() -> None:
    plan = chosen(chain(2, 8, 1), SHAPE, [[1.0] * 8], Budget(keep=0.5, of="units"))
    assert plan.kept == {"0": (0, 1, 2, 3)}
    plan = chosen(chain(2, 4, 4, 1), SHAPE, [[1.0] * 4, [1.0] * 4], Budget(keep=5, of="units"))
    assert all(keep == tuple(range(len(keep))) for keep in plan.kept.values())


def test_unknown_settings_are_refused() -> None:
    for wrong in ({"normalise": "median"}, {"per": "joule"}):
        with pytest.raises(niwaki.errors.InputError, match="sum, lamp, rest; per: unit, macs, params"):
            GlobalRank(**wrong)
