"""A search that is really killed goes on where it was, and ends with the same bits."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

BEGUN = 150.0
"""Seconds that a process has to begin its work: far more than importing torch takes."""
WORDS = (
    *("compress", "python:deep.py:deep", "--data", "digits", "--batch", "64", "--method", "pagcp", "--keep", "0.1"),
    *(
        "--set",
        "initial_rate=0.002",
        "--set",
        "batches=2",
        "--limit-test",
        "64",
        "--runs",
        "0",
        "--threads",
        "1",
        "--calibrate",
        "0",
    ),
)
DEEP = """
import torch
from torch import nn


def deep():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 20, 3, padding=1), nn.ReLU()]
    for _ in range(5):
        layers += [nn.Conv2d(20, 20, 3, padding=1), nn.BatchNorm2d(20), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 10))
"""


def test_a_killed_search_goes_on(run, here):
    (here / "deep.py").write_text(DEEP)
    found = here / "broken.partial" / "search.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    life = subprocess.Popen(
        [sys.executable, "-m", "niwaki", *WORDS, "--out", "broken"], cwd=here, env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + BEGUN
        while (
            life.poll() is None
            and time.monotonic() < deadline
            and not (found.is_file() and json.loads(found.read_text())["rounds"][0]["steps"])
        ):
            time.sleep(0.005)
        assert life.poll() is None, life.stderr.read()
        os.kill(life.pid, signal.SIGKILL)
        assert life.wait(timeout=30) == -signal.SIGKILL
    finally:
        if life.poll() is None:
            life.kill()
        life.communicate()
    held = json.loads(found.read_text())["rounds"][0]["steps"]
    assert held and not (here / "broken").exists()
    said = run(*WORDS, "--out", "broken")
    assert said.code == 2 and "niwaki resume broken goes on with it" in said.err
    said = run("resume", "broken")
    assert said.code == 0 and "search.json" in said.err, said.err
    assert run(*WORDS, "--out", "whole").code == 0
    report = json.loads((here / "broken/report.json").read_text())
    steps = report["search"]["rounds"][0]["steps"]
    assert steps[: len(held)] == held
    assert steps == json.loads((here / "whole/report.json").read_text())["search"]["rounds"][0]["steps"]
    assert (here / "broken/model.safetensors").read_bytes() == (here / "whole/model.safetensors").read_bytes()
    assert not found.parent.exists()
