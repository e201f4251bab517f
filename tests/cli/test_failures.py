"""Every wrong input: what was typed, what is printed, which exit code, and that nothing is written."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from niwaki.cli import main

Run = Callable[..., Any]

WRONG = {
    "nothing": ((), "Usage: niwaki"),
    "unknown command": (("prune",), "No such command 'prune'"),
    "no model": (("trace",), "Missing argument"),
    "unknown option": (("trace", "python:nets.py:small", "--wat"), "No such option"),
    "unknown source": (("trace", "nope:x"), "unknown source of models 'nope:x'; found: known: torchvision:"),
    "unknown factory": (("trace", "python:nets.py:large"), "unknown factory in nets.py 'large'; found: known: small"),
    "unknown torchvision model": (("trace", "torchvision:resnet19"), "resnet19"),
    "argument": (("trace", "python:nets.py:small?width=x"), "argument 'width=x'"),
    "shape": (("trace", "python:nets.py:small", "--input", "1xax8"), "--input 1xax8; found: not a shape"),
    "shape of zero": (("measure", "python:nets.py:small", "--input", "1x1x0x8"), "not a shape"),
    "no SVG": (("trace", "python:nets.py:small", "--input", "2x1x4x4", "--picture", "g.png"), "end it with .svg"),
    "no checkpoint": (("trace", "python:nets.py:small", "--checkpoint", "no.pt"), "no.pt"),
    "protect": (("trace", "python:nets.py:with_example", "--protect", "head"), "head"),
    "unknown data": (("measure", "python:nets.py:small", "--data", "mnist"), "unknown kind of data 'mnist'"),
    "data of several targets": (("measure", "python:nets.py:small", "--data", "samples:x.npz"), "text:FILE"),
    "a text without a place": (("measure", "python:nets.py:small", "--data", "text:"), "write text:FILE"),
    "no data there": (("measure", "python:nets.py:small", "--data", "npz:no.npz"), "no such file or folder"),
    "unknown method": (("methods", "magic"), "unknown method 'magic'; found: known:"),
    "no run": (("report", "."), "no report.json in it or below"),
    "no folder": (("report", "runs"), "no such folder"),
    "no plan": (("verify", "python:nets.py:small", "runs"), "no plan there"),
    "no run either": (("measure", "."), "a folder without a run"),
    "threads": (("measure", "python:nets.py:small", "--threads", "0"), "--threads"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "said"), WRONG.values(), ids=WRONG)
def test_says_what_is_wrong_and_writes_nothing(here: Path, run: Run, arguments: tuple[str, ...], said: str) -> None:
    before = sorted(here.iterdir())
    found = run(*arguments)
    assert (found.code, found.out) == (2, "") if arguments else (2, found.out)
    assert said in found.err + found.out
    assert "Traceback" not in found.err
    assert [path for path in sorted(here.iterdir()) if path.name != "__pycache__"] == before


@pytest.mark.parametrize("name", [name for name in WRONG if name != "nothing"])
def test_json_carries_the_four_parts(run: Run, name: str) -> None:
    found = run(*WRONG[name][0], "--json")
    assert found.code == 2
    assert set(found.data) == {"error"}
    assert set(found.data["error"]) == {"asked", "found", "where", "do"}
    assert found.data["error"]["asked"]
    assert "error:" not in found.err


def test_out_of_memory_is_one_line(run: Run) -> None:
    found = run("measure", "python:nets.py:hungry")
    assert found.code == 1
    assert "error: run the model; found: CUDA out of memory. Tried to allocate 2.00 GiB." in found.err
    assert "smaller --input or batch" in found.err


def test_the_unexpected_is_one_line_and_a_hint(run: Run) -> None:
    found = run("measure", "python:nets.py:broken")
    assert found.code == 1
    assert "error: unexpected ZeroDivisionError; found: a bug of the user's own; do: niwaki --debug" in found.err
    assert "Traceback" not in found.err
    shown = run("--debug", "measure", "python:nets.py:broken")
    assert shown.code == 1
    assert "Traceback" in shown.err
    assert "in forward" in shown.err


def test_the_unexpected_in_json(run: Run) -> None:
    assert run("measure", "python:nets.py:broken", "--json").data["error"]["found"] == "a bug of the user's own"


def test_stopping_is_no_crash(here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["niwaki.cli.methods"], "known", stop)
    assert main(["methods", "--json"]) == 130
    assert json.loads(capfd.readouterr().out)["error"]["asked"] == "stopped"


def test_damaged_plans_and_checkpoints(here: Path, run: Run) -> None:
    (here / "plan.json").write_text('{"format": "niwaki plan 1", "mod')
    (here / "weights.safetensors").write_bytes(b"\x00\x01")
    (here / "weights.pt").write_bytes(b"PK\x03\x04 truncated")
    found = run("verify", "python:nets.py:with_example", "plan.json")
    assert (found.code, "read a plan" in found.err) == (2, True)
    for name in ("weights.safetensors", "weights.pt"):
        found = run("trace", "python:nets.py:with_example", "--checkpoint", name)
        assert (found.code, name in found.err) == (2, True)
    assert (here / "weights.safetensors").read_bytes() == b"\x00\x01"
