"""Times of layers over their widths: measured at some, read off at all.

Runtimes work in blocks of channels: a width that fills its last block in part takes as long as one that fills it, or
longer. So a layer is measured on a grid of multiples of 16, and at a few widths between two of them: how the time goes
up between multiples (all at once, or evenly), and how much more some residues take.
"""

import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np

from niwaki.errors import FileDamagedError, InputError
from niwaki.files import refuse_unwritable
from niwaki.graph.cost import Cost

FORMAT = "niwaki latency table 1"
PERIOD = 16
"""Channels of the widest blocks: 512 bits of float32. Narrower blocks (8, 4) divide it."""
SHARES = (0.125, 0.25, 0.5, 0.75, 1.0)
"""Of the full width, where the grid lies."""
PROBES = (0, 1, 2, 4, 6, 8, 12, 15, 16)
"""Widths between two multiples that are measured, as what is left over."""
NOISE = 0.04
"""Residues that take less than this more than the next multiple are taken to cost the same: timers are no better."""
Timer = Callable[[int, int], float]
"""Milliseconds at a width put out and one taken in."""


def grid_of(full: int) -> tuple[int, ...]:
    """Widths to measure: multiples of 16 up to the first one from `full` on; for narrow layers some of all."""
    if full <= PERIOD:
        return tuple(sorted({1, max(1, full // 2), full}))
    top = -(-full // PERIOD)
    return tuple(sorted({PERIOD * max(1, round(share * top)) for share in SHARES} | {PERIOD}))


@final
@dataclass(frozen=True)
class Steps:
    """What lies between two multiples of 16."""

    rise: tuple[float, ...] = tuple(i / PERIOD for i in range(PERIOD + 1))
    """How far the time has risen from one multiple to the next, by what is left over; 0 to 1, `[17]`."""
    extra: tuple[float, ...] = (1.0,) * (PERIOD + 1)
    """How many times as long as the next multiple a residue takes, from 1 on; `[17]`."""

    @classmethod
    def of(cls, times: Mapping[int, float]) -> "Steps":
        """From milliseconds at what is left over (0 and 16 among them).

        Examples:
            >>> stairs = Steps.of({0: 1.0, 1: 2.0, 8: 2.0, 15: 2.0, 16: 2.0})
            >>> stairs.rise[1], stairs.rise[15], set(stairs.extra)
            (1.0, 1.0, {1.0})
        """
        low, high = times[0], max(times[0], times[PERIOD])
        known = sorted(times)
        span = high - low
        if span <= NOISE * low:
            rise = np.arange(PERIOD + 1) / PERIOD
        else:
            measured = np.clip([(min(times[r], high) - low) / span for r in known], 0.0, 1.0)
            rise = np.interp(np.arange(PERIOD + 1), known, np.maximum.accumulate(measured))
        kinds: dict[int, list[float]] = {}
        for residue in known:
            if 0 < residue < PERIOD:
                kinds.setdefault(math.gcd(residue, PERIOD), []).append(times[residue] / high)
        more = {kind: sum(found) / len(found) for kind, found in kinds.items()}
        extra = [more.get(math.gcd(residue, PERIOD), 1.0) for residue in range(PERIOD + 1)]
        extra = [value if value > 1 + NOISE else 1.0 for value in extra]
        return cls(tuple(float(x) for x in rise), (1.0, *extra[1:PERIOD], 1.0))


@final
@dataclass(frozen=True)
class Surface:
    """Milliseconds of one layer over the width that it puts out and the one that it takes in."""

    out: tuple[int, ...]
    into: tuple[int, ...]
    ms: tuple[tuple[float, ...], ...]
    """`[out, into]`"""
    steps: tuple[Steps, Steps] = (Steps(), Steps())

    @classmethod
    def measured(cls, full: tuple[int, int], timer: Timer) -> "Surface":
        """Time a layer where it has to be; a wider one is never taken to be faster than a narrower one on the grid."""
        grids = [grid_of(width) for width in full]
        found = np.array([[timer(out, into) for into in grids[1]] for out in grids[0]])
        raised = np.maximum.accumulate(np.maximum.accumulate(found, axis=0), axis=1)
        tops = grids[0][-1], grids[1][-1]
        steps = []
        for axis, width in enumerate(full):
            if width <= PERIOD:
                steps.append(Steps())
                continue
            base = PERIOD * max(1, round(width / 2 / PERIOD))
            at = [(base + r, tops[1]) if axis == 0 else (tops[0], base + r) for r in PROBES]
            steps.append(Steps.of({r: timer(*place) for r, place in zip(PROBES, at, strict=True)}))
        return cls(grids[0], grids[1], tuple(map(tuple, raised.tolist())), (steps[0], steps[1]))

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        steps = [{"rise": list(one.rise), "extra": list(one.extra)} for one in self.steps]
        return {"out": list(self.out), "into": list(self.into), "ms": [list(row) for row in self.ms], "steps": steps}

    @classmethod
    def from_json(cls, data: Any) -> "Surface":
        """What `to_json` wrote.

        Raises:
            FileDamagedError: something else.
        """
        try:
            steps = [Steps(tuple(map(float, s["rise"])), tuple(map(float, s["extra"]))) for s in data["steps"]]
            made = cls(
                tuple(map(int, data["out"])),
                tuple(map(int, data["into"])),
                tuple(tuple(map(float, row)) for row in data["ms"]),
                (steps[0], steps[1]),
            )
            sizes = np.array(made.ms)
            if sizes.shape != (len(made.out), len(made.into)) or not np.isfinite(sizes).all() or (sizes < 0).any():
                raise ValueError(f"times of shape {sizes.shape}")
            if any(len(part) != PERIOD + 1 for one in steps for part in (one.rise, one.extra)):
                raise ValueError("steps of another period")
            return made
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise FileDamagedError(
                "read a latency table", found=f"{type(error).__name__}: {error}", do="delete it: it is measured again"
            ) from error


@final
@dataclass(frozen=True, eq=False)
class Times(Cost):
    """A sum over layers of milliseconds read off their surfaces, as calibrated on whole networks."""

    surfaces: tuple[Surface, ...]
    which: np.ndarray
    """Surface of each item; int64 `[items]`."""
    scale: np.ndarray
    """What an item's time is multiplied by; float64 `[items]`."""
    slots: tuple[int, int]
    """How many of the factors are the width put out, and how many the width taken in; what follows is whether the
    layer is there at all."""

    def __post_init__(self) -> None:
        most = max((len(grid) for s in self.surfaces for grid in (s.out, s.into)), default=1)
        count = len(self.surfaces)
        grids, lengths = np.full((2, count, most), np.inf), np.zeros((2, count), np.int64)
        ms = np.zeros((count, most, most))
        steps = np.ones((2, 2, count, PERIOD + 1))  # [rise or extra, axis, surface, residue]
        for i, surface in enumerate(self.surfaces):
            for axis, grid in enumerate((surface.out, surface.into)):
                grids[axis, i, : len(grid)], lengths[axis, i] = grid, len(grid)
                steps[0, axis, i], steps[1, axis, i] = surface.steps[axis].rise, surface.steps[axis].extra
            ms[i, : len(surface.out), : len(surface.into)] = surface.ms
        object.__setattr__(self, "_arrays", (grids, lengths, ms, steps))

    def corrected(self, factor: float, plus: float) -> "Times":
        """The same times `factor` times as long, and `plus` milliseconds more for every plan. The last item is what is
        the same for every plan."""
        constant = float(self.surfaces[int(self.which[-1])].ms[0][0] * self.scale[-1])
        surfaces = (*self.surfaces, Surface((1,), (1,), ((factor * constant + plus,),)))
        which = np.append(self.which[:-1], len(self.surfaces))
        return replace(self, surfaces=surfaces, which=which, scale=np.append(self.scale[:-1] * factor, 1.0))

    def values(self, items: np.ndarray, widths: np.ndarray) -> np.ndarray:
        grids, lengths, ms, (rise, extra) = self._arrays  # type: ignore[attr-defined]
        which = self.which[items]
        first, second = self.slots
        sizes = widths[:, :first].prod(1), widths[:, first : first + second].prod(1)
        there = widths[:, first + second :].prod(1) * sizes[0] * sizes[1] > 0
        places, parts, more = [], [], self.scale[items] * there
        for axis, width in enumerate(sizes):
            grid, last = grids[axis][which], lengths[axis][which] - 1
            left = np.mod(width, PERIOD).astype(np.int64)
            stepped = width - left + PERIOD * rise[axis][which, left]
            more = more * extra[axis][which, left]
            low = np.clip((grid <= stepped[:, None]).sum(1) - 1, 0, np.maximum(last - 1, 0))
            high = np.minimum(low + 1, last)
            a, b = (np.take_along_axis(grid, at[:, None], 1)[:, 0] for at in (low, high))
            places.append((low, high))
            parts.append(np.maximum((stepped - a) / np.where(b > a, b - a, 1.0), 0.0) * (b > a))
        (o0, o1), (i0, i1) = places
        p, q = parts
        read = (
            ms[which, o0, i0] * (1 - p) * (1 - q)
            + ms[which, o1, i0] * p * (1 - q)
            + ms[which, o0, i1] * (1 - p) * q
            + ms[which, o1, i1] * p * q
        )
        return np.asarray(read * more)


@final
@dataclass(eq=False)
class Table:
    """A file of measured layers, and of whole networks to calibrate by, for one machine and target."""

    path: Path | None
    machine: Mapping[str, str]
    layers: dict[str, Surface]
    networks: dict[str, list[dict[str, Any]]]

    @classmethod
    def open(cls, path: Path | None, machine: Mapping[str, str]) -> "Table":
        """Read the file, or begin one.

        Raises:
            FileDamagedError: no such table.
            InputError: it was measured on another machine, or for another target; it can't be written.
        """
        if path is not None:
            refuse_unwritable(path)
        if path is None or not path.exists():
            return cls(path, machine, {}, {})
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']!r}")
            layers = {key: Surface.from_json(one) for key, one in data["layers"].items()}
            table = cls(path, dict(data["machine"]), layers, dict(data["networks"]))
        except FileDamagedError:
            raise
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise FileDamagedError(
                "read a latency table",
                found=f"{type(error).__name__}: {error}",
                where=str(path),
                do="delete it: it is measured again",
            ) from error
        differing = [name for name in {**machine, **table.machine} if table.machine.get(name) != machine.get(name)]
        if differing:
            raise InputError(
                "use a latency table of another machine",
                found="; ".join(
                    f"{name} {table.machine.get(name)!r}, here {machine.get(name)!r}" for name in differing
                ),
                where=str(path),
                do="give another file: times are worth nothing elsewhere",
            )
        return table

    def save(self) -> None:
        """Write the file aside and rename it."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "format": FORMAT,
            "machine": dict(self.machine),
            "layers": {key: one.to_json() for key, one in self.layers.items()},
            "networks": self.networks,
        }
        handle, aside = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file)
        os.replace(aside, self.path)
