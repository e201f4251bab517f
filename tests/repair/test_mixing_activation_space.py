"""Form B: moments of rectified normals by sampled numbers and by quadrature, then the mixture.

The numbers of the first test were sampled, four million draws each, and agree to 1e-3.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from niwaki.errors import InputError, NotFiniteError, UnknownNameError
from niwaki.repair import ActivationSpace, Composite, Filters, FilterSpace, Gaussians, mix
from niwaki.repair.moments import (
    expanded,
    linear,
    rectified,
    rectified_mean,
    rectified_product,
    rectified_square,
    sampled,
)


def product(*values: float) -> float:
    return float(rectified_product(*(np.array([value], float) for value in values))[0])


def layer(targets: int, rest: int, seed: int = 0) -> tuple[Filters, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    filters = Filters(torch.randn(targets, rest, generator=generator) + 0.3, torch.randn(targets, generator=generator))
    mean = torch.randn(targets, generator=generator, dtype=torch.float64)
    deviation = torch.rand(targets, generator=generator, dtype=torch.float64) + 0.2
    return filters, mean, deviation


def rounded(filters: Filters, step: float = 0.5) -> Filters:
    return Filters((filters.weight / step).round() * step, filters.bias)


def test_moments_against_sampled_numbers() -> None:
    mean, deviation = np.array([0.0, 1.0]), np.array([1.0, 2.0])
    assert rectified_mean(mean, deviation).tolist() == pytest.approx([0.3989, 1.3956], abs=1e-4)
    assert rectified_square(mean, deviation).tolist() == pytest.approx([0.5, 4.1614], abs=1e-4)
    assert product(0, 1, 0, 1, 0.5) == pytest.approx(0.3045, abs=1e-3)
    assert product(0.3, 1, -0.5, 2, 0.4) == pytest.approx(0.5466, abs=1e-3)
    assert product(1, 0.5, 0.2, 1, -0.7) == pytest.approx(0.3130, abs=1e-3)


def test_the_arc_cosine_kernel() -> None:
    """Without means: (sin t + (pi - t) cos t) / 2 pi, t the angle (Cho and Saul 2009)."""
    rho = np.linspace(-0.999, 0.999, 401)
    angle = np.arccos(rho)
    expected = (np.sin(angle) + (np.pi - angle) * rho) / (2 * np.pi)
    zero, one = np.zeros_like(rho), np.ones_like(rho)
    np.testing.assert_allclose(rectified_product(zero, one, zero, one, rho), expected, atol=1e-14)


def test_moments_against_quadrature() -> None:
    """E[y1+ E[y2+ | y1]] on a grid, an independent way."""
    random = np.random.default_rng(0)
    m1, m2 = random.normal(0, 1.5, (2, 200))
    s1, s2 = random.uniform(0.05, 2, (2, 200))
    rho = random.uniform(-0.99, 0.99, 200)
    z = np.linspace(np.maximum(-m1 / s1, -12), np.maximum(-m1 / s1, -12) + 24, 40001)  # [grid, pairs], from the kink on
    inner = rectified_mean(m2 + s2 * rho * z, s2 * np.sqrt(1 - rho**2) + 0 * z)
    values = np.maximum(m1 + s1 * z, 0) * inner * np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)
    np.testing.assert_allclose(rectified_product(m1, s1, m2, s2, rho), np.trapezoid(values, z, axis=0), atol=2e-7)


@pytest.mark.parametrize(
    "m1, s1, m2, s2", [(0.3, 1, 0.3, 1), (-1, 2, 0.5, 0.1), (0, 1, 0, 3), (0, 1, -2, 1), (5, 1, 0, 1)]
)
def test_moments_at_the_ends_of_correlation(m1: float, s1: float, m2: float, s2: float) -> None:
    z = np.linspace(-12, 12, 400001)
    weight = np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)
    for sign in (1, -1):
        expected = np.trapezoid(np.maximum(m1 + s1 * z, 0) * np.maximum(m2 + sign * s2 * z, 0) * weight, z)
        for short in (0, 1e-16, 1e-13, 1e-12):
            assert product(m1, s1, m2, s2, sign * (1 - short)) == pytest.approx(expected, abs=1e-8)
    assert product(0.3, 1, 0.3, 1, 1) == pytest.approx(float(rectified_square(np.array(0.3), np.array(1.0))), abs=1e-10)


def test_moments_of_constants() -> None:
    other = float(rectified_mean(np.array(-0.4), np.array(0.7)))
    assert product(2, 0, -0.4, 0.7, 0.3) == pytest.approx(2 * other)
    assert product(-0.4, 0.7, 2, 0, 0.9) == pytest.approx(2 * other)
    assert product(-2, 0, -0.4, 0.7, 0.3) == 0 and product(2, 0, 3, 0, 0) == 6
    assert product(2, 1e-9, -0.4, 0.7, 0.3) == pytest.approx(2 * other, abs=1e-8)
    assert product(0, 1e-12, 0, 1, 0.5) == pytest.approx(0.3045e-12, rel=1e-3)
    assert product(1e6, 1, 1e6, 1, 0.5) == pytest.approx(1e12) and product(-1e6, 1, 3, 1, 0.5) == 0


def model(targets: int = 12, rest: int = 30, seed: int = 0, damage: bool = True) -> Gaussians:
    filters, mean, deviation = layer(targets, rest, seed)
    kept = torch.arange(0, targets, 2)
    damaged = rounded(filters[kept]) if damage else filters[kept]
    unit, own = (f.weight / f.squares.sqrt()[:, None] for f in (filters, damaged))
    return Gaussians(
        mean=mean,
        deviation=deviation,
        damaged_mean=mean[kept],
        damaged_deviation=deviation[kept] * (damaged.squares / filters[kept].squares).sqrt(),
        cosine=unit @ own.T,
        damaged_cosine=own @ own.T,
        kept=kept,
    )


@pytest.mark.parametrize("name", ["relu", "identity"])
def test_draws_agree_with_the_closed_form(name: str) -> None:
    """200 000 draws: within 0.02, four standard errors of the largest entries."""
    given = model()
    closed, function = (rectified, F.relu) if name == "relu" else (linear, lambda values: values)
    exact, drawn = closed(given), sampled(given, function, samples=200_000, seed=0)
    for part in ("cross", "gram", "squares"):
        torch.testing.assert_close(getattr(drawn, part), getattr(exact, part), atol=0.02, rtol=0.02)

    def lost(samples: int | None) -> float:
        matrix = ActivationSpace(activation=name, samples=samples).solve(given).matrix
        return float((exact.squares - 2 * (matrix * exact.cross).sum(1) + (matrix @ exact.gram * matrix).sum(1)).sum())

    assert lost(None) * (1 - 1e-3) < lost(200_000) < 1.002 * lost(None), "and the mixtures are as good"


@pytest.mark.parametrize("name", ["relu", "identity"])
def test_the_series_agrees_with_the_closed_form(name: str) -> None:
    given = model()
    closed, function = (rectified, F.relu) if name == "relu" else (linear, lambda values: values)
    exact, near = closed(given), expanded(given, function)
    for part in ("cross", "gram", "squares"):
        torch.testing.assert_close(getattr(near, part), getattr(exact, part), atol=5e-4, rtol=0)


@pytest.mark.parametrize("function", [F.silu, F.gelu, F.relu6, F.hardswish, torch.tanh, torch.exp])
def test_the_series_against_quadrature(function: Callable[[Tensor], Tensor]) -> None:
    """The plane by Gauss and Hermite, 80 by 80 nodes; exp by hand as well: E[e^y1 e^y2] of normals."""
    given = model(targets=6)
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    z, weight = torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())
    rho = given.cosine[..., None, None]
    first = given.mean[:, None, None, None] + given.deviation[:, None, None, None] * z[:, None]
    second = given.damaged_mean[:, None, None] + given.damaged_deviation[:, None, None] * (
        rho * z[:, None] + (1 - rho**2).sqrt() * z
    )
    expected = (function(first) * function(second) * weight[:, None] * weight).sum((-1, -2))
    found = expanded(given, function).cross
    torch.testing.assert_close(found, expected, atol=2e-3 if function in (F.relu6, F.hardswish) else 1e-6, rtol=1e-6)
    if function is torch.exp:
        pair = given.deviation[:, None] * given.damaged_deviation
        variance = given.deviation[:, None] ** 2 + given.damaged_deviation**2 + 2 * given.cosine * pair
        closed = torch.exp(given.mean[:, None] + given.damaged_mean + variance / 2)
        torch.testing.assert_close(found, closed, atol=1e-9, rtol=1e-9)


def test_draws_agree_with_the_series() -> None:
    """200 000 draws: within 0.02."""
    given = model()
    near, drawn = expanded(given, F.silu), sampled(given, F.silu, samples=200_000, seed=0)
    for part in ("cross", "gram", "squares"):
        torch.testing.assert_close(getattr(drawn, part), getattr(near, part), atol=0.02, rtol=0.02)


def test_draws_are_seeded() -> None:
    given = model()
    first, again, other = (ActivationSpace(samples=500, seed=seed).solve(given).matrix for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(
    "activation", ["relu", "relu6", "silu", "hardswish", "gelu", "identity", "tanh", lambda values: values.abs()]
)
def test_undamaged_channels_stay_to_the_bit(activation: str | Callable[[Tensor], Tensor]) -> None:
    filters, mean, deviation = layer(23, 11)
    kept = torch.randperm(23)[:9]
    block = ActivationSpace(activation=activation)
    mixing = block(filters, filters[kept], kept, mean=mean, deviation=deviation)
    assert torch.equal(mixing.matrix[kept], torch.eye(9, dtype=torch.float64))
    assert bool((mixing.after[kept] == 0).all()) and bool((mixing.after <= mixing.before).all())
    some = filters[kept]
    some.weight[0] *= 0.7
    mixing = block(filters, some, kept, mean=mean, deviation=deviation)
    assert torch.equal(mixing.matrix[kept[1:]], torch.eye(9, dtype=torch.float64)[1:])


def test_a_damaged_norm_is_a_damaged_deviation() -> None:
    """Identity: means 0, so a filter scaled by 0.5 is undone by 2."""
    filters = Filters(torch.eye(2), torch.zeros(2))
    half = Filters(0.5 * torch.eye(2), torch.zeros(2))
    block = ActivationSpace(ridge=1e-13, activation="identity")
    mixing = block(filters, half, torch.arange(2), mean=torch.zeros(2), deviation=torch.ones(2))
    torch.testing.assert_close(mixing.matrix, 2 * torch.eye(2, dtype=torch.float64), atol=1e-10, rtol=0)


def test_the_solution_by_hand() -> None:
    """One kept, one removed, K = .3045 and .5, ridge 1e-3 of .5: m = .3045 / .5005, and .5 - .3045^2 / .5005 left."""
    filters = Filters(torch.tensor([[1.0, 0.0], [0.5, 0.75**0.5]], dtype=torch.float64), torch.zeros(2))
    kept = torch.tensor([0])
    mixing = ActivationSpace()(filters, filters[kept], kept, mean=torch.zeros(2), deviation=torch.ones(2))
    pair = (np.sin(np.pi / 3) + (np.pi - np.pi / 3) * 0.5) / (2 * np.pi)
    assert mixing.matrix[1].item() == pytest.approx(pair / 0.5005)
    assert mixing.after[1].item() == pytest.approx((0.5 - pair**2 / 0.5005) / 0.5)


def test_it_is_the_best_mixture_of_activations() -> None:
    """On draws of its own model: nearer than form A and than leaving out, and no perturbation helps."""
    filters, _, _ = layer(16, 12)
    deviation, mean = filters.squares.sqrt(), filters.bias
    kept = torch.arange(8)
    x = torch.randn(12, 200_000, dtype=torch.float64)
    whole = F.relu(filters.weight @ x + mean[:, None])
    second = ActivationSpace(ridge=1e-6)(filters, filters[kept], kept, mean=mean, deviation=deviation)
    first = FilterSpace()(filters, filters[kept], kept)

    def lost(matrix: Tensor) -> float:
        return float((whole - matrix @ whole[kept]).square().sum(0).mean())

    start = torch.zeros(16, 8, dtype=torch.float64)
    start[kept, kept] = 1
    assert lost(second.matrix) < 0.8 * min(lost(first.matrix), lost(start))
    predicted = float((second.after * second.squares).sum())
    assert lost(second.matrix) == pytest.approx(predicted, rel=0.02), "and the predicted error is the measured one"
    for seed in range(20):
        noise = torch.randn(16, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert lost(second.matrix + 0.1 * noise) > lost(second.matrix)


def test_permuted_channels_permute_the_mixture() -> None:
    filters, mean, deviation = layer(15, 40)
    kept = torch.tensor([1, 4, 9, 12, 14])
    damaged = rounded(filters[kept])
    order, inner = torch.randperm(15), torch.randperm(5)
    place = torch.empty_like(order)
    place[order] = torch.arange(15)
    first = ActivationSpace()(filters, damaged, kept, mean=mean, deviation=deviation)
    moved = ActivationSpace()(
        filters[order], damaged[inner], place[kept[inner]], mean=mean[order], deviation=deviation[order]
    )
    torch.testing.assert_close(moved.matrix, first.matrix[order][:, inner], atol=1e-10, rtol=0)


def test_non_negative_coefficients() -> None:
    filters, mean, deviation = layer(30, 10)
    kept = torch.arange(12)
    free, held = (
        ActivationSpace(non_negative=n)(filters, filters[kept], kept, mean=mean, deviation=deviation)
        for n in (False, True)
    )
    assert free.matrix.min() < 0 <= held.matrix.min()
    assert bool((held.after >= free.after - 1e-12).all()) and bool((held.after <= held.before + 1e-12).all())


def test_dead_and_constant_channels() -> None:
    """A zero filter is a constant; kept ones carry it, dead ones carry nothing."""
    filters, mean, deviation = layer(10, 6)
    filters.weight[2], filters.weight[5], filters.weight[7] = 0, 0, 0
    mean[2], mean[5], mean[7] = -1, 1.5, 0.7
    kept = torch.tensor([0, 1, 2, 3, 5])
    mixing = ActivationSpace(ridge=1e-9)(filters, filters[kept], kept, mean=mean, deviation=deviation)
    assert bool(mixing.matrix.isfinite().all())
    torch.testing.assert_close(mixing.matrix[7, 4].item(), 0.7 / 1.5, atol=1e-5, rtol=0)
    assert mixing.after[7] < 1e-8
    assert bool((mixing.matrix[[4, 6, 7, 8, 9], 2] == 0).all()), "nothing is taken from a channel that is always zero"
    off = ActivationSpace()(filters, filters[kept], kept, mean=mean - 1e9, deviation=deviation)
    assert off.matrix.count_nonzero() == 5 and "ever passes" in off.warnings[0]


def test_composites() -> None:
    (expand, _, _), (depthwise, mean, deviation) = layer(8, 5), layer(8, 9, seed=1)
    both = Composite(expand, depthwise)
    explicit = Filters(torch.einsum("nc,nk->nck", expand.weight, depthwise.weight), both.bias)
    kept = torch.arange(4)
    first, second = (
        ActivationSpace()(f, f[kept], kept, mean=mean, deviation=deviation).matrix for f in (both, explicit)
    )
    torch.testing.assert_close(first, second, atol=1e-11, rtol=0)


def test_negative_coefficients_of_the_identity_are_form_a() -> None:
    """Without a non-linearity and with means as biases of weight one, both forms are one."""
    filters, _, _ = layer(9, 20)
    kept = torch.arange(5)
    second = ActivationSpace(ridge=1e-12, activation="identity")(
        filters, filters[kept], kept, mean=filters.bias, deviation=filters.squares.sqrt()
    )
    first = FilterSpace(bias_weight=1, ridge=1e-12)(filters, filters[kept], kept)
    torch.testing.assert_close(first.matrix, second.matrix, atol=1e-9, rtol=0)
    assert mix(torch.ones(1, 9), second).shape == (1, 5)


def test_refusals() -> None:
    filters, mean, deviation = layer(4, 3)
    kept = torch.tensor([0, 1])
    given: dict[str, Any] = {"mean": mean, "deviation": deviation}
    with pytest.raises(UnknownNameError, match="relu6"):
        ActivationSpace(activation="relux")
    with pytest.raises(InputError, match="negative ridge"):
        ActivationSpace(ridge=-1)
    with pytest.raises(InputError, match="no draws"):
        ActivationSpace(samples=0)
    with pytest.raises(InputError, match="keep at least one"):
        ActivationSpace()(filters, filters[kept], torch.tensor([], dtype=torch.long), **given)
    with pytest.raises(InputError, match="one mean and one deviation"):
        ActivationSpace()(filters, filters[kept], kept, mean=mean[:3], deviation=deviation)
    with pytest.raises(InputError, match="negative deviation"):
        ActivationSpace()(filters, filters[kept], kept, mean=mean, deviation=-deviation)
    with pytest.raises(NotFiniteError, match="mean"):
        ActivationSpace()(filters, filters[kept], kept, mean=mean / 0, deviation=deviation)
    with pytest.raises(NotFiniteError, match="activation"):
        ActivationSpace(activation=torch.log)(filters, filters[kept], kept, **given)
    three, apart = torch.arange(3), 2 * torch.eye(3) - 1  # each the opposite of both others
    wrong = Gaussians(mean[:3], deviation[:3], mean[:3], deviation[:3], apart, apart, three)
    with pytest.raises(InputError, match="no vectors have"):
        ActivationSpace(samples=10).solve(wrong)
    with pytest.raises(InputError, match="cosine beyond 1"):
        Gaussians(mean[:3], deviation[:3], mean[:3], deviation[:3], 2 * apart, apart, three)
    with pytest.raises(InputError, match="of shape"):
        Gaussians(mean[:2], deviation, mean[:2], deviation[:2], torch.eye(2), torch.eye(2), kept)
