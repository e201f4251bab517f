"""ExecuTorch programs for phones and small devices."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from niwaki.errors import FileDamagedError, InputError
from niwaki.export.onnx_file import program_of, translated
from niwaki.export.target import Opened, Target
from niwaki.units import tensors_in


@final
@dataclass(frozen=True)
class ExecuTorch(Target):
    """A `.pte` program, run by ExecuTorch's own runtime in this process.

    Its memory is planned for one batch when it is written, so the batch is fixed. The runtime takes as many threads as
    it likes: it gives no way to say how many.

    Source: docs.pytorch.org/executorch, `to_edge_transform_and_lower`.
    """

    kernels: Literal["xnnpack", "portable"] = "xnnpack"
    """Who computes: XNNPACK where it can (what a phone's processor should run), or the plain portable kernels only."""
    name: ClassVar[str] = "executorch"
    extension: ClassVar[str] = ".pte"
    needs: ClassVar[tuple[str, ...]] = ("executorch",)
    extra: ClassVar[str] = "niwaki[executorch]"
    runtime: ClassVar[str] = "ExecuTorch"
    dynamic: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.kernels not in ("xnnpack", "portable"):
            raise InputError(f"ExecuTorch(kernels={self.kernels!r})", found="known: xnnpack, portable", do="use one")

    def write(self, model: nn.Module, example: Any, file: Path, *, dynamic_batch: bool) -> None:
        asked = f"export to {file.name}"
        traced = program_of(model, example, dynamic_batch=False, asked=asked)
        with translated(asked, model):
            from executorch.exir import to_edge_transform_and_lower

            helpers = []
            if self.kernels == "xnnpack":
                from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

                helpers = [XnnpackPartitioner()]
            lowered = to_edge_transform_and_lower(traced, partitioner=helpers).to_executorch()
            with open(file, "wb") as out:
                lowered.write_to_file(out)

    def open(self, file: Path, *, threads: int | None = None) -> Opened:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the package calls its own interface experimental when it is imported
            from executorch.runtime import Runtime

        try:
            method = Runtime.get().load_program(file).load_method("forward")
            if method is None:
                raise RuntimeError("no method forward")
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise FileDamagedError(
                f"run {file.name}", found=f"ExecuTorch can't read it: {lines[0]}", where=str(file), do="export it again"
            ) from error

        def call(inputs: Any) -> list[Tensor]:
            given = [tensor.detach().cpu().contiguous() for tensor in tensors_in(inputs)]
            return [torch.as_tensor(found).clone() for found in method.execute(given)]  # its memory is used again

        return call
