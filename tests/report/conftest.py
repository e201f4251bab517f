"""A saved run small enough to know by heart: two convolutions and a classifier, cut to half of their MACs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def measured(name: str, value: float, unit: str, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "value": value,
        "unit": unit,
        "definition": f"definition of {name}",
        "spread": None,
        "device": "cpu (test)",
        "versions": {"torch": "2.15.0"},
        "uncounted": [],
        **more,
    }


def side(macs: float, params: float, accuracy: float | None) -> dict[str, Any]:
    made = {
        "macs": measured("macs", macs, "MACs", uncounted=["aten._trilinear"]),
        "params": measured("params", params, "parameters"),
        "latency": measured("latency", macs / 1e6, "ms", spread=0.125),
    }
    if accuracy is not None:
        made["accuracy"] = measured("accuracy", accuracy, "%")
    return made


def report(*, method: str = "Magnitude", keep: float = 0.5, accuracy: float | None = 90.0) -> dict[str, Any]:
    after = side(2e6 * keep, 4000 * keep, accuracy)
    return {
        "niwaki": "0.1.0",
        "command": "niwaki compress python:nets:small --keep 0.5",
        "created": "2026-01-02T03:04:05+00:00",
        "model": {"source": "python:nets:small", "class": "Small", "fingerprint": "f00d"},
        "method": {"name": method, "p": 2, "rule": "global_rank"},
        "budget": [{"keep": keep, "of": "macs", "floor": 1, "multiple": 1}],
        "before": side(2e6, 4000, None if accuracy is None else 93.5),
        "after": after,
        "stages": []
        if accuracy is None
        else [
            {"stage": "cut", "measurements": {"accuracy": measured("accuracy", 41.25, "%")}},
            {"stage": "batch-norm", "measurements": {"accuracy": measured("accuracy", 80.0, "%")}},
            {"stage": "recovery", "measurements": {"accuracy": measured("accuracy", accuracy, "%")}},
        ],
        "receipt": {
            "difference": 3.5e-15,
            "scale": 2.0,
            "exact": False,
            "inexact": ["stem: layer norm over the channels"],
            "door": "eager",
            "inputs": 2,
            "tolerance": 1e-9,
            "physical": True,
            "passed": True,
        },
        "widths": [
            {"tensor": "stem.weight", "axis": 0, "before": 16, "after": 8},
            {"tensor": "body.weight", "axis": 0, "before": 32, "after": 20},
            {"tensor": "body.weight", "axis": 1, "before": 16, "after": 4},
        ],
        "groups": [
            {"name": "stem", "units": 16, "kept": 8, "fixed": None, "exact": False, "inexact": "layer norm"},
            {"name": "body", "units": 32, "kept": 20, "fixed": None, "exact": True, "inexact": None},
            {"name": "head", "units": 10, "kept": 10, "fixed": "output of the model", "exact": True, "inexact": None},
        ],
        "candidates": [
            {"label": "before", "macs": 2e6, "params": 4000, "accuracy": 93.5},
            {"label": "keep 0.7", "macs": 1.4e6, "params": 2800, "accuracy": accuracy and 91.5},
        ],
        "versions": {"torch": "2.15.0", "python": "3.11"},
        "seconds": {"trace": 0.51234, "cut": 0.01},
        "splits": {"source": "digits", "train": 1400, "test": 180, "seed": 0},
    }


PLAN = {
    "cuts": [
        {"tensor": "stem.weight", "axis": 0, "keep": list(range(8))},
        {"tensor": "norm.weight", "axis": 0, "keep": list(range(8))},
        {"tensor": "body.weight", "axis": 0, "keep": list(range(20))},
        {"tensor": "body.weight", "axis": 1, "keep": [[0, 1, 2, 3], [0, 1, 2, 3]], "blocks": 2},
    ]
}

Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Writes a run: save("name", report dict) -> its folder."""

    def write(name: str = "run", data: dict[str, Any] | None = None, plan: dict[str, Any] | None = None) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "report.json").write_text(json.dumps(data or report()), encoding="utf-8")
        (folder / "plan.json").write_text(json.dumps(plan or PLAN), encoding="utf-8")
        (folder / "settings.json").write_text(json.dumps({"seed": 0, "method": {"p": 2}}), encoding="utf-8")
        return folder

    return write


@pytest.fixture
def made() -> Callable[..., dict[str, Any]]:
    """The report's dictionary, with method, keep and accuracy to choose."""
    return report
