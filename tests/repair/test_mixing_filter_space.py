"""Form A by numbers worked by hand, then what an optimum must satisfy.

Source of the closed form: UDFC, Bai et al. 2023, arXiv:2308.07209 (derived from its assumption).
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import nnls
from torch import Tensor

from niwaki.errors import InputError, NotFiniteError
from niwaki.repair import Composite, Diagonal, Filters, FilterSpace, InnerProducts, Mixing, folded, inner_products, mix


def numbers(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def layer(targets: int, rest: int, seed: int = 0) -> Filters:
    generator = torch.Generator().manual_seed(seed)
    return Filters(
        torch.randn(targets, rest, generator=generator, dtype=torch.float64),
        torch.randn(targets, generator=generator, dtype=torch.float64),
    )


def rounded(filters: Filters, step: float = 0.5) -> Filters:
    return replace(filters, weight=(filters.weight / step).round() * step)


def objective(mixture: Tensor, target: Filters, damaged: Filters, kept: Tensor, block: FilterSpace) -> Tensor:
    """The definition, for any stack of mixtures `[.., targets, kept]`."""
    start = torch.zeros(len(target), len(kept), dtype=torch.float64)
    start[kept, torch.arange(len(kept))] = 1
    gap = target.weight - mixture @ damaged.weight
    shift = target.bias - mixture @ damaged.bias
    return gap.square().sum(-1) + block.bias_weight * shift**2 + block.ridge * (mixture - start).square().sum(-1)


def lost(mixing: Mixing) -> Tensor:
    return mixing.after * mixing.squares


FIRST_TWO = torch.tensor([0, 1])


def test_a_duplicate_is_removed_without_loss() -> None:
    target = Filters(numbers((1, 0), (0, 1), (2, 0)), numbers(0.5, -0.2, 1))
    mixing = FilterSpace(ridge=1e-12)(target, target[FIRST_TWO], FIRST_TWO)
    torch.testing.assert_close(mixing.matrix[2], numbers(2, 0), atol=1e-10, rtol=0)
    reader = numbers((3, 4, 5))
    small = mix(reader, mixing)
    torch.testing.assert_close(small, numbers((13, 4)), atol=1e-10, rtol=0)
    activation = F.relu(target.weight @ numbers(1, 1) + target.bias)
    assert (reader @ activation).item() == pytest.approx(22.7, abs=1e-12)
    assert (small @ activation[:2]).item() == pytest.approx(22.7, abs=1e-9)


def test_the_ridge_by_hand() -> None:
    target = Filters(numbers((1, 0), (0, 1), (2, 1)), torch.zeros(3))
    block = FilterSpace(ridge=1)
    mixing = block(target, target[FIRST_TWO], FIRST_TWO)
    torch.testing.assert_close(mixing.matrix[2], numbers(1, 0.5), atol=1e-14, rtol=0)
    assert lost(mixing)[2].item() == pytest.approx(2.5, abs=1e-14)
    assert mixing.before[2] == 1 and mixing.after[2].item() == pytest.approx(0.5)
    beside = mixing.matrix.clone()
    beside[2, 0] = 1.1
    assert objective(beside, target, target[FIRST_TWO], FIRST_TWO, block)[2].item() == pytest.approx(2.52)


def test_the_bias_term_by_hand() -> None:
    target = Filters(numbers((1, 0), (0, 1), (1, 1)), numbers(1, 0, 3))
    block = FilterSpace(bias_weight=1, ridge=1e-13)
    mixing = block(target, target[FIRST_TWO], FIRST_TWO)
    torch.testing.assert_close(mixing.matrix[2], numbers(2, 1), atol=1e-11, rtol=0)
    assert lost(mixing)[2].item() == pytest.approx(2, abs=1e-10)
    beside = mixing.matrix.clone()
    beside[2, 0] = 1.9
    assert objective(beside, target, target[FIRST_TWO], FIRST_TWO, block)[2].item() == pytest.approx(2.02)


def test_folding_by_hand() -> None:
    filters = folded(numbers((3,)), gamma=numbers(2), beta=numbers(0.5), mean=numbers(1), variance=numbers(4), eps=0.0)
    assert filters.weight.item() == 3 and filters.bias.item() == -0.5


def test_folding_is_the_layer_and_its_norm() -> None:
    conv, norm = torch.nn.Conv2d(3, 5, 3), torch.nn.BatchNorm2d(5).eval()
    with torch.no_grad():
        for values in (norm.weight, norm.bias, norm.running_mean):
            values.normal_()
        norm.running_var.uniform_(0.5, 2)
        x = torch.randn(2, 3, 7, 7)
        filters = folded(
            conv.weight,
            conv.bias,
            gamma=norm.weight,
            beta=norm.bias,
            mean=norm.running_mean,
            variance=norm.running_var,
            eps=norm.eps,
        )
        ours = F.conv2d(x.double(), filters.weight.reshape(conv.weight.shape), filters.bias)
        torch.testing.assert_close(ours.float(), norm(conv(x)), atol=1e-5, rtol=1e-5)
    bare = folded(conv.weight, conv.bias)
    assert torch.equal(bare.weight.float(), conv.weight.detach().flatten(1))
    assert torch.equal(bare.bias.float(), conv.bias.detach())


def test_the_scale_by_hand() -> None:
    target, damaged = Filters(numbers((1, 0.4)), numbers(0)), Filters(numbers((1, 0.5)), numbers(0))
    mixing = Diagonal(bias_weight=0, ridge=0)(target, damaged, torch.tensor([0]))
    assert mixing.matrix.item() == pytest.approx(0.96, abs=1e-14)
    assert (mixing.before * mixing.squares).item() == pytest.approx(0.010, abs=1e-14)
    assert lost(mixing).item() == pytest.approx(0.008, abs=1e-14)


def test_scales_with_bias_and_ridge() -> None:
    target, kept = layer(7, 9), torch.tensor([5, 1, 2])
    damaged = rounded(target[kept])
    block = Diagonal(bias_weight=0.3, ridge=0.2)
    mixing = block(target, damaged, kept)
    for i, j in enumerate(kept.tolist()):
        v, w, b = damaged.weight[i], target.weight[j], target.bias[j]
        assert mixing.matrix[j, i].item() == pytest.approx(1 + float(v @ (w - v) / (v @ v + 0.3 * b * b + 0.2)))
    assert (mixing.matrix != 0).sum() == 3, "nothing is mixed"
    scales = FilterSpace(bias_weight=0.3, ridge=0.2)
    torch.testing.assert_close(
        lost(mixing)[kept], objective(mixing.matrix, target, damaged, kept, scales)[kept], atol=1e-12, rtol=0
    )
    dead = Filters(torch.zeros(1, 4), torch.zeros(1))
    assert Diagonal(ridge=0)(dead, dead, torch.tensor([0])).matrix.item() == 1


@pytest.mark.parametrize(
    "block", [FilterSpace(), FilterSpace(relative=True), FilterSpace(non_negative=True), Diagonal()]
)
@pytest.mark.parametrize("targets, rest", [(5, 3), (33, 57), (130, 41)])
def test_undamaged_channels_stay_to_the_bit(block: Any, targets: int, rest: int) -> None:
    target = layer(targets, rest, seed=targets)
    kept = torch.randperm(targets)[: targets // 2 + 1]
    mixing = block(target, target[kept], kept)
    assert torch.equal(mixing.matrix[kept], torch.eye(len(kept), dtype=torch.float64))
    assert bool((mixing.before[kept] == 0).all()) and bool((mixing.after[kept] == 0).all())
    some = target[kept]
    some.weight[0] += 0.25  # one is damaged: the others still stand for themselves
    mixing = block(target, some, kept)
    assert torch.equal(mixing.matrix[kept[1:]], torch.eye(len(kept), dtype=torch.float64)[1:])
    assert mixing.before[kept[0]] > mixing.after[kept[0]] > 0


def test_composite_filters_are_outer_products() -> None:
    expand, depthwise = layer(12, 20), layer(12, 9, seed=1)
    explicit = Filters(
        torch.einsum("nc,nk->nck", expand.weight, depthwise.weight),
        depthwise.bias + depthwise.weight.sum(1) * expand.bias,
    )
    kept = torch.tensor([3, 0, 7, 8, 11])
    damaged = Composite(rounded(expand[kept]), rounded(depthwise[kept]))
    long = Filters(
        torch.einsum("nc,nk->nck", damaged.expand.weight, damaged.depthwise.weight),
        damaged.depthwise.bias + damaged.depthwise.weight.sum(1) * damaged.expand.bias,
    )
    short, whole = inner_products(Composite(expand, depthwise), damaged, kept), inner_products(explicit, long, kept)
    for name in ("cross", "gram", "squares", "bias", "damaged_bias"):
        torch.testing.assert_close(getattr(short, name), getattr(whole, name), atol=1e-12, rtol=1e-12)
    assert short.rank == whole.rank == 180
    for block in (FilterSpace(), Diagonal()):
        ours, theirs = block(Composite(expand, depthwise), damaged, kept), block(explicit, long, kept)
        torch.testing.assert_close(ours.matrix, theirs.matrix, atol=1e-10, rtol=0)
        torch.testing.assert_close(ours.after, theirs.after, atol=1e-10, rtol=0)


def test_composite_is_the_two_layers_without_what_lies_between() -> None:
    expand, depthwise = layer(4, 6), layer(4, 9, seed=1)
    x = torch.randn(1, 6, 3, 3, dtype=torch.float64)
    inner = F.conv2d(x, expand.weight[:, :, None, None], expand.bias)
    outer = F.conv2d(inner, depthwise.weight.reshape(4, 1, 3, 3), depthwise.bias, groups=4)
    whole = Composite(expand, depthwise)
    filters = torch.einsum("nc,nk->nck", expand.weight, depthwise.weight).reshape(4, 6, 3, 3)
    torch.testing.assert_close(outer, F.conv2d(x, filters, whole.bias), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("block", [FilterSpace(), FilterSpace(1.0, 0.5), FilterSpace(ridge=1e-3)])
def test_no_perturbation_lowers_the_objective(block: FilterSpace) -> None:
    target, kept = layer(20, 30), torch.arange(0, 20, 2)
    damaged = rounded(target[kept])
    mixing = block(target, damaged, kept)
    least = objective(mixing.matrix, target, damaged, kept, block)
    torch.testing.assert_close(lost(mixing), least, atol=1e-11, rtol=0)
    size = torch.logspace(-6, 0, 1000, dtype=torch.float64)[:, None, None]
    around = mixing.matrix + size * torch.randn(1000, 20, 10, dtype=torch.float64)
    assert bool((objective(around, target, damaged, kept, block) >= least).all())


def test_the_error_falls_as_more_is_kept() -> None:
    target = layer(24, 16)
    order = torch.randperm(24)
    errors = torch.stack([lost(FilterSpace()(target, target[order[:n]], order[:n])) for n in range(1, 24)])
    for n in range(1, 23):
        removed = order[n + 1 :]
        assert bool((errors[n, removed] <= errors[n - 1, removed] + 1e-12).all())


def test_permuted_channels_permute_the_mixture() -> None:
    target, kept = layer(15, 40), torch.tensor([1, 4, 9, 12, 14])
    damaged = rounded(target[kept])
    order, inner = torch.randperm(15), torch.randperm(5)
    place = torch.empty_like(order)
    place[order] = torch.arange(15)
    for block in (FilterSpace(), FilterSpace(non_negative=True), Diagonal()):
        mixing = block(target, damaged, kept)
        moved = block(target[order], damaged[inner], place[kept[inner]])
        torch.testing.assert_close(moved.matrix, mixing.matrix[order][:, inner], atol=1e-11, rtol=0)


def test_scaling_a_filter_against_its_norm_changes_nothing() -> None:
    weight, kept = torch.randn(9, 3, 3, 3), torch.tensor([0, 2, 3, 8])
    norm = {"gamma": torch.randn(9), "beta": torch.randn(9)}
    mean, variance, factor = torch.randn(9), torch.rand(9) + 0.1, torch.rand(9) + 0.5
    plain = folded(weight, **norm, mean=mean, variance=variance, eps=0.0)
    scaled = folded(
        weight.double() * factor.double()[:, None, None, None],
        **norm,
        mean=mean.double() * factor.double(),
        variance=variance.double() * factor.double() ** 2,
        eps=0.0,
    )
    first, second = (FilterSpace()(filters, filters[kept], kept).matrix for filters in (plain, scaled))
    torch.testing.assert_close(first, second, atol=1e-10, rtol=0)


def test_repaired_inputs_of_the_next_layer_are_closer_without_a_non_linearity() -> None:
    target, kept = layer(12, 8), torch.arange(6)
    damaged = rounded(target[kept])
    mixing = FilterSpace(bias_weight=1, ridge=1e-6)(target, damaged, kept)
    x = torch.randn(8, 20000, dtype=torch.float64)
    whole = target.weight @ x + target.bias[:, None]
    part = damaged.weight @ x + damaged.bias[:, None]
    reader = torch.randn(5, 12, dtype=torch.float64)
    plain = (reader @ whole - reader[:, kept] @ part).square().mean()
    assert (reader @ whole - mix(reader, mixing) @ part).square().mean() < 0.7 * plain
    per_channel = (whole - mixing.matrix @ part).square().mean(1)
    assert bool((per_channel < (target.weight.square().sum(1) + target.bias**2) * 1.1).all())


def against_nnls(mixing: Mixing, products: InnerProducts, kept: Tensor, block: FilterSpace) -> None:
    """SciPy's solver as the referee, row by row."""
    bias, own = products.bias, products.damaged_bias
    gram = products.gram + block.bias_weight * torch.outer(own, own)
    ridge = block.ridge * (float(gram.diagonal().mean()) if block.relative else 1)
    gram = gram + ridge * torch.eye(len(kept), dtype=torch.float64)
    linear = products.cross + block.bias_weight * torch.outer(bias, own)
    linear[kept] += ridge * torch.eye(len(kept), dtype=torch.float64)
    root = np.linalg.cholesky(gram.numpy())
    expected = np.stack([nnls(root.T, np.linalg.solve(root, row))[0] for row in linear.numpy()])
    assert mixing.matrix.min() >= 0
    np.testing.assert_allclose(mixing.matrix.numpy(), expected, atol=1e-7)
    # optimality: no gradient where positive, none that asks for more where zero
    gradient = mixing.matrix @ gram - linear
    scale = linear.abs().max()
    assert float(gradient[mixing.matrix > 0].abs().max()) < 1e-9 * scale
    assert float(gradient.min()) > -1e-9 * scale
    assert not mixing.remarks or "badly" in mixing.remarks[0]


