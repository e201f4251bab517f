"""Numbers that follow a width, and results that are swapped by one: the eager door does not let them through."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import niwaki
from niwaki.surgery.record import surgery_of


class Between(nn.Module):
    """Eight channels, to which `how` does something by their number."""

    def __init__(self, how: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.wide, self.out, self.how = nn.Linear(3, 8), nn.Linear(8, 2), how

    def forward(self, x: Tensor) -> Tensor:
        wide = self.wide(x)
        return self.out(self.how(wide, wide.shape[1]))


def halved(model: nn.Module, example: Any) -> tuple[nn.Module, niwaki.Plan]:
    graph = niwaki.trace(model, example)
    scores = niwaki.score(graph, niwaki.collect(model, graph, frozenset()), how=niwaki.scores.Magnitude(p=2))
    plan = niwaki.choose(graph, scores, niwaki.Budget(keep=0.5, of="units"))
    return niwaki.cut(model, plan), plan


BY_WIDTH: dict[str, Callable[[Tensor, int], Tensor]] = {
    "added": lambda x, n: x.relu() * (x + n),
    "power": lambda x, n: x.abs() ** (n / 4),
    "bounded": lambda x, n: x.clamp(max=n / 100),
    "filled": lambda x, n: x.masked_fill(x > 0, n),
    "full": lambda x, n: x * x.new_full((1, n), n).sin(),
    "table": lambda x, n: x * torch.arange(2 * n)[2 * n - 1 : 2 * n].sin(),
    "share of a sum": lambda x, n: torch.baddbmm(x[None], x[None, :, :1], x[None, :1], beta=1.0, alpha=n / 4)[0],
}


@pytest.mark.parametrize("how", BY_WIDTH.values(), ids=BY_WIDTH.keys())
def test_a_number_that_follows_the_width_stays_what_it_was(how: Callable[[Tensor, int], Tensor]) -> None:
    torch.manual_seed(0)
    model, example = Between(how).eval(), torch.randn(2, 3)
    small, plan = halved(model, example)
    assert surgery_of(small).door == "exported"
    report = niwaki.verify(model, small, plan, example)
    assert report.passed and report.difference < 1e-12
    assert sum(p.numel() for p in small.parameters()) == 4 * 4 + 2 * 5


def test_a_factor_that_follows_the_width_is_made_good_in_the_weights() -> None:
    model, example = Between(lambda x, n: x * n).eval(), torch.randn(2, 3)
    small, plan = halved(model, example)
    assert surgery_of(small).door == "eager"
    assert niwaki.verify(model, small, plan, example).difference < 1e-12


class Swapped(nn.Module):
    """Two tensors of one shape, of which the width of a layer says which goes where."""

    def __init__(self, *, inside: bool) -> None:
        super().__init__()
        self.wide, self.out, self.inside = nn.Linear(3, 8), nn.Linear(8, 3), inside

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = (x.sin(), y.sin()) if self.inside else (x, y)
        a, b = (a, b) if self.wide.out_features == 8 else (b, a)
        return self.out(self.wide(a)) + b


@pytest.mark.parametrize("inside", [False, True], ids=["inputs", "results"])
def test_tensors_that_are_swapped_by_a_width_are_seen(inside: bool) -> None:
    model, example = Swapped(inside=inside).eval(), (torch.randn(2, 3), torch.randn(2, 3))
    small, plan = halved(model, example)
    assert surgery_of(small).door == "exported"
    assert niwaki.verify(model, small, plan, example).difference < 1e-12


class Normed(nn.Module):
    """A norm over the channels of a grid, or, once they are fewer, over the rows too."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.out = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.wide(x)
        return self.out(nn.functional.layer_norm(x, x.shape[-1 if wide.shape[-1] == 8 else -2 :])[..., :1] * wide)


def test_a_norm_over_more_axes_is_seen() -> None:
    model, example = Normed().eval(), torch.randn(2, 5, 3)
    small, plan = halved(model, example)
    assert surgery_of(small).door == "exported"
    assert niwaki.verify(model, small, plan, example).difference < 1e-12


class Windows(nn.Module):
    """As many sums of halves as the width has pairs of channels: numbers that tensors alone are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.out, self.pairs = nn.Linear(3, 8), nn.Linear(8, 2), 4

    def forward(self, x: Tensor) -> Tensor:
        count = int(torch.div(12, self.pairs, rounding_mode="trunc"))
        wide = self.wide(x).view(-1, self.pairs, self.wide.out_features // self.pairs)
        return self.out(wide.flatten(1)) + x[:, :1].repeat(1, 2) * (count > 2)


def test_a_number_made_of_a_width_is_seen() -> None:
    model, example = Windows().eval(), torch.randn(2, 3)
    small, plan = halved(model, example)
    assert niwaki.verify(model, small, plan, example).difference < 1e-12
