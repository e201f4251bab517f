"""The mixture goes into what reads the channels: any axis, runs of positions, any precision."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from niwaki.errors import InputError, NotFiniteError
from niwaki.repair import ActivationSpace, Filters, FilterSpace, Merge, Mixing, mix, untrained


def mixing(rows: list[list[float]], kept: list[int]) -> Mixing:
    matrix = torch.tensor(rows, dtype=torch.float64)
    zeros = torch.zeros(len(matrix))
    return Mixing(matrix, torch.tensor(kept), zeros, zeros, zeros + 1)


HAND = mixing([[1, 0], [2, 0.5], [0, 1]], [0, 2])


def test_a_row_by_hand() -> None:
    """(3, 4, 5) becomes 3 + 2 * 4 and 5 + 0.5 * 4."""
    assert mix(torch.tensor([[3.0, 4.0, 5.0]]), HAND).tolist() == [[11, 7]]
    assert HAND.largest == 2 and HAND.warnings == ()


def test_runs_of_positions_by_hand() -> None:
    """Two positions per channel: (3 30 | 4 40 | 5 50) becomes (11 110 | 7 70)."""
    row = torch.tensor([[3.0, 30, 4, 40, 5, 50]])
    assert mix(row, HAND, each=2).tolist() == [[11, 110, 7, 70]]
    assert mix(row.T, HAND, 0, each=2).T.tolist() == [[11, 110, 7, 70]]


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
@pytest.mark.parametrize("each", [1, 4])
def test_any_axis(axis: int, each: int) -> None:
    shape = [5, 2, 6]
    shape[axis] = 3 * each
    weight = torch.randn(shape, dtype=torch.float64)
    found = mix(weight, HAND, axis, each=each)
    parts = weight.unflatten(axis, (3, each)) if each > 1 else weight.unflatten(axis, (3, 1))
    at = axis if axis >= 0 else axis + 3
    parts = parts.movedim(at, 0)
    expected = torch.stack([sum(HAND.matrix[j, i] * parts[j] for j in range(3)) for i in range(2)])  # type: ignore[misc]
    torch.testing.assert_close(found, expected.movedim(0, at).flatten(at, at + 1), atol=1e-13, rtol=0)
    assert found.is_contiguous()


def test_flatten_before_a_linear_layer() -> None:
    target = Filters(torch.randn(4, 6), torch.randn(4))
    target.weight[3], target.bias[3] = 2 * target.weight[1], 2 * target.bias[1]
    kept = torch.tensor([0, 1, 2])
    found = FilterSpace(ridge=1e-12)(target, target[kept], kept)
    x = torch.randn(2, 6, 3, 3, dtype=torch.float64)
    maps = F.relu(F.conv2d(x, target.weight[:, :, None, None], target.bias))
    reader = torch.randn(5, 4 * 9, dtype=torch.float64)
    whole, part = maps.flatten(1) @ reader.T, maps[:, kept].flatten(1) @ mix(reader, found, each=9).T
    torch.testing.assert_close(whole, part, atol=1e-8, rtol=0)


@pytest.mark.parametrize("block", ["A", "A+", "B", "merge"])
def test_duplicates_go_without_loss_through_relu(block: str) -> None:
    conv, reader = torch.randn(5, 3, 3, 3, dtype=torch.float64), torch.randn(4, 5, 3, 3, dtype=torch.float64)
    bias = torch.randn(5, dtype=torch.float64)
    conv[4], bias[4] = 0.3 * conv[2], 0.3 * bias[2]
    target, kept = Filters(conv, bias), torch.tensor([0, 1, 2, 3])
    deviation = target.squares.sqrt()
    found = {
        "A": lambda: FilterSpace(ridge=1e-12)(target, target[kept], kept),
        "A+": lambda: FilterSpace(ridge=1e-12, non_negative=True)(target, target[kept], kept),
        "B": lambda: ActivationSpace(ridge=1e-10)(target, target[kept], kept, mean=bias, deviation=deviation),
        "merge": lambda: Merge()(target, target[kept], kept),
    }[block]()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)

    def network(channels: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(F.relu(F.conv2d(x, conv[channels], bias[channels], padding=1)), weight, padding=1)

    torch.testing.assert_close(network(torch.arange(5), reader), network(kept, mix(reader, found)), atol=1e-6, rtol=0)


def test_what_is_kept_undamaged_is_read_as_before() -> None:
    target, kept = Filters(torch.randn(6, 9), torch.randn(6)), torch.tensor([5, 0, 3])
    alone = FilterSpace()(target[kept], target[kept], torch.arange(3))
    weight = torch.randn(4, 3, 3, 3)
    assert torch.equal(mix(weight, alone), weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_precision_is_given_back(dtype: torch.dtype) -> None:
    weight = torch.randn(7, 3).to(dtype)
    found = mix(weight, HAND)
    assert found.dtype == dtype and torch.equal(found, (weight.double() @ HAND.matrix).to(dtype))


def test_refusals() -> None:
    with pytest.raises(InputError, match="axis of size 3"):
        mix(torch.zeros(2, 4), HAND)
    with pytest.raises(InputError, match="axis of size 3"):
        mix(torch.zeros(2, 3), HAND, 2)
    with pytest.raises(InputError, match="floating-point"):
        mix(torch.zeros(2, 3, dtype=torch.int8), HAND)
    with pytest.raises(NotFiniteError, match="in it"):
        mix(torch.full((2, 3), float("inf")), HAND)
    with pytest.raises(NotFiniteError, match="float16"):
        mix(torch.full((2, 3), 60000.0).half(), HAND)


def test_statistics_that_nobody_trained() -> None:
    norm = torch.nn.BatchNorm2d(4)
    assert norm.running_mean is not None and norm.running_var is not None
    assert untrained(norm.running_mean, norm.running_var)
    norm(torch.randn(8, 4, 3, 3))
    assert not untrained(norm.running_mean, norm.running_var)
