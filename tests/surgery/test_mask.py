"""Masking by hand: what is zeroed, what is not."""

import pytest
import torch
from planned import Heads, keeping, mlp
from torch import nn

import niwaki

X = torch.tensor([[1.0, 2.0]])


def test_by_hand() -> None:
    """Without hidden unit 1: its row, its bias and the column that reads it are zero; the output is that of the cut."""
    model = mlp()
    masked = niwaki.mask(model, keeping(model, X, {"0": [0, 2]}))
    assert masked[0].weight.tolist() == [[1, 2], [0, 0], [0, -1]] and masked[0].bias.tolist() == [1, 0, 2]
    assert masked[2].weight.tolist() == [[1, 0, 100], [0, 0, -1]] and masked[2].bias.tolist() == [5, 0]
    assert masked(X).tolist() == [[11.0, 0.0]]
    assert model(X).tolist() == [[41.0, 0.0]]


def test_shapes_modes_flags_and_buffers_stay() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)).train()
    model[0].weight.requires_grad_(False)
    with torch.no_grad():
        model[1].running_mean.fill_(3.0)
    masked = niwaki.mask(model, keeping(model, torch.zeros(1, 1, 2, 2), {"0": [1]}))
    assert [p.shape for p in masked.parameters()] == [p.shape for p in model.parameters()]
    assert masked.training and [p.requires_grad for p in masked.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]
    assert masked[1].running_mean.tolist() == [3.0] * 4 and masked[1].weight.tolist() == [0, 1, 0, 0]


def test_blocks_of_grouped_convolutions() -> None:
    """[4, 2] in 2 groups: input channel 1 (group 0, place 1) and 2 (group 1, place 0) go."""
    model = nn.Sequential(
        nn.Conv2d(1, 4, 1, bias=False), nn.Conv2d(4, 4, 1, groups=2, bias=False), nn.Conv2d(4, 1, 1, bias=False)
    )
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(torch.arange(1.0, layer.weight.numel() + 1).reshape(layer.weight.shape))
    masked = niwaki.mask(model, keeping(model, torch.zeros(1, 1, 2, 2), {"0": [0, 3]}))
    assert masked[0].weight.flatten().tolist() == [1, 0, 0, 4]
    assert masked[1].weight.flatten(1).tolist() == [[1, 0], [3, 0], [0, 6], [0, 8]]


def test_tied_parameters_are_masked_once() -> None:
    model = nn.Sequential(
        nn.Linear(2, 4, bias=False),
        nn.Linear(4, 4, bias=False),
        nn.Linear(4, 4, bias=False),
        nn.Linear(4, 1, bias=False),
    )
    model[2].weight = model[1].weight
    masked = niwaki.mask(model, keeping(model, X, {"0": [0, 1]}))
    assert masked[2].weight is masked[1].weight
    assert (masked[1].weight != 0).tolist() == [[True, True, False, False]] * 2 + [[False] * 4] * 2


def test_attention_keeps_the_scale_of_the_original_head() -> None:
    """Two of four columns of each head: shapes stay, so the scale is still 1 / sqrt(4)."""
    model, x = Heads().eval(), torch.randn(1, 5, 3)
    plan = keeping(model, x, {"q": [0, 1, 4, 6]})
    masked, small = niwaki.mask(model, plan), niwaki.cut(model, plan)
    assert masked.q.weight.shape == (8, 3) and small.q.weight.shape == (4, 3)
    assert torch.allclose(masked(x), small(x), atol=1e-6)


def test_nothing_to_mask() -> None:
    model = mlp()
    assert torch.equal(niwaki.mask(model, keeping(model, X, {}))(X), model(X))


def test_another_model_is_refused() -> None:
    plan = keeping(mlp(), X, {"0": [0, 2]})
    with pytest.raises(niwaki.errors.PlanMismatchError, match="apply a plan made for Sequential"):
        niwaki.mask(nn.Sequential(nn.Linear(2, 3)), plan)
