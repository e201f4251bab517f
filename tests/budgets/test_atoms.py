"""Atoms: channels, whole heads, one position of every head; by hand on small grids."""

from typing import Any

import numpy as np
import pytest
import torch
from costed import graph_of, scored
from torch import nn

import niwaki
from niwaki import Budget
from niwaki.budgets.atoms import make_atoms


class Heads(nn.Module):
    """Width 6 as 2 heads of 3: q, k, v, out."""

    def __init__(self, kv: int = 2) -> None:
        super().__init__()
        self.q, self.k, self.v = (
            nn.Linear(4, 6, bias=False),
            nn.Linear(4, 3 * kv, bias=False),
            nn.Linear(4, 3 * kv, bias=False),
        )
        self.out, self.repeat = nn.Linear(6, 4, bias=False), 2 // kv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 3)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.repeat > 1:
            k, v = k.repeat_interleave(self.repeat, 1), v.repeat_interleave(self.repeat, 1)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


def atoms_of(
    net: nn.Module, shape: tuple[int, ...], values: list[list[float]], **settings: Any
) -> tuple[list[tuple[list[int], float]], Any]:
    """(positions on the named axis's units, score) of every atom, and the graph."""
    graph = graph_of(net, *shape)
    fixed: dict[str, Any] = {"grids": "rows", "exact_only": False, "bundle": "mean"} | settings
    atoms, skipped = make_atoms(graph, scored(net, graph, values), **fixed)
    return list(zip([u.tolist() for u in atoms.units], atoms.score.tolist(), strict=True)), (graph, atoms, skipped)


QK, V = [1.0, 2.0, 3.0, 10.0, 20.0, 30.0], [4.0, 4.0, 4.0, 0.0, 0.0, 0.0]
"""Scores of the 6 query/key units (two heads of three) and of the 6 value units."""


def test_plain_channels_are_one_each() -> None:
    net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 1, bias=False))
    found, (graph, atoms, skipped) = atoms_of(net, (1, 2), [[5.0, 6.0, 7.0]])
    (group,) = [g for g in graph.groups if g.fixed is None]
    assert found == [([i], s) for i, s in zip(group.ids.tolist(), (5.0, 6.0, 7.0), strict=True)]
    assert (atoms.width.tolist(), atoms.pools, atoms.least.tolist()) == ([1, 1, 1], (group.name,), [1])
    assert skipped["0#2"] == "meets input of the model"  # the single output is no axis to cut


