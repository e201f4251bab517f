"""Side by side: what is timed, that ratios are what the medians say, and what is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import niwaki
from niwaki.bench import RUNTIMES, bench
from niwaki.bench.items import Item, example_of, open_item
from niwaki.bench.process import work
from niwaki.bench.starting import failure
from niwaki.cli import main
from niwaki.cli.options import RUNTIMES as KNOWN
from niwaki.errors import FileDamagedError, InputError, MissingExtraError, UnknownNameError
from niwaki.export import export_model
from niwaki.measure.turns import Times, in_turns

NETS = """
import os, signal, sys
import torch
from torch import nn

def small(width: int = 8, classes: int = 3) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))

def flat() -> tuple[nn.Module, torch.Tensor]:
    return nn.Linear(4, 3), torch.zeros(1, 4)

class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.table(ids) * mask[..., None]

def two() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return Two(), {"ids": torch.arange(10)[None], "mask": torch.ones(1, 10)}

class Killed(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if sys.argv[-1].endswith("eager.json"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)

def killed() -> tuple[nn.Module, torch.Tensor]:
    return Killed(4, 3), torch.zeros(1, 4)

class Picky(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] == 2:
            raise ValueError("no pairs")
        return super().forward(x)

def picky() -> tuple[nn.Module, torch.Tensor]:
    return Picky(4, 3), torch.zeros(1, 4)
"""
SMALL = "python:nets.py:small"
SHAPE = (1, 1, 8, 8)
QUICK: dict[str, Any] = {"runs": 3, "warm_up": 1, "shape": SHAPE}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """The job runs in this process: a new one takes seconds to load torch."""

    def work_here(job: Path, threads: str, progress: Any) -> tuple[int, str]:
        work(json.loads(job.read_text()))
        return 0, ""

    monkeypatch.setattr("niwaki.bench.starting.spawn", work_here)


def test_turns() -> None:
    order: list[str] = []
    calls: dict[str, Callable[[], Any]] = {name: lambda name=name: order.append(name) for name in "ab"}  # type: ignore[misc]
    heard: list[int] = []
    found = in_turns(calls, runs=3, warm_up=2, heard=heard.append)
    assert order == [*"aabb", *"ababab"] and heard == [1, 2, 3]
    assert [len(found[name].wall) for name in "ab"] == [len(found[name].cpu) for name in "ab"] == [3, 3]
    times = Times((4.0, 1.0, 2.0, 3.0), (8.0, 6.0, 7.0, 5.0))
    assert (times.median(), times.median("cpu"), times.quarters()) == (2.5, 6.5, (1.25, 3.75))
    assert Times((2.0,), (1.0,)).quarters() == (2.0, 2.0)


def test_networks_and_their_counts(here: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    found = bench(
        [SMALL, f"{SMALL}?width=2", SMALL], batches=(1, 2), **QUICK, progress=lambda *told: heard.append(told)
    )
    assert [item.label for item in found.items] == [SMALL, f"{SMALL}?width=2", f"{SMALL} (2)"]
    assert [(item.macs, item.params) for item in found.items[:2]] == [
        (8 * 36 * 9 + 24, 80 + 27),
        (2 * 36 * 9 + 6, 20 + 9),
    ]
    assert [(row.runtime, row.batch, row.item) for row in found.rows] == [
        ("eager", batch, item.label) for batch in (1, 2) for item in found.items
    ]
    for row in found.rows:
        first = next(one for one in found.rows if one.batch == row.batch)
        assert row.ms and first.ms and row.quarters and row.cpu_ms
        assert row.times_as_fast == first.ms / row.ms and row.quarters[0] <= row.ms <= row.quarters[1]
        assert row.outputs == ((row.batch, 3),)
    assert (found.settings["threads"], found.settings["runs"], found.settings["inputs"]) == (1, 3, ["1x8x8 float32"])
    told = found.to_json()
    assert json.loads(json.dumps(told)) == told
    assert set(told["rows"][0]) == {
        "item", "runtime", "batch", "ms", "quarters", "cpu_ms", "times_as_fast", "outputs", "failed",
    }  # fmt: skip
    assert ("eager, batch 2", 3, 3) in heard


def test_files_and_networks_in_every_runtime(here: Path, inside: None) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    model = niwaki.models.load(SMALL, shape=SHAPE[1:]).model
    for name in ("a.onnx", "a.xml", "a.pt2"):
        export_model(model, torch.rand(SHAPE), name, runs=0)
    found = bench(["a.onnx", SMALL, "a.xml", "a.pt2"], runtimes=("eager", "onnxruntime", "openvino"), **QUICK)
    able = {
        (row.runtime, row.item)
        for row in found.rows
        if row.ms is not None and row.outputs == ((1, 3),) and not row.failed
    }
    assert able == {
        ("eager", SMALL), ("eager", "a.pt2"), ("onnxruntime", "a.onnx"), ("onnxruntime", SMALL),
        ("openvino", "a.onnx"), ("openvino", SMALL), ("openvino", "a.xml"),
    }  # fmt: skip
    without = {row.item: row.failed for row in found.rows if row.runtime == "eager" and row.ms is None}
    assert without == {"a.onnx": "onnx runs in onnxruntime, openvino", "a.xml": "openvino runs in openvino"}
    assert all(row.times_as_fast is None for row in found.rows if row.runtime == "eager")  # the first can't run there
    assert found.settings["versions"]["openvino"]
    told = {item.label: item for item in found.items}
    assert told["a.xml"].bytes == sum((here / name).stat().st_size for name in ("a.xml", "a.bin"))
    assert told["a.onnx"].params == told["a.pt2"].params == 107 and told["a.pt2"].macs == told[SMALL].macs


def test_the_runtimes_that_suit(here: Path, inside: None) -> None:
    pytest.importorskip("onnxruntime")
    export_model(nn.Linear(4, 3), torch.rand(1, 4), "a.onnx", runs=0)
    found = bench(["a.onnx"], runs=1, warm_up=0)
    assert found.settings["runtimes"] == ["onnxruntime"] and found.rows[0].ms is not None
    assert found.settings["inputs"] == ["4 float32"]


def test_several_named_inputs_of_whole_numbers(here: Path, inside: None) -> None:
    found = bench(["python:nets.py:two"], runtimes=["eager"], batches=[3], runs=1)
    assert found.rows[0].outputs == ((3, 10, 4),) and found.settings["inputs"] == ["10 int64", "10 float32"]


def test_a_runtime_that_dies_leaves_the_others(here: Path) -> None:
    pytest.importorskip("onnxruntime")
    found = bench(["python:nets.py:flat", "python:nets.py:killed"], runtimes=("eager", "onnxruntime"), runs=2)
    dead = [row for row in found.rows if row.runtime == "eager"]
    assert len(dead) == 2 and all("the process of eager ended with signal 9" in row.failed for row in dead)
    assert all(row.ms for row in found.rows if row.runtime == "onnxruntime")


def test_one_that_fails_leaves_the_others(here: Path, inside: None) -> None:
    found = bench(["python:nets.py:flat", "python:nets.py:picky"], batches=(1, 2), runs=2)
    assert [bool(row.ms) for row in found.rows] == [True, True, True, False]
    assert found.rows[-1].failed == "ValueError: no pairs"


def test_what_is_refused(here: Path, inside: None, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "empty").mkdir()
    (here / "text.onnx").write_text("text")
    (here / "text.pt2").write_text("text")
    for names, more, kind, said in (
        ([], {}, InputError, "nothing to time"),
        (["nothing"], {}, InputError, "no such file or folder, and no source of models"),
        (["nothing.onnx"], {}, InputError, "no such file"),
        (["empty"], {}, InputError, "a folder without a run"),
        (["text.onnx"], {}, FileDamagedError, "ONNX can't read it"),
        (["text.pt2"], {}, FileDamagedError, "no archive of torch.export"),
        ([SMALL], {"runs": 0}, InputError, "a count below 1"),
        ([SMALL], {"batches": (0,)}, InputError, "a count below 1"),
        ([SMALL], {"runtimes": ["tflite"]}, UnknownNameError, "known: eager, compile, onnxruntime, openvino"),
        (["python:nets.py:flat", "python:nets.py:two"], {}, InputError, "it takes 2 inputs, the others 1"),
        ([SMALL, f"{SMALL}?classes=4"], {"shape": SHAPE}, InputError, r"outputs of \[\[1, 3\]\] and \[\[1, 4\]\]"),
    ):
        with pytest.raises(kind, match=said):
            bench(names, **{"runs": 1, "warm_up": 0, **more})  # type: ignore[arg-type]
    monkeypatch.setattr("niwaki.bench.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"not installed: openvino; do: pip install 'niwaki\[openvino\]'"):
        bench([SMALL], runtimes=["openvino"])


def test_a_run_is_opened_with_its_own_weights(here: Path) -> None:
    words = ("compress", SMALL, "--input", "1x1x8x8", "--keep", "0.5", "--out", "r", "--runs", "0", "--json")
    assert main(["--quiet", *words]) == 0
    item = open_item("r", shape=None, seed=0)
    assert (item.kind, item.bytes) == ("run", (here / "r" / "model.safetensors").stat().st_size)
    assert tuple(item.example.shape) == SHAPE  # type: ignore[union-attr]
    saved = niwaki.load("r", niwaki.models.load(SMALL, shape=SHAPE[1:]).factory)
    assert all(torch.equal(a, b) for a, b in zip(item.opened.parameters(), saved.parameters(), strict=True))


def test_the_command(here: Path, inside: None, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", SMALL, f"{SMALL}?width=2", "--batch", "1", "2", "--input", "1x1x8x8", "--runs", "2"]
    assert main([*arguments, "--json"]) == 0
    lines = capfd.readouterr().out.splitlines()
    told = json.loads("\n".join(line for line in lines if not line.startswith("niwaki-bench ")))
    assert [row["batch"] for row in told["rows"]] == [1, 1, 2, 2] and len(told["items"]) == 2
    assert main([*arguments, "--runtime", "eager"]) == 0
    shown = capfd.readouterr().out
    assert "times as fast" in shown and "1 CPU threads, 2 runs after 5 of warm-up" in shown
    for wrong, said in (
        ((SMALL, "--runtime", "tflite"), "unknown runtime 'tflite'"),
        ((SMALL, "--batch", "many"), "no number from 1"),
        ((), "Missing argument"),
        (("nowhere",), "no such file or folder"),
    ):
        assert main(["bench", *wrong]) == 2
        assert said in capfd.readouterr().err
    assert tuple(RUNTIMES) == KNOWN


def test_failures_in_a_line() -> None:
    assert failure(InputError("a", found="b")) == "a; found: b"
    assert failure(KeyError("x")) == "KeyError: 'x'" and failure(ValueError()) == "ValueError: no message"


def test_the_input_is_one_that_an_item_knows_and_no_guess() -> None:
    """A network that says nothing is taken to read pictures of 224; a file or run beside it knows better."""
    guessed, sure = (Item(name, "model", name, example=torch.zeros(1, count)) for name, count in (("a", 3), ("b", 1)))
    guessed = replace(guessed, assumed="a picture, as a guess")
    file = Item("c.onnx", "onnx", "c.onnx", example=torch.zeros(1, 2))
    assert example_of([guessed, sure, file], None) is sure.example
    assert example_of([guessed, file], None) is file.example
    assert example_of([guessed], None) is guessed.example
