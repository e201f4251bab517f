"""Times read off measured widths, by hand, and budgets of them with made-up tables."""

import json
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import niwaki
from budgets.clocks import clocked, work
from budgets.costed import chain, graph_of, scored
from niwaki.budgets.networks import Networks
from niwaki.budgets.tables import Steps, Surface, Table, Times, grid_of
from niwaki.budgets.timed import calibrated, priced_by, table_path, timed
from niwaki.errors import BudgetError, FileDamagedError, InputError
from niwaki.graph.layers import layers_of
from niwaki.measure import Target
from niwaki.measure.measurement import device_name

MACHINE = {"cpu": "an abacus", "runtime": "onnxruntime", "threads": "1"}


def read(surface: Surface, out: float, into: float) -> float:
    cost = Times(
        np.array([[0, 1, 2]]), 2, surfaces=(surface,), which=np.zeros(1, np.int64), scale=np.ones(1), slots=(1, 1)
    )
    return cost.total(np.array([out, into]))


def test_between_two_widths_times_lie_on_a_line() -> None:
    """At 16 and 32 by 16 and 48; halfway in both: the mean of four, (1 + 3 + 5 + 11) / 4."""
    surface = Surface((16, 32), (16, 48), ((1.0, 3.0), (5.0, 11.0)))
    assert read(surface, 16, 16) == 1.0 and read(surface, 32, 48) == 11.0
    assert read(surface, 24, 32) == pytest.approx(5.0)
    assert read(surface, 20, 16) == pytest.approx(2.0)  # a quarter of the way from 1 to 5


