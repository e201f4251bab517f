"""What a method gets and gives, and the folder it is saved in."""

import datetime
import hashlib
import json
import logging
import platform
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from niwaki.distill import Weighted
from niwaki.errors import NiwakiError
from niwaki.files import PICTURES, PLAN, REPORT, SETTINGS, SURGERY, WEIGHTS, write_folder
from niwaki.graph import ChannelGraph
from niwaki.graph.skeleton import identity
from niwaki.measure import Measurement, Meter, Target
from niwaki.plan import Plan
from niwaki.quantize import Quantised, packed_state
from niwaki.surgery import Surgery
from niwaki.surgery.verify import fresh_like
from niwaki.tasks import Task
from niwaki.train import Recovery
from niwaki.units import Budget, Receipt, device_of, run, tensors_in

log = logging.getLogger(__name__)


@final
@dataclass(frozen=True, eq=False)
class Job:
    """A model, a target, and what may be used to get there."""

    model: nn.Module
    example: Any
    budget: tuple[Budget, ...]
    task: Task | None = None
    recovery: Recovery | None = None
    distill: tuple[Weighted, ...] = ()
    """In the recovery the uncut model is a teacher, by these losses; none leave it out."""
    repair: bool = True
    """Re-estimate batch norm after the cut (needs a task)."""
    calibration: int = 16
    """Batches for the repair."""
    protect: tuple[str, ...] = ()
    seed: int = 0
    limit: int | None = None
    """Samples of the test split to evaluate on; None is all."""
    meters: tuple[Meter, ...] = ()
    """Meters beside parameters, MACs and bytes."""
    progress: Callable[[str, float], None] | None = None
    """Hears of each finished stage and its seconds."""
    steps: Callable[[int, int, str], None] | None = None
    """Hears of each training step: its number from 1, how many there are, which epoch."""
    target: Target | None = None
    """What budgets of latency are about."""
    table: Path | None = None
    """The file that keeps what was measured there."""
    partial: Path | None = None
    """A folder for the plan and the recovery's checkpoints, from which a job that was killed goes on."""
    source: str = ""
    """Where the model came from, for the report."""
    weights: str = ""
    """Where its weights came from, for the settings."""
    drawn: tuple[str, ...] = ()
    """Tensors that are as they were drawn, where the others have weights: heads for other classes."""
    command: str | None = None

    @property
    def wanted(self) -> "Request":
        return Request(
            self.budget,
            data=self.task is not None,
            recovery=self.recovery is not None,
            distill=bool(self.distill),
            target=self.target,
            table=self.table,
        )

    def tell(self, stage: str, seconds: float) -> None:
        if self.progress is not None:
            self.progress(stage, seconds)


@final
@dataclass(frozen=True, kw_only=True)
class Request:
    """What a job asks for whatever its model is: enough to refuse it before one is read."""

    budget: tuple[Budget, ...] = field(kw_only=False)
    data: bool = False
    """Whether there are any: a task."""
    recovery: bool = False
    distill: bool = False
    calibration: int | None = None
    """Batches that somebody asked for by number, to re-estimate batch norm with."""
    target: Target | None = None
    table: Path | None = None


@final
@dataclass(frozen=True, eq=False)
class Stage:
    """Measurements after one step."""

    stage: str
    measurements: dict[str, Measurement]


class Method(ABC):
    """A paper's method: settings as fields, a job in, an outcome out."""

    searches: ClassVar[bool] = False
    """Whether it leaves in the job's `partial` folder what a killed search goes on from."""
    trains: ClassVar[bool] = False
    """Whether it trains by itself, with or without a recovery: its runs can be gone on with after a kill."""

    def refuse(self, wanted: Request) -> None:  # noqa: B027  # a method may bear everything
        """Refuse what this method can't do, whatever the model is: nothing, unless it says more.

        Raises:
            InputError: what is asked for, why it can't be, and what to do instead.
        """

    @abstractmethod
    def __call__(self, job: Job) -> "Outcome":
        """Run the method."""


