"""How much energy one forward pass takes in the runtime that a network is made for."""

import statistics
from dataclasses import dataclass
from typing import Any, final

from torch import nn

from niwaki.errors import InputError
from niwaki.measure.measurement import Measurement, Meter, device_name, versions
from niwaki.measure.target import ENERGY_RUNS, RUNTIMES, Target
from niwaki.units import device_of


@final
@dataclass(frozen=True)
class RuntimeEnergy(Meter):
    """The fewest joules of a forward pass on the CPU in a runtime: what a budget of energy is about.

    Counted by the processor's packages (RAPL) over stretches of many passes; whatever else the machine does is in it.
    """

    runtime: str = "onnxruntime"
    """"pytorch" (eager), "onnxruntime" or "openvino"."""
    batch: int = 1
    """Samples in the pass: the example's first one, repeated."""
    threads: int = 1
    """CPU threads inside an operation."""
    runs: int = ENERGY_RUNS
    """Stretches of passes; the one of the fewest joules counts, and the spread says how far the median is above it."""

    def __post_init__(self) -> None:
        if type(self.runs) is not int or self.runs < 1:
            raise InputError(f"RuntimeEnergy(runs={self.runs!r})", found="not a count", do="give 1 or more")
        self.target()

    def target(self) -> Target:
        """Where it measures."""
        return Target(self.runtime, batch=self.batch, threads=self.threads, of="energy")

    @property
    def name(self) -> str:
        return "runtime_energy"

    def __call__(self, model: nn.Module, example: Any) -> Measurement:
        """Measure `model` called on `example`.

        Raises:
            NiwakiError: the machine has no counters, or keeps them to itself.
            MissingExtraError: the runtime is not installed.
            InputError: a model that the runtime can't take.
        """
        target = self.target()
        with target.running(model, example) as call:
            joules = target.amounts({"it": call}, runs=self.runs)["it"]
        return Measurement(
            name=self.name,
            value=min(joules),
            unit="J",
            definition=f"energy of the processor packages (RAPL) over a stretch of forward passes in {self.runtime}, "
            f"float32, batch {self.batch}, {self.threads} CPU threads, over their number: the least of {len(joules)} "
            "stretches; spread is the median less the least; other work and idling included",
            spread=statistics.median(joules) - min(joules),
            device=device_name(device_of(nn.Module())),
            versions=versions() | {RUNTIMES[self.runtime][0]: target.machine()["version"]},
            uncounted=("memory and the rest of the machine",),
        )
