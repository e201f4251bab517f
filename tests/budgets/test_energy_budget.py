"""Budgets of energy, by a counter made up: every multiply-add takes a microjoule."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import niwaki
from budgets.costed import chain, graph_of
from niwaki.budgets import table_path, timed
from niwaki.errors import InputError, NiwakiError, UnknownNameError
from niwaki.measure import Target, energy
from niwaki.measure.energy import joules_in_turns
from niwaki.report.reading import Run, read_run
from niwaki.report.tables import promises

TARGET = Target("pytorch", of="energy")
X = torch.zeros(1, 64)


@pytest.fixture
def burning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two packages, which share each pass's joules three to one; stretches of one pass."""
    spent = [0.0]

    def eager(model: Any, example: Any) -> Any:
        def call() -> None:
            given = example if isinstance(example, tuple) else (example,)
            with torch.no_grad(), FlopCounterMode(display=False) as counted:
                model(*given)
            spent[0] += counted.get_total_flops() / 2 * 1e-6

        return call

    monkeypatch.setattr("niwaki.measure.target._eager", eager)
    counters = [lambda: 7 + 0.75 * spent[0], lambda: 3 + 0.25 * spent[0]]
    monkeypatch.setattr("niwaki.measure.target.processor_counters", lambda: counters)
    monkeypatch.setattr("niwaki.measure.target.joules_in_turns", partial(joules_in_turns, seconds=0.0))


def test_joules_of_a_pass() -> None:
    """Whatever the number of passes: 0.03 of the one and 0.01 of the other, which are not mixed up."""
    spent = [5.0, 0.0]

    def takes(joules: float) -> Any:
        def call() -> None:
            spent[0] += joules

        return call

    found = joules_in_turns(
        {"a": takes(0.03), "b": takes(0.01)}, [lambda: spent[0], lambda: spent[1]], runs=3, seconds=0.001
    )
    assert found["a"] == pytest.approx([0.03] * 3) and found["b"] == pytest.approx([0.01] * 3)


@pytest.mark.usefixtures("burning")
def test_the_table_has_the_joules_of_every_width() -> None:
    """64 -> h -> 16: 80 h microjoules."""
    net = chain(64, 64, 16)
    graph = timed(net, X, graph_of(net, 1, 64), target=TARGET)
    (group,) = [group for group in graph.groups if group.fixed is None]
    for width in (64, 48, 40, 33, 16):
        alive = np.ones(graph.units.count, bool)
        alive[group.ids[width:]] = False
        assert graph.cost(alive)["energy"] == pytest.approx(80e-6 * width, rel=0.01), width
    assert "latency" not in graph.costs


@pytest.mark.usefixtures("burning")
def test_a_network_is_compressed_to_joules(tmp_path: Path) -> None:
    """Half of 5.12 mJ: 32 of 64. Kept, and not taken for a table of times."""
    table = table_path(tmp_path, TARGET)
    assert table.name.startswith("energy-pytorch-") and table != table_path(tmp_path, Target("pytorch"))
    net, how = chain(64, 64, 16), niwaki.methods.Magnitude()
    for budget in (niwaki.Budget(0.5, of="energy"), niwaki.Budget.at_most(0.00256, "energy")):
        result = niwaki.compress(net, X, method=how, budget=budget, target=TARGET, table=table)
        told = result.plan.decided_by["measured"]
        assert (told["of"], told["unit"], len(told["rounds"])) == ("energy", "J", 1)
        assert told["uncut"] == pytest.approx(0.00512) and told["measured"] == pytest.approx(0.00256, rel=0.04)
        assert result.model[0].out_features in (31, 32) and "runtime_latency" not in result.after
        joules = [side["runtime_energy"] for side in (result.before, result.after)]
        assert [one.value for one in joules] == pytest.approx([0.00512, 80e-6 * result.model[0].out_features])
        rows = {row[0]: row[1:] for row in promises(saved(result, tmp_path)).rows}
        for label in ("energy in PyTorch as the target, the budget's", "the same, measured again by itself"):
            assert rows[label][1].startswith("0.00256") and rows[label][1].endswith(" J")
    assert json.loads(table.read_text())["machine"]["of"] == "energy"
    with pytest.raises(InputError, match="another machine"):
        timed(net, X, graph_of(net, 1, 64), target=TARGET, table=other(table, tmp_path))
    with pytest.raises(InputError, match="of 'energy', here None"):  # nor for one of times
        timed(net, X, graph_of(net, 1, 64), target=Target("pytorch", threads=TARGET.threads), table=table)


def saved(result: Any, folder: Path) -> Run:
    result.save(folder / "run", force=True)
    return read_run(folder / "run")


def other(table: Path, folder: Path) -> Path:
    """The table as if it were of times."""
    content = json.loads(table.read_text())
    del content["machine"]["of"]
    (folder / "times.json").write_text(json.dumps(content))
    return folder / "times.json"


def test_without_counters_it_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("niwaki.measure.target.processor_counters", lambda: energy.processor_counters(str(tmp_path)))
    budget, how = niwaki.Budget(0.5, of="energy"), niwaki.methods.Magnitude()
    with pytest.raises(NiwakiError, match="no RAPL counters"):
        niwaki.compress(chain(64, 64, 16), X, method=how, budget=budget, target=TARGET)
    with pytest.raises(InputError, match=r"no target to measure on.*of='energy'"):
        niwaki.compress(chain(64, 64, 16), X, method=how, budget=budget)
    for target, of in ((Target("pytorch"), "energy"), (TARGET, "latency")):
        with pytest.raises(InputError, match=f"a target that measures {target.of}"):
            niwaki.compress(chain(64, 64, 16), X, method=how, budget=niwaki.Budget(0.5, of=of), target=target)
    with pytest.raises(UnknownNameError, match="known: latency, energy"):
        Target("pytorch", of="weight")  # type: ignore[arg-type]
