"""What a sweep's folder holds, and the rows of results.jsonl.

sweep.json      what was asked: the trials, the command, the versions
trials/NAME/    one run of `niwaki compress` each, as `niwaki report` and `niwaki.load` know them
attempts.jsonl  one line for every attempt at a trial, as it ends
timing.jsonl    one line for every measured latency
results.jsonl   one line for every trial: what was asked, how it ended, what was measured
logs/NAME.log   what the attempts said
"""

import importlib.util
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from niwaki.errors import FileDamagedError, InputError
from niwaki.files import REPORT, write_text
from niwaki.sweep.attempt import finished
from niwaki.sweep.trials import Trial

log = logging.getLogger(__name__)

RESULTS, ATTEMPTS, TIMING, PLAN = "results.jsonl", "attempts.jsonl", "timing.jsonl", "sweep.json"
TRIALS, LOGS = "trials", "logs"
STATUS = ("done", "failed", "waiting")
NEEDED: dict[str, type] = {"trial": str, "digest": str, "status": str, "options": dict, "values": dict}
_UNCUT = "uncut"


def rows_of(folder: Path, trials: Sequence[Trial]) -> dict[str, dict[str, Any]]:
    """One row for every trial by its digest, in the order they were asked for, from what lies in `folder`."""
    attempts: dict[str, list[Mapping[str, Any]]] = {}
    for entry in read_lines(folder / ATTEMPTS):
        attempts.setdefault(str(entry.get("digest")), []).append(entry)
    times = times_of(folder)
    return {trial.digest: _row(folder, trial, attempts.get(trial.digest, []), times) for trial in trials}


