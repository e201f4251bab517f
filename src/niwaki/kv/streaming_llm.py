"""The first tokens and the newest stay."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from niwaki.errors import InputError
from niwaki.kv.eviction import Eviction, Tokens


@final
@dataclass(frozen=True)
class StreamingLLM(Eviction):
    """The first `sinks` tokens of a sequence, and the newest.

    Source: Xiao et al. 2024, arXiv:2309.17453, sec. 3.2. Differs: tokens keep their places (the paper numbers those
    that stay anew and rotates keys again); texts longer than the model was trained for gain nothing here.

    Raises:
        InputError: a share outside (0, 1], or a count within the sinks.
    """

    keep: float | int = 0.2
    """Tokens per head that stay, at every time: a share of those seen, in (0, 1], or a count."""
    sinks: int = 4
    """First tokens that stay, counted behind padding."""
    asks: ClassVar[str] = "nothing"
    ongoing: ClassVar[bool] = True
    window: ClassVar[int] = 0  # type: ignore[misc]

    def __post_init__(self) -> None:
        if self.sinks < 0:
            raise InputError(f"StreamingLLM(sinks={self.sinks})", found="less than 0", do="give 0 or more")
        self.check()

    def least(self) -> int:
        return self.sinks

    def scores(self, tokens: Tokens) -> Tensor:
        sinks = tokens.positions < tokens.first[:, None, None] + self.sinks
        return tokens.positions.float().masked_fill(sinks, torch.inf)
