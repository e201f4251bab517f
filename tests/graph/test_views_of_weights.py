"""Tensors that are views of others: they are left whole, and what shares no number is not."""

import pytest
import torch
from torch import Tensor, nn

import niwaki


class Viewed(nn.Module):
    """Eight units, of whose weights a second tensor holds some rows: registered, or as a plain attribute."""

    def __init__(self, held: str) -> None:
        super().__init__()
        self.wide, self.out = nn.Linear(3, 8), nn.Linear(8, 2)
        rows = self.wide.weight.detach()[2:6]
        if held == "attribute":
            self.rows = rows
        elif held == "buffer":
            self.register_buffer("rows", rows)
        elif held == "bias":  # one memory, cut in two
            both = torch.randn(8 * 3 + 8)
            self.wide.weight, self.wide.bias = nn.Parameter(both[:24].view(8, 3)), nn.Parameter(both[24:])
            self.rows = torch.ones(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.wide(x).relu()) + (x @ self.rows.t()).sum(1, keepdim=True)


@pytest.mark.parametrize(("held", "name"), [("attribute", "a tensor of its module"), ("buffer", "rows")])
def test_a_weight_of_which_a_view_is_held_is_left_whole(held: str, name: str) -> None:
    graph = niwaki.trace(Viewed(held).eval(), torch.zeros(1, 3))
    fixed = {group.name: group.fixed for group in graph.groups}
    assert fixed["wide"] == f"its memory is also that of {name} (4, 3)"


def test_weights_that_lie_side_by_side_in_one_memory_are_cut() -> None:
    graph = niwaki.trace(Viewed("bias").eval(), torch.zeros(1, 3))
    assert {group.name: group.fixed for group in graph.groups}["wide"] is None
