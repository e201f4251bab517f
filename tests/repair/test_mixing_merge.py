"""One-to-one merges: done right, and as published.

Source: Kim et al. 2020, "Neuron Merging" (NeurIPS). The numbers are worked by hand.
"""

import pytest
import torch
from torch import Tensor

from niwaki.errors import InputError
from niwaki.repair import Composite, Filters, Merge, NeuronMerging, folded


def numbers(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


FIRST_TWO = torch.tensor([0, 1])


def test_the_nearest_partner_and_its_scale() -> None:
    """|(3, 4)| / |(0, 2)| = 2.5; what is left is 9 of 25, and (-1, -1) is like nobody."""
    target = Filters(numbers((1, 0), (0, 2), (3, 4), (-1, -1)), torch.zeros(4))
    mixing = Merge()(target, target[FIRST_TWO], FIRST_TWO)
    assert mixing.matrix.tolist() == [[1, 0], [0, 1], [0, 2.5], [0, 0]]
    # |(3, 4) - (0, 5)|^2 = 10
    assert mixing.after.tolist() == pytest.approx([0, 0, 10 / 25, 1]) and mixing.before.tolist() == [0, 0, 1, 1]
    assert mixing.condition is None and mixing.warnings == ()


def test_the_threshold_is_a_cosine() -> None:
    target = Filters(numbers((1, 0), (3, 4)), torch.zeros(2))
    kept = torch.tensor([0])
    assert Merge(threshold=0.59)(target, target[kept], kept).matrix[1].tolist() == [5]
    assert Merge(threshold=0.61)(target, target[kept], kept).matrix[1].tolist() == [0]


def test_the_bias_decides_between_equals() -> None:
    """Cosines are equal; scales 1: mismatches |0.5 - 2| and |0.5 - 1|."""
    target = Filters(numbers((1, 0), (0, 1), (0.5**0.5, 0.5**0.5)), numbers(2, 1, 0.5))
    assert Merge()(target, target[FIRST_TWO], FIRST_TWO).matrix[2].tolist() == pytest.approx([0, 1])
    nearer = Filters(numbers((1, 0), (0, 1), (0.8, 0.6)), numbers(2, 1, 0.5))
    assert Merge(balance=1)(nearer, nearer[FIRST_TWO], FIRST_TWO).matrix[2].tolist() == pytest.approx([1, 0])
    # 0.85 * 0.2 + 0.15 * 1 against 0.85 * 0.4 + 0
    assert Merge()(nearer, nearer[FIRST_TWO], FIRST_TWO).matrix[2].tolist() == pytest.approx([1, 0])
    assert Merge(balance=0.7)(nearer, nearer[FIRST_TWO], FIRST_TWO).matrix[2].tolist() == pytest.approx([0, 1])


def test_negative_norm_scales_turn_filters_round() -> None:
    """Raw filters are opposite, folded ones alike."""
    weight, gamma = numbers((1, 0), (-2, 0)), numbers(1, -1)
    norm = {"beta": torch.zeros(2), "mean": torch.zeros(2), "variance": torch.ones(2)}
    target = folded(weight, gamma=gamma, **norm, eps=0.0)
    kept = torch.tensor([0])
    assert Merge()(target, target[kept], kept).matrix[1].item() == 2
    assert NeuronMerging()(weight, kept, gamma=gamma, **norm).matrix[1].item() == 0


def test_dead_channels_are_nobodys_partner() -> None:
    target = Filters(numbers((0, 0), (0, 1), (1, 1), (0, 0)), torch.zeros(4))
    mixing = Merge()(target, target[FIRST_TWO], FIRST_TWO)
    assert mixing.matrix[2].tolist() == pytest.approx([0, 2**0.5]) and mixing.matrix[3].tolist() == [0, 0]
    only = Merge()(target, target[torch.tensor([0])], torch.tensor([0]))
    assert only.matrix[:, 0].tolist() == [1, 0, 0, 0]


def test_merging_is_positive_and_leaves_the_kept_alone() -> None:
    target = Filters(torch.randn(40, 30) + 0.2, torch.randn(40))
    kept = torch.randperm(40)[:15]
    mixing = Merge()(target, target[kept], kept)
    assert mixing.matrix.min() == 0 and bool(((mixing.matrix > 0).sum(1) <= 1).all())
    assert torch.equal(mixing.matrix[kept], torch.eye(15, dtype=torch.float64))
    gap = target.weight - mixing.matrix @ target[kept].weight
    torch.testing.assert_close(mixing.after * mixing.squares, gap.square().sum(1), atol=1e-11, rtol=0)


def test_composites_merge_too() -> None:
    expand, depthwise = Filters(torch.rand(6, 5), torch.randn(6)), Filters(torch.rand(6, 9), torch.randn(6))
    both = Composite(expand, depthwise)
    explicit = Filters(torch.einsum("nc,nk->nck", expand.weight, depthwise.weight), both.bias)
    first, second = (Merge()(filters, filters[FIRST_TWO], FIRST_TWO).matrix for filters in (both, explicit))
    torch.testing.assert_close(first, second, atol=1e-12, rtol=0)


PUBLISHED = {
    "gamma": numbers(2, 3),
    "beta": numbers(0, 0),
    "mean": numbers(0, 0),
    "variance": numbers(4, 16),
}


def test_the_published_scale_and_the_right_one() -> None:
    """|W| 1 and 2; right: 2 * (3 * 2) / (2 * 4) = 1.5; published: 2 * (2 * 16) / (3 * 4) = 16/3."""
    weight, kept = numbers((1, 0), (2, 0)), torch.tensor([0])
    literal = NeuronMerging()(weight, kept, **PUBLISHED)
    assert literal.matrix[:, 0].tolist() == pytest.approx([1, 16 / 3])
    target = folded(weight, **PUBLISHED, eps=0.0)
    right = Merge()(target, target[kept], kept)
    assert right.matrix[:, 0].tolist() == pytest.approx([1, 1.5])
    # the exact multiple loses nothing; the other one (16/3 - 1.5)^2 of the partner's square 1, whose own is 2.25
    assert right.after[1].item() == pytest.approx(0, abs=1e-14)
    literal = NeuronMerging()(weight, kept, **PUBLISHED, eps=0.0)
    assert literal.after[1].item() == pytest.approx((16 / 3 - 1.5) ** 2 / 2.25)


def test_they_agree_where_the_slips_do_not_show() -> None:
    """Equal gammas, variances of one, no biases."""
    weight = torch.randn(20, 3, 3, 3) + 0.3
    ones, zeros, kept = torch.ones(20), torch.zeros(20), torch.arange(8)
    norm = {"gamma": ones, "beta": zeros, "mean": zeros, "variance": ones}
    target = folded(weight, **norm, eps=0.0)
    torch.testing.assert_close(
        NeuronMerging()(weight, kept, **norm).matrix, Merge()(target, target[kept], kept).matrix, atol=1e-12, rtol=0
    )


def test_the_published_mismatch() -> None:
    """With balance 0 the mismatch alone decides: |1 (1 (0 - 1 * 3) - 0) + 3| = 0 and |1 (1 (0 - 3) - 0) + 1| = 2."""
    weight = numbers((1, 0), (0, 1), (0.5**0.5, 0.5**0.5))
    ones, zeros = torch.ones(3), torch.zeros(3)
    found = NeuronMerging(balance=0)(weight, FIRST_TWO, gamma=ones, beta=numbers(3, 1, 3), mean=zeros, variance=ones)
    assert found.matrix[2].tolist() == pytest.approx([1, 0])
    # variance 4 of the removed one: |1 (0 - 4 * 1) + 3| = 1 and |-4 + 4| = 0; its deviation would give 1 and 2
    found = NeuronMerging(balance=0)(
        weight, FIRST_TWO, gamma=ones, beta=numbers(3, 4, 1), mean=zeros, variance=numbers(1, 1, 4)
    )
    assert found.matrix[2].tolist() == pytest.approx([0, 4])


def test_a_zero_gamma_is_no_partner() -> None:
    weight, kept = numbers((1, 0), (0, 1), (1, 1)), FIRST_TWO
    norm = {"beta": torch.zeros(3), "mean": torch.zeros(3), "variance": torch.ones(3)}
    removed = NeuronMerging()(weight, kept, gamma=numbers(1, 1, 0), **norm)
    assert removed.matrix[2].tolist() == [0, 0] and bool(removed.after.isfinite().all())


def test_refusals() -> None:
    for block in (Merge, NeuronMerging):
        with pytest.raises(InputError, match="outside 0"):
            block(balance=1.5)
        with pytest.raises(InputError, match="outside 0"):
            block(threshold=-0.1)
    with pytest.raises(InputError, match="keep at least one"):
        NeuronMerging()(torch.ones(2, 2), torch.tensor([], dtype=torch.long), **PUBLISHED)
