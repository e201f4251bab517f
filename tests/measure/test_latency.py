"""Latency: not how fast, which a test cannot know, but what is timed and said."""

import pytest
import torch
from torch import nn

from niwaki.errors import InputError
from niwaki.measure import Latency
from niwaki.measure.latency import at_batch


class Counting(nn.Module):
    """Counts its calls and remembers shape, mode and threads of the last."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.seen = (tuple(x.shape), self.training, torch.is_grad_enabled(), torch.get_num_threads())
        return x


def test_runs_warm_up_batch_and_threads() -> None:
    model, threads = Counting(), torch.get_num_threads()
    found = Latency(runs=7, warm_up=3, threads=1, batch=4)(model, torch.zeros(2, 5))
    assert model.calls == 10
    assert model.seen == ((4, 5), False, False, 1)
    assert torch.get_num_threads() == threads
    assert found.name == "latency_batch_4"
    assert "batch 4, 1 CPU threads, 7 runs after 3 of warm-up" in found.definition


def test_median_and_interquartile_range_of_known_times(monkeypatch: pytest.MonkeyPatch) -> None:
    # passes that take 1, 2, 3, 4 and 100 ms: median 3; quartiles (exclusive) 1.5 and 52
    clock = iter([0.0, 1, 1, 3, 3, 6, 6, 10, 10, 110])
    monkeypatch.setattr("niwaki.measure.latency.time.perf_counter", lambda: next(clock) / 1e3)
    found = Latency(runs=5, warm_up=0)(nn.Identity(), torch.zeros(1))
    assert found.value == pytest.approx(3.0)
    assert found.spread == pytest.approx(50.5)


def test_one_run_has_no_spread() -> None:
    assert Latency(runs=1, warm_up=0)(nn.Identity(), torch.zeros(1)).spread == 0.0


def test_batch_repeats_only_what_is_batched() -> None:
    example = {
        "ids": torch.arange(6).reshape(2, 3),
        "table": torch.zeros(5, 5),
        "scale": torch.tensor(2.0),
        "use": True,
    }
    made = at_batch(example, 3)
    assert made["ids"].tolist() == [[0, 1, 2]] * 3
    assert made["table"].shape == (5, 5)
    assert made["scale"] == 2.0
    assert made["use"] is True


@pytest.mark.parametrize("wrong", [{"runs": 0}, {"warm_up": -1}, {"threads": 0}, {"batch": 1.5}, {"runs": True}])
def test_refuses_settings_that_time_nothing(wrong: dict) -> None:
    with pytest.raises(InputError, match=r"Latency\("):
        Latency(**wrong)


def test_refuses_meta_and_examples_without_a_batch() -> None:
    with pytest.raises(InputError, match="meta device"):
        Latency()(nn.Linear(2, 2, device="meta"), torch.zeros(1, 2))
    with pytest.raises(InputError, match="without batched tensors"):
        Latency(batch=2)(nn.Identity(), torch.tensor(1.0))
