"""`sensitivity`: what becomes of a network when one group alone is cut, at several widths."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import nn

from niwaki.budgets.atoms import Grids, make_atoms
from niwaki.errors import FileDamagedError, InputError, NiwakiError, NotFiniteError, Setting
from niwaki.evidence import Need, collect
from niwaki.graph import ChannelGraph, trace
from niwaki.graph.plans import plan_of
from niwaki.graph.skeleton import named_tensors
from niwaki.measure.measurement import evaluating
from niwaki.scores import Magnitude, Score, score
from niwaki.scores.score import describe
from niwaki.surgery import cut
from niwaki.surgery.verify import fresh_like
from niwaki.tasks import Task
from niwaki.units import device_of, run, tensors_in
from niwaki.verbs import callable_module

__all__ = ["CHANGE", "Row", "Sensitivity", "sensitivity"]

CHANGE = "output change"
"""What is told where there is no data: the distance between old and new outputs over the length of the old ones."""
INPUTS = 4
"""Random inputs that it is the mean of."""
Progress = Callable[[int, int, str], None]
_DEFAULT = Magnitude()


@final
@dataclass(frozen=True)
class Row:
    """One group cut alone to one width."""

    group: str
    units: int
    """Positions of the group that could go: channels, or whole heads."""
    kept: int
    """How many of them stay."""
    value: float
    """The metric of the cut network, nothing repaired or trained; infinite where it put out NaN or infinity."""
    macs: float
    """Share of the network's multiply-adds that stay."""


@final
@dataclass(frozen=True, eq=False)
class Sensitivity:
    """Every group at every width, and the uncut network."""

    metric: str
    """"accuracy" or what else the task's metric is called, or "output change"."""
    unit: str
    before: float
    """The metric of the uncut network: 0 for the change of outputs."""
    higher_is_better: bool
    rows: tuple[Row, ...]
    settings: dict[str, Any]
    left_whole: dict[str, str]
    """Groups that can't be cut, with the reason."""

    def to_json(self) -> dict[str, Any]:
        """Plain data; a value that is not finite is null."""
        rows = [{**asdict(row), "value": row.value if np.isfinite(row.value) else None} for row in self.rows]
        return {**{k: v for k, v in vars(self).items() if k != "rows"}, "rows": rows}

    def worst_first(self) -> list[tuple[str, tuple[Row, ...]]]:
        """Groups with their rows from wide to narrow; the one that suffers most, on average over its widths, first."""
        groups: dict[str, list[Row]] = {}
        for row in self.rows:
            groups.setdefault(row.group, []).append(row)
        sign = 1.0 if self.higher_is_better else -1.0

        def mean(rows: list[Row]) -> float:
            return sign * sum(row.value for row in rows) / len(rows)

        listed = sorted(groups.items(), key=lambda item: mean(item[1]))
        return [(name, tuple(sorted(rows, key=lambda row: -row.kept))) for name, rows in listed]


def refuse(shares: Sequence[float], how: Score, *, data: bool) -> None:
    """Refuse what can't be whatever the model is.

    Raises:
        InputError: shares outside (0, 1); a score that needs data where there are none.
    """
    if not shares or any(type(share) is not float or not 0 < share < 1 for share in shares):
        said = Setting("shares", ",".join(map(str, shares)), f"sensitivity(shares={list(shares)})")
        do = ("give e.g. ", Setting("shares", "0.75,0.5", "(0.75, 0.5)"))
        raise InputError((said,), found="not between 0 and 1", do=do)
    if Need.GRADIENT in how.needs and not data:
        raise InputError(
            (Setting("score", type(how).__name__.lower(), f"sensitivity(how={type(how).__name__}())"),),
            found="its score needs gradients",
            do=("give ", Setting("data", written="a task")),
        )


