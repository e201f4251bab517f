"""Allowances whose product is given: the worked numbers of the method's description."""

import math

import pytest

from niwaki.errors import InputError
from niwaki.search import Geometric


@pytest.mark.parametrize(
    ("rate", "steps", "total", "factor"),
    [
        (0.1, 2, 1.155, 0.5),  # 1.1 * 1.05
        (0.1, 3, 1.331, 1.0),  # 1.1 ** 3
        (0.1, 3, 1.2, 0.568064),
        (0.06, 52, 6, 0.97689),
        (0.06, 69, 6, 0.97158),
        (0.06, 86, 6, 0.96930),
        (0.06, 103, 6, 0.96821),
        (0.1, 2, 1.1 * 1.2, 2.0),  # it may grow as well
    ],
)
def test_the_factor_solves_the_product(rate, steps, total, factor):
    how = Geometric(initial_rate=rate, initial_thres=total)
    assert how.factor(steps) == pytest.approx(factor, abs=1e-5)
    assert math.prod(1 + value for value in how(steps)) == pytest.approx(total, rel=1e-12)


def test_allowances_by_hand():
    assert Geometric(initial_rate=0.1, initial_thres=1.2)(3) == pytest.approx([0.1, 0.0568064, 0.0322696], abs=1e-7)
    assert Geometric(initial_rate=0.06, initial_thres=6)(69)[-1] == pytest.approx(0.0084, abs=1e-4)
    assert Geometric(initial_rate=0.1, exp=False)(3) == [0.1, 0.1, 0.1]
    assert Geometric(initial_rate=0.1, initial_thres=9)(1) == [0.1]
    # a total that the first step takes whole leaves the others nothing
    assert Geometric(initial_rate=0.1, initial_thres=1.1)(3)[1] == pytest.approx(0, abs=1e-6)
    assert Geometric(initial_rate=1.0, initial_thres=1e30)(5000)[0] == 1.0


def test_refusals():
    with pytest.raises(InputError, match=r"initial_thres=1.05 with initial_rate=0.1.*at least initial_thres=1.1"):
        Geometric(initial_rate=0.1, initial_thres=1.05)
    Geometric(initial_rate=0.1, initial_thres=1.05, exp=False)
    for rate in (0.0, -0.1, math.nan, math.inf):
        with pytest.raises(InputError, match="no rise above 0"):
            Geometric(initial_rate=rate)
    with pytest.raises(InputError, match="initial_thres"):
        Geometric(initial_thres=math.nan)
