"""Network slimming's penalty on norm scales, with a rate that may change from epoch to epoch."""

from dataclasses import dataclass
from typing import Literal, final, get_args

import torch
from torch import Tensor, nn

from niwaki.errors import InputError, UnknownNameError
from niwaki.pressure.pressure import Moment, Pressure, need_rate, scales_of

Schedule = Literal["constant", "decreasing", "increasing"]
LAST = 0.1
"""Share of the rate that the decreasing schedule comes down to, and the increasing one starts from."""


@final
@dataclass(frozen=True)
class Slimming(Pressure):
    """L1 on the scales of batch norms: s(e) sign(gamma) is added to their gradients, and 0 where gamma is 0.

    Source: Liu et al. 2017, arXiv:1708.06519, sec. 3 (constant rate). The decreasing rate is the formula of Sabaghian
    et al. 2025, arXiv:2509.12918, as its reviews quote it: s(e) = s (1 - 0.9 e / E); they call it "gradually
    increased", which `increasing` is: s(e) = s (0.1 + 0.9 e / E). Differs: added once per step of the optimiser, to
    gradients that are unscaled and clipped, however many batches they are of.

    Raises:
        InputError: a rate that is not above 0, or shifts below 0.
        UnknownNameError: an unknown schedule.

    Examples:
        >>> how = Slimming(2e-4, "decreasing")
        >>> [round(how.at(epoch, 100), 8) for epoch in (0, 50, 99)]
        [0.0002, 0.00011, 2.18e-05]
    """

    rate: float = 1e-4
    """s; 1e-4 to 2e-4 are usual for detectors, 1e-3 is known to cost accuracy."""
    schedule: Schedule = "constant"
    """"constant", "decreasing" linearly to a tenth over the epochs, or "increasing" from a tenth."""
    shifts: float = 0.0
    """Of a like term on the norms' shifts, at shifts * rate whatever the schedule; 10 in public code, 0 leaves it
    out."""
    scales: tuple[str, ...] | None = None
    """Names of the scales; None is every batch norm's."""

    def __post_init__(self) -> None:
        need_rate(self)
        if self.schedule not in get_args(Schedule):
            raise UnknownNameError.of("schedule of Slimming", self.schedule, get_args(Schedule))
        if not 0 <= self.shifts < float("inf"):
            raise InputError(f"Slimming(shifts={self.shifts!r})", do="give 0 or more")

    def at(self, epoch: int, epochs: int) -> float:
        """s(e) of an epoch from 0, of so many."""
        done = epoch / epochs
        return self.rate * {"constant": 1.0, "decreasing": 1 - (1 - LAST) * done,
                            "increasing": LAST + (1 - LAST) * done}[self.schedule]  # fmt: skip

    def memory(self, model: nn.Module) -> dict[str, Tensor]:
        scales_of(model, self.scales)
        return {}

    @torch.no_grad()
    def __call__(self, model: nn.Module, memory: dict[str, Tensor], at: Moment) -> None:
        rate, named = self.at(at.epoch, at.epochs), dict(model.named_parameters())
        for name, scale in scales_of(model, self.scales).items():
            if scale.grad is not None:
                scale.grad.add_(scale.sign(), alpha=rate)
            shift = named.get(f"{name.removesuffix('weight')}bias")
            if self.shifts and shift is not None and shift.grad is not None:
                shift.grad.add_(shift.sign(), alpha=self.shifts * self.rate)
