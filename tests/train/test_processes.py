"""Two processes over gloo on the CPU: the loss curve of one with the doubled batch, a dead one, and going on."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from worker import Points, network

from niwaki.errors import InputError
from niwaki.train import Checkpoints, Ema, Recovery, Validation
from niwaki.train.checkpoints import newest
from niwaki.train.processes import told_by_first

HOW = Recovery(
    epochs=3, lr=0.05, clip=0.5, accumulate=2, ema=Ema(0.8), validation=Validation(), checkpoints=Checkpoints(2)
)
SOURCE = Path(__file__).parents[2] / "src"
TOLERANCE = 1e-5
"""Relative, of losses and weights: sums over a batch are taken in two halves."""


def together(folder, what):
    """Two processes that train; (exit code, stderr) of each."""
    return launched(["worker.py", json.dumps(HOW.to_json()), str(folder), what])


def launched(words):
    """Two processes of a script beside this file; (exit code, stderr) of each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {**os.environ, "ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(SOURCE)}
    words = [sys.executable, str(Path(__file__).parent / words[0]), *words[1:]]
    processes = [
        subprocess.Popen(words, env={**common, "RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    try:
        said = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def test_two_processes_are_one_with_the_doubled_batch_even_if_one_died(tmp_path):
    """8 batches of 8 an epoch for each, in shards and in copies; both break off in the second epoch and start again."""
    first, second = together(tmp_path, "die")
    assert second[0] == -signal.SIGKILL, second
    assert first[0] == 1 and "another process is gone or does not answer" in first[1] and "resume" in first[1], first
    for kind in ("fsdp2", "ddp"):
        saved = newest(tmp_path / kind / "checkpoints")
        assert saved.state["position"]["step"] == 4 and not (tmp_path / kind / "history.json").exists()
        network().load_state_dict(saved.model)  # whole, by the model's own names

    ended = together(tmp_path, "live")
    assert [code for code, _ in ended] == [0, 0], ended
    torch.manual_seed(0)
    model, task = network(), Points(16)
    alone = Recovery.from_json({**HOW.to_json(), "checkpoints": None})(model, task)
    for kind in ("fsdp2", "ddp"):
        history = json.loads((tmp_path / f"{kind}.json").read_text())
        assert history["processes"] == 2
        assert [epoch["loss"] for epoch in history["epochs"]] == pytest.approx(alone.losses, rel=TOLERANCE)
        assert [epoch["validation"] for epoch in history["epochs"]] == [epoch["validation"] for epoch in alone.epochs]
        for rank in (0, 1):
            found = safetensors.torch.load_file(f"{tmp_path / kind}.{rank}")
            for name, tensor in nn.ModuleList([model, task.extra]).state_dict().items():
                torch.testing.assert_close(found[name], tensor, rtol=TOLERANCE, atol=1e-6)
        how = Recovery.from_json({**HOW.to_json(), "folder": str(tmp_path / kind)})
        with pytest.raises(InputError, match="processes was 2, is 1"):
            how(network(), Points(8), resume=True)


def test_the_first_process_measures_alone_and_the_others_wait(tmp_path):
    """Longer than they wait for each other in a training; what it can't do is said in all of them."""
    first, second = launched(["first_alone.py", str(tmp_path)])
    assert first[0] == 2 and "no such machine" in first[1], first
    assert second[0] == 1 and "the first one failed: measure; found: no such machine" in second[1], second
    heard = [json.loads((tmp_path / f"heard.{rank}").read_text()) for rank in (0, 1)]
    assert heard[1] == [] and heard[0].count("table") == heard[0].count("score") == 1 and "measure" in heard[0]
    groups = [(tmp_path / f"groups.{rank}").read_text() for rank in (0, 1)]
    assert groups == ["1", "1"], "groups that were made to tell stay behind"
    plans = [json.loads((tmp_path / f"plan.{rank}").read_text()) for rank in (0, 1)]
    assert plans[0] == plans[1] and len(plans[0]["0"]) == 32  # 80 thousandths of a millisecond for each of 64
    weights = [safetensors.torch.load_file(tmp_path / f"weights.{rank}") for rank in (0, 1)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_one_process_alone_tells_itself(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert told_by_first(network(), lambda: "it") == "it"


def test_the_first_version_of_fsdp_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="--fsdp_version 2"):
        Recovery()(network(), Points(8))
