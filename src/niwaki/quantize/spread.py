"""What numbers a tensor may hold, channel by channel, when all that is known is a mean and a deviation."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

NODES = 201
"""Points at which a function of a Gaussian is looked at, from -6 to 6 deviations: enough for 3 digits of a mean."""


@final
@dataclass(frozen=True, eq=False)
class Spread:
    """Mean, deviation and bounds of each channel, float64 `[channels]`, or `[1]` where all are taken together."""

    mean: Tensor
    std: Tensor
    low: Tensor
    high: Tensor

    @property
    def span(self) -> tuple[float, float]:
        """The least and the largest bound."""
        return float(self.low.min()), float(self.high.max())

    @classmethod
    def normal(cls, mean: Tensor, std: Tensor, deviations: float) -> "Spread":
        mean, std = mean.detach().cpu().double(), std.detach().cpu().double()
        return cls(mean, std, mean - deviations * std, mean + deviations * std)

    @classmethod
    def between(cls, low: float, high: float) -> "Spread":
        """Anything from `low` to `high`, evenly."""
        values = ((low + high) / 2, (high - low) / math.sqrt(12), low, high)
        return cls(*(torch.tensor([value], dtype=torch.float64) for value in values))

    def through(self, function: Callable[[Tensor], Tensor]) -> "Spread":
        """After a pointwise function: moments and bounds over points that lie as a Gaussian does, within the bounds."""
        z = torch.linspace(-6, 6, NODES, dtype=torch.float64)
        weight = torch.exp(-z * z / 2)
        weight = weight / weight.sum()
        points = (self.mean[:, None] + self.std[:, None] * z).clamp(self.low[:, None], self.high[:, None])
        image = function(points.clone()).double()  # [channels, nodes]; clone: it may write in place
        mean = image @ weight
        std = ((image - mean[:, None]).square() @ weight).sqrt()
        part = torch.linspace(0, 1, NODES, dtype=torch.float64)
        within = function(self.low[:, None] + (self.high - self.low)[:, None] * part).double()
        return Spread(mean, std, within.amin(1), within.amax(1))

    def plus(self, other: "Spread", deviations: float) -> "Spread":
        """The sum with an independent one. Its bounds reach as far as either term's, and no farther than both."""
        a, b = self.matched(other)
        mean, std = a.mean + b.mean, (a.std.square() + b.std.square()).sqrt()
        low = torch.minimum(torch.minimum(a.low, b.low), torch.maximum(a.low + b.low, mean - deviations * std))
        high = torch.maximum(torch.maximum(a.high, b.high), torch.minimum(a.high + b.high, mean + deviations * std))
        return Spread(mean, std, low, high)

    def times(self, other: "Spread") -> "Spread":
        """The product with an independent one."""
        a, b = self.matched(other)
        corners = torch.stack([a.low * b.low, a.low * b.high, a.high * b.low, a.high * b.high])
        second = (a.std.square() + a.mean.square()) * (b.std.square() + b.mean.square())
        mean = a.mean * b.mean
        return Spread(mean, (second - mean.square()).clamp(min=0).sqrt(), corners.amin(0), corners.amax(0))

    def together(self) -> "Spread":
        """All channels as one."""
        mean = self.mean.mean().reshape(1)
        std = (self.std.square().mean() + (self.mean - mean).square().mean()).sqrt().reshape(1)
        return Spread(mean, std, self.low.min().reshape(1), self.high.max().reshape(1))

    def matched(self, other: "Spread") -> tuple["Spread", "Spread"]:
        """Both with as many channels, or both as one."""
        if self.mean.numel() == other.mean.numel() or 1 in (self.mean.numel(), other.mean.numel()):
            return self, other
        return self.together(), other.together()

    def channels(self, count: int) -> "Spread":
        """Spread over `count` channels."""
        if self.mean.numel() == count:
            return self
        one = self.together()
        return Spread(*(part.expand(count) for part in (one.mean, one.std, one.low, one.high)))

    @classmethod
    def joined(cls, parts: list["Spread"]) -> "Spread":
        """Channels of several, one after the other."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in ("mean", "std", "low", "high")))
