"""A sweep on a Ray cluster of two nodes, one of which is killed while trials run on it."""

import json
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
NET = """
from torch import nn, zeros

def small():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), zeros(1, 1, 8, 8)
"""


def test_a_killed_node_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    from niwaki.sweep import Workers, grid, read_rows, sweep
    from niwaki.sweep.results import ATTEMPTS, read_lines

    (tmp_path / "nets.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    trials = grid(
        {"model": "python:nets.py:small", "method": ["magnitude", "random"], "keep": [0.8, 0.6, 0.4], "seed": [0, 1]}
    )
    assert len(trials) == 12
    folder = tmp_path / "swept"
    settings = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=settings)
    try:
        doomed = cluster.add_node(**{name: settings[name] for name in ("num_cpus", "object_store_memory")})
        cluster.wait_for_nodes()
        killed = threading.Event()

        def kill() -> None:
            while len(read_lines(folder / ATTEMPTS)) < 3:  # both nodes are at work
                time.sleep(0.1)
            time.sleep(2)  # in the middle of trials
            cluster.remove_node(doomed, allow_graceful=False)
            killed.set()

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        rows = sweep(trials, folder, workers=Workers(cluster.address, tries=1), timing=None)
        killer.join(60)
    finally:
        ray.shutdown()
        cluster.shutdown()
    attempts = read_lines(folder / ATTEMPTS)
    print(f"attempts: {len(attempts)}; lost: {[a['trial'] + ': ' + a['error'] for a in attempts if a['lost']]}")
    print(f"nodes of what is done: {Counter(a['node'] for a in attempts if a['done'])}")
    assert killed.is_set()
    assert any(entry["lost"] for entry in attempts), "the node was idle when it was killed"
    assert [row["status"] for row in rows] == ["done"] * 12
    assert [row["trial"] for row in read_rows(folder)] == [trial.name for trial in trials]
    assert Counter(entry["trial"] for entry in attempts if entry["done"]) == Counter(trial.name for trial in trials)
    assert sorted(path.name for path in (folder / "trials").iterdir()) == sorted(trial.name for trial in trials)
    for trial in trials:
        assert json.loads((folder / "trials" / trial.name / "report.json").read_text())["receipt"]["passed"]
