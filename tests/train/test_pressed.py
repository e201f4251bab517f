"""Pressure in the training loop: once a step, on gradients that are ready, and over a kill."""

from dataclasses import dataclass

import pytest
import torch
from lines import Line, Squares
from torch import nn

from niwaki.errors import InputError, UnknownNameError
from niwaki.pressure import LocalDecay, Moment, Pressure, Slimming
from niwaki.train import Checkpoints, Recovery

PLAIN = {"momentum": 0.0, "weight_decay": 0.0, "schedule": "constant", "warmup": 0.0}


@dataclass(frozen=True)
class Growing(Pressure):
    """Pushes the weight by how many steps there were before: what it knows must survive a kill."""

    seen: list[Moment]

    def memory(self, model):
        return {"steps": torch.zeros(1)}

    def __call__(self, model, memory, at):
        self.seen.append(at)
        model.weight.grad.add_(memory["steps"])
        memory["steps"] += 1

    def __repr__(self):
        return "Growing()"


def test_pressure_comes_once_a_step_after_clipping():
    """Gradient 2 w x^2 = 4 is clipped to 1, then 0, 1, 2, ... is added: two batches are one step."""
    model, how = Line(), Growing([])
    Recovery(epochs=2, lr=0.1, clip=1.0, accumulate=2, **PLAIN)(model, Squares(((1.0,),) * 4), pressure=how)
    assert model.weight.item() == pytest.approx(2.0 - 0.1 * (4 * 1 + 0 + 1 + 2 + 3), rel=1e-5)
    assert how.seen == [Moment(0, 2, 0, 4), Moment(0, 2, 1, 4), Moment(1, 2, 2, 4), Moment(1, 2, 3, 4)]


def test_what_a_pressure_remembers_is_in_checkpoints(tmp_path):
    task = Squares(((1.0,), (2.0,), (0.5,)))
    whole, broken = Line(), Line()
    settings = {
        "epochs": 2,
        "lr": 0.01,
        "folder": str(tmp_path),
        "checkpoints": Checkpoints(every_steps=1, keep_last=9),
    }

    class Killed(Exception):
        pass

    def kill(done, of, words):
        if done == 5:
            raise Killed

    Recovery(epochs=2, lr=0.01)(whole, task, pressure=Growing([]))
    with pytest.raises(Killed):
        Recovery(**settings)(broken, task, pressure=Growing([]), progress=kill)
    assert broken.weight.item() == 2.0
    Recovery(**settings)(broken, task, pressure=Growing([]), resume=True)
    assert torch.equal(broken.weight, whole.weight)
    with pytest.raises(InputError, match=r"pressure was 'Growing.*is .Slimming"):
        Recovery(**settings)(Line(noisy=True), task, pressure=Slimming(), resume=True)
    with pytest.raises(InputError, match=r"pressure was 'Growing.*is None"):
        Recovery(**settings)(Line(), task, resume=True)


def test_a_penalty_moves_scales_by_rate_times_lr():
    """A loss that no scale changes (a norm's output summed is 0 mean): each step takes lr * s off every |gamma|."""
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Flatten())
    net[0].weight.data = torch.tensor([0.5, -0.5])
    net.weight = nn.Parameter(torch.ones(1))

    class Sums(Squares):
        def loss(self, model, batch):
            return model(batch.expand(-1, 2)).sum() * 1.0

    task = Sums(((1.0, -1.0), (2.0, -2.0)))
    Recovery(epochs=4, lr=0.1, **PLAIN)(net, task, pressure=LocalDecay(0.01, switch=0.25, quantile=0.5))
    # epochs 0 and 1 are uniform; in 2 and 3 the limit is the larger of the two, and of equal ones both are protected
    assert net[0].weight.tolist() == pytest.approx([0.5 - 4 * 1e-3 - 4e-5, -0.5 + 4 * 1e-3 + 4e-5], abs=1e-6)


def test_a_network_without_batch_norm_is_refused_before_it_trains():
    model = Line()
    with pytest.raises(InputError, match="no batch norm"):
        Recovery()(model, Squares(), pressure=Slimming())
    assert model.weight.item() == 2.0


def test_decay_on_weights_alone():
    net = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    listed = Recovery(weight_decay=0.1, decayed="weights").new_optimizer(list(net.parameters()))
    found = [(group["weight_decay"], [p.dim() for p in group["params"]]) for group in listed.param_groups]
    assert found == [(0.1, [2]), (0.0, [1, 1, 1])]
    assert len(Recovery(weight_decay=0.1).new_optimizer(list(net.parameters())).param_groups) == 1
    with pytest.raises(UnknownNameError, match="all, weights"):
        Recovery(decayed="norms")
