"""Every bad input that the design names: what was typed, what was printed, and that nothing was lost.

The command line's own refusals (wrong options, unknown names) are in tests/cli.
"""

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import niwaki
from niwaki.cli import main
from niwaki.methods import Magnitude, NormScale, Random, Taylor

NETS = """
import torch
from torch import nn

def small(width: int = 8) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))

class Hard(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 8, 1), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).mean((2, 3)).view(-1, 8).relu())

def hard() -> nn.Module:
    return Hard()
"""
MODEL, SHAPE = "python:nets.py:small", ("--input", "1x1x8x8", "--runs", "0")


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str


Say = Callable[..., Said]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with two finished runs: one through each door."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "nets.py").write_text(NETS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("small", "hard"):
            assert main(["--quiet", "compress", f"python:nets.py:{name}", *SHAPE, "--out", name]) == 0
    yield folder


@pytest.fixture
def here(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the current folder."""
    shutil.copytree(finished, tmp_path / "work", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def say(here: Path, capfd: pytest.CaptureFixture[str]) -> Say:
    def call(*typed: str) -> Said:
        capfd.readouterr()
        code = main(list(typed))
        printed = capfd.readouterr()
        return Said(code, printed.out, printed.err)

    return call


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a folder, hidden leftovers too."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def factory(name: str = "small") -> Callable[[], nn.Module]:
    space: dict[str, Any] = {"__name__": "nets"}
    exec(NETS, space)
    made: Callable[[], nn.Module] = space[name]
    return made


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()


def outcome(**settings: Any) -> Any:
    fixed: dict[str, Any] = {"method": Magnitude(), "budget": niwaki.Budget(keep=0.5)}
    return niwaki.compress(mlp(), torch.zeros(1, 4), **{**fixed, **settings})


# -- files ----------

COMMANDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "plan.json": (("verify", MODEL, "small"), ("load-check", "small", MODEL)),
    "surgery.json": (("load-check", "small", MODEL),),
    "model.safetensors": (("load-check", "small", MODEL),),
    "report.json": (("report", "small"), ("load-check", "small", MODEL)),
}


@pytest.mark.parametrize("damage", ["empty", "half", "last byte", "noise", "absent", "folder"])
@pytest.mark.parametrize("name", COMMANDS)
def test_damaged_files_of_a_run_are_refused_and_left_as_they_are(here: Path, say: Say, name: str, damage: str) -> None:
    file = here / "small" / name
    raw = file.read_bytes()
    file.unlink()
    if damage == "folder":
        file.mkdir()
    elif damage != "absent":
        file.write_bytes(
            {"empty": b"", "half": raw[: len(raw) // 2], "last byte": raw.rstrip()[:-1], "noise": b"\x93\x00\xff" * 50}[
                damage
            ]
        )
    before = files(here)
    for typed in COMMANDS[name]:
        found = say(*typed)
        assert found.code == 2, (typed, found.err)
        assert found.err.startswith("error: ") and "found: " in found.err and "Traceback" not in found.err
        assert files(here) == before


SURGERY: dict[str, Any] = {
    "a list": lambda d: [],
    "no door": lambda d: {k: v for k, v in d.items() if k != "door"},
    "an unknown door": lambda d: {**d, "door": "magic"},
    "mends as a number": lambda d: {**d, "mends": 5},
    "mends of numbers": lambda d: {**d, "mends": [1]},
    "a mend of an unknown module": lambda d: {
        **d,
        "mends": [{"module": "zzz", "attribute": "out_features", "value": 3}],
    },
    "a mend of an unknown attribute": lambda d: {**d, "mends": [{"module": "0", "attribute": "zzz", "value": 3}]},
    "a mend of a tensor": lambda d: {**d, "mends": [{"module": "0", "attribute": "weight", "value": 3}]},
    "a mend of a method": lambda d: {**d, "mends": [{"module": "0", "attribute": "forward", "value": 3}]},
    "a mend of the class": lambda d: {**d, "mends": [{"module": "0", "attribute": "__class__", "value": "int"}]},
    "a mend with text": lambda d: {**d, "mends": [{"module": "0", "attribute": "out_channels", "value": "3"}]},
    "scaled beyond": lambda d: {**d, "scaled": [{"tensor": "0.weight", "axis": 0, "positions": [999], "factor": 2.0}]},
    "scaled by text": lambda d: {**d, "scaled": [{"tensor": "0.weight", "axis": 0, "positions": [0], "factor": "x"}]},
    "scaled unknown": lambda d: {**d, "scaled": [{"tensor": "zzz", "axis": 0, "positions": [0], "factor": 2.0}]},
    "exported without a graph": lambda d: {**d, "door": "exported", "graph": None},
    "exported with an empty graph": lambda d: {**d, "door": "exported", "graph": {}},
}


@pytest.mark.parametrize("name", SURGERY)
def test_tampered_surgery_is_refused(here: Path, name: str) -> None:
    file = here / "small" / "surgery.json"
    file.write_text(json.dumps(SURGERY[name](json.loads(file.read_text()))))
    with pytest.raises(niwaki.errors.InputError):
        niwaki.load(here / "small", factory())


def test_tensors_that_do_not_fit_the_plan_are_refused(here: Path) -> None:
    from safetensors.torch import load_file

    file = here / "small" / "model.safetensors"
    tensors = load_file(file)
    for change in (
        {k: v for k, v in tensors.items() if k != "5.bias"},
        {**tensors, "stranger": torch.zeros(2)},
        {**tensors, "5.bias": torch.zeros(9)},
        {**tensors, "5.bias": torch.zeros(4, dtype=torch.float64)},
    ):
        save_file(change, file)
        with pytest.raises(niwaki.errors.InputError):
            niwaki.load(here / "small", factory())
    for aliases in ("[", '{"5.bias": "nothing"}', "[1]", "7"):
        save_file(tensors, file, metadata={"aliases": aliases})
        with pytest.raises(niwaki.errors.InputError):
            niwaki.load(here / "small", factory())


def test_a_run_or_plan_for_another_model(here: Path, say: Say) -> None:
    before = files(here)
    for typed in (
        ("verify", f"{MODEL}?width=12", "small"),
        ("load-check", "small", f"{MODEL}?width=12"),
        ("verify", MODEL, "hard"),
    ):
        found = say(*typed)
        assert found.code == 2
        assert "apply a plan made for" in found.err and "use the model the plan was made for" in found.err
    assert files(here) == before


# -- files from strangers are never executed ----------


def node(op: str, name: str, target: str, args: Any = (), kwargs: Any = None) -> dict[str, Any]:
    return {"op": op, "name": name, "target": target, "args": list(args), "kwargs": {"dict": kwargs or {}}}


OPEN = "open('pwned', 'w')"
CALL = node("call_function", "y", "aten::relu|default", [{"node": "x"}])
EVIL: dict[str, list[dict[str, Any]]] = {
    "another namespace": [node("call_function", "y", "prims::relu|default", [{"node": "x"}])],
    "a Python function": [node("call_function", "y", "os.system", ["touch pwned"])],
    "an operator that is none": [node("call_function", "y", "operator.__import__", ["os"])],
    "attributes of a namespace": [node("call_function", "y", "aten::__class__|default", [{"node": "x"}])],
    "a method of an operator": [node("call_function", "y", "aten::relu|__init__", [{"node": "x"}])],
    "a kind of node that calls": [node("call_method", "y", "relu", [{"node": "x"}])],
    "a module call": [node("call_module", "y", "a", [{"node": "x"}])],
    "code as a tensor's name": [node("get_attr", "y", f"a, {OPEN}")],
    "inner attributes as a tensor's name": [node("get_attr", "y", "__class__.__init__.__globals__")],
    "code as an input's name": [node("placeholder", "y", f"y={OPEN}")],
    "code as a node's name": [{**CALL, "name": f"y={OPEN}"}],
    "a line break in a name": [{**CALL, "name": "y\n"}],
    "a line break in a tensor's name": [node("get_attr", "y", "training\n")],
    "code as an argument's name": [{**CALL, "kwargs": {"dict": {f"**{{}}, **({OPEN} and {{}}), q": 1}}}],
    "a call that maps files": [node("call_function", "y", "aten::from_file|default", ["pwned", True, 4])],
    "a call that writes files": [node("call_function", "y", "aten::save|", [{"node": "x"}, "pwned"])],
    "a node that is not there": [node("call_function", "y", "aten::relu|default", [{"node": "z"}])],
    "an unknown kind of argument": [node("call_function", "y", "aten::relu|default", [{"pickle": "gASV"}])],
    "two kinds of argument in one": [
        node("call_function", "y", "aten::relu|default", [{"node": "x", "dtype": "float32"}])
    ],
}


@pytest.mark.parametrize("name", EVIL)
def test_saved_graphs_that_are_not_aten_on_tensors_are_refused(here: Path, name: str) -> None:
    """Put into a run that was saved through the exported door: load refuses, and nothing was run."""
    file = here / "hard" / "surgery.json"
    data = json.loads(file.read_text())
    program = data["graph"]["programs"]["eval"]
    first = next(i for i, n in enumerate(program["nodes"]) if n["op"] == "placeholder")
    text = json.dumps(EVIL[name]).replace('"node": "x"', f'"node": "{program["nodes"][first]["name"]}"')
    program["nodes"][first + 1 : first + 1] = json.loads(text)
    file.write_text(json.dumps(data))
    before = files(here)
    with pytest.raises(niwaki.errors.FileDamagedError):
        small = niwaki.load(here / "hard", factory("hard"))
        small(torch.zeros(1, 1, 8, 8))
    assert files(here) == before


@pytest.mark.parametrize("where", ["in_spec", "out_spec"])
def test_structures_of_saved_graphs_import_nothing(here: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """torch reads a defaultdict's factory by importing the module that the file names."""
    (here / "trap.py").write_text("open('pwned', 'w').close()\n\n\ndef made() -> int:\n    return 0\n")
    monkeypatch.syspath_prepend(here)
    leaf = {"type": None, "context": None, "children_spec": []}
    context = {"default_factory_module": "trap", "default_factory_name": "made", "dict_context": ["a"]}
    spec = json.dumps([1, {"type": "collections.defaultdict", "context": json.dumps(context), "children_spec": [leaf]}])
    file = here / "hard" / "surgery.json"
    data = json.loads(file.read_text())
    data["graph"]["programs"]["eval"][where] = spec
    file.write_text(json.dumps(data))
    with pytest.raises(niwaki.errors.FileDamagedError):
        niwaki.load(here / "hard", factory("hard"))
    assert not (here / "pwned").exists() and "trap" not in sys.modules


class Trap:
    """Makes a file as soon as a pickle of it is read."""

    def __reduce__(self) -> Any:
        return (open, ("pwned", "w"))


@pytest.mark.parametrize("kind", ["torch file", "plain pickle", "old torch file", "among tensors", "named safetensors"])
def test_pickles_given_as_checkpoints_are_not_run(here: Path, say: Say, kind: str) -> None:
    path = here / ("bad.safetensors" if kind == "named safetensors" else "bad.pt")
    if kind == "plain pickle" or kind == "named safetensors":
        path.write_bytes(pickle.dumps(Trap()))
    else:
        content = {"0.weight": torch.zeros(2), "x": Trap()} if kind == "among tensors" else Trap()
        torch.save(content, path, _use_new_zipfile_serialization=kind != "old torch file")
    before = files(here)
    found = say("compress", MODEL, "--checkpoint", path.name, *SHAPE, "--out", "r")
    assert found.code == 2 and "read a checkpoint" in found.err
    assert not (here / "pwned").exists() and files(here) == before


def test_object_arrays_given_as_data_are_not_run(here: Path, say: Say) -> None:
    np.savez(here / "bad.npz", x=np.array([Trap()], dtype=object), y=np.zeros(1))
    assert say("compress", MODEL, "--data", "npz:bad.npz", "--out", "r").code == 2
    assert not (here / "pwned").exists() and not (here / "r").exists()


# -- data and weights ----------


def test_an_empty_data_set(here: Path, say: Say) -> None:
    np.savez(here / "none.npz", x=np.zeros((0, 8, 8), np.uint8), y=np.zeros(0, np.int64))
    (here / "photos" / "train" / "cats").mkdir(parents=True)
    before = files(here)
    for spec in ("npz:none.npz", "imagefolder:photos"):
        found = say("compress", MODEL, "--data", spec, "--out", "r")
        assert found.code == 2 and "Traceback" not in found.err, found.err
        assert files(here) == before


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", [Magnitude(), NormScale(), Random()], ids=lambda m: type(m).__name__)
def test_weights_that_are_no_numbers(method: Any, bad: float) -> None:
    model = factory()().eval()
    with torch.no_grad():
        model[0].weight[3, 0, 1, 1] = bad
    with pytest.raises(niwaki.errors.NotFiniteError, match=r"found: NaN or infinity; where: 0\.weight"):
        niwaki.compress(model, torch.zeros(1, 1, 8, 8), method=method, budget=niwaki.Budget(keep=0.5))


def test_a_budget_that_cannot_be_met_says_what_can(here: Path, say: Say) -> None:
    before = files(here)
    found = say("compress", MODEL, *SHAPE, "--keep", "0.01", "--out", "r")
    assert found.code == 2 and "the least that floors, multiples and fixed groups allow is" in found.err
    least = float(found.err.split("allow is ")[1].split("(")[1].split(")")[0])
    assert say("compress", MODEL, *SHAPE, "--keep", "0.01", "--out", "r", "--json").out.count("allow is") == 1
    assert files(here) == before
    assert say("compress", MODEL, *SHAPE, "--keep", str(least + 0.001), "--out", "r").code == 0


def test_a_protected_layer_that_does_not_exist(here: Path, say: Say) -> None:
    found = say("compress", MODEL, *SHAPE, "--protect", "layer9", "--out", "r")
    assert found.code == 2 and "protect 'layer9'; found: no module or parameter of that name" in found.err
    assert not (here / "r").exists()


def test_everything_protected(here: Path, say: Say) -> None:
    found = say("compress", MODEL, *SHAPE, "--protect", "*", "--out", "r")
    assert found.code == 2 and "0 of" in found.err and not (here / "r").exists()


# -- wrong objects ----------


@pytest.mark.parametrize("method", ["magnitude", Magnitude, niwaki.scores.Magnitude(), None, lambda job: job])
def test_a_method_that_is_none(method: Any) -> None:
    with pytest.raises(niwaki.errors.InputError, match=r"pass an instance from niwaki\.methods, e\.g\. Magnitude\(\)"):
        outcome(method=method)


@pytest.mark.parametrize("budget", [0.5, "half", None, (), (0.5,)])
def test_a_budget_that_is_none(budget: Any) -> None:
    with pytest.raises(niwaki.errors.InputError):
        outcome(budget=budget)


def test_gradients_without_a_task(here: Path, say: Say) -> None:
    with pytest.raises(niwaki.errors.InputError, match="Taylor without data; found: its score needs gradients"):
        outcome(method=Taylor())
    assert say("compress", MODEL, *SHAPE, "--method", "taylor", "--out", "r").code == 2
    assert not (here / "r").exists()


def test_recovery_without_a_task() -> None:
    with pytest.raises(niwaki.errors.InputError, match="recovery without data"):
        outcome(recovery=niwaki.train.Recovery(epochs=1))


@pytest.mark.parametrize("settings", [{"rule": "best"}, {"grids": "cells"}, {"p": 3}, {"over": "sideways"}], ids=str)
def test_settings_of_a_method_that_do_not_exist(settings: dict[str, Any]) -> None:
    with pytest.raises(niwaki.errors.InputError):
        outcome(method=Magnitude(**settings))


@pytest.mark.parametrize(
    "example", [torch.zeros(1, 5), None, "x", (torch.zeros(1, 4), torch.zeros(1)), {"y": torch.zeros(1, 4)}], ids=str
)
def test_examples_that_do_not_fit(example: Any) -> None:
    with pytest.raises(niwaki.errors.InputError, match="check that model"):
        niwaki.compress(mlp(), example, method=Magnitude(), budget=niwaki.Budget(keep=0.5))


# -- folders, kills, memory ----------


def test_an_existing_folder_is_kept(here: Path, say: Say) -> None:
    before = files(here)
    found = say("compress", MODEL, *SHAPE, "--out", "small")
    assert (found.code, "write a run to small; found: it exists" in found.err) == (2, True)
    with pytest.raises(
        niwaki.errors.RunExistsError, match="found: it exists; do: choose another folder, or give force=True"
    ):
        outcome().save(here / "small")
    assert files(here) == before
    outcome().save(here / "small", force=True)
    assert files(here / "small") != {k: v for k, v in before.items() if k.startswith("small")}
    assert {path.name for path in here.iterdir()} == {"small", "hard", "nets.py"}


class Killed(BaseException):
    """What stops a process in the middle: neither an error nor an interrupt that someone expects."""


PLACES = ["Path.write_text", "safetensors.torch.save_file", "json.dumps", "os.rename first", "os.rename second"]


@pytest.mark.parametrize("error", [Killed, OSError, KeyboardInterrupt])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("exists", [True, False])
def test_a_save_that_is_stopped_loses_nothing(
    here: Path, monkeypatch: pytest.MonkeyPatch, exists: bool, place: str, error: Any
) -> None:
    """Whether an old run is there or not: afterwards everything is as before, with no leftovers."""
    made = outcome()
    target = here / ("small" if exists else "new")
    if place == "os.rename second" and not exists:
        pytest.skip("a new folder is renamed once")
    before = files(here)
    folders = {path.name for path in here.iterdir()}
    wanted = 2 if place.endswith(("second", "dumps")) else 1
    calls = 0

    def stop(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == wanted:
                raise error("no space left on device")
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        if place == "Path.write_text":
            patch.setattr(Path, "write_text", stop(Path.write_text))
        elif place == "json.dumps":
            patch.setattr(json, "dumps", stop(json.dumps))
        elif place.startswith("os.rename"):
            patch.setattr(os, "rename", stop(os.rename))
        else:
            import safetensors.torch

            patch.setattr(safetensors.torch, "save_file", stop(safetensors.torch.save_file))
        with pytest.raises(error):
            made.save(target, force=exists)
    assert calls >= wanted
    assert {path.name for path in here.iterdir()} == folders
    assert files(here) == before


def test_a_failed_compression_over_an_old_run_keeps_it(here: Path, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(here)
    assert say("compress", MODEL, *SHAPE, "--keep", "0.0001", "--out", "small", "--force").code == 2
    with monkeypatch.context() as patch:
        patch.setattr(
            sys.modules["niwaki.methods.job"], "save_tensors", lambda *_: (_ for _ in ()).throw(OSError("disk full"))
        )
        found = say("compress", MODEL, *SHAPE, "--out", "small", "--force")
    assert found.code == 1 and "disk full" in found.err
    assert files(here) == before


@pytest.mark.parametrize("when", ["conv2d", "linear"])
@pytest.mark.parametrize("command", ["compress", "trace", "measure"])
def test_a_device_that_is_out_of_memory(
    say: Say, here: Path, monkeypatch: pytest.MonkeyPatch, command: str, when: str
) -> None:
    """Exit code 1, one line that says what to do, nothing written; whichever step it hits."""

    def full(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")

    typed = (command, MODEL, "--input", "1x1x8x8", *(("--out", "r", "--runs", "0") if command == "compress" else ()))
    layer = nn.Conv2d if when == "conv2d" else nn.Linear
    before = files(here)
    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", full)
        found = say(*typed)
    assert found.code == 1
    assert "found: CUDA out of memory. Tried to allocate 2.00 GiB." in found.err
    assert "do: " in found.err and "smaller" in found.err and "more lines" not in found.err
    assert files(here) == before


def test_a_device_that_fills_up_while_the_cut_is_judged(say: Say, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    before = files(here)
    monkeypatch.setattr(sys.modules["niwaki.methods.steps"], "verify", full)
    found = say("compress", MODEL, *SHAPE, "--out", "small", "--force")
    assert (found.code, "CUDA out of memory." in found.err) == (1, True)
    assert files(here) == before
