"""How many parameters a model has."""

from dataclasses import dataclass
from typing import Any, final

from torch import nn

from niwaki.measure.measurement import Measurement, Meter, device_name, storage_of
from niwaki.units import device_of


@final
@dataclass(frozen=True)
class Params(Meter):
    """Elements of all parameters, trainable or not; tied parameters (one storage, several names) once."""

    @property
    def name(self) -> str:
        return "params"

    def __call__(self, model: nn.Module, example: Any = None) -> Measurement:
        sizes = {(storage_of(p), p.storage_offset(), tuple(p.shape), p.stride()): p.numel() for p in model.parameters()}
        return Measurement(
            name=self.name,
            value=float(sum(sizes.values())),
            unit="parameters",
            definition="elements of all parameters, trainable or not; tied parameters once; buffers not",
            device=device_name(device_of(model)),
        )