@pytest.mark.parametrize("rest", [6, 30, 200])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("damage", [False, True])
def test_non_negative_coefficients_reach_the_optimum(rest: int, relative: bool, damage: bool) -> None:
    target, kept = layer(40, rest, seed=rest), torch.arange(0, 40, 3)
    target.weight.add_(0.5)  # alike enough to mix
    damaged = rounded(target[kept], 0.7) if damage else target[kept]
    block = FilterSpace(relative=relative, non_negative=True)
    mixing = block(target, damaged, kept)
    against_nnls(mixing, inner_products(target, damaged, kept), kept, block)
    free = replace(block, non_negative=False)(target, damaged, kept)
    assert bool((mixing.after >= free.after - 1e-12).all()) and bool((mixing.after <= mixing.before + 1e-12).all())
    same = (free.matrix >= 0).all(1)
    assert torch.equal(mixing.matrix[same], free.matrix[same]), "nothing to change where A is not negative already"
    if not relative:
        torch.testing.assert_close(
            lost(mixing), objective(mixing.matrix, target, damaged, kept, block), atol=1e-9, rtol=0
        )


def test_non_negative_coefficients_of_many_channels_at_once() -> None:
    target, kept = layer(150, 60), torch.arange(0, 150, 2)
    target.weight.abs_()
    block = FilterSpace(non_negative=True)
    against_nnls(block(target, target[kept], kept), inner_products(target, target[kept], kept), kept, block)


