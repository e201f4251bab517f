"""Which modules may be left out whole, what that costs, and that it is what it says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import niwaki
from niwaki.graph.plans import plan_of
from zoo import named


class Add(nn.Module):
    """What comes in, plus a branch; then what a subclass makes of the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Any:
        return x + self.down(self.up(x).relu())


class Bent(Add):
    def forward(self, x: Tensor) -> Tensor:
        return (super().forward(x)).relu()


class Normed(Add):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class Subtracts(Add):
    def forward(self, x: Tensor) -> Tensor:
        return x - self.down(self.up(x))


class SubtractsFrom(Add):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x)) - x


class Biased(Add):
    """The branch puts out one half where its parameters are zero."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sigmoid(self.down(self.up(x)))


class WritesInput(Add):
    """Bends its input in place before the branch: what is added to is not what came in."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x.relu_()))


class WritesView(Add):
    def forward(self, x: Tensor) -> Tensor:
        x[:, :2] += 1
        return x + self.down(self.up(x))


class Doubles(Add):
    def forward(self, x: Tensor) -> Tensor:
        return x + x + self.down(self.up(x))


class Stack(nn.Module):
    def __init__(self, *blocks: nn.Module, between: Any = None) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = nn.Linear(3, 4), nn.ModuleList(blocks), nn.Linear(4, 2)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x if self.between is None else self.between(x))
        return self.head(x)


def names(model: nn.Module, **settings: Any) -> list[str]:
    return [group.name for group in niwaki.trace(model, torch.randn(5, 3), **settings).blocks]


@pytest.mark.parametrize("block", [Add, Subtracts])
def test_what_passes_its_input_is_a_block(block: type[nn.Module]) -> None:
    assert names(Stack(block(), block())) == ["block blocks.0", "block blocks.1"]


@pytest.mark.parametrize("block", [Normed, SubtractsFrom, Biased, WritesInput, WritesView, Doubles])
def test_what_changes_its_input_is_none(block: type[nn.Module]) -> None:
    assert names(Stack(block(), block())) == []


@pytest.mark.parametrize(
    ("between", "found"),
    [
        (None, [1]),  # the first sum's input has not been bent
        (torch.relu, [0, 1]),
        (lambda x: torch.relu(x).flip(1), [0, 1]),  # moved about, and still nothing below zero
        (torch.sigmoid, []),  # nothing below zero either, but only the same call is known to be idle
        (torch.tanh, []),
    ],
)
def test_a_bend_behind_the_sum_has_to_be_idle(between: Any, found: list[int]) -> None:
    """ReLU of what ReLU put out changes nothing; of anything else it may."""
    assert names(Stack(Bent(), Bent(), between=between)) == [f"block blocks.{i}" for i in found]


class Rounds(Add):
    """Adds, then rounds to so many decimals: an argument that is given by name alone."""

    def __init__(self, decimals: int) -> None:
        super().__init__()
        self.decimals = decimals

    def forward(self, x: Tensor) -> Tensor:
        return torch.round(super().forward(x), decimals=self.decimals)


def test_a_bend_is_idle_behind_the_very_same_one_only() -> None:
    assert names(Stack(Rounds(1), Rounds(1))) == ["block blocks.1"]
    assert names(Stack(Rounds(2), Rounds(1))) == []


def test_shared_and_protected_blocks_stay() -> None:
    once = Add()
    assert names(Stack(once, once)) == []
    first, second = Add(), Add()
    second.down.weight = first.down.weight
    assert names(Stack(first, second)) == []
    for protect in ("blocks.0", "blocks.0.up", "blocks.0.up.weight"):
        assert names(Stack(Add(), Add()), protect=[protect]) == ["block blocks.1"]


def test_what_is_used_outside_keeps_its_block() -> None:
    class Tapped(Stack):
        def forward(self, x: Tensor) -> Any:
            x = self.stem(x)
            first = self.blocks[0](x)
            return self.head(self.blocks[1](first)) + self.blocks[0].seen.sum()

    class Tells(Add):
        def forward(self, x: Tensor) -> Tensor:
            self.seen = self.up(x)
            return x + self.down(self.seen.relu())

    assert names(Tapped(Tells(), Add())) == ["block blocks.1"]


def test_costs_by_hand() -> None:
    """Linear 3-4, two blocks of 4-6-4, linear 4-2, one row: 12 + 2 x 48 + 8 MACs; 16 + 2 x (30 + 28) + 10 parameters;
    16 units of width, six of which go with each block."""
    model = Stack(Add(), Add())
    graph = niwaki.trace(model, torch.randn(1, 3))
    alive = torch.ones(graph.units.count, dtype=torch.bool).numpy()
    assert graph.cost(alive) == {"macs": 116, "params": 142, "units": 16}
    alive[graph.blocks[1].ids] = False
    plan = plan_of(graph, alive)
    assert {name: plan.promised[name] for name in ("macs", "params", "units")} == {
        "macs": 68,
        "params": 84,
        "units": 10,
    }
    assert dict(plan.dropped) == {"blocks.1": "tensor"} and not plan.kept
    gone = {cut["tensor"] for cut in plan.cuts}
    assert gone == {f"blocks.1.{part}" for part in ("up.weight", "up.bias", "down.weight", "down.bias")}
    assert all(cut["axis"] == 0 and cut["keep"] == [] for cut in plan.cuts)
    small = niwaki.cut(model, plan)
    assert sum(p.numel() for p in small.parameters()) == 84
    x = torch.randn(5, 3)
    assert torch.equal(small(x), model.head(model.blocks[0](model.stem(x))))


