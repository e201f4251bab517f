"""Runs the command line in this process and catches what it says."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from niwaki.cli import main

NETS = '''
"""Networks for the command line's tests."""
import torch
from torch import nn


def small(width: int = 8) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10),
    )


def with_example() -> tuple[nn.Module, torch.Tensor]:
    return small(), torch.zeros(1, 1, 8, 8)


class Hungry(nn.Module):
    """Runs out of memory as soon as it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def hungry() -> tuple[nn.Module, torch.Tensor]:
    return Hungry(), torch.zeros(1, 4)


class Broken(Hungry):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("a bug of the user's own")


def broken() -> tuple[nn.Module, torch.Tensor]:
    return Broken(), torch.zeros(1, 4)
'''


@dataclass(frozen=True)
class Said:
    """Exit code, and what went to stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Said]


@pytest.fixture(scope="session")
def networks() -> str:
    """The text of a file of networks."""
    return NETS


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with a file of networks."""
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(here: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """run("trace", "python:nets.py:small") -> what was said."""

    def call(*arguments: str) -> Said:
        capfd.readouterr()
        code = main(list(arguments))
        caught = capfd.readouterr()
        return Said(code, caught.out, caught.err)

    return call
