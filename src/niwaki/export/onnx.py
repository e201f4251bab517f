"""ONNX files that were run before anybody trusts them."""

import inspect
import os
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.errors import InputError, MissingExtraError, NiwakiError
from niwaki.measure import Measurement
from niwaki.measure.latency import at_batch
from niwaki.measure.measurement import evaluating, versions
from niwaki.units import map_tensors, run, tensors_in

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TRACED_BATCH = 2  # torch.export takes a length of 1 for a constant
TRIED_BATCHES = (1, 3)  # both differ from the traced one, so a batch that was baked in shows


def export_onnx(
    model: nn.Module,
    example: Any,
    path: str | Path,
    *,
    dynamic_batch: bool = True,
    opset: int | None = None,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> dict[str, Measurement]:
    """Write `model` to an ONNX file, after ONNX Runtime gave PyTorch's outputs on fresh inputs.

    Gives "difference" (largest difference of any output, relative to that output's largest value) and "bytes" (on
    disk). The file appears under its name in one step; if anything fails, what was there is still there. Above
    2 GiB the weights lie beside it in `<name>.data`.

    Args:
        dynamic_batch: the first axis of every input that has the first input's length may vary; tried with 1 and 3.
        opset: operator set; None takes the exporter's own.
        tolerance: relative difference above which the export failed. 1e-3 is some hundred times what float32 sums in
            another order differ by, and far below what a wrong operator does.
        seed: of the fresh inputs.

    Raises:
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed.
        InputError: the place cannot be written to, or the example has no tensors.
        NiwakiError: the exporter refuses the model, or the file computes something else.

    Examples:
        >>> export_onnx(model, torch.rand(1, 3, 32, 32), "small.onnx")["difference"].value  # doctest: +SKIP
        3.1e-07
    """
    need_packages()
    target = Path(path)
    if target.is_dir() or not target.parent.is_dir():
        raise InputError(f"export to {target}", found="no folder to write a file in", do="give a file in a folder")
    traced = at_batch(example, TRACED_BATCH) if dynamic_batch else example
    if not tensors_in(traced):
        raise InputError(f"export to {target}", found="an example without tensors", do="give the model's input")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as aside, evaluating(model):
        file = Path(aside) / target.name
        _write(model, traced, file, dynamic_batch=dynamic_batch, opset=opset)
        tried = [at_batch(example, batch) for batch in TRIED_BATCHES] if dynamic_batch else [example] * 2
        generator = torch.Generator().manual_seed(seed)
        difference = max(_difference(model, _fresh(inputs, generator), file) for inputs in tried)
        if not difference <= tolerance:
            raise NiwakiError(
                f"export to {target}",
                found=f"ONNX Runtime differs from PyTorch by {difference:.3g} of the largest output",
                where=type(model).__name__,
                do="nothing was written; try dynamic_batch=False or another opset",
            )
        size = sum(part.stat().st_size for part in Path(aside).iterdir())
        for part in sorted(Path(aside).iterdir(), key=lambda part: part.name == target.name):  # the model itself last
            os.replace(part, target.parent / part.name)
    made = versions() | {name: version(name) for name in PACKAGES}
    return {
        "difference": Measurement(
            name="difference",
            value=difference,
            unit="relative",
            definition="largest absolute difference of any output between ONNX Runtime and PyTorch on fresh random "
            "inputs, divided by that output's largest absolute value",
            device="cpu (ONNX Runtime)",
            versions=made,
        ),
        "bytes": Measurement(
            name="bytes", value=float(size), unit="bytes", definition="ONNX file and its weights on disk", versions=made
        ),
    }


def need_packages() -> None:
    """Refuse early where a package is missing.

    Raises:
        MissingExtraError: names what is not installed.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            "export to ONNX", found=f"not installed: {', '.join(missing)}", do="pip install 'niwaki[export]'"
        )


def _write(model: nn.Module, example: Any, file: Path, *, dynamic_batch: bool, opset: int | None) -> None:
    named = isinstance(example, dict)
    arguments = () if named else example if isinstance(example, tuple) else (example,)
    shapes: Any = None
    if dynamic_batch:
        length = next(tensor.shape[0] for tensor in tensors_in(example) if tensor.dim() > 0)

        def free(tensor: Tensor) -> Any:
            varies = tensor.dim() > 0 and tensor.shape[0] == length
            return {0: torch.export.Dim.DYNAMIC} if varies else None

        shapes = map_tensors(example if named else arguments, free)
        kinds = [parameter.kind for parameter in inspect.signature(model.forward).parameters.values()]
        if not named and inspect.Parameter.VAR_POSITIONAL in kinds[:1]:
            shapes = (shapes,)  # a forward(*args): its arguments are one tuple
    try:
        program = torch.onnx.export(
            model,
            arguments,
            kwargs=example if named else None,
            dynamo=True,
            dynamic_shapes=shapes,
            opset_version=opset,
            verbose=False,
        )
        program.save(str(file))  # type: ignore[union-attr]  # None is the answer of the older exporter only
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the exporter raises what any of its stages raises
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise NiwakiError(
            f"export to {file.name}",
            found=reason[0],
            where=type(model).__name__,
            do="nothing was written; try dynamic_batch=False, or make the forward exportable (torch.export)",
        ) from error


def _fresh(example: Any, generator: torch.Generator) -> Any:
    """Inputs of the same shapes and kinds with other values; whole numbers stay within the example's range."""

    def draw(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return torch.randn(tensor.shape, generator=generator).to(tensor)
        if tensor.dtype == torch.bool or tensor.numel() == 0:
            return tensor
        low, high = int(tensor.min()), int(tensor.max())
        return torch.randint(low, high + 1, tensor.shape, generator=generator).to(tensor)

    return map_tensors(example, draw)


def _difference(model: nn.Module, inputs: Any, file: Path) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    wanted, given = session.get_inputs(), tensors_in(inputs)
    expected = tensors_in(run(model, inputs))
    if len(wanted) != len(given):
        names = ", ".join(entry.name for entry in wanted)
        raise InputError(
            f"run {file.name}",
            found=f"the file takes {len(wanted)} inputs ({names}), the example has {len(given)}",
            do="give an example whose tensors the model all uses",
        )
    feeds = {entry.name: tensor.detach().cpu().numpy() for entry, tensor in zip(wanted, given, strict=True)}
    found = [torch.from_numpy(array) for array in session.run(None, feeds)]
    if [tuple(a.shape) for a in found] != [tuple(b.shape) for b in expected]:
        return float("inf")
    worst = 0.0
    for ours, theirs in zip(expected, found, strict=True):
        ours, theirs = ours.detach().cpu().double(), theirs.double()
        if not torch.isfinite(ours).all() or not torch.isfinite(theirs).all():
            return float("inf")
        scale = float(ours.abs().max()) if ours.numel() else 0.0
        apart = float((ours - theirs).abs().max()) if ours.numel() else 0.0
        worst = max(worst, apart / scale if scale else apart)
    return worst
