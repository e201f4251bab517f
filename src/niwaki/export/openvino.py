"""OpenVINO's own files, made from the ONNX file."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

from torch import nn

from niwaki.export.onnx_file import PACKAGES, translated, write
from niwaki.export.runtimes import read_openvino
from niwaki.export.target import Opened, Target


@final
@dataclass(frozen=True)
class OpenVino(Target):
    """OpenVINO's intermediate representation: the graph in `<name>.xml`, the weights in `<name>.bin`, in float32.

    The ONNX file that torch's exporter writes is converted; that takes the same way as `Onnx` and what fails there
    fails here.

    Source: docs.openvino.ai, conversion of ONNX models; `compress_to_fp16=False`, since half precision is no export of
    the same numbers.
    """

    name: ClassVar[str] = "openvino"
    extension: ClassVar[str] = ".xml"
    needs: ClassVar[tuple[str, ...]] = ("openvino", *PACKAGES)
    extra: ClassVar[str] = "niwaki[export,openvino]"
    runtime: ClassVar[str] = "OpenVINO"

    def write(self, model: nn.Module, example: Any, file: Path, *, dynamic_batch: bool) -> None:
        import openvino

        with tempfile.TemporaryDirectory(dir=file.parent.parent, prefix=f".{file.name}.") as aside:
            between = Path(aside) / f"{file.stem}.onnx"
            write(model, example, between, dynamic_batch=dynamic_batch, opset=None)
            with translated(f"export to {file.name}", model):
                openvino.save_model(openvino.convert_model(str(between)), str(file), compress_to_fp16=False)

    def open(self, file: Path, *, threads: int | None = None) -> Opened:
        return read_openvino(file, threads=threads)
