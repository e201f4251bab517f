"""The sweep itself: what is not done yet is begun, what fails is begun again, and every end is written down at once."""

import datetime
import fcntl
import json
import logging
import os
import platform
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from niwaki import __version__
from niwaki.errors import InputError, RunExistsError, making
from niwaki.files import write_text
from niwaki.sweep.attempt import Attempt
from niwaki.sweep.pool import Pool, RayPool, Workers
from niwaki.sweep.results import ATTEMPTS, LOGS, PLAN, TRIALS, append, earlier_rows, rows_of, write_rows
from niwaki.sweep.timing import Timing, time_trials
from niwaki.sweep.trials import Trial

log = logging.getLogger(__name__)
LOST = 10
"""How often a trial whose worker went away is begun again, beside its tries."""

Row = dict[str, Any]
Progress = Callable[[str, int, int, Mapping[str, Any]], None]
"""Called with what goes on ("trials" or "latency"), how many are through, how many there are, and the row."""


def sweep(
    trials: Sequence[Trial],
    folder: str | Path,
    *,
    workers: Workers = Workers(),  # noqa: B008
    timing: Timing | None = Timing(),  # noqa: B008
    progress: Progress | None = None,
    command: str | None = None,
) -> tuple[Row, ...]:
    """Run every trial that is not done in `folder`, and return the rows of its results.jsonl.

    A trial that fails does not stop the others. Interrupted, even by a kill, it goes on with the same call: what is
    done is found by its digest. Latency is measured at the end, one trial after another, so that none competes.

    Args:
        timing: how latency is measured; None leaves it out.
        command: what was typed, for the record.

    Raises:
        InputError: no trials, no such cluster, or a folder that holds something else.
        RunExistsError: another sweep is at work in the folder.
        MissingExtraError: Ray is not installed.
    """
    folder = Path(folder).absolute()
    with _opened(folder, trials, command):
        earlier = earlier_rows(folder, trials)
        if earlier:
            names = ", ".join(row["trial"] for row in earlier)
            log.warning("not asked for any more, their runs and rows stay, apart from the others: %s", names)
        rows = rows_of(folder, trials)
        places = {trial.digest: _places(folder, trial) for trial in trials}
        common = {"threads": workers.cpus, "working": os.getcwd(), "sign": str(folder / PLAN)}
        run(trials, folder, rows, lambda: RayPool(workers, common, places), tries=workers.tries, progress=progress)
        if timing is not None:
            done = [trial for trial in trials if rows[trial.digest]["status"] == "done"]

            def tell(through: int, count: int, trial: Trial) -> None:
                rows.update(rows_of(folder, [trial]))
                if progress is not None:
                    progress("latency", through, count, rows[trial.digest])

            time_trials(done, folder, timing, threads=workers.cpus, tell=tell)
        rows = rows_of(folder, trials)
        write_rows(folder, [*rows.values(), *earlier])
    return tuple(rows.values())


def run(
    trials: Sequence[Trial],
    folder: Path,
    rows: dict[str, Row],
    pool: Callable[[], AbstractContextManager[Pool]],
    *,
    tries: int,
    progress: Progress | None = None,
) -> None:
    """The trials that `rows` does not call done, until each is done or has failed `tries` times; `rows` follows.

    The pool is opened only if there is something to do.
    """
    todo = [trial for trial in trials if rows[trial.digest]["status"] != "done"]
    through = len(trials) - len(todo)
    earlier = earlier_rows(folder, trials)
    write_rows(folder, [*rows.values(), *earlier])
    log.info("%d trials%s", len(trials), f", {through} of them done already" if through else "")
    if not todo:
        return
    failed: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    with pool() as at:
        for trial in todo:
            at.begin(trial)
        left = len(todo)
        while left:
            trial, attempt = at.ended()
            append(folder / ATTEMPTS, _entry(trial, attempt))
            rows.update(rows_of(folder, [trial]))
            write_rows(folder, [*rows.values(), *earlier])
            (lost if attempt.lost else failed)[trial.digest] += not attempt.done
            if not attempt.done and not attempt.final and failed[trial.digest] < tries and lost[trial.digest] <= LOST:
                log.warning("%s: %s; begun again", trial.name, attempt.error)
                at.begin(trial)
                continue
            left -= 1
            through += 1
            if progress is not None:
                progress("trials", through, len(trials), rows[trial.digest])


def _entry(trial: Trial, attempt: Attempt) -> dict[str, Any]:
    return {"trial": trial.name, "digest": trial.digest, "ended": _now(), **attempt.to_json()}


def _places(folder: Path, trial: Trial) -> tuple[str, str]:
    return str(folder / TRIALS / trial.name), str(folder / LOGS / f"{trial.name}.log")


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@contextmanager
def _opened(folder: Path, trials: Sequence[Trial], command: str | None) -> Iterator[None]:
    """Inside, the folder is there, says what was asked, and is nobody else's."""
    if not trials:
        raise InputError("a sweep", found="no trials", do="give at least one")
    with making(folder):
        if folder.exists() and not (folder / PLAN).is_file() and not _begun(folder):
            raise RunExistsError(f"write a sweep to {folder}", found="it holds no sweep", do="choose another folder")
        for name in (TRIALS, LOGS):
            (folder / name).mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            do = "wait for it, or choose another folder"
            raise RunExistsError(f"a sweep in {folder}", found="another one is at work there", do=do) from error
        _clean(folder)
        record = {
            "niwaki": __version__,
            "command": command,
            "started": _now(),
            "platform": platform.platform(terse=True),
            "python": platform.python_version(),
            "trials": [
                {"name": t.name, "digest": t.digest, "arguments": ["niwaki", *t.arguments]} for t in trials
            ],
        }  # fmt: skip
        write_text(folder / PLAN, json.dumps(record, indent=1) + "\n")
        yield


def _begun(folder: Path) -> bool:
    """Whether nothing is there but what a sweep makes first: it may have been killed before it wrote its plan."""
    return folder.is_dir() and all(
        path.name in (TRIALS, LOGS, ".lock") or path.name.startswith(f".{PLAN}.") for path in folder.iterdir()
    )


def _clean(folder: Path) -> None:
    """Take away what killed attempts left half-written: folders with a dot in front."""
    for left in (folder / TRIALS).glob(".*"):
        shutil.rmtree(left, ignore_errors=True)
