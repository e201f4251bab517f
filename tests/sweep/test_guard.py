"""What a killed sweep leaves running: nothing."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from niwaki.sweep import guard

linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
NET = """
from torch import nn, zeros

def small():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), zeros(1, 1, 8, 8)
"""
SWEEP = """
model = "python:nets.py:small"
keep = [0.8, 0.6]
seed = [0, 1, 2, 3]
[sweep]
latency_runs = 0
"""
RAYLET = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(90)']);" \
         "time.sleep(90)"  # fmt: skip
PARENT = """
import os, subprocess, sys, time
raylet, sleeps, guard = sys.argv[1:]
subprocess.Popen([sys.executable, "-IS", guard, str(os.getpid()), "0.05"])
subprocess.Popen([raylet, "-c", sleeps])
subprocess.Popen([sys.executable, "-c", sleeps])
time.sleep(90)
"""


def waited(true: Callable[[], bool], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not (found := true()) and time.monotonic() < until:
        time.sleep(0.1)
    return found


def family(root: int) -> dict[int, str]:
    """Processes below one, by when they began: a number may be given again."""
    table = guard.processes()
    found, new = {}, {root}
    while new:
        new = {pid for pid, one in table.items() if one.parent in new}
        found |= {pid: table[pid].born for pid in new}
    return found


def alive(ones: dict[int, str]) -> list[int]:
    table = guard.processes()
    return [pid for pid, born in ones.items() if pid in table and table[pid].born == born]


@linux
def test_children_of_a_raylet_end_with_whoever_began_it(tmp_path: Path) -> None:
    """The raylet's child ends, and nothing else: not the raylet, and not the other child's child."""
    raylet = tmp_path / "raylet"
    raylet.symlink_to(sys.executable)
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(raylet), RAYLET, str(guard.__file__)])
    below: dict[int, str] = {}
    try:
        assert waited(lambda: len(family(parent.pid)) == 5, 60)
        below = family(parent.pid)
        table = guard.processes()
        (watched,) = guard.agents(parent.pid)
        assert table[table[watched].parent].name == "raylet" and watched in below
        (watcher,) = [pid for pid in below if str(guard.__file__) in Path(f"/proc/{pid}/cmdline").read_text()]
        time.sleep(0.5)
        parent.kill()
        parent.wait()
        assert waited(lambda: watched not in alive(below) and watcher not in alive(below), 30)
        assert len(alive(below)) == 3
    finally:
        parent.kill()
        for pid in alive(below):
            os.kill(pid, signal.SIGKILL)


def test_another_process_of_the_same_number_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two agents the second has ended since, and its number is another process's, which began later."""
    raylet, first = guard.Process("raylet", 1, "10"), guard.Process("agent", 2, "20")
    before = {2: raylet, 3: first, 4: first}
    after = {3: first, 4: guard.Process("editor", 1, "90")}
    tables, parents, killed = iter([before, after]), iter([1, 0]), []
    monkeypatch.setattr(guard, "processes", lambda: next(tables))
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append((pid, number)))
    guard.watch(1, seconds=0)
    assert killed == [(3, signal.SIGKILL)]


@pytest.mark.slow
@linux
def test_a_killed_sweep_leaves_no_process(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    (tmp_path / "nets.py").write_text(NET)
    (tmp_path / "s.toml").write_text(SWEEP)
    source = str(Path(guard.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "niwaki", "sweep", "s.toml", "--out", "swept"]
    with open(tmp_path / "said", "w") as said:
        life = subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=said, stderr=said)
    below: dict[int, str] = {}
    try:
        assert waited((tmp_path / "swept" / "attempts.jsonl").exists, 300), (tmp_path / "said").read_text()
        below = family(life.pid)
        names = {Path(f"/proc/{pid}/cmdline").read_text().strip("\0") for pid in below}
        assert {"ray::DashboardAgent", "ray::RuntimeEnvAgent"} <= names  # those that stayed
        life.kill()
        life.wait()
        gone = waited(lambda: not alive(below), 20)
        left = [Path(f"/proc/{pid}/cmdline").read_text() for pid in alive(below)]
        assert gone, left
    finally:
        life.kill()
        for pid in alive(below):
            os.kill(pid, signal.SIGKILL)