def earlier_rows(folder: Path, trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Rows of trials that the folder has and that are not asked for any more, each marked as `earlier`."""
    asked = {trial.digest for trial in trials}
    found = [row for row in read_lines(folder / RESULTS) if row.get("status") in STATUS]
    fits = [row for row in found if all(isinstance(row.get(key), kind) for key, kind in NEEDED.items())]
    return [row | {"earlier": True} for row in fits if row["digest"] not in asked and row["status"] != "waiting"]


def times_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Newest measured latency of each trial, by digest; of the uncut models by "uncut" and the model's source."""
    return {
        str(entry.get("of")): entry["latency"]
        for entry in read_lines(folder / TIMING)
        if isinstance(entry.get("latency"), dict) and _number(entry["latency"].get("value")) is not None
    }


def uncut(trial: Trial) -> str:
    """Name under which the latency of a trial's uncut model is kept: with what its example and place follow from, where
    that is said."""
    said = [f"{name}={trial.options[name]}" for name in ("input", "device") if trial.options.get(name)]
    return " ".join((_UNCUT, str(trial.options["model"]), *said))


def _row(
    folder: Path, trial: Trial, attempts: Sequence[Mapping[str, Any]], times: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    place = folder / TRIALS / trial.name
    mark = finished(place, trial.digest)
    failed = [entry for entry in attempts if not entry.get("done")]
    row: dict[str, Any] = {
        "trial": trial.name,
        "digest": trial.digest,
        "status": "done" if mark is not None else "failed" if failed else "waiting",
        "options": dict(trial.options),
        "attempts": len(attempts) or int(mark is not None),
        "lost": sum(1 for entry in attempts if entry.get("lost")),
        "error": str(failed[-1].get("error") or "") if failed and mark is None else "",
        "values": {},
    }
    if mark is None:
        return row
    report = json.loads((place / REPORT).read_text(encoding="utf-8"))
    values = _values(report)
    for side, name in (("latency", trial.digest), ("latency_before", uncut(trial))):
        if name in times:
            values[side] = float(times[name]["value"])
            values[f"{side}_spread"] = float(times[name].get("spread") or 0.0)
    receipt = report.get("receipt") or {}
    return {
        **row,
        "method": (report.get("method") or {}).get("name"),
        "metric": _metric(report),
        "values": values,
        "passed": receipt.get("passed"),
        "exact": receipt.get("exact"),
        "seconds": mark.get("seconds"),
        "node": mark.get("node"),
        "created": report.get("created"),
    }


def _values(report: Mapping[str, Any]) -> dict[str, float]:
    """Every measurement by name, those of the uncut model as NAME_before."""
    found = {}
    for side, ending in (("before", "_before"), ("after", "")):
        for name, record in (report.get(side) or {}).items():
            value = _number(record.get("value")) if isinstance(record, dict) else None
            if value is not None:
                found[f"{name}{ending}"] = value
    return found


def _metric(report: Mapping[str, Any]) -> str | None:
    """The figure that the trial's task judges by, where it is in percent."""
    name = report.get("metric")
    record = (report.get("after") or {}).get(name)
    return str(name) if isinstance(record, dict) and record.get("unit") == "%" else None


def _number(value: Any) -> float | None:
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if fits else None


def write_rows(folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """results.jsonl, in one step; results.parquet as well where pyarrow is installed."""
    rows = list(rows)
    write_text(folder / RESULTS, "".join(json.dumps(row) + "\n" for row in rows))
    if importlib.util.find_spec("pyarrow") is None:
        log.info("no results.parquet: pyarrow is not installed (pip install 'niwaki[sweep]')")
        return
    import pyarrow
    import pyarrow.parquet

    flat = [
        {
            **{key: value for key, value in row.items() if key not in ("values", "options")},
            "options": json.dumps(row["options"]),
            **{f"value_{name}": value for name, value in row["values"].items()},
        }
        for row in rows
    ]
    names = list(dict.fromkeys(name for row in flat for name in row))
    table = pyarrow.Table.from_pylist([{name: row.get(name) for name in names} for row in flat])
    aside = folder / ".results.parquet"
    pyarrow.parquet.write_table(table, aside)
    os.replace(aside, folder / "results.parquet")


def append(file: Path, entry: Mapping[str, Any]) -> None:
    """One more line, on the disk before this returns; a line that a kill cut short is closed first."""
    with file.open("a+b") as lines:
        lines.seek(0, os.SEEK_END)
        torn = lines.tell() > 0
        if torn:
            lines.seek(-1, os.SEEK_END)
            torn = lines.read(1) != b"\n"
        lines.write((b"\n" if torn else b"") + json.dumps(entry).encode() + b"\n")
        lines.flush()
        os.fsync(lines.fileno())


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The entries of a log; lines that a kill cut short are left out."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            found.append(entry)
    return found


def read_rows(folder: str | Path) -> tuple[dict[str, Any], ...]:
    """The rows of a sweep's results.jsonl, checked.

    Raises:
        InputError: no sweep there.
        FileDamagedError: a line is no row.
    """
    file = Path(folder) / RESULTS
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        do = "give the folder that `niwaki sweep` wrote"
        raise InputError(f"the results of {folder}", found=f"no readable {RESULTS}", do=do) from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise _damaged(file, f"line {number}: {error}") from error
        if not isinstance(row, dict):
            raise _damaged(file, f"line {number} is no object")
        for key, kind in NEEDED.items():
            if not isinstance(row.get(key), kind):
                raise _damaged(file, f"line {number}: {key} is missing or no {kind.__name__}")
        if row["status"] not in STATUS:
            raise _damaged(file, f"line {number}: status {row['status']!r}")
        if any(_number(value) is None for value in row["values"].values()):
            raise _damaged(file, f"line {number}: a value is no number")
        rows.append(row)
    return tuple(rows)


def is_sweep(folder: str | Path) -> bool:
    """Whether `niwaki sweep` wrote this folder."""
    return (Path(folder) / RESULTS).is_file()


def _damaged(file: Path, found: str) -> FileDamagedError:
    return FileDamagedError(
        f"read {file.name}", found=found, where=str(file), do="start the same sweep again: it writes the file anew"
    )