def test_where_form_a_is_not_negative_it_is_both() -> None:
    target = Filters(numbers((1, 0), (0, 1), (2, 1)), torch.zeros(3))
    free, held = (FilterSpace(non_negative=n)(target, target[FIRST_TWO], FIRST_TWO) for n in (False, True))
    assert torch.equal(free.matrix, held.matrix)


def test_what_is_doubtful_is_said() -> None:
    wide = layer(30, 4)
    mixing = FilterSpace(ridge=1e-12)(wide, wide[torch.arange(12)], torch.arange(12))
    told = " | ".join(mixing.warnings)
    assert "badly posed: 12 kept channels, filters of 4 numbers" in told and "condition number" in told
    near = Filters(numbers((1, 0), (1, 0.01), (0, 1)), torch.zeros(3))
    mixing = FilterSpace(ridge=1e-9)(near, near[FIRST_TWO], FIRST_TWO)
    assert mixing.largest == pytest.approx(100, rel=0.01) and "largest coefficient" in " ".join(mixing.warnings)
    fine = layer(8, 40)
    assert FilterSpace()(fine, fine[FIRST_TWO], FIRST_TWO).warnings == ()


def test_the_condition_number_is_near_the_true_one() -> None:
    target, kept = layer(40, 60), torch.arange(30)
    gram = target[kept].weight @ target[kept].weight.T
    gram += 0.01 * torch.outer(target[kept].bias, target[kept].bias) + 0.008 * torch.eye(30)
    found = FilterSpace()(target, target[kept], kept).condition
    assert found is not None and 0.3 < found / float(torch.linalg.cond(gram, 1)) < 1.0001


