"""Ends what Ray on this machine leaves when the process that started it is killed.

Ray's own servers end with it, but for the agents that a raylet begins: they tell its end to a server that is gone, and
wait a minute for the answer. `python guard.py PARENT [SECONDS]` remembers them while PARENT is its parent, and kills
them once it is not. On Linux; elsewhere it finds none. It needs no package, so that it is there at once.
"""

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

RAYLET = "raylet"


class Process(NamedTuple):
    """One that runs."""

    name: str
    parent: int
    born: str
    """In ticks since the machine started: another process of the same number has another."""


def processes() -> dict[int, Process]:
    """All that run, by their numbers; those that ended and were not asked for yet are left out."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            before, _, after = (folder / "stat").read_text(errors="replace").rpartition(")")
        except OSError:  # it ended meanwhile
            continue
        words = after.split()
        if words[0] not in "ZX":
            found[int(folder.name)] = Process(before.partition("(")[2], int(words[1]), words[19])
    return found


def agents(parent: int) -> dict[int, Process]:
    """What the raylets that `parent` started have started."""
    table = processes()
    raylets = {pid for pid, one in table.items() if one.parent == parent and one.name == RAYLET}
    return {pid: one for pid, one in table.items() if one.parent in raylets}


def watch(parent: int, seconds: float = 0.5) -> None:
    """Return once `parent` is not this process's parent any more, and what its raylets had started is killed."""
    known: dict[int, Process] = {}
    while os.getppid() == parent:
        known |= agents(parent)
        time.sleep(seconds)
    table = processes()
    for pid, one in known.items():
        if pid in table and table[pid].born == one.born:
            with suppress(ProcessLookupError):  # it ended by itself just now
                os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    watch(int(sys.argv[1]), *map(float, sys.argv[2:]))
