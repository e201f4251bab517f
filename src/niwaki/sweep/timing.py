"""Latency of the trials and of their uncut models, measured one after another on this machine."""

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from niwaki.errors import InputError
from niwaki.files import REPORT
from niwaki.sweep.attempt import call
from niwaki.sweep.results import LOGS, TIMING, TRIALS, append, read_lines, uncut
from niwaki.sweep.trials import Trial

log = logging.getLogger(__name__)


@final
@dataclass(frozen=True)
class Timing:
    """How latency is measured: as `niwaki measure` does."""

    runs: int = 30
    """Timed passes of each model."""
    batch: int | None = None
    """Samples in a pass; None takes the example as it is."""

    def __post_init__(self) -> None:
        for name, value in (("runs", self.runs), ("batch", self.batch)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InputError(f"{name}={value!r} of a sweep's timing", found="no whole number", do="give 1 or more")


def time_trials(
    trials: Sequence[Trial],
    folder: Path,
    timing: Timing,
    *,
    threads: int,
    tell: Callable[[int, int, Trial], None] | None = None,
) -> None:
    """Measure every trial that was not measured this way yet, and each uncut model once; into timing.jsonl.

    What can't be measured is said in the log, and has no latency.
    """
    known = {
        str(entry.get("of")): entry.get("how") for entry in read_lines(folder / TIMING) if entry.get("latency")
    }  # fmt: skip
    for number, trial in enumerate(trials, start=1):
        place = folder / TRIALS / trial.name
        device = trial.options.get("device")
        how = {**asdict(timing), "threads": threads, "device": device}
        for name, target, shape in (
            (uncut(trial), str(trial.options["model"]), _shape(place)),
            (trial.digest, str(place), None),
        ):
            if known.get(name) == how:
                continue
            words = ["measure", target, f"--runs={timing.runs}", f"--threads={threads}", "--json"]
            words += [f"--batch={timing.batch}"] if timing.batch else []
            words += [f"--device={device}"] if device else []
            words += [f"--input={shape}"] if shape else []
            latency = _latency(words, threads, str(folder / LOGS / f"{trial.name}.log"))
            if latency is None:
                log.warning("%s: its latency can't be measured; see logs/%s.log", target, trial.name)
            append(folder / TIMING, {"of": name, "how": how, "latency": latency})
            known[name] = how
        if tell is not None:
            tell(number, len(trials), trial)


def _latency(words: Sequence[str], threads: int, file: str) -> dict[str, Any] | None:
    code, out, _ = call(words, threads=threads, working=os.getcwd(), log=file)
    try:
        found = json.loads(out)
        return next(found[name] for name in found if code == 0 and name.startswith("latency"))
    except (ValueError, StopIteration, TypeError):
        return None


def _shape(place: Path) -> str | None:
    """Shape of the example that a trial was run on, where it is a single tensor of floating numbers."""
    try:
        example = json.loads((place / REPORT).read_text(encoding="utf-8"))["digest"]["example"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if isinstance(example, dict) and "float" in str(example.get("dtype")) and isinstance(example.get("tensor"), list):
        return "x".join(map(str, example["tensor"]))
    return None
