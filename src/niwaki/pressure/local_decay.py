"""Dynamic sparse training: a penalty that lets go of the large norm scales after a while."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from niwaki.errors import InputError
from niwaki.pressure.pressure import Moment, Pressure, need_rate, scales_of, whole
from niwaki.units import share_down


@final
@dataclass(frozen=True)
class LocalDecay(Pressure):
    """L1 on the scales of batch norms, uniform at first; from the switch on, the largest keep a small part of it.

    With v the sorted |gamma| of a set, n of them: those at or above v[floor(n quantile)] are protected, found anew in
    every step. A quantile of 0 protects all after the switch (global decay).

    Source: Chu et al. 2022, arXiv:2306.01526, official code (dynamic sparse training; the constants are its defaults).
    Differs: added once per step of the optimiser, to gradients that are unscaled and clipped; the code adds it after
    every backward, so that accumulating over k batches makes it k times as strong.

    Raises:
        InputError: a setting out of its range, or a scale in two sets.
    """

    rate: float = 1e-3
    """s, above 0; the authors' default, which they say costs recall: 1e-4 loses less."""
    switch: float = 0.4
    """Share of the epochs up to and with which the penalty is uniform; in [0, 1]."""
    quantile: float = 0.65
    """Share of the scales that keep all of it afterwards; in [0, 1). Choose the share that will be removed."""
    protected: float = 0.01
    """What the others keep of it; in [0, 1]."""
    sets: tuple[tuple[str, ...], ...] | None = None
    """Names of scales, in sets that have a quantile each; None is one set of every batch norm's."""

    def __post_init__(self) -> None:
        need_rate(self)
        ranges = {"switch": self.switch <= 1, "quantile": self.quantile < 1, "protected": self.protected <= 1}
        for name, below in ranges.items():
            if not (below and getattr(self, name) >= 0):
                limit = "[0, 1)" if name == "quantile" else "[0, 1]"
                raise InputError(f"LocalDecay({name}={getattr(self, name)!r})", do=f"give a share in {limit}")
        listed = [name for names in self.sets or () for name in names]
        if twice := sorted({name for name in listed if listed.count(name) > 1}):
            raise InputError(f"LocalDecay of {twice[0]}", found="it is in two sets", do="name each scale once")

    def memory(self, model: nn.Module) -> dict[str, Tensor]:
        self._sets(model)
        return {}

    @torch.no_grad()
    def __call__(self, model: nn.Module, memory: dict[str, Tensor], at: Moment) -> None:
        uniform = at.epoch <= share_down(self.switch, at.epochs)
        for scales in self._sets(model):
            limit = None if uniform else self.limit([whole(scale) for scale in scales])
            for scale in scales:
                if scale.grad is None:
                    continue
                push = scale.sign()
                if limit is not None:
                    push = push * (1 - (1 - self.protected) * (scale.abs() >= limit).to(scale.dtype))
                scale.grad.add_(push, alpha=self.rate)

    def limit(self, scales: list[Tensor]) -> float:
        """The smallest protected |gamma| of a set."""
        sizes = torch.cat([scale.detach().abs().flatten() for scale in scales]).sort().values
        return float(sizes[min(share_down(self.quantile, len(sizes)), len(sizes) - 1)])

    def _sets(self, model: nn.Module) -> list[list[nn.Parameter]]:
        if self.sets is None:
            return [list(scales_of(model, None).values())]
        return [list(scales_of(model, names).values()) for names in self.sets]
