"""One way to every target: written aside, run in its own runtime on inputs it was not exported with, then renamed."""

import copy
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import nn

from niwaki.errors import InputError, NiwakiError, Setting
from niwaki.export.onnx_file import TRACED_BATCH, difference, expected_of, fresh, place
from niwaki.export.target import Target
from niwaki.measure import Measurement
from niwaki.measure.latency import at_batch, with_threads
from niwaki.measure.measurement import device_name, evaluating, versions
from niwaki.units import device_of, map_tensors, need_module, run, tensors_in

Batch = int | Literal["dynamic", "example"] | None
TOLERANCES = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
TOLERANCE = 1e-4  # float32: some ten to a hundred times what sums in another order differ by
TRIED_BATCHES = (1, 3)  # both differ from the traced one, so a batch that was baked in shows


@final
@dataclass(frozen=True)
class Artefact:
    """A written file, and what was found when it was run."""

    target: str
    file: Path
    batch: int | Literal["dynamic"]
    """The batch that the file takes."""
    measurements: dict[str, Measurement]
    """"difference", "bytes", and, where it was timed, "latency" and "pytorch_latency"."""
    note: str = ""
    """Why the batch is fixed, where nobody asked for that."""
    files: tuple[str, ...] = field(default=())
    """Names of all files, the one that is opened last."""

    def to_json(self) -> dict[str, Any]:
        """For a report: the measurements by name, and beside them the file, its batch and the note."""
        told = {"file": self.file.name, "files": list(self.files), "batch": self.batch, "note": self.note}
        return {**{name: one.to_json() for name, one in self.measurements.items()}, **told}


def make_artefact(
    model: nn.Module,
    example: Any,
    path: str | Path,
    *,
    target: Target,
    batch: Batch = None,
    tolerance: float | None = None,
    runs: int = 10,
    threads: int | None = None,
    seed: int = 0,
) -> Artefact:
    """Write `model` for `target`; the file has its name only after its own runtime gave PyTorch's outputs.

    Args:
        batch: "dynamic" (the first axis of every input that has the first input's length may vary; tried with 1 and
            3), a number, "example" (as the example is), or None: dynamic where format and model can, otherwise as the
            example is; the result's `note` says why.
        tolerance: relative difference above which the export failed; 1e-4 unless said (1e-2 in float16).
        runs: timed passes of the file and of PyTorch, in turns; 0 leaves the times out.
        threads: CPU threads inside an operation, of both.
        seed: of the inputs that are compared, which the exporter has not seen.

    Raises:
        MissingExtraError: a package of the target is not installed.
        InputError: the place cannot be written to, or the example has no tensors.
        NiwakiError: the exporter refuses the model, or the file computes something else; what was there is still there.
    """
    need_module(model, f"export to {target.name}")
    target.need()
    at = place(path)
    if at.suffix != target.extension:
        raise InputError(f"export to {at}", found=f"a name for {target.name}", do=f"end it in {target.extension}")
    if not tensors_in(example):
        raise InputError(f"export to {at}", found="an example without tensors", do="give the model's input")
    if batch == "dynamic" and not target.dynamic:
        found = f"{target.name} plans its memory for one batch"
        raise InputError(f"export to {at} with a dynamic batch", found=found, do="give a number")
    if isinstance(batch, int) and batch < 1:
        raise InputError(f"export to {at} at batch {batch}", found="no batch", do="give a number from 1, or dynamic")
    network, sample = on_cpu(model, example)
    sample = at_batch(sample, batch) if isinstance(batch, int) else sample
    with evaluating(network):
        note = ""
        if batch is None and not target.dynamic:
            note = f"{target.name} plans its memory for one batch"
        if batch == "dynamic" or (batch is None and target.dynamic):
            try:
                return _made(network, sample, at, target, True, tolerance, runs, threads, seed, "")
            except InputError:
                raise
            except NiwakiError as error:
                if batch == "dynamic":
                    raise
                note = f"no dynamic batch: {error.found}"
        return _made(network, sample, at, target, False, tolerance, runs, threads, seed, note)


