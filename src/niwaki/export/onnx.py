"""ONNX files that were run before anybody trusts them."""

import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from niwaki.errors import InputError, NiwakiError
from niwaki.export.onnx_file import (
    PACKAGES,
    TRACED_BATCH,
    difference,
    expected_of,
    fresh,
    need_packages,
    outputs_of,
    place,
    write,
)
from niwaki.measure import Measurement
from niwaki.measure.latency import at_batch
from niwaki.measure.measurement import evaluating, versions
from niwaki.units import tensors_in

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
    target = place(path)
    traced = at_batch(example, TRACED_BATCH) if dynamic_batch else example
    if not tensors_in(traced):
        raise InputError(f"export to {target}", found="an example without tensors", do="give the model's input")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as aside, evaluating(model):
        file = Path(aside) / target.name
        write(model, traced, file, dynamic_batch=dynamic_batch, opset=opset)
        tried = [at_batch(example, batch) for batch in TRIED_BATCHES] if dynamic_batch else [example] * 2
        generator = torch.Generator().manual_seed(seed)
        drawn = [fresh(inputs, generator) for inputs in tried]
        apart = max(difference(expected_of(model, inputs), outputs_of(file, inputs)) for inputs in drawn)
        if not apart <= tolerance:
            raise NiwakiError(
                f"export to {target}",
                found=f"ONNX Runtime differs from PyTorch by {apart:.3g} of the largest output",
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
            value=apart,
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
