"""Programs of torch.export, which need PyTorch to run and no code of the model's."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from niwaki.export.onnx_file import program_of, translated
from niwaki.export.pt2_archive import read_pt2
from niwaki.export.target import Opened, Target
from niwaki.measure.latency import with_threads
from niwaki.units import run, tensors_in


@final
@dataclass(frozen=True)
class Pt2(Target):
    """A `.pt2` archive of `torch.export.save`: the graph as JSON, the weights as raw numbers, and, as torch writes it,
    the example.

    What loading one can execute: `torch.export.load` unpickles what an archive marks as pickled, evaluates sizes as
    expressions of Python, and the graph may name any function of torch. niwaki loads only archives that have nothing
    pickled, sizes of plain arithmetic and calls of operators; still, load only files that you trust.

    Source: docs.pytorch.org, torch.export.save and torch.export.load.
    """

    name: ClassVar[str] = "pt2"
    extension: ClassVar[str] = ".pt2"
    needs: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = "niwaki"
    runtime: ClassVar[str] = "torch.export's program"

    def write(self, model: nn.Module, example: Any, file: Path, *, dynamic_batch: bool) -> None:
        asked = f"export to {file.name}"
        program = program_of(model, example, dynamic_batch=dynamic_batch, asked=asked)
        with translated(asked, model):
            torch.export.save(program, str(file))

    def open(self, file: Path, *, threads: int | None = None) -> Opened:
        network = read_pt2(file).module()

        def call(inputs: Any) -> list[Tensor]:
            with torch.no_grad(), with_threads(threads):
                return tensors_in(run(network, inputs))

        return call
