"""Removes as little as the budgets allow: exact costs, updated as atoms come and go, never a cut."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from scipy.sparse import csr_matrix

from niwaki.budgets.rule import Parts, runs
from niwaki.graph.cost import Cost, Widths


@dataclass(frozen=True, eq=False)
class Pairs:
    """Every item of a cost that a kind of chunk takes from, kind by kind."""

    starts: np.ndarray
    """Where each kind's pairs begin; `[kinds + 1]`."""
    items: np.ndarray
    """Its number; `[pairs]`."""
    factors: np.ndarray
    """Its widths; `[pairs, slots]`."""
    moved: np.ndarray
    """How many positions of each the chunk takes; `[pairs, slots]`."""


@dataclass(eq=False)
class Ledger:
    """Counts of every width, and what each chunk takes from them."""

    widths: Widths
    costs: dict[str, Cost]
    takes: csr_matrix
    """How many positions of each width a chunk removes; `[chunks, widths + 1]`."""
    pairs: dict[str, Pairs] = field(default_factory=dict)
    kind: np.ndarray = field(init=False)
    """Chunks of one number take the same from every width, so they always cost the same; `[chunks]`."""
    first: np.ndarray = field(init=False)
    """One chunk of every kind."""
    _chunk: np.ndarray = field(init=False)
    """The chunk that each number in `takes` is of."""

    def __post_init__(self) -> None:
        takes = self.takes
        self._chunk = np.repeat(np.arange(takes.shape[0]), np.diff(takes.indptr))
        codes = np.random.default_rng(0).integers(1, 1 << 62, takes.shape[1])  # a sum of 62-bit codes names a row
        with np.errstate(over="ignore"):
            sums = np.concatenate([[0], np.cumsum(codes[takes.indices] * takes.data)])
            names = sums[takes.indptr[1:]] - sums[takes.indptr[:-1]]
        _, self.first, self.kind = np.unique(names, return_index=True, return_inverse=True)

    @classmethod
    def of(cls, widths: Widths, costs: dict[str, Cost], chunks: Iterable[np.ndarray], units: int) -> "Ledger":
        parts = Parts.of(chunks)
        owner = np.full(units + 1, -1, dtype=np.int64)
        owner[parts.flat] = parts.owner
        held = owner[widths.units]
        hit = held >= 0
        takes = csr_matrix(
            (np.ones(int(hit.sum()), dtype=np.int64), (held[hit], widths.owner[hit])),
            shape=(len(parts), widths.rows + 1),
        )
        takes.sum_duplicates()
        return cls(widths, costs, takes)

    def counts(self, gone: np.ndarray, full: np.ndarray) -> np.ndarray:
        """Counts of the widths when the chunks flagged in `gone` are removed."""
        taken = self.takes.data * gone[self._chunk]
        return full - np.bincount(self.takes.indices, weights=taken, minlength=self.takes.shape[1])[:-1].astype(
            np.int64
        )

    def additions(self, name: str, chunks: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """What adding back each of `chunks` alone would cost at these counts; exact; float64 `[chunks]`."""
        kinds, place = np.unique(self.kind[chunks], return_inverse=True)
        return self._change(name, kinds, counts, 1)[place]

    def addition(self, name: str, chunk: int, counts: np.ndarray) -> float:
        """The same for one chunk."""
        cost, pairs, kind = self.costs[name], self._pairs(name), int(self.kind[chunk])
        run = slice(pairs.starts[kind], pairs.starts[kind + 1])
        now, items = np.append(counts, 1).astype(np.float64)[pairs.factors[run]], pairs.items[run]
        change = cost.values(items, now + pairs.moved[run]) - cost.values(items, now)
        return float(cost.changes(change, items, np.zeros(items.size, np.int64), size=1, counts=counts)[0])

    def savings(self, name: str, counts: np.ndarray) -> np.ndarray:
        """What removing each chunk alone would save at these counts; exact; float64 `[chunks]`."""
        return self._change(name, np.arange(self.first.size), counts, -1)[self.kind]

    def worth(self, name: str, order: np.ndarray, full: np.ndarray) -> np.ndarray:
        """Whether removing the first chunks of `order`, up to each, costs less than removing any fewer of them, all
        else being whole; bool `[order]`. A width of which this is not so is never worth taking: a wider one is at
        least as fast.
        """
        cost, takes = self.costs[name], self.takes[order]
        rows = np.unique(takes.indices)
        gone = np.cumsum(takes[:, rows].toarray(), axis=0)  # [order, rows]
        items = np.flatnonzero(np.isin(cost.factors, rows).any(1))
        place = np.searchsorted(rows, cost.factors[items]).clip(max=max(rows.size - 1, 0))
        moved = gone[:, place] * (rows[place] == cost.factors[items]) if rows.size else np.zeros((order.size, 0, 0))
        now = np.append(full, 1).astype(np.float64)[cost.factors[items]]  # [items, slots]
        widths = np.concatenate([now[None], now[None] - moved])  # [order + 1, items, slots]
        values = cost.values(np.tile(items, order.size + 1), widths.reshape(-1, cost.factors.shape[1]))
        curve = values.reshape(order.size + 1, items.size).sum(1)
        return np.asarray(curve[1:] < np.minimum.accumulate(curve)[:-1] * (1 - 1e-9))

    def _change(self, name: str, kinds: np.ndarray, counts: np.ndarray, sign: int) -> np.ndarray:
        cost, pairs = self.costs[name], self._pairs(name)
        at, bounds = runs(pairs.starts, kinds)
        now = np.append(counts, 1).astype(np.float64)[pairs.factors[at]]  # [pairs, slots]
        items = pairs.items[at]
        change = cost.values(items, now + sign * pairs.moved[at]) - cost.values(items, now)
        owner = np.repeat(np.arange(kinds.size), np.diff(bounds))
        return sign * cost.changes(change, items, owner, size=kinds.size, counts=counts)

    def _pairs(self, name: str) -> Pairs:
        if name not in self.pairs:
            cost, taken = self.costs[name], self.takes[self.first]
            products, slots = cost.factors.shape
            rows = cost.factors.ravel()
            real = rows < self.widths.rows
            touch = csr_matrix(  # which products each width is a factor of
                (np.ones(int(real.sum()), np.int8), (rows[real], np.repeat(np.arange(products), slots)[real])),
                shape=(self.widths.rows + 1, products),
            )
            both = taken @ touch
            factors = cost.factors[both.indices]
            owner = np.repeat(np.arange(self.first.size), np.diff(both.indptr) * slots)
            moved = np.asarray(taken[owner, factors.ravel()]).reshape(-1, slots) if owner.size else factors
            self.pairs[name] = Pairs(both.indptr.astype(np.int64), both.indices, factors, moved)
        return self.pairs[name]

    def totals(self, counts: np.ndarray) -> dict[str, float]:
        return {name: cost.total(counts) for name, cost in self.costs.items()}


def remove(ledger: Ledger, full: np.ndarray, order: np.ndarray, limits: dict[str, float]) -> np.ndarray | None:
    """Which chunks go: the shortest start of `order` that meets every limit, less what then fits back in.

    Returns bool `[chunks]`, or None where even removing all of `order` is not enough.
    """
    size = ledger.takes.shape[0]

    def fits(n: int) -> bool:
        gone = np.zeros(size, bool)
        gone[order[:n]] = True
        counts = ledger.counts(gone, full)
        return all(ledger.costs[name].total(counts) <= limit for name, limit in limits.items())

    if not fits(len(order)):
        return None
    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    gone = np.zeros(size, bool)
    gone[order[:low]] = True
    return gone


def refill(
    ledger: Ledger, full: np.ndarray, gone: np.ndarray, order: np.ndarray, limits: dict[str, float], chained: np.ndarray
) -> None:
    """Give back, highest priority first, every removed chunk that still fits (in place).

    `chained` numbers chunks that may only come back in order (fixed multiples): once one does not fit, the rest of its
    chain stays out.
    """
    counts = ledger.counts(gone, full)
    slack = {name: limits[name] - ledger.costs[name].total(counts) for name in limits}
    candidates = order[::-1][gone[order[::-1]]]
    blocked: set[int] = set()
    while candidates.size:
        ok = np.ones(candidates.size, bool)
        for name, left in slack.items():
            ok &= ledger.additions(name, candidates, counts) <= left
        # what does not fit now never will: adding others only makes it dearer
        for chain in chained[candidates[~ok]]:
            if chain >= 0:
                blocked.add(int(chain))
        candidates = candidates[ok]
        if not candidates.size:
            return
        taken = 0
        dear: set[int] = set()  # kinds of which one did not fit: what they cost only grows
        for i in candidates[:64].tolist():
            taken += 1
            if int(chained[i]) in blocked:
                continue
            if int(ledger.kind[i]) in dear:
                if chained[i] >= 0:
                    blocked.add(int(chained[i]))
                continue
            price = {name: ledger.addition(name, i, counts) for name in slack}
            if all(price[name] <= slack[name] for name in slack):
                gone[i] = False
                held = slice(ledger.takes.indptr[i], ledger.takes.indptr[i + 1])
                counts[ledger.takes.indices[held]] += ledger.takes.data[held]
                slack = {name: slack[name] - price[name] for name in slack}
                continue
            dear.add(int(ledger.kind[i]))
            if chained[i] >= 0:
                blocked.add(int(chained[i]))
        candidates = candidates[taken:]