@final
@dataclass(frozen=True, eq=False)
class Outcome:
    """A smaller model with its plan, its receipt, and numbers before and after."""

    model: nn.Module = field(repr=False)
    plan: Plan
    receipt: Receipt
    before: dict[str, Measurement] = field(repr=False)
    after: dict[str, Measurement] = field(repr=False)
    stages: tuple[Stage, ...] = field(repr=False)
    graph: ChannelGraph = field(repr=False)
    method: dict[str, Any]
    job: Job = field(repr=False)
    surgery: Surgery = field(repr=False)
    """What was done to the model: enough for `load` to do the same to a fresh one."""
    history: dict[str, Any] | None = field(default=None, repr=False)
    seconds: dict[str, float] = field(default_factory=dict)
    quantised: dict[str, Quantised] = field(default_factory=dict, repr=False)
    """Weights that lie on a grid, and their codes: they are saved at their real width."""
    details: dict[str, Any] = field(default_factory=dict, repr=False)
    """What else the method has to say, as plain data: parts of the report by name."""
    unfolded: tuple[str, ...] = ()
    """Layers that could not take the constants of removed units, or be refitted, where these were to be."""

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write plan.json, model.safetensors, surgery.json, report.json and settings.json; all or nothing.

        A model of transformers gets a folder `hf` besides, for `from_pretrained`, where its configuration can say the
        new sizes; where it can't, report.json says why (`pretrained`).

        Raises:
            RunExistsError: the folder exists and `force` is not given.
            InputError: no folder can be made there.
        """
        return write_folder(Path(folder), self._write, force=force)

    def _write(self, folder: Path) -> None:
        (folder / PLAN).write_text(self.plan.to_json(), encoding="utf-8")
        save_tensors(self.model, folder / WEIGHTS, self.quantised)
        (folder / SURGERY).write_text(json.dumps(self.surgery.to_json()), encoding="utf-8")
        (folder / SETTINGS).write_text(json.dumps(self.settings(), indent=1), encoding="utf-8")
        pretrained = _pretrained(self.model, folder / "hf", self.job.example)
        report = self.report() | ({} if pretrained is None else {"pretrained": pretrained})
        models = {"before": self.job.model, "after": self.model}
        report |= {"pictures": write_pictures(self.job.task, models, folder, limit=self.job.limit)}
        (folder / REPORT).write_text(json.dumps(report, indent=1), encoding="utf-8")

    def settings(self) -> dict[str, Any]:
        """Everything needed to run this again."""
        job = self.job
        return {
            "source": job.source,
            "weights": job.weights,
            **({"drawn": list(job.drawn)} if job.drawn else {}),
            "example": describe_example(job.example),
            "device": str(device_of(job.model)),
            "threads": torch.get_num_threads(),
            "method": self.method,
            "budget": list(self.plan.budget),
            "seed": job.seed,
            "protect": list(job.protect),
            "repair": job.repair,
            "calibration": job.calibration,
            "limit": job.limit,
            "task": None if job.task is None else settings_of(job.task),
            "meters": [settings_of(meter) for meter in job.meters],
            "target": None if job.target is None else settings_of(job.target),
            "command": job.command,
            "recovery": None if job.recovery is None else job.recovery.to_json(),
            "distill": [
                {**settings_of(one.loss), "weight": one.weight, "taps": _plain(one.pairs)} for one in job.distill
            ],
        }

    def report(self) -> dict[str, Any]:
        """The run as plain data, as `niwaki report` reads it."""
        from niwaki import __version__

        plan, graph = self.plan, self.graph
        widths = []
        for cut in plan.cuts:
            keep, blocks = cut["keep"], cut.get("blocks", 1)
            shape = graph.shapes.get(cut["tensor"])
            if shape is not None and cut["tensor"].endswith("weight") and len(shape) > 1:
                after = len(keep) if blocks == 1 else max(len(block) for block in keep)
                width = {"tensor": cut["tensor"], "axis": cut["axis"], "before": shape[cut["axis"]], "after": after}
                widths.append(width | ({"new": len(cut["new"])} if "new" in cut else {}))
        gone, grows = {f"block {path}" for path in plan.dropped}, plan.grows
        metric = [name for name in self.after if name not in ("params", "macs", "bytes")]
        candidates = [
            {"label": label, **{name: m[name].value for name in ("macs", "params", *metric) if name in m}}
            for label, m in [("before", self.before), *((s.stage, s.measurements) for s in self.stages)]
        ]
        splits = getattr(getattr(self.job.task, "splits", None), "record", {})
        return {
            "niwaki": __version__,
            "command": self.job.command,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "model": {"source": self.job.source, "class": plan.model, "fingerprint": plan.fingerprint},
            "method": self.method,
            "budget": list(plan.budget),
            "before": {name: m.to_json() for name, m in self.before.items()},
            "after": {name: m.to_json() for name, m in self.after.items()},
            "stages": [
                {"stage": s.stage, "measurements": {n: m.to_json() for n, m in s.measurements.items()}}
                for s in self.stages
            ],
            "promised": dict(plan.promised),
            "measured": dict(plan.decided_by.get("measured") or {}),
            "receipt": self.receipt.to_json(),
            "widths": widths,
            "groups": [
                {
                    "name": g.name,
                    "units": g.units,
                    "kept": 0 if g.name in gone else len(plan.kept.get(g.name, range(g.units))),
                    **({"new": grows[g.name]} if g.name in grows else {}),
                    "fixed": g.fixed,
                    "exact": g.exact,
                    "inexact": g.inexact,
                    "kind": g.kind,
                    "rows": g.rows,
                }
                for g in (*graph.groups, *(block for block in graph.blocks if block.name in gone))
            ],
            "unknown": [
                vars(u) if hasattr(u, "__dict__") else {"operation": u.operation, "module": u.module, "where": u.where}
                for u in graph.unknown
            ],
            "data_reads": [vars(read) for read in graph.data_reads],
            "candidates": candidates,
            "metric": None if self.job.task is None else next(reversed(self.after), None),
            "history": self.history,
            "unfolded": list(self.unfolded),
            **_plain(self.details),
            "splits": _plain(splits),
            "versions": {
                "niwaki": __version__,
                "torch": torch.__version__,
                "numpy": np.__version__,
                "python": sys.version.split()[0],
                "platform": platform.platform(terse=True),
            },
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "digest": digest(self.model, self.job.example),
        }


def write_pictures(
    task: Task | None, models: Mapping[str, nn.Module], folder: Path, *, limit: int | None
) -> list[dict[str, str]]:
    """What a task shows of its models, as files of a run; their words and names for the report.

    Where that fails (a picture that is gone meanwhile) there are none: the run is saved all the same.
    """
    try:
        shown = [] if task is None else task.shown(models, limit=limit)
    except NiwakiError as error:
        log.warning("the run has no pictures: %s", error)
        shown = []
    rows = []
    for number, one in enumerate(shown):
        file = Path(PICTURES) / f"{number}.jpg"
        (folder / PICTURES).mkdir(exist_ok=True)
        (folder / file).write_bytes(one.jpeg)
        rows.append({"row": one.row, "words": one.words, "file": file.as_posix()})
    return rows


def digest(model: nn.Module, example: Any) -> dict[str, Any]:
    """What the model puts out on a seeded input of the example's shapes and types: digest of the bytes, to check a
    reload by.

    Bit-equality holds for the same versions, device and number of threads, which are recorded.
    """
    generator = torch.Generator().manual_seed(0)
    fresh = fresh_like(example, generator, device_of(model), wide=False)
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)  # a forward may draw: an order of patches
            outputs = tensors_in(run(model, fresh))
    finally:
        for module, mode in modes.items():
            module.training = mode
    code = hashlib.sha256()
    for tensor in outputs:
        code.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return {
        "sha256": code.hexdigest(),
        "seed": 0,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": str(device_of(model)),
        "example": describe_example(example),
    }


def describe_example(example: Any) -> Any:
    from niwaki.plan import encode_example

    return encode_example(example)


def note_export(folder: Path, kind: str, measurements: dict[str, Any]) -> None:
    """Add what an export of a saved run measured to its report.json (written aside and renamed)."""
    path = folder / REPORT
    data = json.loads(path.read_text(encoding="utf-8"))
    data.setdefault("exports", {})[kind] = measurements
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    aside.replace(path)


def _pretrained(model: nn.Module, folder: Path, example: Any) -> str | None:
    """Write a model of transformers as transformers do; the folder's name, why there is none, or None for others."""
    if not any(kind.__module__.startswith("transformers.") for kind in type(model).__mro__):
        return None
    from niwaki.models.fitted import write_pretrained

    try:
        write_pretrained(model, folder, example)
    except Exception as error:  # whatever a class of transformers makes of its new sizes: the run is saved all the same
        return f"none: {str(error) or type(error).__name__}"
    return folder.name


