"""Tiny networks and tasks for the tests of training."""

import torch
from torch import nn
from torch.nn import functional

from niwaki.measure import Measurement


class Line(nn.Module):
    """x * weight; dropout and batch norm on request, to have randomness and buffers."""

    def __init__(self, *, noisy=False):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0]))
        self.norm = nn.BatchNorm1d(1) if noisy else nn.Identity()
        self.drop = nn.Dropout(0.5 if noisy else 0.0)

    def forward(self, x):
        return self.drop(self.norm(x)) * self.weight


class Squares:
    """Loss (x * weight)^2, meaned; each epoch has the same batches."""

    def __init__(self, batches=((1.0,),), values=()):
        self.batches = [torch.tensor(batch).view(-1, 1) for batch in batches]
        self.values = list(values)
        self.seen = []

    @property
    def steps(self):
        return len(self.batches)

    def train_batches(self, seed):
        return iter(self.batches)

    def loss(self, model, batch):
        return model(batch.to(model.weight)).square().mean()

    def evaluate(self, model, *, split, limit):
        """The next of the given values, or the weight."""
        self.seen.append(model.weight.item())
        value = self.values.pop(0) if self.values else model.weight.item()
        return Measurement("metric", value, "", f"on {split}, {limit}")


class Noise:
    """Batches of random pictures in an order by seed, augmented from the global generator: hard to resume."""

    classes = 4

    def __init__(self, steps=7, batch=4):
        self.steps, self.batch = steps, batch
        self.extra = nn.Linear(4, 4)

    def train_batches(self, seed):
        own = torch.Generator().manual_seed(seed)
        late = torch.rand(())  # a draw of the epoch's start
        for _ in range(self.steps):
            inputs = torch.randn(self.batch, 1, 6, 6, generator=own) + 0.1 * torch.randn(()) + late
            yield inputs, torch.randint(4, (self.batch,), generator=own)

    def loss(self, model, batch):
        return functional.cross_entropy(self.extra(model(batch[0])), batch[1])

    def evaluate(self, model, *, split, limit):
        with torch.no_grad():
            total = sum(p.double().sum() for p in model.parameters())
        return Measurement("metric", float(total), "", "sum of weights")


def network():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(48, 4)
    )
