"""Inputs fitted to batch-norm variances: what is put in comes out."""

import pytest
import torch
from torch import Tensor

from niwaki.repair.coloured import Coloured
from niwaki.repair.filters import Filters
from niwaki.repair.inputs import NEIGHBOURS, fitted_inputs


def filters(outputs: int, inputs: int, *kernel: int, seed: int = 0) -> Tensor:
    return torch.randn(outputs, inputs, *kernel, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def variance_of(weight: Tensor, scales: Tensor, neighbours: float) -> Tensor:
    rows = Filters(weight, torch.zeros(len(weight)))
    return Coloured(rows, scales, tuple(weight.shape[2:]), neighbours).squares


@pytest.mark.parametrize("neighbours", NEIGHBOURS)
def test_the_correlation_of_places_is_found(neighbours: float) -> None:
    weight = filters(24, 6, 3, 3)
    found, scales = fitted_inputs(weight, 7 * variance_of(weight, torch.ones(6), neighbours))
    assert found == neighbours
    assert torch.allclose(scales, torch.ones(6, dtype=torch.float64), atol=1e-6)


def test_variances_of_inputs_are_found_where_there_are_equations_enough() -> None:
    weight, true = filters(400, 4), torch.tensor([0.25, 0.5, 1.0, 2.25], dtype=torch.float64)
    neighbours, scales = fitted_inputs(weight, variance_of(weight, true, 0.0))
    assert neighbours == 0
    assert torch.allclose(scales / scales.mean(), true / true.mean(), rtol=0.02)


def test_variances_are_a_covariance_without_the_rest() -> None:
    rows, scales = Filters(filters(5, 3, 2, 2), torch.zeros(5)), torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    one, other = (Coloured(rows, given, (2, 2), 0.6) for given in (scales, scales.diag()))
    assert torch.allclose(one.dot(one), other.dot(other), rtol=1e-6)
    assert float(Coloured(rows, scales, (2, 2), 0.0).squares[0]) == pytest.approx(
        float((rows.weight[0].reshape(3, 4).square().sum(1) * scales).sum())
    )


def test_by_hand() -> None:
    """Input 0 alone gives 1, input 1 alone 4; the level is the median, of two the lower: 1.

    With r = (1, 1/4) the shares at that level, the variances minimise (r s - 1)^2 + 0.1 (s - 1)^2, so
    s = (r + 0.1) / (r^2 + 0.1).
    """
    _, scales = fitted_inputs(torch.eye(2, dtype=torch.float64), torch.tensor([1.0, 4.0], dtype=torch.float64))
    assert scales.tolist() == pytest.approx([1.0, 0.35 / 0.1625])


def test_dead_layers_and_inputs() -> None:
    neighbours, scales = fitted_inputs(torch.zeros(3, 2, 3, 3), torch.zeros(3))
    assert scales.tolist() == [1.0, 1.0] and neighbours == 0
    weight = filters(8, 3)
    weight[:, 1] = 0
    _, scales = fitted_inputs(weight, variance_of(weight, torch.ones(3), 0.0))
    assert bool(torch.isfinite(scales).all()) and bool((scales > 0).all())
