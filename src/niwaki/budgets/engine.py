"""Removes as little as the budgets allow: exact costs, updated as atoms come and go, never a cut."""

from dataclasses import dataclass, field

import numpy as np
from scipy.sparse import csr_matrix

from niwaki.graph.cost import Cost, Widths


@dataclass(eq=False)
class Ledger:
    """Counts of every width, and what each chunk takes from them."""

    widths: Widths
    costs: dict[str, Cost]
    takes: csr_matrix
    """How many positions of each width a chunk removes; `[chunks, widths + 1]`."""
    touch: dict[str, csr_matrix] = field(default_factory=dict)

    @classmethod
    def of(cls, widths: Widths, costs: dict[str, Cost], chunks: list[np.ndarray], units: int) -> "Ledger":
        owner = np.full(units + 1, -1, dtype=np.int64)
        if chunks:
            owner[np.concatenate(chunks)] = np.repeat(np.arange(len(chunks)), [chunk.size for chunk in chunks])
        held = owner[widths.units]
        hit = held >= 0
        takes = csr_matrix(
            (np.ones(int(hit.sum()), dtype=np.int64), (held[hit], widths.owner[hit])),
            shape=(len(chunks), widths.rows + 1),
        )
        takes.sum_duplicates()
        return cls(widths, costs, takes)

    def counts(self, gone: np.ndarray, full: np.ndarray) -> np.ndarray:
        """Counts of the widths when the chunks flagged in `gone` are removed."""
        return full - np.asarray(self.takes.T @ gone.astype(np.int64)).ravel()[:-1]

    def additions(self, name: str, chunks: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """What adding back each of `chunks` alone would cost at these counts; exact; float64 `[chunks]`."""
        return self._change(name, self.takes[chunks], counts, 1)

    def savings(self, name: str, counts: np.ndarray) -> np.ndarray:
        """What removing each chunk alone would save at these counts; exact; float64 `[chunks]`."""
        return self._change(name, self.takes, counts, -1)

    def _change(self, name: str, taken: csr_matrix, counts: np.ndarray, sign: int) -> np.ndarray:
        cost = self.costs[name]
        products, slots = cost.factors.shape
        if taken.shape[0] == 0 or products == 0:
            return np.zeros(taken.shape[0])
        padded = np.append(counts, 1).astype(np.float64)
        pairs = (taken @ self._touch(name)).tocoo()
        if pairs.nnz == 0:
            return np.zeros(taken.shape[0])
        factors = cost.factors[pairs.col]  # [pairs, slots]
        moved = np.asarray(taken[np.repeat(pairs.row, slots), factors.ravel()]).reshape(-1, slots)
        moved[factors == counts.size] = 0
        change = cost.constants[pairs.col] * ((padded[factors] + sign * moved).prod(1) - padded[factors].prod(1))
        return sign * np.bincount(pairs.row, weights=change, minlength=taken.shape[0])

    def _touch(self, name: str) -> csr_matrix:
        """Which products each width is a factor of."""
        if name not in self.touch:
            cost = self.costs[name]
            products, slots = cost.factors.shape
            rows = cost.factors.ravel()
            real = rows < self.widths.rows
            self.touch[name] = csr_matrix(
                (np.ones(int(real.sum()), np.int8), (rows[real], np.repeat(np.arange(products), slots)[real])),
                shape=(self.widths.rows + 1, products),
            )
        return self.touch[name]

    def totals(self, counts: np.ndarray) -> dict[str, int]:
        return {name: cost.total(counts) for name, cost in self.costs.items()}


def remove(ledger: Ledger, full: np.ndarray, order: np.ndarray, limits: dict[str, float]) -> np.ndarray | None:
    """Which chunks go: the shortest start of `order` that meets every limit, less what then fits back in.

    Returns bool `[chunks]`, or None where even removing all of `order` is not enough.
    """
    size = ledger.takes.shape[0]

    def fits(n: int) -> bool:
        gone = np.zeros(size, bool)
        gone[order[:n]] = True
        totals = ledger.totals(ledger.counts(gone, full))
        return all(totals[name] <= limit for name, limit in limits.items())

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
    totals = ledger.totals(counts)
    slack = {name: limits[name] - totals[name] for name in limits}
    candidates = np.array([i for i in order[::-1] if gone[i]], dtype=np.int64)
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
        for i in candidates[:64]:
            taken += 1
            if int(chained[i]) in blocked:
                continue
            one = np.array([i])
            price = {name: float(ledger.additions(name, one, counts)[0]) for name in slack}
            if all(price[name] <= slack[name] for name in slack):
                gone[i] = False
                counts = counts + np.asarray(ledger.takes[i].todense()).ravel()[:-1]
                slack = {name: slack[name] - price[name] for name in slack}
            elif chained[i] >= 0:
                blocked.add(int(chained[i]))
        candidates = candidates[taken:]
