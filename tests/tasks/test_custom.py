"""A task made of two functions."""

import math

import pytest
import torch
from torch import nn

from niwaki.errors import InputError, NotFiniteError, UnknownNameError
from niwaki.tasks import Custom
from niwaki.train import Recovery

BATCHES = [{"x": torch.tensor([[1.0], [2.0]]) * k, "y": torch.tensor([[3.0], [6.0]]) * k} for k in (1, 2, 3)]


def made(**changes):
    settings = {
        "loss": lambda model, batch: nn.functional.mse_loss(model(batch["x"]), batch["y"]),
        "metric": lambda model, batches: -sum((model(b["x"]) - b["y"]).abs().sum().item() for b in batches),
        "splits": {"train": BATCHES, "test": BATCHES[:2]},
        "inputs": lambda batch: batch["x"],
        "name": "closeness",
        "definition": "minus the sum of differences",
    }
    return Custom(**{**settings, **changes})


def line():
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    return model


def test_by_hand():
    task, model = made(), line()
    assert task.loss(model, BATCHES[0]).item() == pytest.approx((2**2 + 4**2) / 2)
    found = task.evaluate(model)
    assert (found.name, found.value) == ("closeness", -(2 + 4 + 4 + 8))
    assert found.definition == "minus the sum of differences; 4 samples in 2 of 2 batches of the test split"
    assert task.evaluate(model, limit=2).value == -6 and task.evaluate(model, limit=3).value == -18
    assert task.metrics(model, split="train")["closeness"].value == -36
    assert task.example().tolist() == [[1.0]] and task.inputs(BATCHES[1]) is BATCHES[1]["x"]
    assert made(example=torch.zeros(7)).example().shape == (7,)
    assert made(inputs=lambda batch: batch["y"]).example().tolist() == [[3.0]]


def test_a_loss_of_several_parts_is_their_sum():
    parts = made(
        loss=lambda model, batch: {
            "square": nn.functional.mse_loss(model(batch["x"]), batch["y"]),
            "plain": (model(batch["x"]) - batch["y"]).abs().mean(),
        }
    )
    found = {name: loss.item() for name, loss in parts.losses(line(), BATCHES[0]).items()}
    assert found == {"square": pytest.approx(10.0), "plain": pytest.approx(3.0)}
    assert parts.loss(line(), BATCHES[0]).item() == pytest.approx(13.0)
    whole = made().losses(line(), BATCHES[0])
    assert list(whole) == ["loss"] and whole["loss"].item() == pytest.approx(10.0)


def test_order_is_decided_by_the_seed():
    task = made(splits={"train": list(range(9))})
    orders = [list(task.train_batches(seed)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[2]) == list(range(9)) and task.steps == 9
    assert task.calibration(2, 1) == orders[2][:2] and len(task.calibration(99, 0)) == 9


def test_it_trains():
    model = line()
    Recovery(epochs=20, lr=0.01)(model, made())
    assert model.weight.item() == pytest.approx(3.0, abs=0.05)


def test_refusals():
    for call, error, says in (
        (lambda: made(splits={"test": BATCHES}), InputError, "no training batches"),
        (lambda: made(splits={"train": []}), InputError, "no training batches"),
        (lambda: made(splits={"train": BATCHES, "dev": BATCHES}), UnknownNameError, "train, val, test"),
        (lambda: made().evaluate(line(), split="dev"), UnknownNameError, "train, val, test"),
        (lambda: made().evaluate(line(), split="val"), InputError, "0 batches"),
        (lambda: made().evaluate(line(), limit=0), InputError, "limit above 0"),
        (lambda: made().calibration(0, 0), InputError, "at least 1"),
        (lambda: made(metric=lambda model, batches: math.nan).evaluate(line()), NotFiniteError, "closeness nan"),
    ):
        with pytest.raises(error, match=says):
            call()
