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
    assert moved(labels, np.array([1, 2, 3]), sizes).tolist() == [1, 2]
    assert moved(labels, np.array([0, 4]), sizes).tolist() == [0]


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
