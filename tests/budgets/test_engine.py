"""The ledger's incremental costs beside costs computed anew."""

import numpy as np
import pytest
import torch
from costed import chain, graph_of
from torch import nn

from niwaki.budgets.engine import Ledger, refill, remove


def nets() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    grouped = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 2, 1)
    )
    return {"chain": (chain(3, 6, 5, 2, bias=True), (2, 3)), "grouped": (grouped, (1, 3, 5, 5))}


@pytest.mark.parametrize("name", nets())
@pytest.mark.parametrize("size", [1, 2])
def test_counts_savings_and_additions_are_exact(name: str, size: int) -> None:
    """Random chunks of units go; what the ledger says equals the cost of the graph, before and after one
    more change.
    """
    net, shape = nets()[name]
    graph = graph_of(net, *shape)
    random = np.random.default_rng(0)
    free = np.concatenate([g.ids for g in graph.groups if g.fixed is None])
    chunks = list(random.permutation(free)[: len(free) // size * size].reshape(-1, size))
    full = graph.widths.counts(np.append(np.ones(graph.units.count, bool), True))
    ledger = Ledger.of(graph.widths, graph.costs, chunks, graph.units.count)

    def anew(gone: np.ndarray) -> dict[str, int]:
        alive = np.ones(graph.units.count, bool)
        for i in np.flatnonzero(gone):
            alive[chunks[i]] = False
        return graph.cost(alive)

    for _ in range(20):
        gone = random.random(len(chunks)) < 0.5
        counts = ledger.counts(gone, full)
        now = anew(gone)
        assert ledger.totals(counts) == now
        for cost in graph.costs:
            out = np.flatnonzero(gone)
            added = ledger.additions(cost, out, counts)
            for i, price in zip(out, added, strict=True):
                less = gone.copy()
                less[i] = False
                assert price == anew(less)[cost] - now[cost] == ledger.addition(cost, int(i), counts)
            saved = ledger.savings(cost, counts)
            for i in np.flatnonzero(~gone):
                more = gone.copy()
                more[i] = True
                assert saved[i] == now[cost] - anew(more)[cost]


def test_remove_takes_the_shortest_start_and_refill_gives_back_the_highest() -> None:
    """2 -> 4 -> 1 in one group of cost 3 each; then chains that only come back in order."""
    graph = graph_of(chain(2, 4, 1), 1, 2)
    (ids,) = [g.ids for g in graph.groups if g.fixed is None]
    full = graph.widths.counts(np.append(np.ones(graph.units.count, bool), True))
    ledger = Ledger.of(graph.widths, graph.costs, [ids[i : i + 1] for i in range(4)], graph.units.count)
    order = np.array([2, 0, 3, 1])
    gone = remove(ledger, full, order, {"macs": 7})
    assert gone is not None and gone.tolist() == [True, False, True, False]
    assert remove(ledger, full, order, {"macs": -1}) is None
    every = np.ones(4, bool)
    refill(ledger, full, every, order, {"macs": 7}, np.full(4, -1))
    assert every.tolist() == [True, False, True, False]  # 1 and 3, the last of the order, are back


def test_refill_of_a_chain_stops_at_the_first_that_does_not_fit() -> None:
    """Chunks of 1 and 3 units, both gone. The 3 must come back first and cost 9 > 6: the 1 stays out, too."""
    graph = graph_of(chain(2, 5, 1), 1, 2)
    (ids,) = [g.ids for g in graph.groups if g.fixed is None]
    full = graph.widths.counts(np.append(np.ones(graph.units.count, bool), True))
    ledger = Ledger.of(graph.widths, graph.costs, [ids[:1], ids[1:4]], graph.units.count)
    for chains, expected in ((np.array([0, 0]), [True, True]), (np.array([-1, -1]), [False, True])):
        gone = np.ones(2, bool)
        refill(ledger, full, gone, np.array([0, 1]), {"macs": 9}, chains)
        assert gone.tolist() == expected


def test_no_chunks() -> None:
    graph = graph_of(chain(2, 4, 1), 1, 2)
    full = graph.widths.counts(np.append(np.ones(graph.units.count, bool), True))
    ledger = Ledger.of(graph.widths, graph.costs, [], graph.units.count)
    assert ledger.savings("macs", full).tolist() == []
    gone = remove(ledger, full, np.zeros(0, np.int64), {"macs": 12})
    assert gone is not None and gone.size == 0
    assert remove(ledger, full, np.zeros(0, np.int64), {"macs": 11}) is None
    assert torch.get_num_threads() == 1
