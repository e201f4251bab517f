"""The moving average of a model's weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn

from niwaki.train.settings import Ema


def local(tensor: Tensor) -> Tensor:
    """What of a tensor lies in this process: all of it, or a shard."""
    to_local: Any = getattr(tensor, "to_local", None)
    return to_local() if to_local is not None else tensor


@final
class Average:
    """Averages of a model's state, beside the model."""

    def __init__(self, model: nn.Module, how: Ema) -> None:
        self.how = how
        self.live = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        self.state: dict[str, Tensor] = {name: tensor.clone() for name, tensor in self.live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` (from 1)."""
        weight = 1 - self.how.at(step)
        for name, tensor in self.live.items():
            mean, now = local(self.state[name]), local(tensor)
            if now.is_floating_point() or now.is_complex():
                mean.lerp_(now, weight)
            else:
                mean.copy_(now)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Inside, the model has the averages; afterwards its own weights again."""
        own = {name: local(tensor).clone() for name, tensor in self.live.items()}
        try:
            put(self.live, self.state)
            yield
        finally:
            put(self.live, own)


@torch.no_grad()
def put(places: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy values into the tensors of the same names."""
    for name, tensor in places.items():
        local(tensor).copy_(local(values[name]))
