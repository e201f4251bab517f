"""The library in one page: train, compress, judge, save, load. README.md shows this code; a test keeps them equal."""

import torch
from torch import nn

import niwaki


def factory() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


task = niwaki.tasks.Classification(niwaki.data.open("digits"), batch=32)
model = factory()
niwaki.train.Recovery(epochs=5, lr=0.1)(model, task)  # any trained nn.Module will do

result = niwaki.compress(
    model,  # left alone
    task.example(),
    method=niwaki.methods.Magnitude(p=2),
    budget=niwaki.Budget(keep=0.5, of="macs"),
    task=task,
    recovery=niwaki.train.Recovery(epochs=2),
)
print(result.receipt.passed, result.receipt)  # the cut network against the masked original, in float64
print(result.before["accuracy"].value, "->", result.after["accuracy"].value)
print(result.before["macs"].value, "->", result.after["macs"].value)

result.save("runs/quickstart", force=True)  # plan.json, model.safetensors, report.json, ...; no pickles
small = niwaki.load("runs/quickstart", factory)  # an ordinary nn.Module of the small shapes
inputs, _ = task.calibration(1, seed=0)[0]
assert torch.equal(small.eval()(inputs), result.model.eval()(inputs))
