"""Runs that are saved: every number type, and folders that cannot be written."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import niwaki
from niwaki.methods import Magnitude


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()


def compressed(model: nn.Module, example: Any, **settings: Any) -> Any:
    return niwaki.compress(model, example, method=Magnitude(), budget=niwaki.Budget(keep=0.5), **settings)


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_model_of_any_type_is_saved_and_loaded_bit_by_bit(kind: torch.dtype, tmp_path: Path) -> None:
    example = torch.randn(1, 1, 8, 8, dtype=kind)
    outcome = compressed(small().to(kind), example)
    folder = outcome.save(tmp_path / "run")
    loaded = niwaki.load(folder, lambda: small().to(kind))
    assert loaded[0].weight.dtype == kind and torch.equal(loaded(example), outcome.model(example))
