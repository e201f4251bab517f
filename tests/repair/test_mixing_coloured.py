"""Filters over inputs that go together: inner products are covariances of outputs."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from niwaki.errors import InputError
from niwaki.repair import ActivationSpace, Coloured, Composite, Filters, FilterSpace, Merge, inner_products


def numbers(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def covariance(channels: int, seed: int = 0) -> Tensor:
    half = torch.randn(channels, 2 * channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return half @ half.T / channels


def test_by_hand() -> None:
    """(1, 0) and (0, 1) over [[1, .5], [.5, 2]]; and over two positions that correlate by a quarter."""
    unit = Filters(torch.eye(2), torch.zeros(2))
    channels = Coloured(unit, numbers((1, 0.5), (0.5, 2)))
    torch.testing.assert_close(channels.dot(channels), numbers((1, 0.5), (0.5, 2)), atol=1e-8, rtol=0)
    positions = Coloured(unit, size=(2,), neighbours=0.25)
    torch.testing.assert_close(positions.dot(positions), numbers((1, 0.25), (0.25, 1)), atol=1e-8, rtol=0)
    square = Filters(torch.eye(4), torch.zeros(4))
    corners = Coloured(square, size=(2, 2)).dot(Coloured(square, size=(2, 2)))[0]
    torch.testing.assert_close(corners, numbers(1, 0.5, 0.5, 0.5 ** (2**0.5)), atol=1e-8, rtol=0)


def test_white_inputs_change_nothing() -> None:
    plain = Filters(torch.randn(7, 12), torch.randn(7))
    white = Coloured(plain, torch.eye(3), size=(2, 2), neighbours=0)
    torch.testing.assert_close(white.dot(white), plain.dot(plain), atol=1e-7, rtol=0)
    torch.testing.assert_close(white.squares, plain.squares, atol=1e-7, rtol=0)
    assert torch.equal(white.bias, plain.bias) and torch.equal(white.sums, plain.sums) and white.rank == 12
    kept = torch.arange(3)
    first, second = (FilterSpace()(f, f[kept], kept).matrix for f in (plain, white))
    torch.testing.assert_close(first, second, atol=1e-6, rtol=0)


def inputs(between: Tensor, size: tuple[int, int], count: int) -> Tensor:
    """[count, channels, positions] with this covariance of channels and one half between neighbours."""
    places = torch.cartesian_prod(torch.arange(size[0]), torch.arange(size[1])).double()
    window = 0.5 ** (places[:, None] - places).square().sum(-1).sqrt()
    white = torch.randn(count, len(between), len(window), dtype=torch.float64)
    return torch.linalg.cholesky(between) @ white @ torch.linalg.cholesky(window).T


def test_inner_products_are_covariances_of_outputs() -> None:
    """200 000 windows: within 2 per cent of the largest."""
    between = covariance(3)
    filters = Filters(torch.randn(6, 3 * 6), torch.zeros(6))
    out = inputs(between, (2, 3), 200_000).flatten(1) @ filters.weight.T
    coloured = Coloured(filters, between, size=(2, 3))
    found = coloured.dot(coloured)
    torch.testing.assert_close(out.T @ out / len(out), found, atol=0.02 * float(found.max()), rtol=0)


def test_the_mixture_fits_inputs_of_this_colour() -> None:
    between = covariance(4, seed=1)
    filters = Filters(torch.randn(16, 4 * 4), torch.randn(16))
    x, kept = inputs(between, (2, 2), 100_000).flatten(1), torch.arange(8)
    out = F.relu(x @ filters.weight.T + filters.bias)
    coloured = Coloured(filters, between, size=(2, 2))
    deviation, block = coloured.squares.sqrt(), ActivationSpace(ridge=1e-6)
    errors = []
    for layer in (coloured, filters):
        mixing = block(layer, layer[kept], kept, mean=filters.bias, deviation=deviation)  # type: ignore[type-var]
        errors.append(float((out - out[:, kept] @ mixing.matrix.T).square().sum(1).mean()))
        if layer is coloured:
            assert errors[0] == pytest.approx(float((mixing.after * mixing.squares).sum()), rel=0.03)
    assert errors[0] < 0.95 * errors[1]
    activations = block.covariance(coloured, mean=filters.bias, deviation=deviation)
    torch.testing.assert_close(torch.cov(out.T), activations, atol=0.03 * float(activations.max()), rtol=0)


@pytest.mark.parametrize("block", [FilterSpace(), Merge()])
def test_undamaged_channels_stay_to_the_bit(block: FilterSpace | Merge) -> None:
    coloured = Coloured(Filters(torch.randn(33, 5 * 9), torch.randn(33)), covariance(5), size=(3, 3))
    kept = torch.randperm(33)[:17]
    assert torch.equal(block(coloured, coloured[kept], kept).matrix[kept], torch.eye(17, dtype=torch.float64))


def test_composites_of_coloured_layers() -> None:
    """The expanding layer sees channels, the depthwise one positions: together as one layer that sees both."""
    between = covariance(3)
    expand, depthwise = Filters(torch.randn(5, 3), torch.randn(5)), Filters(torch.randn(5, 9), torch.randn(5))
    both = Composite(Coloured(expand, between), Coloured(depthwise, size=(3, 3)))
    explicit = Filters(torch.einsum("nc,nk->nck", expand.weight, depthwise.weight), both.bias)
    whole, kept = Coloured(explicit, between, size=(3, 3)), torch.tensor([0, 3])
    first, second = inner_products(both, both[kept], kept), inner_products(whole, whole[kept], kept)
    torch.testing.assert_close(first.cross, second.cross, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(first.squares, second.squares, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(both.sums, whole.sums)


def test_covariances_of_other_activations() -> None:
    """Identity: the model's own covariance. Draws and series agree."""
    filters = Filters(torch.randn(4, 6), torch.randn(4))
    given = {"mean": filters.bias, "deviation": filters.squares.sqrt()}
    found = ActivationSpace(activation="identity").covariance(filters, **given)
    torch.testing.assert_close(found, filters.dot(filters), atol=1e-10, rtol=0)
    series = ActivationSpace(activation="silu").covariance(filters, **given)
    drawn = ActivationSpace(activation="silu", samples=100_000).covariance(filters, **given)
    torch.testing.assert_close(series, drawn, atol=0.03 * float(series.max()), rtol=0)


def test_a_dead_input_channel() -> None:
    between = covariance(3)
    between[1], between[:, 1] = 0, 0
    coloured = Coloured(Filters(torch.randn(4, 3), torch.zeros(4)), between)
    bare = Filters(coloured.filters.weight * numbers(1, 0, 1), torch.zeros(4))
    torch.testing.assert_close(coloured.dot(coloured), bare.weight @ between @ bare.weight.T, atol=1e-6, rtol=0)


def test_refusals() -> None:
    filters = Filters(torch.randn(4, 18), torch.zeros(4))
    with pytest.raises(InputError, match="covariance of the layer's input channels"):
        Coloured(filters, torch.eye(3), size=(3, 3))
    with pytest.raises(InputError, match="kernel's size"):
        Coloured(filters, size=(4, 4))
    with pytest.raises(InputError, match="0 to below 1"):
        Coloured(filters, size=(3, 3), neighbours=1.0)
    with pytest.raises(InputError, match="a covariance that is none"):
        Coloured(filters, -torch.eye(2), size=(3, 3))