def test_a_relative_ridge_is_a_share_of_the_diagonal() -> None:
    target, kept = layer(10, 20), torch.arange(5)
    level = float((target[kept].squares + 0.01 * target[kept].bias ** 2).mean())
    first = FilterSpace(ridge=0.1, relative=True)(target, target[kept], kept)
    second = FilterSpace(ridge=0.1 * level)(target, target[kept], kept)
    torch.testing.assert_close(first.matrix, second.matrix, atol=1e-12, rtol=0)


def test_any_precision_is_computed_in_double() -> None:
    weight, bias = torch.randn(6, 5, 3, 3).half(), torch.randn(6).half()
    kept = torch.arange(3)
    half, double = Filters(weight, bias), Filters(weight.double(), bias.double())
    first, second = (FilterSpace()(filters, filters[kept], kept) for filters in (half, double))
    assert first.matrix.dtype == torch.float64 and torch.equal(first.matrix, second.matrix)


@pytest.mark.parametrize(
    "block", [FilterSpace(), FilterSpace(relative=True), FilterSpace(non_negative=True), Diagonal()]
)
def test_a_layer_of_zeros_and_very_large_or_small_numbers(block: Any) -> None:
    zeros, kept = Filters(torch.zeros(4, 5), torch.zeros(4)), torch.arange(2)
    found = block(zeros, zeros[kept], kept)
    assert found.largest == 1 and bool((found.after == 0).all()) and not found.warnings
    for scale in (1e-60, 1e60):
        target = Filters(torch.randn(6, 9).double() * scale, torch.randn(6).double() * scale)
        found = block(target, rounded(target[kept], 0.5 * scale), kept)
        assert bool(found.matrix.isfinite().all()) and bool((found.after <= found.before * (1 + 1e-9)).all())


