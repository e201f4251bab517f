"""How long exported files take in the runtimes that will run them."""

import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from niwaki.errors import InputError, MissingExtraError, UnknownNameError
from niwaki.measure import Measurement
from niwaki.measure.measurement import device_name, versions
from niwaki.units import tensors_in

RUNTIMES = {"onnxruntime": "export", "openvino": "openvino"}
"""Package -> the extra that brings it."""
CLOCKS = {"wall": ("wall-clock time", time.perf_counter), "cpu": ("processor time", time.process_time)}


def time_files(
    files: Mapping[str, str | Path],
    example: Any,
    *,
    runtime: str = "onnxruntime",
    clock: Literal["wall", "cpu"] = "wall",
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
    open_file = _onnxruntime if runtime == "onnxruntime" else _openvino
    feeds = [tensor.detach().cpu().numpy() for tensor in tensors_in(example)]
    ready = {name: open_file(Path(file), feeds, threads) for name, file in files.items()}
    for call in ready.values():
        for _ in range(warm_up):
            call()
    now = CLOCKS[clock][1]
    times: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(runs):
        for name, call in ready.items():
            start = now()
            call()
            times[name].append((now() - start) * 1e3)

    return {
        name: _measured(name, taken, runtime, CLOCKS[clock][0], threads, device_name(torch.device("cpu")))
        for name, taken in times.items()
    }


def _measured(name: str, times: list[float], runtime: str, clock: str, threads: int, device: str) -> Measurement:
    quarters = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
    return Measurement(
        name,
        statistics.median(times),
        "ms",
        f"median {clock} of {len(times)} runs in {runtime}, in turns with the other files, {threads} CPU "
        "threads; spread is the interquartile range",
        quarters[2] - quarters[0],
        device,
        versions() | {runtime: version(runtime)},
    )


def _onnxruntime(file: Path, feeds: list[Any], threads: int) -> Callable[[], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    named = {entry.name: array for entry, array in zip(session.get_inputs(), feeds, strict=True)}
    return lambda: session.run(None, named)


def _openvino(file: Path, feeds: list[Any], threads: int) -> Callable[[], Any]:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    compiled = openvino.Core().compile_model(str(file), "CPU", settings)
    request = compiled.create_infer_request()
    return lambda: request.infer(feeds)
