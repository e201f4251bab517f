"""Where a network will run: a runtime on this machine, a batch, threads; and how long something takes there."""

import io
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, cast, final, get_args

import torch
from torch import Tensor, nn

from niwaki.errors import InputError, MissingExtraError, UnknownNameError
from niwaki.measure.energy import joules_in_turns, processor_counters
from niwaki.measure.measurement import device_name, evaluating
from niwaki.units import device_of, map_tensors, run, tensors_in

RUNTIMES = {"pytorch": ("torch", ""), "onnxruntime": ("onnxruntime", "export"), "openvino": ("openvino", "openvino")}
"""Runtime -> its package, and the extra that brings it."""
REORDERS = ("ReorderInput", "ReorderOutput", "Reorder", "Parameter", "Result")
"""What a lone layer needs before and after it, and a layer among others does not."""
Call = Callable[[], Any]
Clock = Literal["wall", "cpu"]
Quantity = Literal["latency", "energy"]
ENERGY_RUNS = 3
"""Stretches of many passes over which joules are counted; the least counts."""


@final
@dataclass(frozen=True)
class Target:
    """A runtime on this machine's CPU, and how it will be used there.

    Raises:
        UnknownNameError: no such runtime.
        InputError: batch or threads below 1.
    """

    runtime: str = "onnxruntime"
    """"pytorch" (eager), "onnxruntime" or "openvino"."""
    batch: int = 1
    """Samples of a forward."""
    threads: int = 1
    """CPU threads inside an operation."""
    tolerance: float = 0.05
    """How far, as a share of it, the measured time of a network may be from a budget of latency: what is farther off
    is chosen again, by a corrected table. Timers are no better than some hundredths."""
    rounds: int = 5
    """How often at most a network is chosen and measured for a budget of latency; 0 trusts the table."""
    of: Quantity = "latency"
    """What is measured: "latency" (milliseconds) or "energy" (joules, by the processor packages' own counters, with
    whatever else the machine does; layers too)."""

    @property
    def unit(self) -> str:
        """Of what is measured."""
        return {"latency": "ms", "energy": "J"}[self.of]

    @property
    def clock(self) -> Clock:
        """What times a call: the wall, or with one thread the processor's own count, which others can't lengthen."""
        return "cpu" if self.threads == 1 else "wall"

    def __post_init__(self) -> None:
        if self.runtime not in RUNTIMES:
            raise UnknownNameError.of("runtime", self.runtime, list(RUNTIMES))
        for name, least in (("batch", 1), ("threads", 1), ("rounds", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                do = f"give a whole number from {least}"
                raise InputError(f"Target({name}={value!r})", found="not a count", do=do)
        if self.of not in get_args(Quantity):
            raise UnknownNameError.of("quantity", self.of, get_args(Quantity))
        if isinstance(self.tolerance, bool) or not 0 < self.tolerance < 1:
            raise InputError(f"Target(tolerance={self.tolerance!r})", found="no share", do="give one between 0 and 1")

    def need(self) -> None:
        """Refuse a runtime that is not there, and counters that are not.

        Raises:
            MissingExtraError: its package is not installed.
            NiwakiError: energy is asked for, and the machine has no counters of it or keeps them to itself.
        """
        package, extra = RUNTIMES[self.runtime]
        missing = [name for name in (package, *(("onnx", "onnxscript") if extra else ())) if find_spec(name) is None]
        if missing:
            raise MissingExtraError(
                f"measure in {self.runtime}",
                found=f"not installed: {', '.join(missing)}",
                do=f"pip install 'niwaki[{extra}]'",
            )
        if self.of == "energy":
            processor_counters()

    def machine(self) -> dict[str, str]:
        """What times depend on: they are worth nothing where any of it differs."""
        package = RUNTIMES[self.runtime][0]
        return {
            "cpu": device_name(torch.device("cpu")),
            "runtime": self.runtime,
            "version": version(package),
            "threads": str(self.threads),
            "batch": str(self.batch),
            "dtype": "float32",
            **({} if self.of == "latency" else {"of": self.of}),
        }

    def open(self, model: nn.Module, example: Any) -> Call:
        """A function that runs the whole network once in this runtime.

        Raises:
            MissingExtraError: the runtime is not installed.
            InputError: the network can't be exported for it.
        """
        self.need()
        if self.runtime == "pytorch":
            return _eager(model, example)
        try:
            content = _whole(model, example)
        except Exception as error:
            raise InputError(
                f"measure {type(model).__name__} in {self.runtime}",
                found=f"its export to ONNX failed: {type(error).__name__}: {str(error).strip().splitlines()[:1]}",
                do="Target('pytorch'), or a budget of macs",
            ) from error
        return self._read(content, example)

    @contextmanager
    def running(self, model: nn.Module, example: Any) -> Iterator[Call]:
        """Inside, the whole network as `open` gives it, called on the example's first sample, as often as the batch
        says: on the CPU, in evaluation mode, with the target's threads. Afterwards the model is where it was.

        Raises:
            InputError: a model without numbers, and what `open` raises.
        """
        place = device_of(model)
        if place.type == "meta":
            raise InputError(f"{self.of} of a model on the meta device", found="no real tensors", do="load it first")
        given = map_tensors(at_batch(example, self.batch), lambda tensor: tensor.detach().cpu())
        try:
            model.to("cpu")
            with evaluating(model), self.threaded():
                yield self.open(model, given)
        finally:
            model.to(place)

    def amounts(self, calls: Mapping[str, Call], runs: int) -> dict[str, list[float]]:
        """What each call takes, in turns: milliseconds of one pass, or joules of one among many (in few stretches)."""
        if self.of == "latency":
            return in_turns(calls, runs=runs, clock=self.clock)
        return joules_in_turns(calls, processor_counters(), runs=min(runs, ENERGY_RUNS))

    def amount(self, layer: nn.Module, inputs: tuple[Any, ...]) -> float:
        """What one layer alone takes: `milliseconds`, or the least joules."""
        if self.of == "latency":
            return self.milliseconds(layer, inputs)
        with self.threaded(), evaluating(layer):
            return min(self.amounts({"it": self._alone(layer, inputs)}, ENERGY_RUNS)["it"])

    def _alone(self, layer: nn.Module, inputs: tuple[Any, ...]) -> Call:
        if self.runtime == "pytorch":
            return _eager(layer, inputs)
        return self._read(_layer_file(layer, inputs), inputs)

    def _read(self, content: bytes, example: Any) -> Call:
        """A function that runs an ONNX file once."""
        if self.runtime == "onnxruntime":
            return _onnxruntime(content, example, self.threads)
        return _openvino(content, example, self.threads)[0]

    def milliseconds(self, layer: nn.Module, inputs: tuple[Any, ...]) -> float:
        """The shortest time of one layer alone, without what it would not need among others, in ms."""
        with self.threaded(), evaluating(layer):
            if self.runtime == "pytorch":
                return _shortest(_eager(layer, inputs), self.clock)
            content = _layer_file(layer, inputs)
            if self.runtime == "onnxruntime":
                return _profiled(content, inputs, self.threads)
            call, request = _openvino(content, inputs, self.threads, counted=True)
            best = float("inf")
            for _ in range(_repeats(call)):
                call()
                parts = [info for info in request.profiling_info if info.node_type not in REORDERS]
                best = min(best, sum(info.real_time.total_seconds() for info in parts) * 1e3)
            return best

    @contextmanager
    def threaded(self) -> Iterator[None]:
        """Inside, PyTorch uses as many threads as the target."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def in_turns(
    calls: Mapping[str, Call], *, runs: int, warm_up: int = 2, clock: Clock = "wall"
) -> dict[str, list[float]]:
    """Milliseconds of each call, one run of every one after the other, so that a disturbance meets all alike.

    The clock "cpu" counts what all threads of this process were given: with one thread, on a machine that does other
    work, it is closer to the wall-clock time of an idle one.
    """
    now = time.perf_counter if clock == "wall" else time.process_time
    for call in calls.values():
        for _ in range(warm_up):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(runs):
        for name, call in calls.items():
            start = now()
            call()
            times[name].append((now() - start) * 1e3)
    return times


def _repeats(call: Call, *, wanted_ms: float = 25.0, least: int = 6, most: int = 40) -> int:
    """Runs that take about so long together, after two to warm up."""
    call()
    start = time.perf_counter()
    call()
    return max(least, min(most, int(wanted_ms / max((time.perf_counter() - start) * 1e3, 1e-3))))


def _shortest(call: Call, clock: Clock) -> float:
    runs = _repeats(call)
    return min(in_turns({"it": call}, runs=runs, warm_up=0, clock=clock)["it"])


def _eager(model: nn.Module, example: Any) -> Call:
    def call() -> Any:
        with torch.no_grad():
            return run(model, example)

    return call


@contextmanager
def _silent() -> Iterator[None]:
    """Without the talk of exporters."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(before)


def _whole(model: nn.Module, example: Any) -> bytes:
    given = (example,) if not isinstance(example, (tuple, dict)) else example
    args, kwargs = ((), given) if isinstance(given, dict) else (given, None)
    with _silent(), evaluating(model):
        program: Any = torch.onnx.export(model, args, kwargs=kwargs, dynamo=True, verbose=False)
    return bytes(program.model_proto.SerializeToString())


def _layer_file(layer: nn.Module, inputs: tuple[Any, ...]) -> bytes:
    """One layer as ONNX, by the exporter that takes milliseconds where it is still there."""
    file = io.BytesIO()
    with _silent():
        try:
            torch.onnx.export(layer, inputs, cast(Any, file), dynamo=False, opset_version=20)
        except TypeError:
            return _whole(layer, inputs)
    return file.getvalue()


def _feeds(names: list[str], example: Any) -> dict[str, Any]:
    arrays = [tensor.detach().cpu().numpy() for tensor in tensors_in(example)]
    return dict(zip(names, arrays, strict=False))


def _session(content: bytes, threads: int, profile: str = "") -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    options.log_severity_level = 3
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, profile
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _onnxruntime(content: bytes, example: Any, threads: int) -> Call:
    session = _session(content, threads)
    feeds = _feeds([entry.name for entry in session.get_inputs()], example)
    return lambda: session.run(None, feeds)


def _profiled(content: bytes, inputs: tuple[Any, ...], threads: int) -> float:
    """Sum over the kernels of a file of the shortest time of each."""
    with tempfile.TemporaryDirectory() as folder:
        session = _session(content, threads, str(Path(folder) / "profile"))
        feeds = _feeds([entry.name for entry in session.get_inputs()], inputs)
        for _ in range(_repeats(lambda: session.run(None, feeds))):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    best: dict[str, float] = {}
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith("_kernel_time") and event["args"]["op_name"] not in REORDERS:
            best[name] = min(best.get(name, float("inf")), event["dur"] / 1e3)
    return sum(best.values())


def _openvino(content: bytes, example: Any, threads: int, *, counted: bool = False) -> tuple[Call, Any]:
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    settings["INFERENCE_PRECISION_HINT"] = "f32"  # bfloat16 unless said, where the processor has products of it
    compiled = core.compile_model(core.read_model(io.BytesIO(content)), "CPU", settings | {"PERF_COUNT": counted})
    request = compiled.create_infer_request()
    arrays = [tensor.detach().cpu().numpy() for tensor in tensors_in(example)]
    return (lambda: request.infer(arrays)), request


def at_batch(example: Any, batch: int) -> Any:
    """`example` with the first sample repeated `batch` times in every tensor that shares the first tensor's length."""
    tensors = [tensor for tensor in tensors_in(example) if tensor.dim() > 0]
    if not tensors:
        raise InputError(f"Latency(batch={batch})", found="an example without batched tensors", do="leave batch=None")
    length = tensors[0].shape[0]

    def repeat(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0 or tensor.shape[0] != length:
            return tensor
        return tensor[:1].repeat(batch, *(1 for _ in tensor.shape[1:]))  # [batch, rest]

    return map_tensors(example, repeat)
