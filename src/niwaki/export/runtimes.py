"""How long exported files take in the runtimes that will run them."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from niwaki.errors import FileDamagedError, InputError, MissingExtraError, UnknownNameError
from niwaki.measure import Measurement
from niwaki.measure.measurement import device_name, versions
from niwaki.measure.turns import Clock, Times, in_turns
from niwaki.units import tensors_in

RUNTIMES = {"onnxruntime": "export", "openvino": "openvino"}
"""Package -> the extra that brings it."""
CLOCKS = {"wall": "wall-clock time", "cpu": "processor time"}


OPENVINO: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
"""How files are compiled. The hint keeps float files out of bfloat16; whole numbers stay whole numbers."""


def time_files(
    files: Mapping[str, str | Path],
    example: Any,
    *,
    runtime: str = "onnxruntime",
    clock: Clock = "wall",
    threads: int = 1,
    runs: int = 30,
    warm_up: int = 5,
) -> dict[str, Measurement]:
    """Median time of each ONNX file on the CPU, in turns: one run of every file, then the next of every file.

    So whatever else the machine does meets all files alike, and their ratio is worth more than the times.

    Args:
        files: name -> file.
        example: the input, all of whose tensors the files take in order.
        runtime: "onnxruntime", or "openvino".
        clock: "cpu" takes the processor time of all of this process's threads, which does not count what others on
            the machine took; with one thread on an idle machine both are the same.

    Raises:
        MissingExtraError: the runtime is not installed.
        InputError: an unknown runtime or clock, no files, or counts below 1.
    """
    if runtime not in RUNTIMES:
        raise UnknownNameError.of("runtime", runtime, list(RUNTIMES))
    if clock not in CLOCKS:
        raise UnknownNameError.of("clock", clock, list(CLOCKS))
    if not files or min(runs, threads) < 1 or warm_up < 0:
        raise InputError(
            f"time {len(files)} files, {runs} runs, {threads} threads", found="nothing to time", do="give 1 or more"
        )
    if find_spec(runtime) is None:
        raise MissingExtraError(
            f"time files in {runtime}",
            found=f"not installed: {runtime}",
            do=f"pip install 'niwaki[{RUNTIMES[runtime]}]'",
        )
    inputs = tensors_in(example)
    opened = {name: READERS[runtime](Path(file), threads=threads) for name, file in files.items()}
    calls = {name: partial(call, inputs) for name, call in opened.items()}
    times = in_turns(calls, runs=runs, warm_up=warm_up)
    device = device_name(torch.device("cpu"))
    return {name: _measured(name, taken, runtime, clock, threads, device) for name, taken in times.items()}


def _measured(name: str, times: Times, runtime: str, clock: Clock, threads: int, device: str) -> Measurement:
    low, high = times.quarters(clock)
    return Measurement(
        name,
        times.median(clock),
        "ms",
        f"median {CLOCKS[clock]} of {len(times.wall)} runs in {runtime}, in turns with the other files, {threads} CPU "
        "threads; spread is the interquartile range",
        high - low,
        device,
        versions() | {runtime: version(runtime)},
    )


def read_onnxruntime(file: Path, *, threads: int | None = None) -> Callable[[Any], list[Tensor]]:
    """A function from inputs to what ONNX Runtime on the CPU computes from them.

    Raises:
        FileDamagedError: no ONNX file.
        InputError: later, from the function: other inputs than the file takes.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # warnings about the graph are its writer's business
    if threads is not None:
        options.intra_op_num_threads = options.inter_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common class of their own
        raise unreadable(file, "ONNX Runtime", error) from error
    entries = [(entry.name, entry.shape) for entry in session.get_inputs()]

    def call(inputs: Any) -> list[Tensor]:
        given = fitting(tensors_in(inputs), entries, file)
        feeds = {name: tensor.numpy() for (name, _), tensor in zip(entries, given, strict=True)}
        return [torch.from_numpy(array) for array in session.run(None, feeds)]

    return call


def read_openvino(file: Path, *, threads: int | None = None) -> Callable[[Any], list[Tensor]]:
    """A function from inputs to what OpenVINO on the CPU computes from them, in float32 where the file is.

    Raises:
        FileDamagedError: neither an IR nor an ONNX file.
        InputError: later, from the function: other inputs than the file takes.
    """
    import openvino

    settings = dict(OPENVINO)
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    try:
        compiled = openvino.Core().compile_model(str(file), "CPU", settings)
    except Exception as error:
        raise unreadable(file, "OpenVINO", error) from error
    entries = [
        (port.any_name, [None if length.is_dynamic else length.get_length() for length in port.partial_shape])
        for port in compiled.inputs
    ]
    request = compiled.create_infer_request()

    def call(inputs: Any) -> list[Tensor]:
        given = fitting(tensors_in(inputs), entries, file)
        found = request.infer([tensor.numpy() for tensor in given])
        return [torch.from_numpy(found[port]) for port in compiled.outputs]

    return call


READERS: dict[str, Callable[..., Callable[[Any], list[Tensor]]]] = {
    "onnxruntime": read_onnxruntime,
    "openvino": read_openvino,
}


def unreadable(file: Path, reader: str, error: Exception) -> FileDamagedError:
    """What a runtime's refusal of a file is to the user."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    found = "no such file" if not file.exists() else f"{reader} can't read it: {lines[0][:300]}"
    return FileDamagedError(f"run {file.name}", found=found, where=str(file), do="give a file that an exporter wrote")


def fitting(given: list[Tensor], entries: Sequence[tuple[str, Sequence[Any]]], file: Path) -> list[Tensor]:
    """`given` as plain CPU tensors, if they are as many and of the shapes that a file takes.

    Raises:
        InputError: they are not; the message has the file's inputs.
    """

    def fits(tensor: Tensor, shape: Sequence[Any]) -> bool:
        lengths = zip(tensor.shape, shape, strict=True) if tensor.dim() == len(shape) else ()
        same = all(not isinstance(wanted, int) or wanted == length for length, wanted in lengths)
        return tensor.dim() == len(shape) and same

    if len(given) != len(entries) or not all(fits(t, shape) for t, (_, shape) in zip(given, entries, strict=True)):
        wanted = ", ".join(f"{name} {'x'.join(str(n or '?') for n in shape)}" for name, shape in entries)
        shapes = ", ".join("x".join(map(str, tensor.shape)) for tensor in given)
        raise InputError(
            f"run {file.name} on {len(given)} inputs ({shapes})",
            found=f"the file takes {len(entries)} inputs ({wanted})",
            do="give an example whose tensors the model all uses, of the file's shapes",
        )
    return [tensor.detach().cpu() for tensor in given]
