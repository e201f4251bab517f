"""One process per runtime: what one does to its process (threads, allocators, a crash) does not reach the next."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from safetensors.torch import save_file

from niwaki.bench.items import Item
from niwaki.errors import NiwakiError
from niwaki.units import tensors_in

MARK = "niwaki-bench "
"""What lines of progress begin with; runtimes write to the same stream."""
Progress = Callable[[str, int, int], None]
"""Hears what is at work, how many rounds are done, and of how many."""
LAST = 400  # characters of a dead process's last words


@final
@dataclass(frozen=True)
class Outcome:
    """What a process said: its rows, and how it ended where that was no good end."""

    rows: list[dict[str, Any]]
    died: str = ""


def start(
    items: Sequence[Item],
    inputs: Mapping[int, Any],
    words: Mapping[str, Any],
    folder: Path,
    progress: Progress | None,
) -> Outcome:
    """Time `items` in the runtime that `words` names, in a process of its own.

    Args:
        inputs: batch -> inputs, in the form of the first network's example.
        folder: for what passes between the processes.
    """
    runtime, threads = str(words["runtime"]), str(words["threads"])
    job, answer = folder / f"{runtime}.json", folder / f"{runtime}.answer.json"
    for batch, given in inputs.items():
        tensors = {str(number): tensor.contiguous() for number, tensor in enumerate(tensors_in(given))}
        save_file(tensors, str(folder / f"inputs-{batch}.safetensors"))
    listed = [{"label": item.label, "kind": item.kind, "place": item.place, "shape": item.shape} for item in items]
    told = {**words, "items": listed, "batches": list(inputs), "folder": str(folder), "answer": str(answer)}
    job.write_text(json.dumps(told), encoding="utf-8")
    code, last = spawn(job, threads, progress)
    try:
        found = json.loads(answer.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {"rows": []}
    if code == 0:
        return Outcome(found["rows"])
    ended = f"signal {-code}" if code < 0 else f"exit code {code}"
    return Outcome(found["rows"], f"the process of {runtime} ended with {ended}: {last}")


def spawn(job: Path, threads: str, progress: Progress | None) -> tuple[int, str]:
    """Run a job in a new process: how it ended (below 0: by which signal), and its last words."""
    own = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as complaints:
        with subprocess.Popen(
            [sys.executable, "-m", "niwaki.bench.process", str(job)],
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            errors="replace",
            env={**os.environ, **own},
        ) as process:
            try:
                for line in process.stdout or ():
                    if line.startswith(MARK) and progress is not None:
                        what, done, of = json.loads(line.removeprefix(MARK))
                        progress(what, done, of)
                code = process.wait()
            finally:
                if process.poll() is None:
                    process.kill()
        complaints.seek(0)
        last = " ".join(complaints.read().split())[-LAST:]
    return code, last


def failure(error: BaseException) -> str:
    """An error in a line."""
    if isinstance(error, NiwakiError):
        return str(error)
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:300]}"
