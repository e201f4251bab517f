"""Meters: one thing measured per file, and the verb that runs several on one model."""

from typing import Any

import torch
from torch import nn

from niwaki.errors import InputError, NiwakiError
from niwaki.measure.bytes import Bytes
from niwaki.measure.energy import Energy
from niwaki.measure.latency import Latency
from niwaki.measure.macs import Macs
from niwaki.measure.measurement import Measurement, Meter
from niwaki.measure.memory import Memory
from niwaki.measure.params import Params
from niwaki.measure.runtime_energy import RuntimeEnergy
from niwaki.measure.runtime_latency import RuntimeLatency
from niwaki.measure.target import Target
from niwaki.units import need_module
from niwaki.verbs import callable_module

__all__ = [
    "COUNTS",
    "Bytes",
    "Energy",
    "Latency",
    "Macs",
    "Measurement",
    "Memory",
    "Meter",
    "Params",
    "RuntimeEnergy",
    "RuntimeLatency",
    "Target",
    "measure",
]

COUNTS: tuple[Meter, ...] = (Params(), Macs(), Bytes())
"""The meters that give the same numbers on every machine."""


def measure(model: nn.Module, example: Any, *, meters: tuple[Meter, ...] = COUNTS) -> dict[str, Measurement]:
    """What each meter says about `model` on `example`, by the meter's name; the model stays as it was.

    Raises:
        InputError: no meters, or two of one name; a model that is not an nn.Module, or that the example does not fit.

    Examples:
        >>> import torch
        >>> measure(nn.Linear(3, 2), torch.zeros(1, 3), meters=(Params(), Macs()))["macs"].value
        6.0
    """
    need_module(model, "measure a model")
    names = [meter.name for meter in meters]
    if not names or len(set(names)) < len(names):
        raise InputError(f"measure(meters={names})", found="none, or a name twice", do="give each meter once")
    try:
        return {meter.name: meter(model, example) for meter in meters}
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, NiwakiError):
            raise
        lines = str(error).strip().splitlines() or [""]
        raise InputError(
            f"measure {type(model).__name__}",
            found=f"its forward failed: {type(error).__name__}: {lines[0][:300]}",
            where="the forward of the model on the example",
            do="check that model(example) runs, and the example's shape and type",
        ) from error


callable_module(__name__)
