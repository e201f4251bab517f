"""Networks and files side by side in the runtimes that will run them."""

import json
import platform
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, final

import torch

from niwaki.bench.items import Item, example_of, kind_of, open_item
from niwaki.bench.starting import Outcome, Progress, start
from niwaki.errors import InputError, MissingExtraError, UnknownNameError
from niwaki.export.onnx_file import fresh
from niwaki.measure.latency import at_batch
from niwaki.measure.measurement import device_name, versions
from niwaki.units import tensors_in
from niwaki.verbs import callable_module

__all__ = ["RUNTIMES", "Bench", "Item", "Row", "bench"]

RUNTIMES = {"eager": None, "compile": None, "onnxruntime": "export", "openvino": "openvino"}
"""Name -> the extra that brings it."""


@final
@dataclass(frozen=True)
class Row:
    """One item in one runtime at one batch: times, or why there are none."""

    item: str
    runtime: str
    batch: int
    ms: float | None = None
    """Median wall-clock time of a pass."""
    quarters: tuple[float, float] | None = None
    """First and third quartile, in ms."""
    cpu_ms: float | None = None
    """Median processor time of all threads of the process, which does not count what others on the machine took."""
    times_as_fast: float | None = None
    """The first item's median over this one's; None where the first has no time here."""
    outputs: tuple[tuple[int, ...], ...] = ()
    """Shapes."""
    failed: str = ""


@final
@dataclass(frozen=True)
class Bench:
    """What was compared, how, and what came out."""

    items: tuple[Item, ...]
    rows: tuple[Row, ...]
    settings: dict[str, Any]
    """Threads, runs, warm-up, seed, inputs, machine, versions."""

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        rows = [{**asdict(row), "outputs": [list(shape) for shape in row.outputs]} for row in self.rows]
        for row in rows:
            row["quarters"] = row["quarters"] and list(row["quarters"])
        return {"items": [item.to_json() for item in self.items], "rows": rows, "settings": self.settings}


def bench(
    names: Sequence[str | Path],
    *,
    runtimes: Sequence[str] = (),
    batches: Sequence[int] = (1,),
    threads: int = 1,
    runs: int = 30,
    warm_up: int = 5,
    shape: tuple[int, ...] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Bench:
    """Time several networks or files on the same inputs: one process per runtime, in it one pass of each in turns.

    Args:
        names: folders of runs, `.onnx`, `.xml` and `.pt2` files, sources of models ("torchvision:resnet50"); ratios are
            to the first.
        runtimes: of "eager", "compile" (torch.compile), "onnxruntime", "openvino". Networks are exported for the last
            two. Empty: eager where there is a network or a `.pt2`, onnxruntime for ONNX files, openvino for `.xml`.
        batches: of each runtime, one after the other.
        threads: CPU threads inside an operation.
        shape: of the example, batch first; unless given the first network's own, of those that know theirs.
        seed: of random weights and of the inputs.

    Raises:
        InputError: nothing to compare, a name of nothing, counts below 1, items that take other inputs or give outputs
            of other shapes.
        UnknownNameError: an unknown runtime. MissingExtraError: one that is not installed.
        FileDamagedError: a file that is none of its kind.
    """
    _check(names, runtimes, batches, threads, runs, warm_up)
    for name in names:
        kind_of(str(name))
    items = []
    for number, name in enumerate(names, 1):
        if progress is not None:
            progress(f"opening {name}", number - 1, len(names))
        items.append(open_item(str(name), shape=shape, seed=seed))
    labelled = _labels(items)
    example = example_of(labelled, shape)
    chosen = tuple(dict.fromkeys(runtimes)) or _usual(labelled)
    settings = {
        "threads": threads,
        "runs": runs,
        "warm_up": warm_up,
        "seed": seed,
        "batches": list(batches),
        "runtimes": list(chosen),
        "inputs": [f"{'x'.join(map(str, t.shape[1:]))} {str(t.dtype)[6:]}" for t in tensors_in(example)],
        "machine": f"{device_name(torch.device('cpu'))}, {platform.system()}",
        "assumed": next((item.assumed for item in labelled if item.example is example), ""),
        "versions": versions() | {name: _version(name) for name in chosen if RUNTIMES[name]},
    }
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="niwaki-bench-")))
        generator = torch.Generator().manual_seed(seed)
        inputs = {batch: fresh(at_batch(example, batch), generator) for batch in batches}
        counted = tuple(item.counted(at_batch(example, 1)) for item in labelled)
        rows: list[Row] = []
        for runtime in chosen:
            able = [item for item in counted if runtime in item.runtimes]
            rows += [_unable(item, runtime, batch) for item in counted if item not in able for batch in batches]
            if able:
                words = {"threads": threads, "runs": runs, "warm_up": warm_up, "seed": seed, "runtime": runtime}
                told = start(able, inputs, words, folder, progress)
                rows += _rows(told, able, runtime, batches)
        shutil.rmtree(folder / "onnx", ignore_errors=True)
    order = {item.label: number for number, item in enumerate(counted)}
    rows.sort(key=lambda row: (chosen.index(row.runtime), list(batches).index(row.batch), order[row.item]))
    _same_outputs(rows)
    return Bench(counted, _with_ratios(rows, counted[0].label), settings)


