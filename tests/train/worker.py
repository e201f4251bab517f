"""One of several processes that train together: `python worker.py SETTINGS_JSON FOLDER die|live`."""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from niwaki.errors import NiwakiError
from niwaki.measure import Measurement
from niwaki.train import Recovery
from niwaki.train.checkpoints import save_weights


class Points:
    """Points of three classes around three corners, `batch` at a time; an adapter of the task's own."""

    classes = 3

    def __init__(self, batch, *, adapter=True):
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.randint(3, (128,), generator=generator)
        self.inputs = torch.randn(128, 6, generator=generator) + 2 * functional.one_hot(self.labels, 6)
        self.batch = batch
        torch.manual_seed(5 + int(os.environ.get("RANK", "0")))  # processes make other adapters: the first one's counts
        self.extra = nn.Linear(3, 3) if adapter else None

    @property
    def steps(self):
        return len(self.labels) // self.batch

    def train_batches(self, seed):
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(seed))
        for part in order.split(self.batch):
            yield self.inputs[part], self.labels[part]

    def loss(self, model, batch):
        scores = model(batch[0])
        return functional.cross_entropy(scores if self.extra is None else self.extra(scores), batch[1])

    def evaluate(self, model, *, split, limit):
        model.eval()
        with torch.no_grad():
            right = (model(self.inputs).argmax(dim=1) == self.labels).float().mean().item()
        model.train()
        return Measurement("accuracy", 100 * right, "%", split)


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3))


class Stopped(Exception):
    """Both processes stop here."""


def train(settings, folder, *, progress=None):
    """A training, and its history and weights beside it."""
    model, task = network(), Points(8)
    how = Recovery.from_json({**settings, "folder": folder})
    history = how(model, task, progress=progress, resume=True)
    save_weights(nn.ModuleList([model, task.extra]), Path(f"{folder}.{os.environ['RANK']}"))
    if os.environ["RANK"] == "0":  # both would write into one file
        Path(f"{folder}.json").write_text(json.dumps(history.to_json()))


def main(settings, folder, what):
    """Train in shards, then in copies; where `what` is "die", both break off in the second epoch: the first since
    both processes stop, the second since one is killed.
    """
    dies, how = what == "die", json.loads(settings)

    def stop(done, total, text):
        if done == 11:
            raise Stopped

    def die(done, total, text):
        if done == 11 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_MIN_NUM_PARAMS": "60"}
    with contextlib.suppress(*([Stopped] if dies else [])):
        train(how, f"{folder}/fsdp2", progress=stop if dies else None)
    del os.environ["ACCELERATE_USE_FSDP"]
    train(how, f"{folder}/ddp", progress=die if dies else None)


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        main(*sys.argv[1:])
    except NiwakiError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)
