"""Machines made up for tests: a table of layers and a clock for whole networks, both known by hand."""

from typing import Any

import pytest
from torch import nn

from niwaki.budgets.tables import Surface
from niwaki.budgets.timed import priced_by
from niwaki.graph import ChannelGraph
from niwaki.graph.layers import layers_of
from niwaki.measure import Target


def thousandths(graph: ChannelGraph) -> ChannelGraph:
    """`graph` with a latency: of each convolution and linear layer, what it puts out times what it takes in, in
    microseconds."""
    layers = [one for one in layers_of(graph, fused=True) if one.kind in ("convolution", "linear")]
    surfaces = [Surface.measured(one.full, lambda out, into: out * into / 1000) for one in layers]
    return priced_by(graph, layers, surfaces, scale=(1.0, 1.0), constant=0.0)


def work(model: nn.Module) -> float:
    """What `thousandths` says of a whole network."""
    weights = [one.weight for one in model.modules() if isinstance(one, (nn.Conv2d, nn.Linear))]
    return sum(weight.shape[0] * weight.shape[1] for weight in weights) / 1000


def clocked(monkeypatch: pytest.MonkeyPatch, clock: Any) -> None:
    """Every target takes `clock(model)` ms, and now and then one more."""
    monkeypatch.setattr(Target, "open", lambda self, model, example: model)

    def times(target: Target, calls: dict[str, nn.Module], runs: int) -> dict[str, list[float]]:
        return {name: [clock(model) + 1, clock(model)] for name, model in calls.items()}

    monkeypatch.setattr(Target, "amounts", times)