def sensitivity(
    model: nn.Module,
    example: Any,
    *,
    task: Task | None = None,
    shares: Sequence[float] = (0.75, 0.5, 0.25),
    how: Score = _DEFAULT,
    grids: Grids = "rows",
    protect: Sequence[str] = (),
    limit: int | None = None,
    seed: int = 0,
    file: str | Path | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """Cut each group alone, its lowest scores first, to several widths, and measure each of these networks.

    Judged on the task's validation split, never on its test split; without a task by how far the outputs move on random
    inputs, relative to their length. Nothing is repaired or trained in between, and groups are cut one at a time: two
    groups cut together may lose more than both alone. `model` is left alone.

    Args:
        shares: of each group, what stays.
        how: which units of a group go first; it may not need gradients unless there is a task.
        limit: validation samples to evaluate on (all by default).
        file: a JSONL file that keeps each row as it is measured; rows of the same settings are not measured again.
        progress: called before each measurement with its number, how many there are, and what it is.

    Raises:
        InputError: shares outside (0, 1), no group that can be cut, a score that needs data without a task.
        FileDamagedError: `file` holds something else.

    Examples:
        >>> import torch, niwaki
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> found = niwaki.sensitivity(net, torch.zeros(1, 4), shares=(0.5,))
        >>> [(row.group, row.units, row.kept) for row in found.rows], found.metric
        ([('0#2', 8, 4)], 'output change')
    """
    refuse(shares, how, data=task is not None)
    graph = trace(model, example, protect=protect)
    gradients = Need.GRADIENT in how.needs
    batches = task.calibration(16, seed) if task is not None and gradients else None
    needs = how.needs | {Need.WEIGHT}  # weights that are no numbers are refused, whatever is read of them
    scores = score(graph, collect(model, graph, needs, batches=batches, loss=task.loss if task else None), how=how)
    atoms, left = make_atoms(graph, scores, grids=grids, exact_only=False, bundle="mean")
    wanted = [(pool, share) for pool in range(len(atoms.pools)) for share in sorted(set(shares), reverse=True)]
    plans: list[tuple[str, int, int, np.ndarray]] = []
    for pool, share in wanted:
        mine = np.flatnonzero(atoms.pool == pool)
        order = mine[np.lexsort((-mine, atoms.score[mine]))]  # of equal scores the lower index stays
        keep = max(int(atoms.least[pool]), round(share * mine.size))
        alive = np.ones(graph.units.count, bool)
        for atom in order[: mine.size - keep]:
            alive[atoms.units[int(atom)]] = False
        if keep < mine.size and (atoms.pools[pool], mine.size, keep) not in {one[:3] for one in plans}:
            plans.append((atoms.pools[pool], mine.size, keep, alive))
    if not plans:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(left.items())[:4])
        raise InputError("sensitivity of a network", found=f"no group can be cut ({reasons})", do="protect fewer")
    judge = _Judge(model, example, task, limit, seed)
    settings = {
        "model": graph.fingerprint,
        "weights": _digest(model),
        "score": describe(how),
        "grids": grids,
        "protect": list(protect),
        "seed": seed,
        **judge.settings,
    }
    kept = _Kept(None if file is None else Path(file), settings)
    if kept.before is None:
        if progress is not None:
            progress(0, len(plans) + 1, "the uncut network")
        number = judge(model)
        kept.note_before(number, judge.metric, judge.unit)
    assert kept.before is not None
    before, metric, unit = kept.before
    every = graph.cost(np.ones(graph.units.count, bool))["macs"] or 1.0
    rows = []
    for number, (name, units, keep, alive) in enumerate(plans):
        row = kept.rows.get((name, units, keep))
        if row is None:
            if progress is not None:
                progress(number + 1, len(plans) + 1, f"{name}, {keep} of {units}")
            value = _measured(model, graph, alive, judge)
            row = kept.note(Row(name, units, keep, value, graph.cost(alive)["macs"] / every))
        rows.append(row)
    return Sensitivity(metric, unit, before, task is not None, tuple(rows), settings, left)


def _measured(model: nn.Module, graph: ChannelGraph, alive: np.ndarray, judge: "_Judge") -> float:
    small = cut(model, plan_of(graph, alive))
    try:
        return judge(small)
    except NotFiniteError:
        return float("-inf") if judge.task is not None else float("inf")


