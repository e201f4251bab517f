"""Clocks for several calls in turns: one pass of each, then the next pass of each.

Whatever else the machine does meets all calls alike, so their ratio is worth more than their times.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

Clock = Literal["wall", "cpu"]


@final
@dataclass(frozen=True)
class Times:
    """Milliseconds of every pass of one call, by the clock on the wall and by this process's threads."""

    wall: tuple[float, ...]
    cpu: tuple[float, ...]
    """Processor time of all threads of the process; what others on the machine took is not in it."""

    def median(self, clock: Clock = "wall") -> float:
        return statistics.median(getattr(self, clock))

    def quarters(self, clock: Clock = "wall") -> tuple[float, float]:
        """First and third quartile."""
        taken = getattr(self, clock)
        found = statistics.quantiles(taken, n=4) if len(taken) > 1 else [taken[0]] * 3
        return found[0], found[2]


def in_turns(
    calls: Mapping[str, Callable[[], Any]],
    *,
    runs: int,
    warm_up: int,
    heard: Callable[[int], None] | None = None,
) -> dict[str, Times]:
    """Time each call `runs` times in turns, after `warm_up` passes of each that are not counted.

    Args:
        heard: is told the number of each finished round, from 1.
    """
    for call in calls.values():
        for _ in range(warm_up):
            call()
    wall: dict[str, list[float]] = {name: [] for name in calls}
    cpu: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(1, runs + 1):
        for name, call in calls.items():
            busy, start = time.process_time(), time.perf_counter()
            call()
            wall[name].append((time.perf_counter() - start) * 1e3)
            cpu[name].append((time.process_time() - busy) * 1e3)
        if heard is not None:
            heard(number)
    return {name: Times(tuple(wall[name]), tuple(cpu[name])) for name in calls}
