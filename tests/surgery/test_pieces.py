"""What no shape tells: numbers of norm groups, and loops over pieces of a width that is cut."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import niwaki
from niwaki.surgery import check
from niwaki.surgery.record import surgery_of


class Between(nn.Module):
    """Twelve channels, something done to them, four outputs."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.groups, self.function = nn.Linear(5, 12), nn.Linear(12, 4), 3, function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self, F.gelu(self.first(x))))


def cut(
    function: Callable[[nn.Module, Tensor], Tensor], seed: int = 0, keep: float = 0.67
) -> tuple[str, niwaki.Plan, bool]:
    """Door, plan and verdict, of exact groups alone."""
    model, example = Between(function).double().eval(), torch.randn(2, 5, dtype=torch.float64)
    graph, how = niwaki.trace(model, example), niwaki.scores.Random(seed=seed)
    scores = niwaki.score(graph, niwaki.collect(model, graph, how.needs), how=how)
    budget, rank = niwaki.Budget(keep=keep, of="units"), niwaki.budgets.GlobalRank()
    plan = niwaki.choose(graph, scores, budget, how=rank, exact_only=True)
    small = niwaki.cut(model, plan)
    return surgery_of(small).door, plan, niwaki.verify(model, small, plan, example).passed


NORMS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "a number in forward": (lambda net, y: F.group_norm(y, 2), "exported"),
    "a number of the module": (lambda net, y: F.group_norm(y, net.groups), "eager"),
    "a number of the module, four axes": (
        lambda net, y: F.group_norm(y[..., None, None], net.groups)[..., 0, 0],
        "eager",
    ),
}


@pytest.mark.parametrize("name", NORMS)
def test_norm_groups_that_leave_are_counted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One group of six leaves, or one of four; as many groups as before, of what is left, would be other groups."""
    function, wanted = NORMS[name]
    keep = 0.5 if wanted == "exported" else 0.67
    door, plan, passed = cut(function, keep=keep)
    assert [len(kept) for kept in plan.kept.values()] == [round(12 * keep)] and door == wanted and passed
    if wanted == "exported":
        monkeypatch.setattr(check, "group_count", lambda record: None)
        door, _, passed = cut(function, keep=keep)
        assert door == "eager" and not passed, "nothing else would tell"


LOOPS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "split by size": lambda net, y: torch.cat([p * (i + 1) for i, p in enumerate(y.split(4, -1))], -1),
    "chunks": lambda net, y: torch.cat([p + i for i, p in enumerate(y.chunk(net.groups, -1))], -1) - 1,
    "slices": lambda net, y: torch.cat([y[..., i : i + 4] * (i + 1) for i in range(0, y.shape[-1], 4)], -1),
    "slices, the first bent": lambda net, y: torch.cat(
        [y[..., i : i + 4] if i else y[..., :4].relu() for i in range(0, y.shape[-1], 4)], -1
    ),
}


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("seed", range(3))
def test_loops_over_pieces_of_what_is_cut_do_what_they_did(name: str, seed: int) -> None:
    """Eight of twelve channels are two pieces of four, or three of other channels: an exported program keeps the three
    as they were (by chance, of the last plan, `chunk` does so itself).
    """
    door, plan, passed = cut(LOOPS[name], seed)
    assert passed and sum(map(len, plan.kept.values())) == 8
    assert door == ("eager" if (name, seed) == ("chunks", 2) else "exported")


def test_sums_and_products_may_be_made_of_other_calls() -> None:
    """Of a width of 1, einsum sums nothing and multiplies: that alone sends nobody through the other door."""

    class Few(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.last = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            left, right = self.left(x).tanh(), self.right(x).chunk(1, -1)[0].tanh()
            return self.last(torch.einsum("bi,bi,bj->bj", left, left, right))

    model, example = Few().double().eval(), torch.randn(2, 5, dtype=torch.float64)
    graph, how = niwaki.trace(model, example), niwaki.scores.Random()
    scores = niwaki.score(graph, niwaki.collect(model, graph, how.needs), how=how)
    plan = niwaki.choose(graph, scores, niwaki.Budget(keep=0.17, of="units"), how=niwaki.budgets.Uniform())
    small = niwaki.cut(model, plan)
    assert surgery_of(small).door == "eager" and small.left.out_features == small.right.out_features == 1
    assert niwaki.verify(model, small, plan, example).passed