class _Judge:
    """Measures a network: by the task on its validation split, or by its outputs against the uncut network's."""

    def __init__(self, model: nn.Module, example: Any, task: Task | None, limit: int | None, seed: int) -> None:
        self.task, self.limit = task, limit
        self.metric, self.unit = CHANGE, ""
        self.settings: dict[str, Any] = {"judged by": CHANGE, "inputs": INPUTS}
        self.inputs: list[Any] = []
        if task is None:
            generator, place = torch.Generator().manual_seed(seed), device_of(model)
            self.inputs = [fresh_like(example, generator, place, wide=False) for _ in range(INPUTS)]
            self.outputs = [self._outputs(model, one) for one in self.inputs]
        else:
            splits = getattr(task, "splits", None)
            record = getattr(splits, "record", None)
            self.settings = {"judged by": "validation split", "limit": limit, "data": _jsonable(record)}

    def __call__(self, model: nn.Module) -> float:
        if self.task is not None:
            found = self.task.evaluate(model, split="val", limit=self.limit)
            self.metric, self.unit = found.name, found.unit
            return float(found.value)
        changes = []
        for given, old in zip(self.inputs, self.outputs, strict=True):
            new = self._outputs(model, given)
            if new.shape != old.shape:
                raise InputError(
                    "compare outputs", found=f"{new.numel()} numbers, then {old.numel()}", do="give a task"
                )
            changes.append(float((new - old).norm() / old.norm().clamp_min(1e-30)))
        mean = sum(changes) / len(changes)
        return mean if np.isfinite(mean) else float("inf")

    @staticmethod
    def _outputs(model: nn.Module, given: Any) -> torch.Tensor:
        with evaluating(model):
            tensors = [tensor for tensor in tensors_in(run(model, given)) if tensor.is_floating_point()]
        return torch.cat([tensor.detach().double().flatten().cpu() for tensor in tensors])


def _jsonable(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _digest(model: nn.Module) -> str:
    """Of the values of all parameters and buffers."""
    code = hashlib.sha256()
    for listing in named_tensors(model):
        for name, tensor in listing:
            code.update(name.encode())
            code.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return code.hexdigest()[:16]


class _Kept:
    """Rows in a file, each on its line as soon as it is known; rows of other settings are left alone.

    A line that a kill left unfinished is dropped: what it says is measured again.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        text = json.dumps(settings, sort_keys=True, default=str)
        self.path, self.key = path, hashlib.sha256(text.encode()).hexdigest()[:16]
        self.rows: dict[tuple[str, int, int], Row] = {}
        self.before: tuple[float, str, str] | None = None
        """The uncut network's value, its metric and unit."""
        if path is None or not path.exists():
            return
        try:
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            for line in whole.decode("utf-8").splitlines():
                self._read(json.loads(line))
        except NiwakiError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FileDamagedError(
                "read a file of sensitivities",
                found=f"{type(error).__name__}: {error}",
                where=str(path),
                do="give another file, or delete this one",
            ) from error
        if whole != content:
            handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            with os.fdopen(handle, "wb") as file:
                file.write(whole)
            os.replace(aside, path)

    def _read(self, line: Any) -> None:
        key, value = line["settings"], line["value"]
        number = float("nan") if value is None else float(value)
        if key != self.key or number != number:  # NaN stands for what was not finite: measured again
            return
        if "group" not in line:
            named = (line.get("metric"), line.get("unit"))
            self.before = (number, str(named[0]), str(named[1])) if None not in named else None
        else:
            row = Row(str(line["group"]), int(line["units"]), int(line["kept"]), number, float(line["macs"]))
            self.rows[row.group, row.units, row.kept] = row

    def note(self, row: Row) -> Row:
        self._write({**asdict(row), "value": row.value if np.isfinite(row.value) else None})
        return row

    def note_before(self, value: float, metric: str, unit: str) -> None:
        self.before = (value, metric, unit)
        self._write({"value": value, "metric": metric, "unit": unit})

    def _write(self, line: dict[str, Any]) -> None:
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"settings": self.key, **line}) + "\n")
        except OSError as error:
            raise InputError(
                f"write {self.path}", found=error.strerror or str(error), do="choose a place where files can be made"
            ) from error


callable_module(__name__)
