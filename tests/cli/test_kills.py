"""Runs that are really killed (SIGKILL, at moments drawn by seed), resumed, and compared bit by bit."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from niwaki.cli import main

NETS = """
from torch import nn


def noisy():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Dropout(0.2), nn.Linear(16, 10),
    )
"""
COMMON = ("python:nets.py:noisy", "--data", "npz:digits.npz", "--batch", "32", "--threads", "1")
TRAIN = (
    *("train", *COMMON, "--augment", "flip_crop", "--set", "checkpoints.every_steps=4", "--set", "ema=true"),
    *("--set", "mix.mixup=0.2", "--set", "validation.limit=40"),
)
COMPRESS = ("compress", *COMMON, "--runs", "0", "--recovery-set", "checkpoints.every_steps=4")
BEGUN = 150.0
"""Seconds that a process has to begin its work: far more than importing torch takes."""


def start(words, cwd):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    return subprocess.Popen(
        [sys.executable, "-m", "niwaki", *words], cwd=cwd, env=environment, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def written(folder):
    """What changes with every checkpoint, of one training or of several."""
    return sorted(str(path.relative_to(folder)) for path in folder.glob("**/checkpoints/*"))


def killed(words, cwd, folder, after):
    """Start it, wait until it writes a checkpoint, and then `after` seconds; whether the kill came before its end."""
    process = start(words, cwd)
    try:
        before, deadline = written(folder), time.monotonic() + BEGUN
        while process.poll() is None and written(folder) == before and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(after)
        if process.poll() is not None:
            assert process.returncode == 0, process.stderr.read()
            return False
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait(timeout=30) == -signal.SIGKILL
        return True
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def finished(words, cwd):
    process = start(words, cwd)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def survives(cwd, words, kills, seed, *, partial=""):
    """The weights at the end, after so many kills, are those of a run without any."""
    (cwd / "nets.py").write_text(NETS)
    pictures, labels = load_digits(return_X_y=True)
    np.savez(cwd / "digits.npz", x=(pictures * 15).astype(np.uint8).reshape(-1, 8, 8), y=labels)
    with contextlib.chdir(cwd):  # in this process: another one is another life, not another result
        assert main([*words, "--out", "whole"]) == 0
    folder = cwd / (partial or "broken")
    moments, halves = random.Random(seed), 0
    for number in range(kills):
        life = ("resume", "broken") if number else (*words, "--out", "broken")
        assert killed(life, cwd, folder, moments.uniform(0, 0.25)), f"it ended before kill {number + 1}"
        halves += any("/.aside" in name for name in written(folder))
    assert not (cwd / "broken/report.json").exists()
    finished(("resume", "broken"), cwd)
    assert (cwd / "broken/model.safetensors").read_bytes() == (cwd / "whole/model.safetensors").read_bytes()
    return halves


def test_a_training_killed_twice_ends_with_the_same_bits(tmp_path):
    survives(tmp_path, (*TRAIN, "--epochs", "6"), 2, seed=0)


@pytest.mark.slow
def test_a_compression_killed_in_its_recovery_ends_with_the_same_bits(tmp_path):
    survives(tmp_path, (*COMPRESS, "--recover", "6"), 1, seed=1, partial="broken.partial/recovery")


@pytest.mark.slow
def test_a_compression_of_several_trainings_killed_thrice_ends_with_the_same_bits(tmp_path):
    epochs = [f"{stage}_epochs=4" for stage in ("dense", "sparse", "tune", "distil")]
    method = ("--method", "yolov8_cwd", "--keep", "0.8", "--of", "params", "--set", "multiple=1", "--recover", "4")
    words = (*COMPRESS, *method, *(word for name in epochs for word in ("--set", name)))
    survives(tmp_path, words, 3, seed=3, partial="broken.partial")


@pytest.mark.slow
def test_ten_kills(tmp_path, capsys):
    halves = survives(tmp_path, (*TRAIN, "--epochs", "25"), 10, seed=2)
    with capsys.disabled():
        print(f"ten kills, {halves} of them in the middle of writing a checkpoint")
