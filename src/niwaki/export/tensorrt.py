"""Engines of TensorRT, built from the ONNX file."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from niwaki.errors import FileDamagedError, InputError, NiwakiError
from niwaki.export.onnx_file import PACKAGES, write
from niwaki.export.target import Opened, Target
from niwaki.export.tensorrt_operators import HIGHEST_OPSET, VERSION, unsupported_by_tensorrt
from niwaki.units import tensors_in


@final
@dataclass(frozen=True)
class TensorRT(Target):
    """An engine for the NVIDIA GPU it is built on, from a strongly typed network: number types are the file's.

    The ONNX file is held against the operators that TensorRT lists before the builder sees it. An engine runs on the
    kind of GPU and the version of TensorRT that built it, and on no other.

    Source: docs.nvidia.com/deeplearning/tensorrt, strongly typed networks, optimisation profiles. Not run by niwaki's
    authors: no GPU with TensorRT was at hand.
    """

    largest_batch: int = 32
    """Highest batch of an engine with a dynamic batch; it is tuned for this one."""
    name: ClassVar[str] = "tensorrt"
    extension: ClassVar[str] = ".engine"
    needs: ClassVar[tuple[str, ...]] = ("tensorrt", *PACKAGES)
    extra: ClassVar[str] = "niwaki[export,tensorrt]"
    runtime: ClassVar[str] = "TensorRT"
    advice: ClassVar[str] = (
        "it needs an NVIDIA GPU and its driver. Without them, export to onnx and build on the target: "
        "trtexec --onnx=FILE --stronglyTyped; niwaki.export.unsupported_by_tensorrt(FILE) says what it would refuse"
    )

    def __post_init__(self) -> None:
        if isinstance(self.largest_batch, bool) or not isinstance(self.largest_batch, int) or self.largest_batch < 3:
            raise InputError(f"TensorRT(largest_batch={self.largest_batch!r})", found="no batch", do="give 3 or more")

    def write(self, model: nn.Module, example: Any, file: Path, *, dynamic_batch: bool) -> None:
        import tensorrt

        asked, where = f"export to {file.name}", type(model).__name__
        with tempfile.TemporaryDirectory(dir=file.parent.parent, prefix=f".{file.name}.") as aside:
            between = Path(aside) / f"{file.stem}.onnx"
            write(model, example, between, dynamic_batch=dynamic_batch, opset=HIGHEST_OPSET)
            if refused := unsupported_by_tensorrt(between):
                listed = ", ".join(f"{name} ({count})" for name, count in refused.items())
                found = f"operators that TensorRT {VERSION} does not list: {listed}"
                raise NiwakiError(asked, found=found, where=where, do="write the forward with other operations")
            logger = tensorrt.Logger(tensorrt.Logger.WARNING)
            builder = tensorrt.Builder(logger)
            flag = getattr(tensorrt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # the only kind from 11 on
            network = builder.create_network(0 if flag is None else 1 << int(flag))
            parser = tensorrt.OnnxParser(network, logger)
            if not parser.parse_from_file(str(between)):
                told = "; ".join(str(parser.get_error(number)) for number in range(parser.num_errors))
                raise NiwakiError(asked, found=f"TensorRT's parser: {told}", where=where, do="nothing was written")
            config = builder.create_builder_config()
            if dynamic_batch:
                profile = builder.create_optimization_profile()
                for number in range(network.num_inputs):
                    entry = network.get_input(number)
                    shapes = [
                        tuple(batch if length < 0 else length for length in entry.shape)
                        for batch in (1, self.largest_batch, self.largest_batch)
                    ]
                    profile.set_shape(entry.name, *shapes)  # least, best, most
                config.add_optimization_profile(profile)
            built = builder.build_serialized_network(network, config)
        if built is None:
            raise NiwakiError(
                asked, found="TensorRT built no engine", where=where, do="see its log; nothing was written"
            )
        file.write_bytes(bytes(built))

    def open(self, file: Path, *, threads: int | None = None) -> Opened:
        import tensorrt

        engine = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.WARNING)).deserialize_cuda_engine(file.read_bytes())
        if engine is None:
            raise FileDamagedError(
                f"run {file.name}",
                found="TensorRT can't read it (another version or GPU?)",
                where=str(file),
                do="build it on this machine",
            )
        context = engine.create_execution_context()
        names = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
        incoming = [name for name in names if engine.get_tensor_mode(name) == tensorrt.TensorIOMode.INPUT]

        def call(inputs: Any) -> list[Tensor]:
            given = [tensor.detach().cuda().contiguous() for tensor in tensors_in(inputs)]
            for name, tensor in zip(incoming, given, strict=True):
                context.set_input_shape(name, tuple(tensor.shape))
                context.set_tensor_address(name, tensor.data_ptr())
            found = []
            for name in (name for name in names if name not in incoming):
                kind = getattr(torch, tensorrt.nptype(engine.get_tensor_dtype(name)).__name__)
                out = torch.empty(tuple(context.get_tensor_shape(name)), dtype=kind, device="cuda")
                context.set_tensor_address(name, out.data_ptr())
                found.append(out)
            stream = torch.cuda.current_stream()
            if not context.execute_async_v3(stream.cuda_stream):
                raise NiwakiError(f"run {file.name}", found="TensorRT could not run it", do="see its log")
            stream.synchronize()
            return [tensor.cpu() for tensor in found]

        return call
