"""How much energy one forward pass takes, by the machine's own counters."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from niwaki.errors import InputError, MissingExtraError, NiwakiError
from niwaki.measure.measurement import Measurement, Meter, device_name, evaluating
from niwaki.units import device_of, run

POWERCAP = "/sys/class/powercap"
STRETCH = 0.2
"""Seconds over which joules of a layer are counted: counters of processors step about every millisecond."""
Counter = Callable[[], float]
"""Joules since some time."""


class _Package:
    """A processor package's counter of microjoules, which begins at 0 again after its range."""

    def __init__(self, zone: Path) -> None:
        self.file = zone / "energy_uj"
        self.range = int((zone / "max_energy_range_uj").read_text())
        self.last, self.total = int(self.file.read_text()), 0

    def __call__(self) -> float:
        now = int(self.file.read_text())
        self.total += now - self.last if now >= self.last else now + self.range - self.last
        self.last = now
        return self.total / 1e6


def processor_counters(root: str = POWERCAP) -> list[Counter]:
    """RAPL's counters of whole packages; not "psys", which has the packages in it, and the board.

    Source: Linux, Documentation/power/powercap/powercap.rst, and its intel_rapl_common.c (the names of zones).

    Raises:
        NiwakiError: the system shows none, or does not let them be read.
    """
    zones = [zone for zone in sorted(Path(root).glob("intel-rapl:*")) if zone.name.count(":") == 1]
    zones = [zone for zone in zones if not _named(zone).startswith("psys")]
    if not zones:
        raise NiwakiError(
            "measure the processor's energy",
            found=f"no RAPL counters: no package named intel-rapl:* in {root} (virtual machines and clouds hide them)",
            do="run on the machine itself, with the kernel's intel_rapl modules; or measure latency",
        )
    try:
        return [_Package(zone) for zone in zones]
    except (OSError, ValueError) as error:
        raise NiwakiError(
            "measure the processor's energy",
            found=f"RAPL counters that can't be read: {error}",
            where=root,
            do="let this user read energy_uj (root only, since 2020), or measure latency",
        ) from error


def _named(zone: Path) -> str:
    """What a zone says that it counts: package-0, psys, ..."""
    file = zone / "name"
    return file.read_text(encoding="utf-8").strip() if file.is_file() else ""


def graphics_counter(device: torch.device) -> Counter:
    """NVML's counter of a graphics card.

    Raises:
        MissingExtraError: nvidia-ml-py is not installed.
        NiwakiError: the card has no counter.
    """
    try:
        import pynvml
    except ImportError as error:
        raise MissingExtraError(
            "measure a graphics card's energy", found="not installed: nvidia-ml-py", do="pip install nvidia-ml-py"
        ) from error
    try:
        pynvml.nvmlInit()
        card = pynvml.nvmlDeviceGetHandleByUUID("GPU-" + str(torch.cuda.get_device_properties(device).uuid))
        pynvml.nvmlDeviceGetTotalEnergyConsumption(card)
    except pynvml.NVMLError as error:
        raise NiwakiError(
            "measure a graphics card's energy", found=f"NVML: {error}", do="a card since Volta has a counter"
        ) from error
    return lambda: float(pynvml.nvmlDeviceGetTotalEnergyConsumption(card)) / 1e3


def joules_in_turns(
    calls: Mapping[str, Callable[[], Any]], counters: Sequence[Counter], *, runs: int, seconds: float = STRETCH
) -> dict[str, list[float]]:
    """Joules of one pass of each call: of a stretch of many, over their number; stretches of the calls in turns."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(runs):
        for name, call in calls.items():
            joules, passes = _spent(call, counters, seconds)
            found[name].append(joules / passes)
    return found


def _spent(
    call: Callable[[], Any], counters: Sequence[Counter], seconds: float, *, wait: Callable[[], None] = lambda: None
) -> tuple[float, int]:
    """Joules of repeated calls, and how many there were."""
    start, begun, passes = sum(one() for one in counters), time.perf_counter(), 0
    while passes == 0 or time.perf_counter() - begun < seconds:
        call()
        passes += 1
    wait()
    return sum(one() for one in counters) - start, passes


@final
@dataclass(frozen=True)
class Energy(Meter):
    """Joules of one forward pass: what the processor's packages (RAPL) or the graphics card (NVML) took while it ran
    again and again, over the number of passes. All that the chip does counts, other programs and idling included.
    """

    seconds: float = 2.0
    """How long passes are repeated: counters step about every millisecond on processors, every 20 to 100 on cards."""
    warm_up: int = 5
    """Passes before the counters are read."""

    def __post_init__(self) -> None:
        if isinstance(self.seconds, bool) or not 0 < self.seconds < float("inf"):
            raise InputError(f"Energy(seconds={self.seconds!r})", found="no time", do="give seconds above 0")
        if type(self.warm_up) is not int or self.warm_up < 0:
            raise InputError(f"Energy(warm_up={self.warm_up!r})", found="not a count", do="give 0 or more")

    @property
    def name(self) -> str:
        return "energy"

    def __call__(self, model: nn.Module, example: Any) -> Measurement:
        """Measure `model` called on `example`.

        Raises:
            NiwakiError: the machine has no counters, or keeps them to itself; the message says which are missing.
        """
        device = device_of(model)
        if device.type == "meta":
            raise InputError("energy of a model on the meta device", found="no real tensors", do="load it to a device")
        on_card = device.type == "cuda"
        counters = [graphics_counter(device)] if on_card else processor_counters()
        joules, passes = self.spent(lambda: run(model, example), counters, model)
        return Measurement(
            name=self.name,
            value=joules / passes,
            unit="J",
            definition=f"energy of {'the graphics card (NVML)' if on_card else 'the processor packages (RAPL)'} over "
            f"{passes} forward passes, PyTorch eager, over their number; other work and idling included",
            device=device_name(device),
            uncounted=("memory and the rest of the machine",),
        )

    def spent(self, call: Callable[[], Any], counters: list[Counter], model: nn.Module) -> tuple[float, int]:
        """Joules of repeated calls, and how many there were."""
        with evaluating(model):
            for _ in range(self.warm_up):
                call()
            _wait(model)
            return _spent(call, counters, self.seconds, wait=lambda: _wait(model))


def _wait(model: nn.Module) -> None:
    device = device_of(model)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
