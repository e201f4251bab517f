"""What a rule sees and says: atoms in pools, and the order in which they go."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final, overload

import numpy as np
from scipy.sparse import csr_matrix


def runs(starts: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the runs of these numbers lie when run `i` is from `starts[i]` to `starts[i + 1]`, and their new starts."""
    sizes = starts[order + 1] - starts[order]
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    return np.repeat(starts[order] - bounds[:-1], sizes) + np.arange(bounds[-1]), bounds


@final
@dataclass(frozen=True, eq=False)
class Parts(Sequence[np.ndarray]):
    """Many short arrays of units end to end: a network has an atom for every channel, and an array object for each of
    them costs more than all that is done with it.
    """

    flat: np.ndarray
    """All of them; int64 `[units]`."""
    starts: np.ndarray
    """Where each begins, and the end of the last; int64 `[parts + 1]`."""

    @classmethod
    def of(cls, arrays: "Iterable[np.ndarray]") -> "Parts":
        if isinstance(arrays, cls):
            return arrays
        listed = list(arrays)
        flat = np.concatenate(listed).astype(np.int64) if listed else np.zeros(0, np.int64)
        return cls(flat, np.cumsum([0, *(array.size for array in listed)]))

    def __len__(self) -> int:
        return self.starts.size - 1

    @overload
    def __getitem__(self, at: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, at: slice) -> "Parts": ...
    def __getitem__(self, at: int | slice) -> "np.ndarray | Parts":
        if isinstance(at, slice):
            return self.pick(np.arange(len(self))[at])
        at = range(len(self))[at]
        return self.flat[self.starts[at] : self.starts[at + 1]]

    @property
    def sizes(self) -> np.ndarray:
        return np.diff(self.starts)

    @property
    def owner(self) -> np.ndarray:
        """The part each unit of `flat` belongs to."""
        return np.repeat(np.arange(len(self)), self.sizes)

    def pick(self, order: np.ndarray) -> "Parts":
        """The parts of these numbers, in this order."""
        places, starts = runs(self.starts, order)
        return Parts(self.flat[places], starts)

    def join(self, firsts: np.ndarray) -> "Parts":
        """Neighbours as one: the parts from each of `firsts` (ascending, the first 0) to the next."""
        return Parts(self.flat, np.append(self.starts[firsts], self.starts[-1:]))

    def each(self, function: np.ufunc) -> np.ndarray:
        """`function` (say `np.minimum`) over the units of each part, none of them empty; `[parts]`."""
        return function.reduceat(self.flat, self.starts[:-1]) if len(self) else np.zeros(0, np.int64)


@final
class Savings(Mapping[str, np.ndarray]):
    """What removing each atom alone saves, worked out when a rule asks for it: "macs", "params", "units"."""

    NAMES = ("macs", "params", "units")

    def __init__(self, ask: Callable[[str], np.ndarray]) -> None:
        self.ask = ask
        self.known: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.NAMES:
            raise KeyError(name)
        if name not in self.known:
            self.known[name] = self.ask(name)
        return self.known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.NAMES)

    def __len__(self) -> int:
        return len(self.NAMES)


@final
@dataclass(frozen=True, eq=False)
class Atoms:
    """The smallest things that can be removed: a channel, a whole head, one channel of every head.

    Atoms of one pool are alternatives to each other (the channels of a group, the heads of an attention).
    """

    units: Sequence[np.ndarray]
    """Units of each atom, in the graph's count."""
    score: np.ndarray
    """Higher = keep; float64 `[atoms]`."""
    pool: np.ndarray
    """Pool of each atom; int64 `[atoms]`, from 0 without gaps."""
    width: np.ndarray
    """Positions of the group's axis one atom stands for (head size for a head); int64 `[atoms]`."""
    saves: Mapping[str, np.ndarray]
    """What removing each atom alone saves: "macs", "params", "units"; float64 `[atoms]`."""
    least: np.ndarray
    """Atoms that every pool keeps at least; int64 `[pools]`. Two columns of a grid: one would no longer be an axis."""
    pools: tuple[str, ...]
    """Names of the pools (their first group)."""
    takes: csr_matrix | None = None
    """How many units of each group an atom takes; `[atoms, groups]`."""
    sizes: np.ndarray | None = None
    """Units of each group; int64 `[groups]`."""
    multiples: np.ndarray | None = None
    """A multiple of how many units of each group a kernel takes; int64 `[groups]`."""


class Rule(ABC):
    """Orders atoms: the lowest priority goes first."""

    @abstractmethod
    def __call__(self, atoms: Atoms) -> np.ndarray:
        """Priority of each atom; float64 `[atoms]`. Ties go by index, the lower index staying."""