def test_scores_of_blocks_by_hand() -> None:
    """Magnitude is the norm of what makes the branch; Taylor is the branch times its gradient, summed."""
    torch.manual_seed(0)
    model = Stack(Add(), Add())
    x = torch.randn(7, 3)
    graph = niwaki.trace(model, x)
    assert [m.tensor for m in graph.blocks[0].members] == ["blocks.0.down.bias", "blocks.0.down.weight"]
    found = niwaki.score(graph, niwaki.collect(model, graph, frozenset()), how=niwaki.scores.Magnitude())
    down = model.blocks[0].down
    expected = (down.weight.square().sum() + down.bias.square().sum()).sqrt()
    assert found.values["block blocks.0"].item() == pytest.approx(expected.item(), rel=1e-6)

    def loss(net: nn.Module, batch: Tensor) -> Tensor:
        return net(batch).square().sum()

    how = niwaki.scores.Taylor()
    seen = niwaki.collect(model, graph, how.needs, batches=[x], loss=loss)
    found = niwaki.score(graph, seen, how=how)
    branch: list[Tensor] = []
    handle = down.register_forward_hook(lambda module, args, output: branch.append(output) or output.retain_grad())
    model(x).square().sum().backward()
    handle.remove()
    assert branch[0].grad is not None
    by_hand = (branch[0] * branch[0].grad).sum().abs()
    assert found.values["block blocks.0"].item() == pytest.approx(by_hand.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["residual_stage", "pre_norm_tower", "layer_scaled"])
def test_budgets_of_blocks(name: str) -> None:
    """Only blocks go, lowest scores first, no more than the budget asks for; "keep" leaves them alone."""
    case = named(name)
    model, example = case.make(), case.example()
    graph = niwaki.trace(model, example)
    scores = niwaki.score(graph, niwaki.collect(model, graph, frozenset()), how=niwaki.scores.Magnitude())
    values = {block.name: scores.values[block.name].item() for block in graph.blocks}
    order = sorted(values, key=lambda block: values[block])
    before = graph.macs
    for rule in (niwaki.budgets.Uniform(), niwaki.budgets.GlobalRank()):
        for count in range(1, len(order) + 1):
            alive = torch.ones(graph.units.count, dtype=torch.bool).numpy()
            for block in order[:count]:
                alive[graph.group(block).ids] = False
            cost = graph.cost(alive)["macs"]
            plan = niwaki.choose(graph, scores, niwaki.Budget(keep=cost), how=rule, blocks="only")
            assert {f"block {path}" for path in plan.dropped} == set(order[:count]) and not plan.kept
            assert plan.promised["macs"] == cost < before
        with pytest.raises(niwaki.errors.BudgetError, match="blocks can be left out"):
            niwaki.choose(graph, scores, niwaki.Budget(keep=cost - 1), how=rule, blocks="only")
        plan = niwaki.choose(graph, scores, niwaki.Budget(keep=0.7), how=rule, blocks="keep")
        assert not plan.dropped and plan.kept


def test_expected_blocks_of_the_zoo() -> None:
    def found(name: str) -> list[str]:
        case = named(name)
        return [group.name for group in niwaki.trace(case.make(), case.example()).blocks]

    assert found("residual_stage") == ["block blocks.1", "block blocks.2"]
    assert found("pre_norm_tower") == ["block blocks.0", "block blocks.1", "block blocks.2"]
    assert found("layer_scaled") == ["block scaled.0", "block scaled.1"]


@pytest.mark.parametrize("name", ["residual_stage", "pre_norm_tower", "layer_scaled"])
@pytest.mark.parametrize("blocks", ["only", "also"])
def test_blocks_through_a_saved_run(name: str, blocks: Any, tmp_path: Path) -> None:
    case = named(name)
    outcome = niwaki.compress(
        case.make(),
        case.example(),
        method=niwaki.methods.Magnitude(blocks=blocks),
        budget=niwaki.Budget(keep=0.6, of="params"),
    )
    assert outcome.receipt.passed and (outcome.plan.dropped or blocks == "also")
    outcome.save(tmp_path / "run")
    loaded = niwaki.load(tmp_path / "run", case.make)
    assert torch.equal(loaded(case.example()), outcome.model(case.example()))
    again = niwaki.Plan.from_json((tmp_path / "run" / "plan.json").read_text())
    assert dict(again.dropped) == dict(outcome.plan.dropped)
    small = niwaki.cut(case.make(), again)
    assert torch.equal(small(case.example()), outcome.model(case.example()))


def test_a_plan_with_an_odd_block_is_refused() -> None:
    model = Stack(Add(), Add())
    graph = niwaki.trace(model, torch.randn(1, 3))
    alive = torch.ones(graph.units.count, dtype=torch.bool).numpy()
    alive[graph.blocks[0].ids] = False
    data = json.loads(plan_of(graph, alive).to_json())
    odd = {**data, "dropped": {"blocks.7": "tensor"}}
    with pytest.raises(niwaki.errors.PlanMismatchError, match=r"blocks\.7"):
        niwaki.cut(model, niwaki.Plan.from_json(json.dumps(odd)))
    wrong = {**data, "dropped": {"blocks.0": "list"}}
    with pytest.raises(niwaki.errors.FileDamagedError, match="dropped"):
        niwaki.Plan.from_json(json.dumps(wrong))
    kept = {**data, "dropped": {}}
    with pytest.raises(niwaki.errors.PlanMismatchError, match="contradict"):
        niwaki.cut(model, niwaki.Plan.from_json(json.dumps(kept)))