@pytest.mark.parametrize(("bundle", "expected"), [("mean", [3.0, 10.0]), ("sum", [18.0, 60.0]), ("max", [4.0, 30.0])])
def test_rows_are_whole_heads_with_queries_keys_and_values(bundle: str, expected: list[float]) -> None:
    """Head 0: (1 + 2 + 3 + 4 + 4 + 4) / 6 = 3; head 1: (10 + 20 + 30 + 0 + 0 + 0) / 6 = 10."""
    found, (graph, atoms, _) = atoms_of(Heads(), (1, 5, 4), [QK, V], bundle=bundle)
    assert [score for _, score in found] == expected
    held = [set(ids) for ids, _ in found]
    for head, ids in enumerate(held):
        for name in ("q", "v"):
            group = next(
                g
                for g in graph.groups
                if g.fixed is None and any(m.tensor == f"{name}.weight" and m.axis == 0 for m in g.members)
            )
            member = next(m for m in group.members if m.tensor == f"{name}.weight")
            mine = {int(group.ids[u]) for i, u in zip(member.index, member.unit, strict=True) if i // 3 == head}
            assert mine <= ids
    assert atoms.width.tolist() == [3, 3]


def test_columns_take_the_lowest_of_every_head_together() -> None:
    """Queries and keys: (1, 10), (2, 20), (3, 30) as means of both heads; values: (4, 0) three times."""
    found, (_, atoms, _) = atoms_of(Heads(), (1, 5, 4), [QK, V], grids="columns")
    scores = sorted(score for _, score in found)
    assert scores == [2.0, 2.0, 2.0, 5.5, 11.0, 16.5]
    assert atoms.least.tolist() == [2, 2] and len(atoms.pools) == 2


def test_columns_are_sorted_within_each_head() -> None:
    """Head 0 (3, 1, 2), head 1 (10, 30, 20): lowest with lowest (1, 10), then (2, 20), then (3, 30): never
    position by position.
    """
    found, (_graph, _, _) = atoms_of(Heads(), (1, 5, 4), [[3.0, 1.0, 2.0, 10.0, 30.0, 20.0], V], grids="columns")
    assert sorted(score for _, score in found)[3:] == [5.5, 11.0, 16.5]


@pytest.mark.parametrize("grids", ["rows", "columns"])
def test_one_key_head_for_all_queries(grids: Any) -> None:
    """The single key head is no row of its own: a query head goes without it, columns go with its columns."""
    net = Heads(kv=1)
    graph = graph_of(net, 1, 5, 4)
    how = niwaki.scores.Random()
    scores = niwaki.score(graph, niwaki.collect(net, graph, how.needs), how=how)
    plan = niwaki.choose(graph, scores, Budget(keep=0.8, of="units"), grids=grids)
    small = niwaki.cut(net, plan)
    q, k = (small.get_parameter(f"{name}.weight").shape[0] for name in "qk")
    assert (q % 3, k) == (0, 3) if grids == "rows" else q == 2 * k
    assert niwaki.verify(net, small, plan, torch.randn(1, 5, 4)).passed


def test_a_score_of_only_part_of_a_row_decides_for_it() -> None:
    """Values carry no score: heads are judged by queries and keys alone: means 2 and 20."""
    import dataclasses

    net = Heads()
    graph = graph_of(net, 1, 5, 4)
    scores = scored(net, graph, [QK, V])
    only = dataclasses.replace(scores, values=dict(list(scores.values.items())[:1]))
    atoms, _ = make_atoms(graph, only, grids="rows", exact_only=False, bundle="mean")
    assert atoms.score.tolist() == [2.0, 20.0]


def test_exact_only_leaves_inexact_columns_of_a_norm_group() -> None:
    """Group norm of 2 x 3: whole norm groups leave exactly, single channels change the statistic."""
    net = nn.Sequential(nn.Conv1d(2, 6, 1), nn.GroupNorm(2, 6), nn.Conv1d(6, 1, 1))
    graph = graph_of(net, 1, 2, 4)
    how = niwaki.scores.Random()
    scores = niwaki.score(graph, niwaki.collect(net, graph, how.needs), how=how)
    plan = niwaki.choose(graph, scores, Budget(keep=0.5, of="units"), grids="columns", exact_only=True)
    (kept,) = plan.kept.values()
    assert kept in ((0, 1, 2), (3, 4, 5)) and plan.inexact == {}  # a whole norm group
    loose = niwaki.choose(graph, scores, Budget(keep=0.7, of="units"), grids="columns")
    assert loose.inexact and len(np.unique([i // 3 for i in next(iter(loose.kept.values()))])) == 2


def test_a_single_unit_is_never_removed() -> None:
    net = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 3, bias=False), nn.Linear(3, 1, bias=False))
    graph = graph_of(net, 1, 2)
    how = niwaki.scores.Random()
    plan = niwaki.choose(
        graph, niwaki.score(graph, niwaki.collect(net, graph, how.needs), how=how), Budget(keep=2, of="units")
    )
    assert list(plan.kept) == ["1"]


def test_two_grids_over_the_same_channels() -> None:
    """2 convolution groups of 3 and 3 norm groups of 2: no removal of single channels suits both."""
    net = nn.Sequential(nn.Conv1d(2, 4, 1), nn.Conv1d(4, 6, 1, groups=2), nn.GroupNorm(3, 6), nn.Conv1d(6, 1, 1))
    graph = graph_of(net, 1, 2, 4)
    how = niwaki.scores.Random()
    scores = niwaki.score(graph, niwaki.collect(net, graph, how.needs), how=how)
    held = next(group.ids for group in graph.groups if group.units == 6)
    for grids in ("rows", "columns"):
        atoms, _ = make_atoms(graph, scores, grids=grids, exact_only=False, bundle="mean")
        assert len(atoms.units) and not any(np.isin(held, atom).any() for atom in atoms.units)
