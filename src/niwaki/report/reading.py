"""Reads the folder that a run left behind, and trusts nothing in it."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from niwaki.errors import FileDamagedError, InputError
from niwaki.files import PLAN, REPORT, SETTINGS, TRAINED, UNENDED, nearest, refuse_unended, resume_words, unended

# What report.json holds: key -> type; nested keys for the lists of records. Keys may be missing, never of another type.
SHAPE: dict[str, Any] = {
    "niwaki": str,
    "command": str,
    "created": str,
    "model": {"source": str, "class": str, "fingerprint": str},
    "method": {"name": str},
    "budget": [{"keep": float, "of": str, "multiple": float}],
    "before": dict,
    "after": dict,
    "validation": dict,
    "stages": [{"stage": str, "measurements": dict}],
    "receipt": {"difference": float, "scale": float, "exact": bool, "inexact": [str], "door": str, "passed": bool},
    "widths": [{"tensor": str, "axis": float, "before": float, "after": float, "new": float}],
    "groups": [{"name": str, "units": float, "kept": float, "new": float, "fixed": str, "exact": bool, "inexact": str}],
    "candidates": [{"label": str, "macs": float, "params": float, "accuracy": float}],
    "metric": str,
    "pictures": [{"row": str, "words": str, "file": str}],
    "versions": dict,
    "seconds": dict,
    "splits": {"seed": float, "normalisation": {"mean": [float], "std": [float]}},
    "digest": dict,
    "pretrained": str,
    "repaired": [
        {
            "weight": str,
            "reader": str,
            "kept": float,
            "of": float,
            "unrepaired": float,
            "error": float,
            "warnings": [str],
        }
    ],
    "left_whole": dict,
    "promised": dict,
    "measured": {
        "of": str,
        "unit": str,
        "definition": str,
        "limit": float,
        "uncut": float,
        "measured": float,
        "off": float,
        "tolerance": float,
        "met": bool,
        "rounds": [{"promised": float, "measured": float}],
    },
    "history": {"epochs": [dict]},
    "search": {
        "notes": [str],
        "rounds": [
            {
                "groups": [{"name": str, "grain": float}],
                "base": dict,
                "reached": bool,
                "selected": dict,
                "steps": [
                    {
                        "group": str,
                        "size": float,
                        "allowance": float,
                        "accepted": int,
                        "trials": [{"count": float, "losses": dict, "task": str, "rise": float}],
                    }
                ],
            }
        ],
    },
    "exports": dict,
    "unknown": [{"operation": str, "module": str, "where": str}],
    "data_reads": [dict],
    "unfolded": [str],
}
NEEDED = ("model", "method", "before", "after")
EXPORT: dict[str, Any] = {
    "file": str,
    "note": str,
    "failed": str,
    "tensorrt_refuses": dict,
    **{
        name: {"value": float, "unit": str, "spread": float}
        for name in (
            "difference",
            "float_difference",
            "agreement",
            "integer_layers",
            "bytes",
            "latency",
            "pytorch_latency",
        )
    },
}
MEASUREMENT: dict[str, Any] = {
    "name": str,
    "value": float,
    "unit": str,
    "definition": str,
    "spread": float,
    "device": str,
    "versions": dict,
    "uncounted": [str],
}


@final
@dataclass(frozen=True)
class Run:
    """One run as its files tell it; every value has the type that `SHAPE` states."""

    folder: Path
    name: str
    """How the run is called among others: its folder below the folder that was asked for."""
    data: dict[str, Any]
    settings: dict[str, Any]

    @property
    def trained(self) -> bool:
        """Whether it is a training: nothing was traced or cut, so nothing was to be judged."""
        return bool(self.data["method"].get("name") == TRAINED)

    @property
    def metric(self) -> str:
        """The task's own figure, in percent: what plots stand on and what is said first."""
        named = self.data.get("metric")
        record = self.data["after"].get(named) or {}
        return str(named) if record.get("unit") == "%" else "accuracy"

    def number(self, side: str, name: str) -> float | None:
        """Value of a measurement `before` or `after`; None where it was not taken."""
        found = self.data[side].get(name)
        return None if found is None else float(found["value"])

    def share(self, name: str) -> float | None:
        """What stays of a cost: after / before."""
        before, after = self.number("before", name), self.number("after", name)
        return None if before is None or after is None or before == 0 else after / before

    def get(self, key: str) -> Any:
        """A part of the report, or an empty one of its kind."""
        found = self.data.get(key)
        return found if found is not None else ([] if isinstance(SHAPE[key], list) else {})


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileDamagedError: not UTF-8, not JSON, not an object, or with numbers that are not finite.
    """

    def refuse(constant: str) -> float:
        raise ValueError(f"the number {constant}, which JSON does not have")

    def finite(text: str) -> float:
        value = float(text)
        return value if math.isfinite(value) else refuse(text)

    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"no readable JSON: {error}") from error
    except OSError as error:
        raise InputError(f"read {path.name}", found=str(error), where=str(path), do="check the path") from error
    if not isinstance(data, dict):
        raise _damaged(path, f"a {type(data).__name__} where an object belongs")
    return data


def read_run(folder: Path, name: str = "") -> Run:
    """The run in `folder`, checked.

    Raises:
        FileDamagedError: a file is truncated, has parts of another kind, or contradicts the plan beside it.
    """
    path = folder / REPORT
    data = read_json(path)
    missing = [key for key in NEEDED if key not in data]
    if missing:
        raise _damaged(path, f"no {', '.join(missing)}")
    _check(data, SHAPE, path, "")
    stages = [stage.get("measurements", {}) for stage in data.get("stages") or []]
    for place, records in (
        ("before", data["before"]),
        ("after", data["after"]),
        ("validation", data.get("validation") or {}),
        *(("stages", s) for s in stages),
    ):
        for key, record in records.items():
            _check(record, MEASUREMENT, path, f"{place}.{key}")
            if not isinstance(record.get("value"), (int, float)):
                raise _damaged(path, f"{place}.{key} has no value")
    for target, entry in (data.get("exports") or {}).items():
        _check(entry, EXPORT, path, f"exports.{target}")
    _consistent(data, path)
    plan = folder / PLAN
    if plan.is_file():
        _agrees(data, read_json(plan), plan)
    settings = folder / SETTINGS
    return Run(folder, name or folder.resolve().name, data, read_json(settings) if settings.is_file() else {})


Folders = str | Path | Sequence[str | Path]


@final
@dataclass(frozen=True)
class Runs:
    """The runs of some folders."""

    runs: tuple[Run, ...]
    left_out: dict[str, str]
    """Folders below those asked for whose run is damaged or did not end, with what was found."""


def read(folders: Folders) -> tuple[Run, ...]:
    """The runs that `read_all` finds."""
    return read_all(folders).runs


def read_all(folders: Folders) -> Runs:
    """The run in a folder, or all runs in the folders below it, by name; of several folders one after the other.

    Raises:
        InputError: no such folder, or no run in it; a run that did not end, where it is named itself.
        FileDamagedError: a run that is named itself, or every run below a folder, is damaged.
    """
    if isinstance(folders, (str, Path)):
        return _below(folders)
    found: list[Run] = []
    left: dict[str, str] = {}
    for folder in folders:
        root = Path(folder)
        below = _below(root)
        alone = len(below.runs) == 1 and below.runs[0].folder == root
        found += [replace(run, name=str(root) if alone else str(root / run.name)) for run in below.runs]
        left |= below.left_out
    if not found:
        raise InputError("a report", found="no folder", do="give the folder that a run was saved to")
    found = list({run.folder.resolve(): run for run in found}.values())
    short = [run.folder.resolve().name for run in found]
    if len(set(short)) == len(found):  # the whole path only where it tells two runs apart
        found = [replace(run, name=name) for run, name in zip(found, short, strict=True)]
    return Runs(tuple(found), left)


def _below(folder: str | Path) -> Runs:
    folder = Path(folder)
    if (folder / REPORT).is_file():
        return Runs((read_run(folder),), {})
    refuse_unended(folder, f"report on {folder}")
    do = "give the folder that a run was saved to"
    if not folder.is_dir():
        near = nearest(folder)
        found = "a file" if folder.exists() else "no such folder" + (f"; near: {', '.join(near)}" if near else "")
        raise InputError(f"report on {folder}", found=found, where=str(folder.absolute()), do=do)
    places = sorted(path.parent for path in folder.rglob(REPORT))
    waiting = sorted({path.parent for path in folder.rglob(SETTINGS) if unended(path.parent) == path.parent})
    left = {str(place): f"{UNENDED}: {resume_words(place)} goes on with it" for place in waiting}
    found_runs, errors = [], []
    for place in places:
        try:
            found_runs.append(read_run(place, place.relative_to(folder).as_posix()))
        except FileDamagedError as error:
            errors.append(error)
            left[str(place)] = f"damaged: {error.asked}: {error.found}"
    if errors and not found_runs:
        raise errors[0]
    if not found_runs:
        found = f"{len(waiting)} runs below it, none of which ended" if waiting else f"no {REPORT} in it or below"
        do = f"{resume_words(waiting[0])} goes on with the first" if waiting else do
        raise InputError(f"report on {folder}", found=found, where=str(folder.absolute()), do=do)
    return Runs(tuple(found_runs), left)


def _damaged(path: Path, found: str) -> FileDamagedError:
    return FileDamagedError(
        f"read {path.name}", found=found, where=str(path), do="the file is damaged or was changed; run again"
    )


def _check(value: Any, shape: Any, path: Path, place: str) -> None:
    """Compare `value` with `shape`; None passes everywhere but for the needed parts."""
    if value is None and place not in NEEDED:
        return
    kind = shape if isinstance(shape, type) else type(shape)
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) if kind is float else isinstance(value, kind)
    if not fits:
        raise _damaged(path, f"{place or 'the file'} is a {type(value).__name__}, not a {kind.__name__}")
    if isinstance(shape, dict):
        for key, inner in shape.items():
            if key in value:
                _check(value[key], inner, path, f"{place}.{key}" if place else key)
    if isinstance(shape, list):
        for number, item in enumerate(value):
            if item is None:
                raise _damaged(path, f"{place}[{number}] is empty")
            _check(item, shape[0], path, f"{place}[{number}]")


def _consistent(data: dict[str, Any], path: Path) -> None:
    for key, few, many in (("groups", "kept", "units"), ("widths", "after", "before")):
        for record in data.get(key) or []:
            low, high = record.get(few), record.get(many)
            if low is not None and high is not None and not 0 <= low <= high + record.get("new", 0):
                raise _damaged(path, f"{key}: {record.get('name', record.get('tensor'))} keeps {low} of {high}")


def _agrees(data: dict[str, Any], plan: dict[str, Any], path: Path) -> None:
    """The report's widths must be the plan's."""
    cuts = plan.get("cuts")
    if not isinstance(cuts, list):
        raise _damaged(path, "no list of cuts")
    kept: dict[tuple[Any, Any], int] = {}
    for cut in cuts:
        if not isinstance(cut, dict) or not isinstance(cut.get("keep"), list) or "tensor" not in cut:
            raise _damaged(path, "a cut without tensor or keep")
        blocks = [
            row for row in cut["keep"] if isinstance(row, list)
        ]  # of a grouped convolution; emptied ones are gone
        kept[str(cut["tensor"]), cut.get("axis")] = max(map(len, blocks)) if blocks else len(cut["keep"])
    for record in data.get("widths") or []:
        planned = kept.get((str(record.get("tensor")), record.get("axis")))
        if planned is not None and planned != record.get("after"):
            place = f"{record['tensor']} axis {record['axis']}"
            raise _damaged(path, f"{place} keeps {planned} here and {record.get('after')} in report.json")
