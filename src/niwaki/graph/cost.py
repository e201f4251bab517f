"""The exact cost of any plan, from the graph, without cutting.

A contraction's multiply-adds are a constant (batch, space, kernel) times how many positions of its labelled axes
stay. A term keeps those axes as arrays of units; equal arrays are counted once for the whole graph.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


class Term(NamedTuple):
    """`constant * sum over rows of the product over factors of the positions that stay`.

    Each factor is an array `[rows, positions]` of labels (units, once resolved); rows are 1 except where an
    operation pairs them (groups of a convolution).
    """

    constant: int
    factors: tuple[np.ndarray, ...]


def macs_of(terms: "list[Term] | tuple[Term, ...]") -> int:
    """Multiply-adds when everything stays."""
    total = 0
    for term in terms:
        rows = 1
        for factor in term.factors:
            rows = max(rows, factor.shape[0])
        product = np.full(rows, term.constant, dtype=np.int64)
        for factor in term.factors:
            product = product * factor.shape[1]
        total += int(product.sum())
    return total


@dataclass(frozen=True, eq=False)
class Widths:
    """Arrays of units that are counted: `counts(alive)` gives how many of each row stay."""

    units: np.ndarray
    """All arrays, concatenated; int32 `[entries]`."""
    owner: np.ndarray
    """Row number of each entry; int32 `[entries]`."""
    rows: int

    def counts(self, alive: np.ndarray) -> np.ndarray:
        """How many entries of each row stay; int64 `[rows]`. Unit -1 always stays."""
        stays = alive[self.units]
        return np.bincount(self.owner, weights=stays, minlength=self.rows).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Cost:
    """A cost that is a sum of products of widths: MACs, or parameters."""

    constants: np.ndarray
    """int64 `[products]`"""
    factors: np.ndarray
    """Row numbers into the widths, int32 `[products, most factors]`; the last row is always 1."""

    def total(self, counts: np.ndarray) -> int:
        padded = np.append(counts, 1)
        return int((self.constants * padded[self.factors].prod(axis=1)).sum())


def build(terms: dict[str, list[Term]]) -> tuple[Widths, dict[str, Cost]]:
    """Resolve named lists of terms into shared widths and one cost each."""
    known: dict[bytes, int] = {}
    units: list[np.ndarray] = []
    sizes: list[int] = []

    def row_of(array: np.ndarray) -> int:
        key = array.tobytes()
        if key not in known:
            known[key] = len(units)
            units.append(array)
            sizes.append(array.size)
        return known[key]

    costs: dict[str, list[tuple[int, list[int]]]] = {name: [] for name in terms}
    for name, listed in terms.items():
        for term in listed:
            rows = max((factor.shape[0] for factor in term.factors), default=1)
            for r in range(rows):
                picks = [row_of(np.ascontiguousarray(f[r if f.shape[0] > 1 else 0])) for f in term.factors]
                costs[name].append((term.constant, picks))
    count = len(units)
    most = max((len(picks) for listed in costs.values() for _, picks in listed), default=0)
    widths = Widths(
        np.concatenate(units).astype(np.int32) if units else np.zeros(0, np.int32),
        np.repeat(np.arange(count, dtype=np.int32), sizes) if units else np.zeros(0, np.int32),
        count,
    )
    resolved: dict[str, Any] = {}
    for name, entries in costs.items():
        table = np.full((len(entries), max(most, 1)), count, dtype=np.int32)
        for i, (_, picks) in enumerate(entries):
            table[i, : len(picks)] = picks
        resolved[name] = Cost(np.array([c for c, _ in entries], dtype=np.int64), table)
    return widths, resolved
