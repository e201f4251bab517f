"""ONNX files that were run before anybody trusts them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

from torch import nn

from niwaki.export.artefact import make_artefact
from niwaki.export.onnx_file import PACKAGES, need_packages, write
from niwaki.export.runtimes import read_onnxruntime
from niwaki.export.target import Opened, Target
from niwaki.measure import Measurement


@final
@dataclass(frozen=True)
class Onnx(Target):
    """An ONNX file by torch's exporter (`dynamo=True`), run in ONNX Runtime. Above 2 GiB the weights lie beside it in
    `<name>.data`.

    Source: onnx.ai, operator sets; torch.onnx.
    """

    opset: int | None = None
    """Operator set; None takes the exporter's own."""
    name: ClassVar[str] = "onnx"
    extension: ClassVar[str] = ".onnx"
    needs: ClassVar[tuple[str, ...]] = PACKAGES
    extra: ClassVar[str] = "niwaki[export]"
    runtime: ClassVar[str] = "ONNX Runtime"

    def write(self, model: nn.Module, example: Any, file: Path, *, dynamic_batch: bool) -> None:
        write(model, example, file, dynamic_batch=dynamic_batch, opset=self.opset)

    def open(self, file: Path, *, threads: int | None = None) -> Opened:
        return read_onnxruntime(file, threads=threads)


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
    batch = "dynamic" if dynamic_batch else "example"
    target = Onnx(opset)
    made = make_artefact(model, example, path, target=target, batch=batch, tolerance=tolerance, runs=0, seed=seed)  # type: ignore[arg-type]
    return made.measurements
