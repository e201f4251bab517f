"""A budget of time has one result: in its own runtime, in turns with the uncut network; all of a report says it."""

import io
import json
from typing import Any

import pytest
from rich.console import Console
from test_page import Made, Save

import niwaki.report
from niwaki.errors import FileDamagedError
from niwaki.report.points import runtimes
from niwaki.report.reading import Run, read
from niwaki.report.tables import before_after, definitions, headline, promises, stages

TOLD = {
    "of": "latency", "unit": "ms", "limit": 2.4, "uncut": 4.0, "promised": 2.35, "measured": 2.3, "off": 2.3 / 2.4 - 1,
    "tolerance": 0.05, "met": True, "definition": "shortest processor time of 12 passes, in turns",
    "rounds": [{"promised": 2.4, "measured": 2.6}, {"promised": 2.35, "measured": 2.3}],
}  # fmt: skip
TARGET = {"class": "Target", "runtime": "onnxruntime", "batch": 1, "threads": 1, "of": "latency"}


def alone(made: Made, value: float) -> dict[str, Any]:
    """A network measured by itself."""
    more = {"name": "runtime_latency", "value": value, "spread": 0.1, "definition": "by itself"}
    return dict(made()["after"]["latency"] | more)


def run_of(save: Save, made: Made, name: str = "run", *, target: Any = TARGET, **changed: Any) -> Run:
    data = made()
    for side, value in (("before", 4.1), ("after", 2.2)):  # measured apart, before and after all else
        data[side]["runtime_latency"] = alone(made, value)
    data["stages"][0]["measurements"]["runtime_latency"] = data["after"]["runtime_latency"]
    folder = save(name, data | {"promised": {"latency": 2.35}, "measured": {**TOLD, **changed}})
    (folder / "settings.json").write_text(json.dumps({"target": target}), encoding="utf-8")
    return read(folder)[0]


def test_the_headline_says_where_and_what_was_asked_for(save: Save, made: Made) -> None:
    said = "; 57.5 % of the latency in onnxruntime (batch 1, 1 CPU thread): 2.3 ms of 4 ms, at most 2.4 ms asked for, "
    assert f"{said}met; accuracy" in headline(run_of(save, made))
    late = run_of(save, made, "late", measured=2.45)
    assert "2.45 ms of 4 ms, at most 2.4 ms asked for, met within 5 %; " in headline(late)
    missed = run_of(save, made, "missed", measured=3.0, met=False, target={**TARGET, "threads": 4, "batch": 8})
    assert "75.0 % of the latency in onnxruntime (batch 8, 4 CPU threads): 3 ms of 4 ms" in headline(missed)
    assert "at most 2.4 ms asked for, NOT met; " in headline(missed)


def test_one_number_stands_everywhere(save: Save, made: Made) -> None:
    run = run_of(save, made)
    rows = {row[0]: row[1:] for row in before_after(run).rows}
    assert rows["latency in onnxruntime, the budget's"] == ("4 ms", "2.3 ms", "× 0.575")
    assert rows["latency in PyTorch eager"] == ("2 ± 0.12 ms", "1 ± 0.12 ms", "× 0.500")
    assert not {"latency", "runtime latency"} & set(rows)
    assert promises(run).rows == (
        ("latency in onnxruntime, the budget's", "2.35 ms", "2.3 ms", "-2.13 %"),
        ("the same, measured again by itself", "2.35 ms", "2.2 ± 0.1 ms", "-6.38 %"),
        ("latency in turns with the uncut, plan 1", "2.4 ms", "2.6 ms", "+8.33 %"),
        ("latency in turns with the uncut, plan 2", "2.35 ms", "2.3 ms", "-2.13 %"),
    )
    assert [(label, one["value"]) for label, one in runtimes(run)] == [
        ("PyTorch", 1.0), ("onnxruntime, the budget's target", 2.3)
    ]  # fmt: skip
    assert "runtime latency" not in stages(run).heads and "accuracy" in stages(run).heads  # the cut alone changes it
    meaning = {row[0]: row[1] for row in definitions([run]).rows}
    assert meaning["latency in onnxruntime, the budget's"] == "shortest processor time of 12 passes, in turns"
    assert meaning["latency in PyTorch eager"] == "definition of latency"
    lines = Console(file=io.StringIO(), width=200)
    lines.print(niwaki.report.terminal(run.folder))
    for text in (niwaki.report.html(run.folder), lines.file.getvalue()):  # type: ignore[attr-defined]
        assert (
            "runtime latency" not in text and text.count("of the latency in onnxruntime (batch 1, 1 CPU thread)") >= 1
        )


def test_a_target_that_no_budget_is_about(save: Save, made: Made) -> None:
    """What was measured there is said of that runtime; there is nothing in turns to say."""
    data = made()
    for side, value in (("before", 4.0), ("after", 2.0)):
        data[side]["runtime_latency"] = alone(made, value)
    folder = save(data=data)
    (folder / "settings.json").write_text(json.dumps({"target": TARGET}), encoding="utf-8")
    (run,) = read(folder)
    rows = {row[0]: row[1:] for row in before_after(run).rows}
    assert rows["latency in onnxruntime"] == ("4 ± 0.1 ms", "2 ± 0.1 ms", "× 0.500")
    assert "onnxruntime" not in headline(run)


def test_damaged_measurements_are_refused(save: Save, made: Made) -> None:
    with pytest.raises(FileDamagedError, match="uncut"):
        run_of(save, made, uncut="much")
