"""What any plan costs, from the graph, without cutting.

Every cost is made of items, and each item is a function of a few widths: of how many positions of some axes stay.
A contraction's multiply-adds are a constant (batch, space, kernel) times the widths of its labelled axes; so are the
elements of a parameter and the bytes of a tensor. A term keeps those axes as arrays of units; equal arrays are
counted once for the whole graph.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, final

import numpy as np
from scipy.sparse import csr_matrix


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
class Cost(ABC):
    """Items, each a function of few widths, and what they come to together: their sum unless a kind says otherwise."""

    factors: np.ndarray
    """The widths of every item as row numbers, int32 `[items, most factors]`; the number after the last row is a
    width that is always 1."""
    rows: int
    """How many widths there are."""

    @abstractmethod
    def values(self, items: np.ndarray, widths: np.ndarray) -> np.ndarray:
        """What items of these numbers cost at these widths (float64 `[items, most factors]`); float64 `[items]`."""

    def changes(
        self, change: np.ndarray, items: np.ndarray, owner: np.ndarray, *, size: int, counts: np.ndarray
    ) -> np.ndarray:
        """How the cost at these counts changes for each of `size` alternatives; float64 `[size]`.

        Alternative `owner[i]` changes item `items[i]` by `change[i]`.
        """
        return np.bincount(owner, weights=change, minlength=size)

    def total(self, counts: np.ndarray) -> float:
        """The cost at these counts of the widths."""
        return float(self.all_values(counts).sum())

    def all_values(self, counts: np.ndarray) -> np.ndarray:
        """What every item costs at these counts; float64 `[items]`."""
        widths = np.append(counts, 1).astype(np.float64)[self.factors]
        return self.values(np.arange(self.factors.shape[0]), widths)

    def numbered(self, rows: int, *, first: int = 0) -> np.ndarray:
        """`factors` in a list of `rows` widths in which its own come from `first` on, in their order."""
        return np.where(self.factors == self.rows, rows, self.factors + first).astype(np.int32)


@final
@dataclass(frozen=True, eq=False)
class Products(Cost):
    """A sum of products of widths: MACs, parameters, bytes. Exact."""

    constants: np.ndarray
    """int64 `[items]`"""

    def values(self, items: np.ndarray, widths: np.ndarray) -> np.ndarray:
        return np.asarray(self.constants[items] * widths.prod(1))

    def total(self, counts: np.ndarray) -> int:
        padded = np.append(counts, 1)
        return int((self.constants * padded[self.factors].prod(axis=1)).sum())


@final
@dataclass(frozen=True, eq=False)
class Peak(Cost):
    """The largest, over times, of the sum of what is there: memory. Items are products of widths. Exact."""

    constants: np.ndarray
    """int64 `[items]`"""
    alive: csr_matrix
    """Which items are there at which time, ones; `[times, items]`."""

    def values(self, items: np.ndarray, widths: np.ndarray) -> np.ndarray:
        return np.asarray(self.constants[items] * widths.prod(1))

    def changes(
        self, change: np.ndarray, items: np.ndarray, owner: np.ndarray, *, size: int, counts: np.ndarray
    ) -> np.ndarray:
        now = self.alive @ self.all_values(counts)  # [times]
        moved = csr_matrix((change, (owner, items)), shape=(size, self.factors.shape[0])) @ self.alive.T
        return np.asarray((moved.toarray() + now).max(1) - now.max(initial=0.0))

    def total(self, counts: np.ndarray) -> int:
        return int((self.alive @ self.all_values(counts)).max(initial=0.0))


def build(terms: dict[str, list[Term]]) -> tuple[Widths, dict[str, Cost]]:
    """Resolve named lists of terms into shared widths and one sum of products each."""
    widths, tables = resolved(list(terms.values()))
    return widths, {
        name: Products(factors, widths.rows, constants)
        for name, (factors, constants, _) in zip(terms, tables, strict=True)
    }


def resolved(lists: Sequence[Sequence[Term]]) -> tuple[Widths, list[tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """Shared widths of lists of terms and, for each list, its items: factors, constants, and the term of each."""
    known: dict[bytes, int] = {}
    units: list[np.ndarray] = []
    sizes: list[int] = []
    rows_of: dict[int, list[int]] = {}

    def listed_rows(factor: np.ndarray) -> list[int]:
        """The numbers of the widths that the rows of a factor are; of a factor that many terms share, once."""
        if id(factor) not in rows_of:
            whole = factor.tobytes()
            step = len(whole) // max(factor.shape[0], 1)
            found = rows_of[id(factor)] = []
            for r in range(factor.shape[0]):
                key = whole[r * step : (r + 1) * step]
                number = known.get(key)
                if number is None:
                    number = known[key] = len(units)
                    units.append(factor[r])
                    sizes.append(factor[r].size)
                found.append(number)
        return rows_of[id(factor)]

    found: list[list[tuple[int, list[int], int]]] = []
    for listed in lists:
        items = []
        for number, term in enumerate(listed):
            factors = [listed_rows(factor) for factor in term.factors]
            for r in range(max(map(len, factors), default=1)):
                items.append((term.constant, [rows[r] if len(rows) > 1 else rows[0] for rows in factors], number))
        found.append(items)
    count = len(units)
    most = max((len(picks) for items in found for _, picks, _ in items), default=0)
    widths = Widths(
        np.concatenate(units).astype(np.int32) if units else np.zeros(0, np.int32),
        np.repeat(np.arange(count, dtype=np.int32), sizes) if units else np.zeros(0, np.int32),
        count,
    )
    tables = []
    for items in found:
        table = np.full((len(items), max(most, 1)), count, dtype=np.int32)
        for i, (_, picks, _) in enumerate(items):
            table[i, : len(picks)] = picks
        constants = np.array([c for c, _, _ in items], dtype=np.int64)
        tables.append((table, constants, np.array([number for _, _, number in items], dtype=np.int64)))
    return widths, tables


def joined(
    widths: Widths, costs: dict[str, Cost], more: Widths, new: dict[str, Cost]
) -> tuple[Widths, dict[str, Cost]]:
    """Two sets of costs over one list of widths: the first's, then the second's."""
    rows = widths.rows + more.rows
    both = Widths(
        np.concatenate([widths.units, more.units]), np.concatenate([widths.owner, more.owner + widths.rows]), rows
    )
    first = [(name, cost, 0) for name, cost in costs.items()] + [
        (name, cost, widths.rows) for name, cost in new.items()
    ]
    return both, {name: replace(cost, factors=cost.numbered(rows, first=at), rows=rows) for name, cost, at in first}