def _check(
    names: Sequence[Any], runtimes: Sequence[str], batches: Sequence[int], threads: int, runs: int, warm_up: int
) -> None:
    if not names:
        raise InputError("bench", found="nothing to time", do="give runs, files or models")
    counts = (*batches, threads, runs)
    if not batches or min(counts) < 1 or warm_up < 0:
        raise InputError(f"bench at {json.dumps(list(counts))}", found="a count below 1", do="give 1 or more")
    for name in runtimes:
        if name not in RUNTIMES:
            raise UnknownNameError.of("runtime", name, list(RUNTIMES))
        extra = RUNTIMES[name]
        if extra and find_spec(name) is None:
            raise MissingExtraError(
                f"bench in {name}", found=f"not installed: {name}", do=f"pip install 'niwaki[{extra}]'"
            )


def _usual(items: Sequence[Item]) -> tuple[str, ...]:
    kinds = {item.kind for item in items}
    wanted = (("eager", {"run", "model", "pt2"}), ("onnxruntime", {"onnx"}), ("openvino", {"openvino"}))
    return tuple(name for name, own in wanted if kinds & own)


def _labels(items: Sequence[Item]) -> tuple[Item, ...]:
    """Items whose labels differ: a name that is given twice gets a number."""
    seen: dict[str, int] = {}
    made = []
    for item in items:
        seen[item.label] = seen.get(item.label, 0) + 1
        number = seen[item.label]
        made.append(item if number == 1 else item.called(f"{item.label} ({number})"))
    return tuple(made)


def _unable(item: Item, runtime: str, batch: int) -> Row:
    return Row(item.label, runtime, batch, failed=f"{item.kind} runs in {', '.join(item.runtimes)}")


def _rows(told: Outcome, items: Sequence[Item], runtime: str, batches: Sequence[int]) -> list[Row]:
    found = {(row["item"], row["batch"]): row for row in told.rows}
    made = []
    for batch in batches:
        for item in items:
            row = found.get((item.label, batch))
            if row is None:
                made.append(Row(item.label, runtime, batch, failed=told.died or "its process said nothing"))
            elif "failed" in row:
                made.append(Row(item.label, runtime, batch, failed=row["failed"]))
            else:
                shapes = tuple(tuple(shape) for shape in row["outputs"])
                low, high = row["quarters"]
                made.append(Row(item.label, runtime, batch, row["ms"], (low, high), row["cpu_ms"], None, shapes))
    return made


def _same_outputs(rows: Sequence[Row]) -> None:
    """Raises: InputError: two items of one batch give outputs of different shapes."""
    first: dict[int, Row] = {}
    for row in rows:
        if not row.outputs:
            continue
        other = first.setdefault(row.batch, row)
        if other.outputs != row.outputs:
            raise InputError(
                f"compare {other.item} with {row.item}",
                found=f"outputs of {list(map(list, other.outputs))} and {list(map(list, row.outputs))}",
                do="compare networks that do the same",
            )


def _with_ratios(rows: Sequence[Row], first: str) -> tuple[Row, ...]:
    base = {(row.runtime, row.batch): row.ms for row in rows if row.item == first}
    made = []
    for row in rows:
        least = base.get((row.runtime, row.batch))
        ratio = least / row.ms if least is not None and row.ms else None
        made.append(Row(**{**vars(row), "times_as_fast": ratio}))
    return tuple(made)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


callable_module(__name__)
