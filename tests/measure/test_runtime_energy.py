"""Joules of a pass in a runtime, by counters made up."""

from typing import Any

import pytest
import torch
from torch import nn

from niwaki.errors import InputError, UnknownNameError
from niwaki.measure import RuntimeEnergy, measure


class Burning(nn.Module):
    """Takes 0.1, 0.2, 0.3 ... joules in its passes, and says on how many samples."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.spent, self.passes, self.batch = 0.0, 0, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.batch = len(x)
        assert not self.training
        self.passes += 1
        self.spent += 0.1 * self.passes
        return x * self.weight


def test_the_least_stretch_and_the_median_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass to begin with, then stretches of one pass each: 0.2, 0.3, 0.4 J."""
    net = Burning()
    counters = [lambda: 5 + 0.75 * net.spent, lambda: 0.25 * net.spent]
    monkeypatch.setattr("niwaki.measure.target.processor_counters", lambda: counters)
    monkeypatch.setattr("niwaki.measure.energy.joules_in_turns.__kwdefaults__", {"seconds": 0.0})
    found = measure(net, torch.zeros(1, 2), meters=(RuntimeEnergy("pytorch", batch=4),))["runtime_energy"]
    assert found.value == pytest.approx(0.2) and found.spread == pytest.approx(0.1) and found.unit == "J"
    assert net.batch == 4 and net.training and "the least of 3 stretches" in found.definition


@pytest.mark.parametrize("wrong", [{"runs": 0}, {"runs": True}, {"batch": 0}, {"threads": 0}], ids=str)
def test_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        RuntimeEnergy(**wrong)
    with pytest.raises(UnknownNameError, match="known: pytorch"):
        RuntimeEnergy("abacus")


def test_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="energy of a model on the meta device"):
        RuntimeEnergy("pytorch")(nn.Linear(2, 2, device="meta"), torch.zeros(1, 2))
