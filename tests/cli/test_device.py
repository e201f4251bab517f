"""`--device` says where a model runs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Run = Callable[..., Any]


@pytest.mark.parametrize("command", ["measure", "compress"])
@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta"])
def test_a_device_that_is_not_there(run: Run, here: Path, command: str, name: str) -> None:
    out = () if command == "measure" else ("--out", "run")
    said = run(command, "python:nets.py:small", "--input", "1x1x8x8", "--device", name, *out)
    assert f"--device {name}" in said.err
    assert said.code == 2 and not (here / "run").exists()


def test_the_device_asked_for(run: Run) -> None:
    said = run("measure", "python:nets.py:small", "--input", "1x1x8x8", "--device", "cpu", "--runs", "2", "--json")
    assert said.code == 0 and json.loads(said.out)["latency"]["device"].startswith("cpu")


@pytest.mark.parametrize("name", ["cpu", "meta"])
def test_the_device_of_a_trace(run: Run, name: str) -> None:
    said = run("trace", "python:nets.py:small", "--input", "1x1x8x8", "--device", name, "--json")
    assert said.code == 0 and said.data["device"] == name


def test_a_trace_on_a_device_that_is_not_there(run: Run) -> None:
    said = run("trace", "python:nets.py:small", "--device", "cuda:99")
    assert said.code == 2 and "--device cuda:99" in said.err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_run_on_the_gpu(run: Run, here: Path) -> None:
    said = run("compress", "python:nets.py:small", "--data", "digits", "--device", "cuda", "--out", "run", "--json")
    assert said.code == 0, said.err
    assert said.data["report"]["after"]["latency"]["device"].startswith("cuda")
    checked = run("load-check", "run", "python:nets.py:small", "--json")
    assert (checked.code, checked.data["equal"]) == (0, True), checked.err
    assert checked.data["device"]["here"].startswith("cuda")
    said = run("load-check", "run", "python:nets.py:small", "--device", "cpu", "--json")
    assert (said.code, said.data["equal"]) == (0, None)