def save_tensors(model: nn.Module, path: Path, quantised: Mapping[str, Quantised] | None = None) -> None:
    """State of a model as safetensors; a tensor held under several names is written once, the others as aliases.

    Tensors of `quantised` that still are what their codes say are written at the width of these.
    """
    first: dict[Any, str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    listing = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    for name, tensor in listing:
        key = identity(tensor)
        if key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            tensors[name] = tensor.detach().to("cpu").contiguous()
    metadata = {"aliases": json.dumps(aliases)}
    codes = on_grid(tensors, quantised or {})
    if codes:
        tensors, description = packed_state(tensors, codes)
        metadata["packed"] = json.dumps(description)
    safetensors.torch.save_file(tensors, str(path), metadata=metadata)


def on_grid(tensors: Mapping[str, Tensor], quantised: Mapping[str, Quantised]) -> dict[str, Quantised]:
    """Those of `quantised` whose tensor has the very values that the codes give."""
    return {
        name: codes
        for name, codes in quantised.items()
        if name in tensors
        and tensors[name].shape == codes.shape
        and torch.equal(tensors[name].cpu(), codes.values().cpu())
    }


def settings_of(block: Any) -> dict[str, Any]:
    """A block's class and fields; of data, the record of where it came from and how it was split."""
    names = [part.name for part in fields(block)] if is_dataclass(block) else []
    values = {name: getattr(block, name) for name in names}
    return {
        "class": type(block).__name__,
        **{name: _plain(getattr(value, "record", value)) for name, value in values.items()},
    }


def _plain(value: Any) -> Any:
    """`value` as JSON-able data."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)
