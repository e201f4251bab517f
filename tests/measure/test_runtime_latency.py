"""Targets: what is refused, and that something real is timed."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import niwaki
from niwaki.budgets import table_path, timed
from niwaki.errors import InputError, MissingExtraError, UnknownNameError
from niwaki.measure import RuntimeLatency, Target
from niwaki.measure.target import _openvino, in_turns


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 8, 1), nn.Flatten(), nn.Linear(288, 4)
    ).eval()


X = torch.zeros(1, 3, 8, 8)


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"threads": 0}, {"batch": True}, {"threads": 1.5}], ids=str)
def test_counts(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="whole number from 1"):
        Target(**wrong)


def test_unknown_and_missing_runtimes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownNameError, match="known: pytorch, onnxruntime, openvino"):
        Target("abacus")
    monkeypatch.setattr("niwaki.measure.target.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"not installed: openvino, onnx.*niwaki\[openvino\]"):
        timed(net(), X, niwaki.trace(net(), X), target=Target("openvino"))
    with pytest.raises(MissingExtraError):
        niwaki.compress(
            net(), X, method=niwaki.methods.Magnitude(), budget=niwaki.Budget(0.5), target=Target("openvino")
        )


def test_a_budget_of_latency_needs_a_target() -> None:
    with pytest.raises(InputError, match="no target to measure on"):
        niwaki.compress(net(), X, method=niwaki.methods.Magnitude(), budget=niwaki.Budget(0.5, of="latency"))


def test_calls_are_timed_in_turns() -> None:
    order: list[str] = []
    times = in_turns({name: lambda name=name: order.append(name) for name in "ab"}, runs=3, warm_up=1)
    assert order == ["a", "b", *"ab" * 3] and [len(one) for one in times.values()] == [3, 3]


@pytest.mark.parametrize("runtime", ["pytorch", pytest.param("onnxruntime", marks=pytest.mark.slow)])
def test_a_network_is_compressed_to_a_latency(runtime: str, tmp_path: Any) -> None:
    """Layers are measured once, whole networks too; the plan keeps its promise, and what was promised is measured."""
    if runtime == "onnxruntime":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    target, heard = Target(runtime), []
    table = table_path(tmp_path, target)
    settings: dict[str, Any] = {
        "method": niwaki.methods.Magnitude(),
        "budget": niwaki.Budget(0.9, of="latency"),
        "target": target,
        "table": table,
        "steps": lambda number, of, what: heard.append(what),
    }
    try:
        result = niwaki.compress(net(), X, **settings)
    except niwaki.errors.BudgetError:  # so small a network may have all of its time in what no width changes
        pass
    else:
        assert result.plan.promised["latency"] <= 0.9 * result.plan.promised["latency_before"]
        measured = result.after["runtime_latency"]
        assert measured.unit == "ms" and measured.value > 0 and runtime in measured.definition
    assert table.exists() and any("convolution" in what for what in heard)
    heard.clear()
    graph = timed(
        net(), X, niwaki.trace(net(), X), target=target, table=table, progress=lambda *it: heard.append(it[2])
    )
    assert (
        not heard and graph.costs["latency"].total(graph.widths.counts(torch.ones(graph.units.count + 1).numpy())) > 0
    )


def test_the_meter_says_what_it_measured() -> None:
    found = RuntimeLatency("pytorch", batch=2, runs=3)(net(), X)
    assert found.name == "runtime_latency" and "batch 2" in found.definition and found.value > 0
    with pytest.raises(InputError, match="RuntimeLatency"):
        RuntimeLatency(runs=0)


def test_openvino_is_asked_for_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it would choose by itself is the processor's: bfloat16, where that is fast."""
    said: dict[str, Any] = {}

    class Core:
        def read_model(self, content: Any) -> Any:
            return content

        def compile_model(self, model: Any, device: str, settings: dict[str, Any]) -> Any:
            said.update(settings)
            return SimpleNamespace(create_infer_request=lambda: None)

    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Core=Core))
    _openvino(b"", X, 2)
    assert said["INFERENCE_PRECISION_HINT"] == "f32" and said["INFERENCE_NUM_THREADS"] == 2
