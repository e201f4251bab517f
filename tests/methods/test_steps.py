"""What every method does alike: targets, kept plans, outcomes."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import niwaki
from budgets.clocks import clocked, thousandths, work
from niwaki.errors import InputError
from niwaki.measure import Target
from niwaki.methods import UDFC, Magnitude, PreCropping

X = torch.zeros(1, 3, 8, 8)
METHODS = [Magnitude(), UDFC(), UDFC(bits=6, share="error"), PreCropping(), PreCropping(densities="erk")]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(64, 4),
    ).eval()  # fmt: skip


def slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which networks take 1.5 times what the table says and 0.2 ms more."""
    monkeypatch.setattr("niwaki.budgets.timed", lambda model, example, graph, **_: thousandths(graph))
    monkeypatch.setattr("niwaki.methods.steps.RuntimeLatency", lambda *_, **__: niwaki.measure.Latency(runs=1))
    clocked(monkeypatch, lambda model: 1.5 * work(model) + 0.2)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("budget", [niwaki.Budget(0.6, of="latency"), niwaki.Budget.at_most(2.0, "latency")], ids=str)
def test_every_method_keeps_a_budget_of_latency(
    method: Any, budget: niwaki.Budget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uncut: 3 x 32 + 32 x 64 + 64 x 4 = 2400 thousandths, so 3.8 ms."""
    slower(monkeypatch)
    result = niwaki.compress(net(), X, method=method, budget=budget, target=Target("pytorch"))
    told = result.plan.decided_by["measured"]
    assert told["uncut"] == pytest.approx(3.8) and told["limit"] == pytest.approx(budget.limit(3.8))
    assert told["met"] and abs(told["off"]) <= 0.05 and told["rounds"][0]["measured"] > told["rounds"][0]["promised"]
    assert told["measured"] == pytest.approx(1.5 * work(result.model) + 0.2)  # what is given is what was measured
    assert result.plan.promised["latency"] == pytest.approx(told["promised"], rel=0.01)
    assert result.plan.promised["latency_before"] == pytest.approx(3.8)
    assert result.report()["measured"] == told and result.plan.budget[0]["keep"] == budget.keep
    assert result.receipt.passed and result.stages[-1].measurements is result.after


@pytest.mark.parametrize("method", METHODS[:4], ids=str)
def test_with_a_target_every_plan_promises_its_latency(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    slower(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = niwaki.compress(net(), X, method=method, budget=niwaki.Budget(0.5), target=Target("pytorch"))
    assert result.plan.promised["latency"] == pytest.approx(work(result.model), rel=0.02)  # as the table has it
    assert "measured" not in result.plan.decided_by


@pytest.mark.parametrize("method", [UDFC(), PreCropping()], ids=str)
def test_a_target_is_needed(method: Any) -> None:
    with pytest.raises(InputError, match="no target to measure on"):
        niwaki.compress(net(), X, method=method, budget=niwaki.Budget(0.5, of="latency"))


@pytest.mark.parametrize("method", METHODS[:4], ids=str)
def test_a_killed_job_has_its_plan(method: Any, tmp_path: Path) -> None:
    """A folder of an earlier try decides, whatever would be chosen now."""
    first = niwaki.compress(net(), X, method=method, budget=niwaki.Budget(0.3), partial=tmp_path)
    assert (tmp_path / "plan.json").is_file()
    again = niwaki.compress(net(), X, method=method, budget=niwaki.Budget(0.7), partial=tmp_path)
    assert again.plan.kept == first.plan.kept and again.plan.promised == first.plan.promised
    assert {name: tuple(t.shape) for name, t in again.model.state_dict().items()} == {
        name: tuple(t.shape) for name, t in first.model.state_dict().items()
    }
    assert again.details.keys() == first.details.keys()
    assert again.details.get("precropping") == first.details.get("precropping")
