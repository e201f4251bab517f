"""What leaves PyTorch: one format per file, each run in its own runtime before it is handed over."""

from pathlib import Path
from typing import Any

from torch import nn

from niwaki.errors import InputError, UnknownNameError
from niwaki.export.artefact import Artefact, Batch, make_artefact, time_beside
from niwaki.export.executorch import ExecuTorch
from niwaki.export.onnx import Onnx, export_onnx
from niwaki.export.openvino import OpenVino
from niwaki.export.pretrained import export_pretrained, fitted_config
from niwaki.export.pt2 import Pt2
from niwaki.export.qdq import export_qdq, kernels_of
from niwaki.export.runtimes import time_files
from niwaki.export.target import Target
from niwaki.export.tensorrt import TensorRT
from niwaki.export.tensorrt_operators import unsupported_by_tensorrt
from niwaki.verbs import callable_module

__all__ = [
    "TARGETS",
    "Artefact",
    "ExecuTorch",
    "Onnx",
    "OpenVino",
    "Pt2",
    "Target",
    "TensorRT",
    "export_model",
    "export_onnx",
    "export_pretrained",
    "export_qdq",
    "fitted_config",
    "kernels_of",
    "make_artefact",
    "time_beside",
    "time_files",
    "unsupported_by_tensorrt",
]

TARGETS: dict[str, type[Target]] = {kind.name: kind for kind in (Onnx, OpenVino, Pt2, TensorRT, ExecuTorch)}
"""Name -> target; int8 has its own function, `export_qdq`, since it needs ranges."""


def export_model(
    model: nn.Module,
    example: Any,
    path: str | Path,
    *,
    target: Target | str | None = None,
    batch: Batch = None,
    tolerance: float | None = None,
    runs: int = 10,
    threads: int | None = None,
    seed: int = 0,
) -> Artefact:
    """Write `model` to a file for another runtime, after that runtime gave PyTorch's outputs on fresh inputs.

    Args:
        target: a target, its name, or None: by the file's extension (.onnx, .xml, .pt2, .engine, .pte).
        batch: "dynamic" (any length of the first axis), a number, "example", or None: dynamic where format and model
            can, otherwise as the example is.
        tolerance: largest difference, relative to the largest output, above which nothing is written; 1e-4 in float32.
        runs: timed passes of the file and of PyTorch in turns; 0 leaves the times out.

    Raises:
        UnknownNameError: an unknown target; InputError: an extension of none, a place that can't be written to.
        MissingExtraError: a package of the target is not installed.
        NiwakiError: the exporter refuses the model, or the file computes something else; what was there is still there.

    Examples:
        >>> export_model(model, torch.rand(1, 3, 32, 32), "small.onnx").measurements["latency"]  # doctest: +SKIP
        Measurement(name='latency', value=0.41, ...)
    """
    chosen = target if isinstance(target, Target) else target_of(path if target is None else target)
    return make_artefact(
        model, example, path, target=chosen, batch=batch, tolerance=tolerance, runs=runs, threads=threads, seed=seed
    )


def target_of(asked: str | Path) -> Target:
    """The target of a name, or of a file's extension where a path is given.

    Raises:
        UnknownNameError: no such name; InputError: no such extension.
    """
    if isinstance(asked, str) and asked in TARGETS:
        return TARGETS[asked]()
    found = [kind for kind in TARGETS.values() if Path(asked).suffix == kind.extension]
    if found:
        return found[0]()
    if isinstance(asked, str) and not Path(asked).suffix:
        raise UnknownNameError.of("export target", asked, list(TARGETS))
    known = ", ".join(f"{kind.extension} ({name})" for name, kind in TARGETS.items())
    raise InputError(f"export to {asked}", found=f"known extensions: {known}", do="name the file so, or give target=")


VERB = "export_model"
callable_module(__name__)
