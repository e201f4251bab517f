"""How much memory a model's state takes."""

from dataclasses import dataclass
from typing import Any, final

from torch import nn

from niwaki.measure.measurement import Measurement, Meter, device_name
from niwaki.units import device_of


@final
@dataclass(frozen=True)
class Bytes(Meter):
    """Bytes allocated for parameters and buffers: whole storages, each once.

    A slice that keeps its big storage alive counts in full: a saving that is not in memory is no saving.
    """

    @property
    def name(self) -> str:
        return "bytes"

    def __call__(self, model: nn.Module, example: Any = None) -> Measurement:
        sizes: dict[int, int] = {}
        uncounted: list[str] = []
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            try:
                storage = tensor.untyped_storage()
            except NotImplementedError:  # sparse layouts have no single storage
                uncounted.append(name)
            else:
                sizes[storage._cdata] = storage.nbytes()
        return Measurement(
            name=self.name,
            value=float(sum(sizes.values())),
            unit="bytes",
            definition="storages behind all parameters and buffers, in memory, each once and in full",
            device=device_name(device_of(model)),
            uncounted=tuple(uncounted),
        )
