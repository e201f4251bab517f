"""Tokens that the end of the prompt looks at stay."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.nn import functional

from niwaki.errors import InputError
from niwaki.kv.eviction import Eviction, Tokens


@final
@dataclass(frozen=True)
class SnapKV(Eviction):
    """After the prompt, per head: the last tokens, and those that the last queries give most attention to.

    Weights of the last `window` queries are summed and smoothed by a maximum over `kernel` neighbours. Generated tokens
    all stay.

    Source: Li et al. 2024, arXiv:2404.14469, listing 1. Differs: one choice per key/value head, by its group's sum.

    Raises:
        InputError: a share outside (0, 1], a count within the window, an even kernel.
    """

    keep: float | int = 1024
    """Tokens per head that stay after the prompt, the window among them: a count, or a share in (0, 1]."""
    window: int = 32
    """Last queries of the prompt that are asked, in tokens; they stay."""
    kernel: int = 7
    """Neighbours, the token itself among them, that a token's score is the largest of; odd."""
    asks: ClassVar[str] = "window"
    ongoing: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            found = f"window {self.window}, kernel {self.kernel}"
            raise InputError("SnapKV", found=found, do="give a window of 1 or more and an odd kernel")
        self.check()

    def least(self) -> int:
        return self.window

    def scores(self, tokens: Tokens) -> Tensor:
        assert tokens.attention is not None
        behind = tokens.attention.shape[-1] - self.window
        smooth = tokens.attention.clone()
        if behind > 0:
            smooth[..., :behind] = functional.max_pool1d(
                smooth[..., :behind], self.kernel, stride=1, padding=self.kernel // 2
            )
        smooth[..., max(0, behind) :] = torch.inf
        return smooth
