"""A training from scratch as a run in a folder: weights, history, checkpoints and a report."""

import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import nn

from niwaki.files import REPORT, SURGERY, TRAINED, WEIGHTS, write_json
from niwaki.measure import COUNTS, Measurement, measure
from niwaki.methods.job import describe_example, digest, settings_of, write_pictures
from niwaki.models import load_checkpoint_
from niwaki.tasks import Task
from niwaki.train import Recovery
from niwaki.train.checkpoints import save_weights
from niwaki.train.history import HISTORY


@final
@dataclass(frozen=True, eq=False)
class Training:
    """A network, what it learns, and how; the folder is that of the training's settings."""

    model: nn.Module
    example: Any
    task: Task
    how: Recovery
    limit: int | None = None
    """Samples of the test split to evaluate on; None is all."""
    source: str = ""
    weights: str = ""
    command: str | None = None
    home: Path | None = None
    """Where the folder goes when all is written, if not where it is: the reports name that place."""

    def settings(self) -> dict[str, Any]:
        """What the training was asked for."""
        return {
            "source": self.source,
            "weights": self.weights,
            "example": describe_example(self.example),
            "task": settings_of(self.task),
            "training": self._at_home(self.how.to_json()),
            "limit": self.limit,
        }

    def __call__(
        self,
        *,
        progress: Callable[[str, float], None],
        steps: Callable[[int, int, str], None],
        resume: bool = False,
        write: bool = True,
    ) -> dict[str, Any]:
        """Train in place; write `model.safetensors` and then `report.json`, each whole or not at all. The report.

        `write` is False in all but one of several processes.
        """
        from niwaki import __version__

        clock = time.perf_counter()

        def done(stage: str) -> None:
            nonlocal clock
            progress(stage, time.perf_counter() - clock)
            clock = time.perf_counter()

        before = self._look() if write else {}
        done("measure before")
        history = self.how(self.model, self.task, progress=steps, resume=resume)
        done("train")
        if not write:
            return {}
        after = self._look()
        held = self.task.metrics(self.model, split="val")
        done("measure after")
        assert self.how.folder is not None
        folder = Path(self.how.folder)
        save_weights(self.model, folder / WEIGHTS)
        history = replace(history, settings=self._at_home(history.settings))
        write_json(folder / HISTORY, history.to_json())
        report = {
            "niwaki": __version__,
            "command": self.command,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "model": {"source": self.source, "class": type(self.model).__name__},
            "method": {"name": TRAINED},
            "before": _plain(before),
            "after": _plain(after),
            "validation": _plain(held),
            "metric": next(reversed(after), None),
            "pictures": write_pictures(self.task, {"after": self.model}, folder, limit=self.limit),
            "history": history.to_json(),
            "splits": getattr(getattr(self.task, "splits", None), "record", {}),
            "versions": {
                "niwaki": __version__,
                "torch": torch.__version__,
                "numpy": np.__version__,
                "python": sys.version.split()[0],
                "platform": platform.platform(terse=True),
            },
            "digest": digest(self.model, self.example),
            "processes": int(os.environ.get("WORLD_SIZE", "1")),
        }
        write_json(folder / REPORT, report)
        return report

    def _at_home(self, settings: dict[str, Any]) -> dict[str, Any]:
        return settings if self.home is None else {**settings, "folder": str(self.home)}

    def _look(self) -> dict[str, Measurement]:
        """Counts, and the task's metrics on the test split."""
        found = measure(self.model, self.example, meters=COUNTS)
        return found | self.task.metrics(self.model, limit=self.limit)


def is_training(folder: Path) -> bool:
    """Whether the run in a folder is a training that ended, as far as its report can be read."""
    if (folder / SURGERY).is_file() or not (folder / REPORT).is_file():
        return False
    try:
        method = json.loads((folder / REPORT).read_text(encoding="utf-8")).get("method")
    except (OSError, ValueError, AttributeError):
        return (folder / HISTORY).is_file()  # damaged: whoever reads it says so
    return isinstance(method, dict) and method.get("name") == TRAINED


def fill_trained_(model: nn.Module, folder: Path) -> nn.Module:
    """`model` with the weights of the training in `folder`, all of them or, with an error, none.

    Raises:
        InputError: the weights are another model's, or are not there.
        FileDamagedError: they can't be read.
    """
    load_checkpoint_(model, folder / WEIGHTS)
    return model


def _plain(measurements: dict[str, Measurement]) -> dict[str, Any]:
    return {name: measurement.to_json() for name, measurement in measurements.items()}
