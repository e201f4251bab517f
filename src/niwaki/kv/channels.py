"""Which channels of each head stay: the abstract type, and counts without binary rounding."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from niwaki.errors import InputError
from niwaki.kv.observation import Observation
from niwaki.kv.support import Site
from niwaki.units import share_down


class Channels(ABC):
    """A rule for the channels of keys and of values, from what a prompt's last queries see."""

    per_query_head: bool
    """Whether keys and values are repeated to query heads before anything is chosen; costs the group's saving."""

    @abstractmethod
    def widths(self, site: Site) -> tuple[int, int]:
        """How many channels of keys and of values stay per head.

        Raises:
            InputError: settings that these heads cannot have.
        """

    @abstractmethod
    def choose(self, seen: Observation, site: Site) -> tuple[Tensor | None, Tensor | None]:
        """Key and value channels that stay: int16 `[batch, heads, kept]`, ascending; None for all of them."""


def stay(keep: float, channels: int, *, round_to: int = 1) -> int:
    """How many of `channels` stay at a share: floor of the number removed, then up to a multiple of `round_to`."""
    removed = share_down(1.0 - keep, channels)
    return min(channels, -(-(channels - removed) // round_to) * round_to)


def share(name: str, keep: float) -> None:
    """
    Raises:
        InputError: a share outside (0, 1].
    """
    if not (isinstance(keep, int | float) and 0 < keep <= 1):
        do = "give a share of the channels that stay, above 0 and at most 1"
        raise InputError(f"keep {keep!r} of the {name} channels", found="not in (0, 1]", do=do)


def best(scores: Tensor, count: int) -> Tensor:
    """The `count` highest along the last axis, in ascending order of place; of equal ones the first. int64."""
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    return order[..., :count].sort(dim=-1).values
