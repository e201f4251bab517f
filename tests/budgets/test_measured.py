"""Plans that are measured, by clocks worked out by hand, and chosen again by a corrected table."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import niwaki
from budgets.clocks import clocked, thousandths
from budgets.costed import chain, graph_of, scored
from niwaki.budgets import choose_measured
from niwaki.budgets.measured import line
from niwaki.errors import BudgetError, InputError
from niwaki.measure import Target

WIDTH = 64


def setup(monkeypatch: pytest.MonkeyPatch, clock: Callable[[int], float]) -> Callable[..., Any]:
    """64 -> h -> 16, of which the table says 0.08 h ms: 64 h and 16 h in microseconds. It takes `clock(h)` ms."""
    net = chain(64, WIDTH, 16)
    graph = graph_of(net, 1, 64)
    graph = thousandths(graph)
    scores = scored(net, graph, [list(np.arange(float(WIDTH)))])
    clocked(monkeypatch, lambda model: clock(model[0].out_features))

    def run(*budgets: niwaki.Budget, **settings: Any) -> Any:
        table = settings.pop("table", None)
        return choose_measured(
            net,
            torch.zeros(1, 64),
            graph,
            budgets,
            lambda seen, asked: niwaki.choose(seen, scores, asked),
            target=Target("pytorch", **settings),
            table=table,
        )

    return run


def widths(found: Any) -> list[int]:
    return [len(next(iter(one.plan.kept.values()))) for one in found.rounds]


def test_a_table_that_flatters_is_corrected_until_the_budget_is_met(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.1 h + 2 ms; uncut 8.4, so 0.6 of it is 5.04.

    The table times 8.4 / 5.12 says 38 (5.0 of 5.04), which take 5.8. Times 5.8 / 3.04 it says 33, which take 5.3: more
    than 5 % off. Times 5.3 / 2.64 it says 31, which take 5.1.
    """
    plan, found = setup(monkeypatch, lambda h: 0.1 * h + 2)(niwaki.Budget(0.6, of="latency"))
    assert widths(found) == [38, 33, 31] and found.best == 2 and found.met
    assert [one.measured for one in found.rounds] == pytest.approx([5.8, 5.3, 5.1])
    assert [one.promised for one in found.rounds] == pytest.approx([4.9875, 5.8 / 38 * 33, 5.3 / 33 * 31], rel=1e-3)
    assert found.limit == pytest.approx(5.04) and found.off == pytest.approx(5.1 / 5.04 - 1)
    assert plan.budget == ({"keep": 0.6, "of": "latency", "floor": 1, "multiple": 1},)
    assert plan.promised["latency_before"] == pytest.approx(8.4) and plan.promised["latency"] <= 5.04
    told = json.loads(plan.to_json())["decided_by"]["measured"]
    assert told == found.to_json() and told["met"] and len(told["rounds"]) == 3 and told["uncut"] == pytest.approx(8.4)


def test_a_table_that_frightens_is_corrected_between_two_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """h^2 / 500 ms; uncut 8.192, 0.6 of it 4.9152. 38 take 2.888; on the line from there to the uncut one 47 fit, which
    take 4.418; on the line from there 49, which take 4.802."""
    plan, found = setup(monkeypatch, lambda h: h * h / 500)(niwaki.Budget(0.6, of="latency"))
    assert widths(found) == [38, 47, 49] and found.off == pytest.approx(4.802 / 4.9152 - 1)
    assert len(plan.kept["0"]) == 49


def test_milliseconds_and_a_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the first test, but whatever is within 20 % will do: 38, 15 % above."""
    run = setup(monkeypatch, lambda h: 0.1 * h + 2)
    budget = niwaki.Budget.at_most(5.04, "latency")
    plan, found = run(budget, tolerance=0.2)
    assert widths(found) == [38] and found.met and found.off == pytest.approx(5.8 / 5.04 - 1)
    assert plan.budget[0]["keep"] == 5.04 and plan.budget[0]["absolute"] is True
    assert widths(run(budget, rounds=2)[1]) == [38, 33]


def test_where_another_budget_decides_a_plan_may_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the multiply-adds: 16 of 64, promised 2.1 of 4.2 ms, and no round more to use the time up."""
    run = setup(monkeypatch, lambda h: h * 8.4 / 64)
    plan, found = run(niwaki.Budget(0.5, of="latency"), niwaki.Budget(0.25, of="macs"))
    assert widths(found) == [16] and found.met and found.off == pytest.approx(-0.5)
    assert [one["of"] for one in plan.budget] == ["latency", "macs"]


def test_what_can_not_be_met_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """5 ms that no width changes: half of 11.4 ms is 5.7, and 7 channels take that."""
    run = setup(monkeypatch, lambda h: 5 + 0.1 * h)
    with caplog.at_level(logging.WARNING, logger="niwaki"):
        plan, found = run(niwaki.Budget.at_most(4.0, "latency"), rounds=4)
    assert not found.met and found.best == int(np.argmin([one.measured for one in found.rounds]))
    assert found.rounds[found.best].measured == pytest.approx(5 + 0.1 * len(plan.kept["0"]))
    assert "latency of 4 ms was asked for" in caplog.text and "% more" in caplog.text
    with pytest.raises(BudgetError, match="the least that floors"):  # not even by the table
        run(niwaki.Budget.at_most(0.01, "latency"))


def test_of_two_sides_of_a_jump_the_fast_one_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 32 channels 3 ms, from 33 on 9 ms; 12 uncut. Nothing is within 5 % of 6 ms: the largest at 3 ms that was
    seen."""
    run = setup(monkeypatch, lambda h: 3.0 if h <= 32 else 9.0 if h < 64 else 12.0)
    plan, found = run(niwaki.Budget(0.55, of="latency"), rounds=6)
    assert found.met and found.rounds[found.best].measured == 3.0 and len(plan.kept["0"]) <= 32
    assert 9.0 in [one.measured for one in found.rounds]


def test_no_rounds_and_no_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    run = setup(monkeypatch, lambda h: 0.1 * h + 2)
    plan, found = run(niwaki.Budget(0.6, of="latency"), rounds=0)
    assert found is None and "measured" not in plan.decided_by and plan.promised["latency"] <= 0.6 * 5.12 + 1e-9
    plan, found = run(niwaki.Budget(0.5, of="macs"))
    assert found is None and len(plan.kept["0"]) == 32


def test_what_was_measured_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    seen: list[int] = []
    run = setup(monkeypatch, lambda h: seen.append(h) or 0.1 * h + 2)  # type: ignore[func-returns-value]
    first = run(niwaki.Budget(0.6, of="latency"), table=table)[1]
    assert {64, 38, 33, 31} == set(seen)
    seen.clear()
    assert run(niwaki.Budget(0.6, of="latency"), table=table)[1].to_json() == first.to_json() and not seen


def test_settings_of_the_target() -> None:
    for wrong in ({"tolerance": 0}, {"tolerance": 1.0}, {"tolerance": True}, {"rounds": -1}, {"rounds": True}):
        with pytest.raises(InputError, match="Target"):
            Target("pytorch", **wrong)


def test_lines() -> None:
    factor, plus = line([(10.0, 9.0), (5.0, 9.5), (4.0, 3.0)], 6.0)  # the slower narrow one is passed over
    assert factor * 10 + plus == pytest.approx(9.0) and factor * 4 + plus == pytest.approx(3.0)
    assert line([(10.0, 9.0), (5.0, 9.5)], 6.0) == (1.9, 0.0)
