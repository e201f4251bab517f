"""One attempt at a trial: `niwaki compress` in a process of its own, in the trial's own folder."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from niwaki.files import REPORT, SETTINGS, partial_of, write_text

MARK = "trial.json"
"""Written into a trial's folder once everything else is there."""
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_LINES = 5  # of stderr, in the error of an attempt that says nothing itself


@final
@dataclass(frozen=True)
class Attempt:
    """How one attempt ended."""

    done: bool
    error: str = ""
    """Why it failed; empty where it is done."""
    final: bool = False
    """Whether another attempt would end the same way: the input was wrong."""
    lost: bool = False
    """Whether the worker or its machine went away; that says nothing of the trial."""
    node: str = ""
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def finished(folder: Path, digest: str) -> dict[str, Any] | None:
    """The mark in a trial's folder if that very trial is done there."""
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    fits = isinstance(mark, dict) and isinstance(report, dict) and mark.get("digest") == digest
    return mark if fits else None


def attempt(
    arguments: Sequence[str], folder: str, digest: str, *, threads: int, working: str, log: str, sign: str
) -> dict[str, Any]:
    """Run `niwaki compress` on `arguments` into `folder`, unless that is done; an `Attempt` as plain data.

    Args:
        working: the current folder of the run, for relative paths.
        log: file that the run's talk is added to.
        sign: a file of the sweep that this machine must see, or its results would go nowhere.
    """
    start = time.perf_counter()
    node = socket.gethostname()

    def ended(done: bool, error: str = "", *, final: bool = False) -> dict[str, Any]:
        seconds = round(time.perf_counter() - start, 3)
        return Attempt(done, error, final=final, node=node, seconds=seconds).to_json()

    place = Path(folder)
    if not Path(sign).is_file():
        found = f"{node} does not see {sign}: give --out a folder that all machines share, at the same path"
        return ended(False, found, final=True)
    if finished(place, digest) is not None:
        return ended(True)
    words = [*arguments, f"--threads={threads}", "--runs=0", f"--out={folder}", "--json"]
    if under_way(place, words):
        words = ["resume", folder, "--json"]
    elif place.exists() or partial_of(place).exists():  # of an attempt that was cut short before its mark
        words.append("--force")
    code, out, talk = call(words, threads=threads, working=working, log=log)
    if code == 0:
        seconds = round(time.perf_counter() - start, 3)
        write_text(place / MARK, json.dumps({"digest": digest, "node": node, "seconds": seconds}) + "\n")
        return ended(True)
    return ended(False, _said(code, out, talk), final=code == 2)


def under_way(place: Path, words: Sequence[str]) -> bool:
    """Whether an attempt with these words was cut short in its recovery, from where it can go on."""
    try:
        record = json.loads((partial_of(place) / SETTINGS).read_text(encoding="utf-8"))
        return [word for word in record["arguments"] if word != "--force"] == list(words)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def call(words: Sequence[str], *, threads: int, working: str, log: str) -> tuple[int, str, str]:
    """niwaki's command line in a process that ends with this one: exit code, stdout, stderr (added to `log`)."""
    package = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, **dict.fromkeys(THREADS, str(threads)), "PYTHONPATH": paths}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as talk:
        command = [sys.executable, "-m", "niwaki.sweep.watched", str(os.getpid()), *words]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=talk, cwd=working, env=environment
        )
        try:
            code = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
        out.seek(0)
        talk.seek(0)
        said, spoken = (file.read().decode(errors="replace") for file in (out, talk))
    with contextlib.suppress(OSError), open(log, "a", encoding="utf-8") as file:
        file.write(spoken)
    return code, said, spoken


def _said(code: int, out: str, talk: str) -> str:
    """Why it failed, in the run's own words where it had any left."""
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = str(-code)
        return f"killed by {name}" + (": the machine may have run out of memory" if name == "SIGKILL" else "")
    try:
        parts = json.loads(out)["error"]
        text = "; ".join(
            f"{key}: {parts[key]}" if key != "asked" else parts[key]
            for key in ("asked", "found", "where", "do")
            if parts.get(key)
        )
        if text:
            return text
    except (ValueError, KeyError, TypeError):
        pass
    lines = talk.strip().splitlines()[-_LINES:]
    return f"exit code {code}" + (": " + " / ".join(lines) if lines else "")