def test_a_stair_goes_up_at_once_and_an_odd_width_takes_longer() -> None:
    """t(out) as of kernels of 16 channels: 17 to 32 take what 32 take. In: odd widths 1.25 times the next multiple."""

    def timer(out: int, into: int) -> float:
        return -(-out // 16) * (-(-into // 16)) * (1.25 if into % 4 else 1.0)

    surface = Surface.measured((64, 64), timer)
    assert surface.out == (16, 32, 48, 64)
    for out in (16, 17, 31, 33, 47, 64):
        assert read(surface, out, 64) == pytest.approx(timer(out, 64)), out
    for into in (17, 31, 33, 63, 36, 48):
        assert read(surface, 64, into) == pytest.approx(timer(64, into)), into


def test_an_even_slope_has_no_stairs() -> None:
    surface = Surface.measured((64, 64), lambda out, into: out * into / 100)
    for out, into in ((17, 64), (63, 64), (64, 33), (40, 48)):
        assert read(surface, out, into) == pytest.approx(out * into / 100, rel=0.01)
    assert Steps.of({0: 5.0, 8: 5.01, 16: 5.02}).extra == (1.0,) * 17  # less than a timer can tell


def test_grids() -> None:
    assert grid_of(6) == (1, 3, 6)
    assert grid_of(72) == (16, 32, 64, 80) and grid_of(512) == (16, 64, 128, 256, 384, 512)


def hidden(graph: Any) -> np.ndarray:
    (group,) = [group for group in graph.groups if group.fixed is None]
    return np.asarray(group.ids)


def stairs(net: Any, graph: Any) -> Any:
    """The graph of linear layers, each of which takes 1 ms for every 16 it puts out and 1 more for every 16 it reads,
    begun ones included."""
    layers = layers_of(graph, fused=True)

    def surface(full: tuple[int, int]) -> Surface:
        return Surface.measured(full, lambda out, into: float(-(-out // 16) + -(-into // 16)))

    return priced_by(graph, layers, [surface(layer.full) for layer in layers], scale=(1.0, 1.0), constant=0.5)


def test_the_cost_of_a_plan_is_the_sum_of_its_layers() -> None:
    """64 -> 64 -> 16: (4 + 4) + (1 + 4) and 0.5 for every plan; with 33 hidden (3 + 4) + (1 + 3) + 0.5."""
    net = chain(64, 64, 16)
    graph = stairs(net, graph_of(net, 1, 64))
    alive = np.ones(graph.units.count, bool)
    assert graph.cost(alive)["latency"] == pytest.approx(13.5)
    alive[hidden(graph)[33:]] = False
    assert graph.cost(alive)["latency"] == pytest.approx(11.5)
    assert graph.cost(alive)["macs"] == 64 * 33 + 33 * 16  # beside the exact costs, which are as before


@pytest.mark.parametrize("rule", [niwaki.budgets.GlobalRank(), niwaki.budgets.Uniform()], ids=str)
def test_counts_lie_where_the_time_steps_down(rule: Any) -> None:
    """A stair has nothing to gain between its steps: 48 and not 33, at the same price."""
    net = chain(64, 64, 64, 16)
    graph = stairs(net, graph_of(net, 1, 64))
    scores = scored(net, graph, [list(np.arange(64.0)), list(np.arange(64.0) + 0.5)])
    before = graph.cost(np.ones(graph.units.count, bool))["latency"]
    plan = niwaki.choose(graph, scores, niwaki.Budget(0.8, of="latency"), how=rule)
    assert plan.promised["latency"] <= 0.8 * before and plan.promised["latency_before"] == before
    assert all(len(kept) % 16 == 0 for kept in plan.kept.values()), {k: len(v) for k, v in plan.kept.items()}
    by_macs = niwaki.choose(graph, scores, niwaki.Budget(0.8, of="macs"), how=rule)
    assert any(len(kept) % 16 for kept in by_macs.kept.values())


def test_a_narrower_layer_that_is_slower_is_never_chosen() -> None:
    """A runtime that takes 2 ms for multiples of 8 and 10 ms for all other widths: 7 of 8 would be slower than all."""
    net = chain(64, 64, 16)
    graph = graph_of(net, 1, 64)
    layers = layers_of(graph, fused=True)

    def timer(out: int, into: int) -> float:
        return (1.0 + max(out, into) / 64) * (1.0 if out % 8 == into % 8 == 0 else 5.0)

    graph = priced_by(
        graph, layers, [Surface.measured(one.full, timer) for one in layers], scale=(1.0, 1.0), constant=0.0
    )
    scores = scored(net, graph, [list(np.arange(64.0))])
    for keep in (0.95, 0.9, 0.8):
        plan = niwaki.choose(graph, scores, niwaki.Budget(keep, of="latency"))
        (kept,) = plan.kept.values()
        assert len(kept) % 8 == 0 and plan.promised["latency"] <= keep * plan.promised["latency_before"]
    slower = niwaki.choose(graph, scores, niwaki.Budget(0.95, of="macs"))
    assert slower.promised["latency"] > slower.promised["latency_before"]


def test_a_time_in_milliseconds_and_one_that_can_not_be_had() -> None:
    net = chain(64, 64, 16)
    graph = stairs(net, graph_of(net, 1, 64))
    scores = scored(net, graph, [list(np.arange(64.0))])
    assert niwaki.choose(graph, scores, niwaki.Budget.at_most(11.6, "latency")).promised["latency"] == pytest.approx(
        11.5
    )
    with pytest.raises(BudgetError, match="the least that floors"):
        niwaki.choose(graph, scores, niwaki.Budget.at_most(0.4, "latency"))


def test_calibration_finds_the_factors_of_whole_networks() -> None:
    """Whole networks that take twice the sum of the layers and 3 ms more."""
    net = chain(64, 64, 16)
    graph = graph_of(net, 1, 64)
    layers = layers_of(graph, fused=True)
    surfaces = [Surface.measured(one.full, lambda out, into: out * into / 1000) for one in layers]
    points = []
    for keep in (64, 32, 16):
        alive = np.ones(graph.units.count, bool)
        alive[hidden(graph)[keep:]] = False
        points.append((alive, 2 * (64 * keep + keep * 16) / 1000 + 3))
    heavy, _, constant = calibrated(graph, layers, surfaces, points)
    assert heavy == pytest.approx(2.0, rel=0.02) and constant == pytest.approx(3.0, rel=0.02)


def test_tables_are_kept_and_refused_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "table.json"
    table = Table.open(path, MACHINE)
    table.layers["a"] = Surface.measured((64, 3), lambda out, into: out + into / 2)
    table.save()
    again = Table.open(path, MACHINE)
    assert again.layers == table.layers and [one.name for one in path.parent.iterdir()] == ["table.json"]
    with pytest.raises(InputError, match=r"another machine; found: cpu 'an abacus', here 'a slide rule'"):
        Table.open(path, {**MACHINE, "cpu": "a slide rule"})
    content = json.loads(path.read_text())
    content["layers"]["a"]["ms"][0][0] = -1.0
    for wrong in (json.dumps(content), "{", json.dumps({"format": "other"}), "[]"):
        path.write_text(wrong)
        with pytest.raises(FileDamagedError, match="latency table"):
            Table.open(path, MACHINE)


def test_what_times_depend_on(tmp_path: Path) -> None:
    """Each of these by itself makes another table, in another file."""
    target = Target("pytorch", batch=2, threads=3)
    named = {"runtime": "pytorch", "threads": "3", "batch": "2", "dtype": "float32", "version": version("torch")}
    assert target.machine() == {"cpu": device_name(torch.device("cpu")), **named}
    others = [replace(target, **one) for one in ({"batch": 1}, {"threads": 1}, {"of": "energy"})]
    places = {table_path(tmp_path, one) for one in (target, *others)}
    assert len(places) == 4 and {place.parent for place in places} == {tmp_path}
    for name in target.machine():
        (tmp_path / "t.json").unlink(missing_ok=True)
        Table.open(tmp_path / "t.json", target.machine() | {name: "other"}).save()
        with pytest.raises(InputError, match=f"another machine; found: {name} 'other', here"):
            timed(chain(2, 4, 2), torch.zeros(1, 2), graph_of(chain(2, 4, 2), 1, 2), target=target,
                  table=tmp_path / "t.json")  # fmt: skip


def test_networks_are_kept_by_what_they_are_and_what_they_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another network, and another size of its input, are measured for themselves."""
    clocked(monkeypatch, work)
    nets = [chain(4, 8, 2), chain(4, 16, 2)]
    for net, size in ((nets[0], (1, 4)), (nets[1], (1, 4)), (nets[0], (1, 7, 4))):
        graph = niwaki.trace(net, torch.zeros(size))
        target, table = Target("pytorch"), tmp_path / "t.json"
        networks = Networks.of(net, torch.zeros(size), graph, target=target, table=table, progress=None)
        ((_, uncut),) = networks.measured({})
        assert uncut == work(net)
    assert len(json.loads(table.read_text())["networks"]) == 3


def test_layers_of_a_network() -> None:
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(32, 2)
    ).eval()
    graph = niwaki.trace(net, torch.zeros(1, 3, 4, 4))
    assert [layer.kind for layer in layers_of(graph, fused=True)] == ["convolution", "linear"]
    assert [layer.kind for layer in layers_of(graph, fused=False)] == [
        "convolution",
        "native_batch_norm",
        "relu",
        "linear",
    ]
    first, last = layers_of(graph, fused=True)
    assert first.full == (8, 3) and last.full == (2, 32) and first.widths[0][0].size == 8 and len(first.then) == 1


def test_measuring_leaves_the_modes_of_the_network() -> None:
    net = nn.Sequential(nn.Linear(4, 32), nn.Dropout(), nn.Linear(32, 2))
    net[1].eval()
    example = torch.zeros(1, 4)
    graph = timed(net, example, niwaki.trace(net, example), target=Target("pytorch"))
    assert "latency" in graph.costs
    assert [module.training for module in net.modules()] == [True, True, False, True]


def test_networks_of_other_groups_are_measured_again(tmp_path: Path) -> None:
    """What is protected takes no part: the same share of the MACs is another network."""
    net, example, file = (
        nn.Sequential(nn.Linear(4, 32), nn.Linear(32, 32), nn.Linear(32, 2)),
        torch.zeros(1, 4),
        "t.json",
    )

    def kept(*protect: str) -> int:
        timed(
            net, example, niwaki.trace(net, example, protect=protect), target=Target("pytorch"), table=tmp_path / file
        )
        (networks,) = json.loads((tmp_path / file).read_text())["networks"].values()
        return len(networks)

    first = kept()
    assert kept("0") > first


def test_a_model_elsewhere_stays_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it were on a GPU: what is called and moved is a copy."""
    net, example = nn.Sequential(nn.Linear(4, 32), nn.Linear(32, 2)), torch.zeros(1, 4)
    graph = niwaki.trace(net, example)
    monkeypatch.setattr(sys.modules["niwaki.budgets.networks"], "device_of", lambda model: torch.device("cuda"))
    net.register_forward_hook(lambda module, *_: called.append(module is net))
    called: list[bool] = []
    assert "latency" in timed(net, example, graph, target=Target("pytorch")).costs
    assert called and not any(called)
