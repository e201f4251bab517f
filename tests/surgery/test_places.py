"""Positions named by numbers, where a single one is left and labels can't tell."""

import numpy as np
import pytest
import torch
from planned import keeping
from torch import Tensor, nn

import niwaki
from niwaki.surgery import surgery_of
from niwaki.surgery.evidence import Sizes
from niwaki.surgery.places import moved


def test_positions_move_up_by_what_is_gone_before_them() -> None:
    sizes = Sizes(np.array([True, False, True, True, False]))
    labels = np.arange(5).reshape(5, 1)
    assert moved(labels, np.array([1, 2, 3]), sizes, 3).tolist() == [1, 2]
    assert moved(labels, np.array([0, 4]), sizes, 3).tolist() == [0]


def test_rows_that_keep_other_columns_lie_in_the_same_places() -> None:
    """Two rows of three columns and one position that both have: one keeps the first and the last, the other the last
    two. Three are left of each; of the first two positions the rows keep one each, of the last three two and three."""
    sizes = Sizes(np.array([True, False, True, False, True, True, True]))
    labels = np.array([[0, 3], [1, 4], [2, 5], [6, 6]])
    assert moved(labels, np.arange(3), sizes, 3).tolist() == [0, 1]
    assert moved(labels, np.array([3]), sizes, 3).tolist() == [2]
    assert moved(labels, np.array([0, 1]), sizes, 3).tolist() == [0]
    assert moved(labels, np.array([1, 2, 3]), sizes, 3).tolist() == [-1]  # two and three of them
    assert moved(labels, np.array([2]), sizes, 3).tolist() == [1]


def test_rows_are_left_by_their_columns_together() -> None:
    """Of three rows the second goes; of the others each keeps another column."""
    sizes = Sizes(np.array([True, False, False, False, False, True]))
    assert moved(np.arange(6).reshape(3, 2), np.array([1, 2]), sizes, 2).tolist() == [1]


class Placed(nn.Module):
    """Channels written between two others; where they begin and what lies behind them are numbers of the module's."""

    def __init__(self, *, padded: bool) -> None:
        super().__init__()
        self.conv, self.mix, self.out = nn.Conv2d(3, 4, 1), nn.Conv2d(8, 8, 1, groups=8), nn.Conv2d(8, 2, 1)
        self.front, self.back, self.padded = 2, 2, padded

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.padded:
            return self.out(self.mix(nn.functional.pad(y, (0, 0, 0, 0, self.front, self.back))))
        whole = x.new_zeros(x.shape[0], self.front + y.shape[1] + self.back, *x.shape[2:])
        whole[:, self.front : self.front + y.shape[1]] = y
        return self.out(self.mix(whole))


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("behind", [(0, 1, 6), (0, 6, 7), (6, 7), (0, 1)])
def test_a_single_channel_lies_where_it_lay(padded: bool, behind: tuple[int, ...]) -> None:
    """Of the four in the middle the first stays, third of all; of the four around those that `behind` says."""
    torch.manual_seed(0)
    model, x = Placed(padded=padded).double().eval(), torch.randn(2, 3, 4, 4, dtype=torch.double)
    plan = keeping(model, x, {"mix": [2, *behind]})
    small = niwaki.cut(model, plan)
    assert surgery_of(small).door == "eager"  # the numbers of the module follow
    assert tuple(small.mix.weight.shape) == (1 + len(behind), 1, 1, 1)
    receipt = niwaki.verify(model, small, plan, x)
    assert receipt.exact and receipt.difference < 1e-12, receipt


class Ones(nn.Module):
    """Heads of three columns each, with a column of ones behind them, which the last layer reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.out, self.heads, self.size = nn.Linear(3, 6), nn.Linear(8, 2), 2, 3

    def forward(self, x: Tensor) -> Tensor:
        y = self.wide(x).view(-1, self.heads, self.size)
        return self.out(nn.functional.pad(y, (0, 1), value=1.0).flatten(1))


@pytest.mark.parametrize("kept", [[0, 1, 4, 5], [0, 2, 3, 5], [1, 3]])
def test_a_column_behind_rows_that_keep_others_each(kept: list[int]) -> None:
    torch.manual_seed(0)
    model, x = Ones().double().eval(), torch.randn(2, 3, dtype=torch.double)
    small = niwaki.cut(model, plan := keeping(model, x, {"wide": kept}))
    assert surgery_of(small).door == "eager"
    receipt = niwaki.verify(model, small, plan, x)
    assert receipt.exact and receipt.difference < 1e-12, receipt