def test_refusals() -> None:
    target = layer(4, 3)
    with pytest.raises(InputError, match="keep at least one channel"):
        FilterSpace()(target, target[torch.tensor([0])], torch.tensor([], dtype=torch.long))
    with pytest.raises(InputError, match="at least one filter"):
        Filters(torch.zeros(0, 3), torch.zeros(0))
    with pytest.raises(InputError, match="one bias per filter"):
        Filters(torch.zeros(2, 3), torch.zeros(3))
    with pytest.raises(NotFiniteError, match="weight, channel 1"):
        Filters(numbers((1, 0), (float("nan"), 0)), torch.zeros(2))
    with pytest.raises(InputError, match="distinct numbers from 0 to 3"):
        FilterSpace()(target, target[torch.tensor([0, 0])], torch.tensor([0, 0]))
    with pytest.raises(InputError, match="distinct numbers from 0 to 3"):
        FilterSpace()(target, target[torch.tensor([0])], torch.tensor([4]))
    with pytest.raises(InputError, match="2 numbers, 1 damaged"):
        FilterSpace()(target, target[torch.tensor([0])], FIRST_TWO)
    with pytest.raises(InputError, match="give their numbers"):
        FilterSpace()(target, target[FIRST_TWO], torch.tensor([True, True]))
    twice = Filters(numbers((1, 0), (1, 0), (0, 1)), torch.zeros(3))
    with pytest.raises(InputError, match="raise the ridge"):
        FilterSpace(ridge=0)(twice, twice[FIRST_TWO], FIRST_TWO)
    with pytest.raises(InputError, match="negative weight"):
        FilterSpace(ridge=-1)
    with pytest.raises(InputError, match="negative weight"):
        Diagonal(bias_weight=-1)
    with pytest.raises(InputError, match="both or neither"):
        folded(torch.ones(1, 1), mean=torch.zeros(1))
    with pytest.raises(InputError, match="variance -1"):
        folded(torch.ones(1, 1), mean=torch.zeros(1), variance=-torch.ones(1))
    with pytest.raises(InputError, match="3 and 4 filters"):
        Composite(layer(3, 2), layer(4, 2))
    with pytest.raises(InputError, match=r"gram of shape \[2, 2\]"):
        InnerProducts(torch.zeros(3, 2), torch.zeros(3, 3), torch.zeros(3), torch.zeros(3), torch.zeros(2))
