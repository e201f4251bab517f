"""Writing ONNX files and running them: what the exporters share."""

import inspect
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.errors import InputError, MissingExtraError, NiwakiError, Setting
from niwaki.export.runtimes import read_onnxruntime
from niwaki.units import map_tensors, run, tensors_in

COLOURS = re.compile(r"\x1b\[[0-9;]*m")
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TRACED_BATCH = 2  # torch.export takes a length of 1 for a constant


def place(path: str | Path) -> Path:
    """The file to be written.

    Raises:
        InputError: it is a folder, or there is none to write it in.
    """
    target = Path(path)
    if target.is_dir() or not target.parent.is_dir():
        raise InputError(f"export to {target}", found="no folder to write a file in", do="give a file in a folder")
    return target


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


def write(model: nn.Module, example: Any, file: Path, *, dynamic_batch: bool, opset: int | None) -> None:
    """The exporter's file, its weights beside it where they are above 2 GiB; nobody has run it yet.

    Raises:
        NiwakiError: the exporter refuses the model.
    """
    arguments, named, shapes = call_of(model, example, dynamic_batch=dynamic_batch)
    with translated(f"export to {file.name}", model):
        program = torch.onnx.export(
            model,
            arguments,
            kwargs=named,
            dynamo=True,
            dynamic_shapes=shapes,
            opset_version=opset,
            verbose=False,
        )
        program.save(str(file))  # type: ignore[union-attr]  # None is the answer of the older exporter only


def program_of(model: nn.Module, example: Any, *, dynamic_batch: bool, asked: str) -> torch.export.ExportedProgram:
    """What `torch.export` makes of a model.

    Raises:
        NiwakiError: it refuses the model.
    """
    arguments, named, shapes = call_of(model, example, dynamic_batch=dynamic_batch)
    with translated(asked, model):
        return torch.export.export(model, arguments, named, dynamic_shapes=shapes)


def call_of(
    model: nn.Module, example: Any, *, dynamic_batch: bool
) -> tuple[tuple[Any, ...], dict[str, Any] | None, Any]:
    """Positional and named arguments of the call that is exported, and which of their axes may vary."""
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
    return arguments, example if named else None, shapes


@contextmanager
def translated(asked: str, model: nn.Module) -> Iterator[None]:
    """Inside, a foreign exporter works: what it raises becomes one of niwaki's errors.

    Raises:
        NiwakiError: in place of whatever the exporter raised.
    """
    try:
        with warnings.catch_warnings():
            # torch 2.11 meets deprecated parts of itself; where warnings are errors, its exporter stops at that
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    except (torch.OutOfMemoryError, NiwakiError):
        raise
    except Exception as error:  # an exporter raises what any of its stages raises
        lines = [COLOURS.sub("", line) for line in str(error).strip().splitlines()] or [type(error).__name__]
        cause = str(error.__cause__ or "").strip().splitlines()
        raise NiwakiError(
            asked,
            found=lines[0] + (f" ({cause[0][:300]})" if cause and cause[0] not in lines[0] else ""),
            where=type(model).__name__,
            do=(
                "nothing was written; try ",
                Setting("batch", 1, "dynamic_batch=False"),
                ", or make the forward exportable (torch.export)",
            ),
        ) from error


def fresh(example: Any, generator: torch.Generator) -> Any:
    """Inputs of the same shapes and kinds with other values; whole numbers stay within the example's range."""

    def draw(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return torch.randn(tensor.shape, generator=generator).to(tensor)
        if tensor.dtype == torch.bool or tensor.numel() == 0:
            return tensor
        low, high = int(tensor.min()), int(tensor.max())
        return torch.randint(low, high + 1, tensor.shape, generator=generator).to(tensor)

    return map_tensors(example, draw)


def outputs_of(file: Path, inputs: Any) -> list[Tensor]:
    """What ONNX Runtime on the CPU computes from `inputs`.

    Raises:
        InputError: the file takes other inputs.
    """
    return read_onnxruntime(file)(inputs)


def difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """Largest difference of any output, divided by that output's largest value; infinite where they don't compare."""
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


def expected_of(model: nn.Module, inputs: Any) -> list[Tensor]:
    """What PyTorch computes from `inputs`."""
    return tensors_in(run(model, inputs))
