"""Uniform grids: codes by hand, and what every grid promises."""

import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import pytest
import torch

from niwaki.errors import InputError, NotFiniteError
from niwaki.quantize import Uniform

BY_HAND = torch.tensor([-1.0, -0.3, 0.24, 1.0])
HOWS = [
    Uniform(bits=bits, symmetric=symmetric, per=per, grid=grid)
    for bits in range(2, 9)
    for per in ("channel", "tensor")
    for symmetric, grid in ((True, "zero"), (False, "zero"), (True, "literal"))
]


def test_symmetric_by_hand() -> None:
    """3 bits: 2^2 - 1 = 3 steps of 1/3 on either side; -0.3 is nearest to -1/3, 0.24 to 1/3."""
    one = Uniform(bits=3, per="tensor")(BY_HAND)
    assert one.codes.dtype == torch.int8 and one.codes.tolist() == [-3, -1, 1, 3]
    assert float(one.scale) == pytest.approx(1 / 3, abs=1e-8) and float(one.zero) == 0
    torch.testing.assert_close(one.values(), torch.tensor([-1, -1 / 3, 1 / 3, 1]))


def test_asymmetric_by_hand() -> None:
    """3 bits over -0.5 .. 3: seven steps of 0.5, 0 is the code 1; 1.2 / 0.5 = 2.4 is nearest to 2."""
    one = Uniform(bits=3, symmetric=False, per="tensor")(torch.tensor([-0.5, 0.0, 1.2, 3.0]))
    assert one.codes.dtype == torch.uint8 and one.codes.tolist() == [0, 1, 3, 7]
    assert (float(one.scale), float(one.zero)) == (0.5, 1.0)
    assert one.values().tolist() == [-0.5, 0.0, 1.0, 3.0]


def test_asymmetric_spans_zero() -> None:
    """Weights from 2 to 3 alone: the grid begins at 0, so that 0 is met."""
    one = Uniform(bits=2, symmetric=False, per="tensor")(torch.tensor([2.0, 3.0]))
    assert (one.codes.tolist(), float(one.scale), float(one.zero)) == ([2, 3], 1.0, 0.0)


def test_literal_by_hand() -> None:
    """2 bits, m = 3: the values -3, -1, 1, 3. 0.2 falls to (3 * (0.2 / 6 + 1/2)) = 1.6, code 2, value 1; no 0."""
    one = Uniform(bits=2, grid="literal", per="tensor")(torch.tensor([-3.0, -1.2, 0.2, 3.0]))
    assert one.codes.tolist() == [0, 1, 2, 3] and float(one.zero) == 1.5
    assert one.values().tolist() == [-3.0, -1.0, 1.0, 3.0]
    assert float(Uniform(bits=2, grid="literal", per="tensor")(torch.tensor([0.0, 3.0])).values()[0]) != 0


def test_one_step_per_channel() -> None:
    weight = torch.tensor([[1.0, -0.5], [0.0, 0.0], [10.0, 5.0]])
    one = Uniform(bits=2)(weight)
    assert one.scale.tolist() == [1.0, 1.0, 10.0] and one.codes.tolist() == [[1, 0], [0, 0], [1, 0]]
    assert Uniform(bits=2)(weight, axis=1).scale.tolist() == [10.0, 5.0]
    assert Uniform(bits=2)(weight, axis=-1).axis == 1
    assert Uniform(bits=2)(torch.tensor([1.0, -7.0])).scale.tolist() == [1.0, 7.0]


@pytest.mark.parametrize("how", HOWS, ids=str)
def test_zeros_scalars_and_nothing(how: Uniform) -> None:
    zeros = how(torch.zeros(3, 2)).values()
    assert not zeros.any() and not torch.signbit(zeros).any()
    assert float(how(torch.tensor(-2.5)).values()) == -2.5
    assert how(torch.zeros(2, 0, 3)).values().shape == (2, 0, 3)
    assert not how(torch.full((2, 2), 1e-300, dtype=torch.float64)).values().ne(0).any()


@pytest.mark.parametrize("how", HOWS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_types_and_errors(how: Uniform, dtype: torch.dtype) -> None:
    """Values are of the weight's type, at most half a step off (a whole one where the zero point was rounded)."""
    weight = torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(1)).to(dtype)
    before = weight.clone()
    one = how(weight)
    values = one.values()
    assert values.dtype == dtype and torch.equal(weight, before)
    assert torch.equal(values, one.values())
    off = (values.double() - weight.double()).abs() / one.along(one.scale)
    rounding = torch.finfo(dtype).eps * 2 ** (how.bits - 1)
    assert float(off.max()) <= (0.5 if how.symmetric else 1.0) + rounding + 1e-4
    assert int(one.codes.max()) < 2**how.bits and torch.equal(one.codes, how(weight).codes)


@hypothesis.given(
    arrays.arrays("float32", (4, 3), elements=st.floats(-100, 100, width=32)), st.sampled_from(HOWS), st.integers(-3, 3)
)
def test_scaling_by_a_power_of_two_keeps_codes(array, how: Uniform, power: int) -> None:
    weight = torch.from_numpy(array) + 1.0
    assert torch.equal(how(weight).codes, how(weight * 2.0**power).codes)


@pytest.mark.parametrize("how", [h for h in HOWS if h.grid == "zero"], ids=str)
def test_zero_stays_zero_and_the_grid_stays(how: Uniform) -> None:
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(2))
    weight[:, 2] = 0
    values = how(weight).values()
    assert not values[:, 2].any()
    if how.symmetric:
        assert torch.equal(how(-weight).values(), -values + 0.0)
        assert torch.equal(how(values).codes, how(weight).codes)


def test_centred_codes_keep_the_values() -> None:
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(3)).double()
    for how in HOWS:
        one = how(weight)
        if how.bits == 8 and one.codes.dtype == torch.uint8:
            with pytest.raises(InputError, match="quantise symmetrically, or to 7 bits"):
                one.centred()
            continue
        codes, scale = one.centred()
        assert codes.dtype == torch.int8
        torch.testing.assert_close(codes.double() * one.along(scale), one.values(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bits", [1, 9, 0, -3, 4.5, True, None])
def test_other_widths_are_refused(bits: object) -> None:
    with pytest.raises(InputError, match="2 to 8"):
        Uniform(bits=bits)  # type: ignore[arg-type]


def test_refusals() -> None:
    with pytest.raises(InputError, match="known: channel, tensor"):
        Uniform(per="row")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="literal grid spans"):
        Uniform(grid="literal", symmetric=False)
    with pytest.raises(NotFiniteError, match=r"NaN or infinity; where: a\.weight"):
        Uniform()(torch.tensor([1.0, float("nan")]), name="a.weight")
    with pytest.raises(NotFiniteError):
        Uniform()(torch.tensor([1.0, float("-inf")]))
    with pytest.raises(NotFiniteError, match="beyond float32"):
        Uniform()(torch.tensor([1e300, 1.0], dtype=torch.float64))
    with pytest.raises(InputError, match=r"found: torch\.int64"):
        Uniform()(torch.arange(3))
    with pytest.raises(InputError, match="axis 2"):
        Uniform()(torch.ones(2, 2), axis=2)
