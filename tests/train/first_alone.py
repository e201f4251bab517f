"""One of several processes, of which the first does some things alone: `python first_alone.py FOLDER`."""

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import nn
from worker import Points, network

import niwaki
from budgets.clocks import thousandths, work
from niwaki.errors import InputError, NiwakiError
from niwaki.measure import Target
from niwaki.methods import one_shot, steps
from niwaki.train import Recovery, processes
from niwaki.train.checkpoints import save_weights

PATIENCE, LATE = 4, 6
"""Seconds that processes wait for each other in a training, and that the first comes too late."""


def main(folder: Path) -> None:
    rank = os.environ["RANK"]
    processes.PATIENCE = timedelta(seconds=PATIENCE)
    heard: list[str] = []

    def table(model, example, graph, **_):
        heard.append("table")
        time.sleep(LATE)
        return thousandths(graph)

    def times(target, calls, runs):
        heard.append("whole networks")
        return {name: [work(model)] for name, model in calls.items()}

    def measured(model, example, *, meters):
        heard.append("measure")
        time.sleep(LATE / 2)  # the first of two before the training
        return {}

    niwaki.budgets.timed = table
    Target.open = lambda self, model, example: model
    Target.amounts, steps.measure, real = times, measured, one_shot.score
    one_shot.score = lambda *a, **k: heard.append("score") or real(*a, **k)

    torch.manual_seed(int(rank))  # other weights in every process: the first one's plan counts
    net, example = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16)), torch.zeros(1, 64)
    how = niwaki.methods.Magnitude()
    budget = niwaki.Budget(0.5, of="latency")
    result = niwaki.compress(net, example, method=how, budget=budget, target=Target("pytorch"))
    (folder / f"plan.{rank}").write_text(json.dumps({k: list(v) for k, v in result.plan.kept.items()}))

    model = network()
    if rank == "0":
        time.sleep(LATE)
    Recovery(epochs=1)(model, Points(8, adapter=False))
    save_weights(model, folder / f"weights.{rank}")
    (folder / f"heard.{rank}").write_text(json.dumps(heard))

    def fails() -> str:
        raise InputError("measure", found="no such machine")

    (folder / f"groups.{rank}").write_text(str(len(torch.distributed.distributed_c10d._world.pg_map)))
    processes.told_by_first(net, fails)


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        main(Path(sys.argv[1]))
    except NiwakiError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)
