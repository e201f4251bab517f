"""Runs that are saved: every number type, and folders that cannot be written."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import niwaki
from niwaki.errors import FileDamagedError
from niwaki.methods import Magnitude
from niwaki.methods.job import digest, write_pictures


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()


def compressed(model: nn.Module, example: Any, **settings: Any) -> Any:
    return niwaki.compress(model, example, method=Magnitude(), budget=niwaki.Budget(keep=0.5), **settings)


class Shuffles(nn.Module):
    """Draws an order of its channels, in evaluation mode too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, torch.randperm(x.shape[1])]


def test_a_digest_is_the_same_whatever_was_drawn_before() -> None:
    model, x = nn.Sequential(nn.Linear(4, 64), Shuffles()), torch.randn(2, 4)
    torch.manual_seed(1)
    first = digest(model, x)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert digest(model, x) == first
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_model_of_any_type_is_saved_and_loaded_bit_by_bit(kind: torch.dtype, tmp_path: Path) -> None:
    example = torch.randn(1, 1, 8, 8, dtype=kind)
    outcome = compressed(small().to(kind), example)
    folder = outcome.save(tmp_path / "run")
    loaded = niwaki.load(folder, lambda: small().to(kind))
    assert loaded[0].weight.dtype == kind and torch.equal(loaded(example), outcome.model(example))


class Attention(nn.Module):
    """Heads whose number and size are integers of the module: a cut must mend them."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.size = 4, 4
        self.q, self.k, self.v = (nn.Linear(6, 16) for _ in range(3))
        self.out = nn.Linear(16, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (x.shape[0], x.shape[1], self.heads, self.size)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("grids", ["rows", "columns"])
def test_an_outcome_with_a_copied_model_saves_the_same_run(grids: Any, tmp_path: Path) -> None:
    example = torch.randn(1, 5, 6)
    model = Attention().eval()
    budget = niwaki.Budget(keep=0.5)
    outcome = niwaki.compress(model, example, method=Magnitude(grids=grids), budget=budget)
    assert outcome.surgery.mends
    twin = replace(outcome, model=copy.deepcopy(outcome.model))
    loaded = niwaki.load(twin.save(tmp_path / "run"), lambda: Attention().eval())
    assert (loaded.heads, loaded.size) == (outcome.model.heads, outcome.model.size)
    assert torch.equal(loaded(example), outcome.model(example))


@pytest.mark.parametrize("force", [True, False])
def test_a_folder_that_cannot_be_made_is_the_users_to_mend(force: bool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    outcome = compressed(small(), torch.zeros(1, 1, 8, 8))
    with pytest.raises(niwaki.errors.InputError, match="choose a place where folders can be made") as caught:
        outcome.save(tmp_path / "file" / "run", force=force)
    assert caught.value.exit_code == 2 and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_settings_hold_the_task_its_data_and_the_meters(tmp_path: Path) -> None:
    """What the report's reader needs to run this again, beyond the method and the budget."""
    pytest.importorskip("sklearn")
    task = niwaki.tasks.Classification(niwaki.data.open("digits", seed=3), batch=32, augment="flip_crop")
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)).eval()
    meters = (niwaki.measure.Latency(runs=1, warm_up=0),)
    example = torch.zeros(1, 1, 8, 8)
    outcome = compressed(model, example, task=task, calibration=2, limit=8, meters=meters, weights="file.pt")
    settings = json.loads((outcome.save(tmp_path / "run") / "settings.json").read_text())
    found = settings["task"]
    assert (found["class"], found["batch"], found["augment"], found["label_smoothing"]) == (
        "Classification",
        32,
        "flip_crop",
        0.0,
    )
    assert (found["splits"]["source"], found["splits"]["seed"], found["splits"]["shape"]) == ("digits", 3, [1, 8, 8])
    assert found["splits"]["normalisation"]["mean"]
    assert (settings["calibration"], settings["limit"], settings["weights"]) == (2, 8, "file.pt")
    assert settings["meters"][0]["class"] == "Latency" and settings["meters"][0]["runs"] == 1
    assert settings["example"] == {"tensor": [1, 1, 8, 8], "dtype": "float32"} and settings["device"] == "cpu"
    assert outcome.settings()["task"]["splits"] == task.splits.record


def test_a_time_is_no_accuracy() -> None:
    """Without data nothing is called accuracy, whatever was measured last."""
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    meters = (niwaki.measure.Latency(runs=1, warm_up=0),)
    outcome = niwaki.compress(
        net, torch.zeros(1, 4), method=niwaki.methods.Magnitude(), budget=niwaki.Budget(0.5), meters=meters
    )
    candidates = outcome.report()["candidates"]
    assert [("latency" in one, "accuracy" in one) for one in candidates] == [(True, False)] * 2


def test_a_run_is_saved_where_there_is_nothing_to_show(tmp_path, caplog):
    class Blind:
        def shown(self, models, *, limit=None):
            raise FileDamagedError("read a picture", where="gone.jpg")

    with caplog.at_level("WARNING", "niwaki"):
        assert write_pictures(Blind(), {}, tmp_path, limit=None) == []
    assert "no pictures: read a picture; where: gone.jpg" in " ".join(caplog.messages)
    assert write_pictures(None, {}, tmp_path, limit=None) == [] and not list(tmp_path.iterdir())
