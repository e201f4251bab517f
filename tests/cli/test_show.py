"""The commands that look: trace, methods, measure, report. stdout holds the result and nothing else."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from niwaki.cli.options import budgets_of, number_of, pairs_of, shape_of, value_of
from niwaki.errors import BudgetError, InputError

Run = Callable[..., Any]


def test_trace(run: Run) -> None:
    found = run("trace", "python:nets.py:with_example")
    assert found.code == 0
    assert "output of the model" in found.out
    assert "3 groups, 2 free" in found.out
    assert "weights are random" in found.err
    data = run("trace", "python:nets.py:with_example", "--json").data
    assert [(g["units"], g["fixed"] is None) for g in data["groups"]] == [(8, True), (16, True), (10, False)]
    assert data["macs"] == 64 * 8 * 9 + 64 * 16 * 8 * 9 + 160


def test_trace_protect_input_and_picture(here: Path, run: Run) -> None:
    found = run("trace", "python:nets.py:small", "--input", "2x1x4x4", "--protect", "3", "--picture", "g.svg", "--json")
    assert found.code == 0
    assert "picture: g.svg" in found.err
    assert found.data["macs"] == 2 * (16 * 8 * 9 + 16 * 16 * 8 * 9 + 160)
    assert [g["fixed"] is None for g in found.data["groups"]] == [True, False, False]
    assert (here / "g.svg").read_text().startswith("<svg")


def test_quiet(run: Run) -> None:
    assert run("--quiet", "trace", "python:nets.py:with_example").err == ""
    assert run("trace", "python:nets.py:with_example").err != ""


def test_methods(run: Run) -> None:
    listed = run("methods", "--json").data
    assert {"magnitude", "norm_scale", "taylor", "random"} <= {method["name"] for method in listed}
    assert all(method["summary"].endswith(".") for method in listed)
    shown = run("methods")
    assert all(method["name"] in shown.out for method in listed)
    for name in ("magnitude", "Magnitude", "norm-scale"):
        method = run("methods", name, "--json").data
        assert all(field["help"] and field["type"] for field in method["fields"])
    assert "p" in [field["name"] for field in run("methods", "magnitude", "--json").data["fields"]]


def test_choices_are_listed_and_not_the_names_of_their_types(run: Run) -> None:
    """The same choices, in the same order, as the types of the class; other types by their name."""
    import importlib
    from typing import Literal, get_args, get_origin, get_type_hints

    for listed in run("methods", "--json").data:
        shown = run("methods", listed["name"], "--json").data
        made = getattr(importlib.import_module(f"niwaki.methods.{shown['name']}"), shown["class_name"])
        for field in shown["fields"]:
            hint = get_type_hints(made)[field["name"]]
            choices = get_origin(hint) is Literal
            name = hint.__name__ if get_origin(hint) is None else str(hint)  # tuple[str, ...] says of what
            assert field["type"] == (" | ".join(get_args(hint)) if choices else name), field["name"]
    page = run("methods", "taylor").out
    assert "global_rank | uniform" in page and "rows | columns" in page and "RuleName" not in page


def test_methods_are_what_python_sees(run: Run) -> None:
    """Read from the source text, yet the same names, fields and defaults as the classes have."""
    import dataclasses
    import importlib

    for listed in run("methods", "--json").data:
        shown = run("methods", listed["name"], "--json").data
        made = getattr(importlib.import_module(f"niwaki.methods.{shown['name']}"), shown["class_name"])
        assert [field["name"] for field in shown["fields"]] == [field.name for field in dataclasses.fields(made)]


def test_measure(run: Run) -> None:
    data = run("measure", "python:nets.py:small", "--input", "1x1x8x8", "--runs", "2", "--threads", "1", "--json").data
    assert list(data) == ["params", "macs", "bytes", "latency"]
    assert data["params"]["value"] == 80 + 16 + 16 * 72 + 16 + 32 + 170
    assert data["macs"]["value"] == 64 * 8 * 9 + 64 * 16 * 8 * 9 + 160
    assert "1 CPU threads, 2 runs" in data["latency"]["definition"]
    shown = run("measure", "python:nets.py:small", "--input", "1x1x8x8", "--runs", "0")
    assert "latency" not in shown.out
    assert "multiply-adds" in shown.out


def test_measure_accuracy(run: Run) -> None:
    pytest.importorskip("sklearn")
    data = run(
        "measure", "python:nets.py:small", "--data", "digits", "--runs", "0", "--limit-test", "50", "--json"
    ).data
    assert 0 <= data["accuracy"]["value"] <= 100
    assert data["accuracy"]["unit"] == "%"
    assert data["macs"]["value"] == 64 * 8 * 9 + 64 * 16 * 8 * 9 + 160  # the pictures' own 8 x 8, one channel


def test_measure_at_the_input_asked_for(run: Run) -> None:
    pytest.importorskip("sklearn")
    arguments = ("--data", "digits", "--input", "1x1x16x16", "--runs", "0", "--limit-test", "10", "--json")
    assert run("measure", "python:nets.py:small", *arguments).data["macs"]["value"] == 256 * 72 + 256 * 16 * 72 + 160


def measured(value: float, unit: str) -> dict[str, Any]:
    return {"name": "x", "value": value, "unit": unit, "definition": "d"}


def test_report(here: Path, run: Run) -> None:
    folder = here / "runs" / "a"
    folder.mkdir(parents=True)
    data = {"model": {"source": "python:nets.py:small"}, "method": {"name": "Magnitude"},
            "before": {"macs": measured(10, "MACs")}, "after": {"macs": measured(5, "MACs")}}  # fmt: skip
    (folder / "report.json").write_text(json.dumps(data))
    found = run("report", "runs/a")
    assert found.code == 0
    assert "50.0 % of the MACs stay" in found.out
    assert "page: runs/a/report.html" in found.err
    assert (folder / "report.html").read_text().startswith("<!doctype html>")
    assert run("report", "runs", "--html", "all.html", "--json").data["runs"][0]["model"] == data["model"]
    assert (here / "all.html").is_file()
    assert not (here / "runs" / "report.html").exists()
    run("report", "runs", "--no-page")
    assert not (here / "runs" / "report.html").exists()
    (here / "runs/b").mkdir()
    (here / "runs/b/report.json").write_text('{"model"')
    said = run("report", "runs", "--no-page", "--json")
    assert said.code == 0 and "warning: left out: runs/b: damaged" in said.err
    assert list(said.data["left_out"]) == ["runs/b"] and len(said.data["runs"]) == 1
    assert run("report", "runs/b").code == 2


def test_small_grammars() -> None:
    assert shape_of("1x3x224x224") == (1, 3, 224, 224)
    assert shape_of(None) is None
    assert [value_of(text) for text in ("3", "0.5", "true", "null", '"3"', "plain", "[1, 2]")] == [
        3, 0.5, True, None, "3", "plain", [1, 2]]  # fmt: skip
    assert pairs_of(["p=1", "merge=joint", "note=a=b"], "--set") == {"p": 1, "merge": "joint", "note": "a=b"}
    assert [number_of(text, "") for text in ("12", "0.5", "1e6")] == [12, 0.5, 1e6]
    for wrong in (["p"], ["=3"], ["a b=3"], ["p=1", "p=2"]):
        with pytest.raises(InputError, match="--set"):
            pairs_of(wrong, "--set")
    with pytest.raises(InputError, match="'half' is not a number"):
        number_of("half", "--keep half")


def test_budgets() -> None:
    (one,) = budgets_of(None, keep="0.5", of="macs", floor="0.25", multiple=8)
    assert (one.keep, one.of, one.floor, one.multiple) == (0.5, "macs", 0.25, 8)
    two = budgets_of(
        ["keep=0.5,of=macs", "keep=1000, of=params, multiple=4"], keep=None, of=None, floor=None, multiple=None
    )
    assert [(budget.keep, budget.of, budget.multiple) for budget in two] == [(0.5, "macs", 1), (1000, "params", 4)]
    for wrong in ("of=macs", "keep=0.5,ratio=3", "0.5"):
        with pytest.raises(InputError, match="--budget"):
            budgets_of([wrong], keep=None, of=None, floor=None, multiple=None)
    for wrong in ("keep=1.5", "keep=half", "keep=0.5,of=joules"):
        with pytest.raises(BudgetError):
            budgets_of([wrong], keep=None, of=None, floor=None, multiple=None)
