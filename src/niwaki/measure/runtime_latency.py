"""How long one forward pass takes in the runtime that a network is made for."""

import statistics
from dataclasses import dataclass
from typing import Any, final

from torch import nn

from niwaki.errors import InputError
from niwaki.measure.measurement import Measurement, Meter, device_name, versions
from niwaki.measure.target import RUNTIMES, Target, in_turns
from niwaki.units import device_of


@final
@dataclass(frozen=True)
class RuntimeLatency(Meter):
    """The shortest time of a forward pass on the CPU in a runtime, after warm-up: what a budget of latency is about.

    With one thread the processor's own clock is read, which other work on the machine can't lengthen much.
    """

    runtime: str = "onnxruntime"
    """"pytorch" (eager), "onnxruntime" or "openvino"."""
    batch: int = 1
    """Samples in the pass: the example's first one, repeated."""
    threads: int = 1
    """CPU threads inside an operation."""
    runs: int = 20
    """Timed passes; the shortest counts, and the spread says how far the median is above it."""

    def __post_init__(self) -> None:
        if type(self.runs) is not int or self.runs < 1:
            raise InputError(f"RuntimeLatency(runs={self.runs!r})", found="not a count", do="give 1 or more")
        self.target()

    def target(self) -> Target:
        """Where it measures."""
        return Target(self.runtime, batch=self.batch, threads=self.threads)

    @property
    def name(self) -> str:
        return "runtime_latency"

    def __call__(self, model: nn.Module, example: Any) -> Measurement:
        target = self.target()
        with target.running(model, example) as call:
            times = in_turns({"it": call}, runs=self.runs, warm_up=3, clock=target.clock)["it"]
        clock = {"cpu": "processor time", "wall": "wall-clock time"}[target.clock]
        machine = target.machine()
        return Measurement(
            name=self.name,
            value=min(times),
            unit="ms",
            definition=f"shortest {clock} of {self.runs} forward passes in {self.runtime}, float32, "
            f"batch {self.batch}, {self.threads} CPU threads; spread is the median less the shortest",
            spread=statistics.median(times) - min(times),
            device=device_name(device_of(nn.Module())),
            versions=versions() | {RUNTIMES[self.runtime][0]: machine["version"]},
        )