def _made(
    model: nn.Module,
    example: Any,
    at: Path,
    target: Target,
    dynamic: bool,
    tolerance: float | None,
    runs: int,
    threads: int | None,
    seed: int,
    note: str,
) -> Artefact:
    tried = [at_batch(example, batch) for batch in TRIED_BATCHES] if dynamic else [example] * 2
    generator = torch.Generator().manual_seed(seed)
    drawn = [fresh(inputs, generator) for inputs in tried]
    with tempfile.TemporaryDirectory(dir=at.parent, prefix=f".{at.name}.") as aside:
        file = Path(aside) / at.name
        target.write(model, at_batch(example, TRACED_BATCH) if dynamic else example, file, dynamic_batch=dynamic)
        opened = target.open(file)
        apart = max(difference(expected_of(model, inputs), opened(inputs)) for inputs in drawn)
        allowed = tolerance if tolerance is not None else _tolerance(model)
        if not apart <= allowed:
            raise NiwakiError(
                f"export to {at}",
                found=f"{target.runtime} differs from PyTorch by {apart:.3g} of the largest output, "
                f"above {allowed:.3g}",
                where=type(model).__name__,
                do=("nothing was written; try a fixed batch, ", Setting("batch", 1), ", or another opset"),
            )
        del opened
        timed = time_beside(target, file, model, fresh(example, generator), runs, threads)
        parts = sorted(Path(aside).iterdir(), key=lambda part: part.name == at.name)  # the model itself last
        size = sum(part.stat().st_size for part in parts)
        if len(parts) > 1:  # killed in between, no graph at all is better than one beside another one's weights
            at.unlink(missing_ok=True)
        for part in parts:
            os.replace(part, at.parent / part.name)
    made = versions() | {package: version(package) for package in target.needs}
    told = {
        "difference": Measurement(
            "difference",
            apart,
            "relative",
            f"largest absolute difference of any output between {target.runtime} and PyTorch on fresh random "
            "inputs, divided by that output's largest absolute value",
            device=f"cpu ({target.runtime})",
            versions=made,
        ),
        "bytes": Measurement("bytes", float(size), "bytes", "all files of the export on disk", versions=made),
    }
    first = next(tensor for tensor in tensors_in(example) if tensor.dim() > 0)
    batch: int | Literal["dynamic"] = "dynamic" if dynamic else int(first.shape[0])
    return Artefact(target.name, at, batch, told | timed, note, tuple(part.name for part in parts))


def time_beside(
    target: Target, file: Path, model: nn.Module, inputs: Any, runs: int, threads: int | None
) -> dict[str, Measurement]:
    """The file's and PyTorch's median time, taken in turns: "latency" and "pytorch_latency"; nothing for 0 runs."""
    if not runs:
        return {}
    with evaluating(model), with_threads(threads):
        count = torch.get_num_threads()
        beside = {"pytorch": lambda: run(model, inputs)}
        times = target.time(file, inputs, beside=beside, threads=count, runs=runs)
    first = next(tensor for tensor in tensors_in(inputs) if tensor.dim() > 0)
    found = {}
    for name, key, words in (
        ("latency", target.name, target.runtime),
        ("pytorch_latency", "pytorch", "PyTorch eager"),
    ):
        low, high = times[key].quarters()
        found[name] = Measurement(
            name,
            times[key].median(),
            "ms",
            f"median wall-clock time of {runs} runs in {words}, in turns with the other one, batch "
            f"{first.shape[0]}, {count} CPU threads; spread is the interquartile range",
            high - low,
            device_name(torch.device("cpu")),
            versions() | {package: version(package) for package in target.needs},
        )
    return found


def on_cpu(model: nn.Module, example: Any) -> tuple[nn.Module, Any]:
    """The model and its example where files are compared: a copy, unless they are on the CPU already."""
    device = device_of(model)
    if device.type == "cpu":
        return model, example
    if device.type == "meta":
        raise InputError("export a model of the meta device", found="it holds no numbers", do="load its weights first")
    return copy.deepcopy(model).cpu(), map_tensors(example, lambda tensor: tensor.cpu())


def _tolerance(model: nn.Module) -> float:
    return max((TOLERANCES.get(dtype, TOLERANCE) for dtype in _dtypes(model)), default=TOLERANCE)


def _dtypes(model: nn.Module) -> Iterator[torch.dtype]:
    yield from {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
