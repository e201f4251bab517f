"""`niwaki export`, and `niwaki compress --export` with several targets."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from niwaki.cli.listing import split
from niwaki.cli.options import EXPORTS

pytest.importorskip("onnxruntime")
Run = Callable[..., Any]
MODEL = "python:nets.py:small"
SHAPE = ("--input", "1x1x8x8")


def test_the_names_are_the_library_s() -> None:
    from niwaki.cli.exporting import FILES
    from niwaki.export import TARGETS

    assert set(EXPORTS) == set(FILES) == {*TARGETS, "int8"}
    assert all(FILES[name].endswith(kind.extension) for name, kind in TARGETS.items())


def test_several_words_after_one_option() -> None:
    assert split(["onnx,pt2", "pt2", " int8 "]) == ["onnx", "pt2", "int8"]


def test_a_run_s_exports_are_in_its_report(run: Run, here: Path) -> None:
    words = ("compress", "--export", "onnx", "pt2", MODEL, *SHAPE, "--out", "r", "--runs", "2", "--json")
    found = run(*words)
    assert found.code == 0, found.err
    assert {"model.onnx", "model.pt2"} <= {path.name for path in (here / "r").iterdir()}
    assert found.data["onnx"]["latency"]["value"] > 0 and found.data["onnx"]["tensorrt_refuses"] == {}
    again = run("export", "r", "--to", "pt2", "--json")
    assert again.code == 2 and again.data["error"]["found"] == "model.pt2 exists"
    done = run("export", "r", "--to", "pt2", "--batch", "4", "--force", "--runs", "1", "--json")
    assert done.code == 0, done.err
    saved = json.loads((here / "r" / "report.json").read_text())
    assert saved["exports"] == {"onnx": found.data["onnx"], "pt2": done.data["exports"]["pt2"]}
    assert saved["exports"]["pt2"]["batch"] == 4
    page = (here / "r" / "report.html").read_text()
    assert "<h2>Exports</h2>" in page and "model.onnx" in page
    shown = run("report", "r", "--no-page").out
    assert "Exports" in shown and "model.pt2" in shown


def test_weights_beside_the_file_are_not_written_over(run: Run, here: Path) -> None:
    (here / "mine").mkdir()
    (here / "mine/model.bin").write_bytes(b"precious")
    said = run("export", MODEL, *SHAPE, "--to", "openvino", "--out", "mine", "--json")
    assert said.code == 2 and said.data["error"]["found"] == "model.bin exists"
    assert [path.name for path in (here / "mine").iterdir()] == ["model.bin"]


def test_a_model_by_its_name(run: Run, here: Path) -> None:
    found = run("export", MODEL, *SHAPE, "--to", "pt2", "onnx", "--out", "made", "--runs", "0", "--json")
    assert found.code == 0, found.err
    assert {path.name for path in (here / "made").iterdir()} == {"model.pt2", "model.onnx"}
    assert list(found.data["exports"]) == ["pt2", "onnx"] and "latency" not in found.data["exports"]["pt2"]
    assert "the weights are random" in found.err


def test_one_that_fails_leaves_the_others(run: Run, here: Path) -> None:
    words = ("export", MODEL, *SHAPE, "--to", "int8,pt2", "--out", "made", "--runs", "0")
    found = run(*words, "--json")
    assert found.code == 2  # untrained batch norms say nothing of ranges
    assert "no layer whose input has a range" in found.data["exports"]["int8"]["failed"]
    assert [path.name for path in (here / "made").iterdir()] == ["model.pt2"]
    assert "FAILED" in run(*words, "--force").out


DECIDING = """
import torch
from torch import nn

class Deciding(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
    def forward(self, x):
        return x if float(self.layer(x).sum()) > 0 else -x

def deciding():
    return Deciding(), torch.zeros(1, 4)
"""


def test_what_cannot_be_exported_leaves_nothing(run: Run, here: Path) -> None:
    (here / "deciding.py").write_text(DECIDING)
    found = run("export", "python:deciding.py:deciding", "--to", "pt2", "--out", "made")
    assert found.code == 1 and "export to model.pt2" in found.err
    assert not (here / "made").exists()


WRONG = {
    "no target": ((MODEL, "--out", "o"), "give --to"),
    "unknown target": ((MODEL, "--to", "tflite", "--out", "o"), "unknown export target 'tflite'; found: known: onnx"),
    "unknown second": ((MODEL, "--to", "onnx", "tflite", "--out", "o"), "unknown export target 'tflite'"),
    "no place": ((MODEL, "--to", "pt2"), "say where the files go: --out DIR"),
    "batch": ((MODEL, "--to", "pt2", "--out", "o", "--batch", "many"), "neither dynamic nor a number"),
    "a file for a folder": ((MODEL, "--to", "pt2", "--out", "nets.py"), "found: a file"),
    "a folder without a run": (("empty", "--to", "pt2"), "a folder without a run"),
    "no run": (("nets.py", "--to", "pt2", "--out", "o"), "a file, neither a run's folder"),
    "nothing there": (("nowhere", "--to", "pt2", "--out", "o"), "no such file or folder, and no source of models"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_words(run: Run, here: Path, case: str) -> None:
    (here / "empty").mkdir()
    words, said = WRONG[case]
    found = run("export", *words)
    assert found.code == 2 and said in found.err, found.err
    assert sorted(path.name for path in here.iterdir() if path.name != "__pycache__") == ["empty", "nets.py"]


def test_a_missing_package_stops_compress_before_it_starts(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("niwaki.export.target.find_spec", lambda name: None)
    found = run("compress", MODEL, *SHAPE, "--out", "r", "--export", "tensorrt")
    assert found.code == 2 and "not installed: tensorrt" in found.err and "NVIDIA GPU" in found.err
    assert not (here / "r").exists()
