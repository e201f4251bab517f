"""Small networks whose units, costs and scores are known by hand."""

import dataclasses
import warnings
from itertools import pairwise
from typing import Any

import torch
from torch import nn

import niwaki


def chain(*widths: int, bias: bool = False) -> nn.Sequential:
    """Linear layers of these widths: MACs are the sum of products of neighbours."""
    layers = [nn.Linear(a, b, bias=bias) for a, b in pairwise(widths)]
    return nn.Sequential(*layers)


def graph_of(net: nn.Module, *shape: int) -> Any:
    return niwaki.trace(net, torch.zeros(*shape))


def scored(net: nn.Module, graph: Any, values: list[list[float]]) -> Any:
    """Scores with these numbers, in the order of the free groups."""
    how = niwaki.scores.Random()
    scores = niwaki.score(graph, niwaki.collect(net, graph, how.needs), how=how)
    assert [len(v) for v in scores.values.values()] == [len(v) for v in values], list(scores.values)
    named = {name: torch.tensor(v, dtype=torch.float64) for name, v in zip(scores.values, values, strict=True)}
    return dataclasses.replace(scores, values=named)


def chosen(net: nn.Module, shape: tuple[int, ...], values: list[list[float]], budget: Any, **settings: Any) -> Any:
    """A plan for these scores, without the warning that nothing changed."""
    graph = graph_of(net, *shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", niwaki.errors.NothingChangedWarning)
        return niwaki.choose(graph, scored(net, graph, values), budget, **settings)
