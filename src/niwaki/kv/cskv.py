"""CSKV: keys and values as low-rank projections of the hidden states, with a window of whole tokens."""

import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from torch import nn

from niwaki.errors import InputError
from niwaki.kv.cache import How, KVCache, Session, compressed
from niwaki.kv.cskv_layer import CSKVLayer, Packing, Schedule
from niwaki.kv.factors import Factors
from niwaki.kv.layer import KVLayer
from niwaki.kv.low_rank import Restoring
from niwaki.kv.packed import Grid
from niwaki.kv.projections import Projections, growing
from niwaki.kv.sources import Rotation, source_of
from niwaki.kv.support import Site

NEVER = 2**62
"""A window that no sequence fills."""


@final
@dataclass(frozen=True, eq=False)
class CSKV(How):
    """Old tokens are kept as `C = X A` and read as `C B`, the newest `window` as they are.

    Keys are restored tile by tile and rotated to their positions; values never, their attention weights are applied to
    what is stored. What a prompt sees is not compressed.

    Source: Wang et al. 2024, arXiv:2409.10593, sec. 2. Differs: see `docs/cards/kv/cskv.md`.

    Raises:
        InputError: projections for another model or quantiser, or settings out of range.
    """

    model: nn.Module
    """The model that the caches are for."""
    projections: Projections
    """See `niwaki.kv.project`."""
    window: int = 32
    """Whole tokens; 0 keeps the current one only."""
    tumbling: bool = False
    """Whether the window empties at once when it is full, as in the authors' code, or slides."""
    bits: int | None = None
    """2, 4 or 8: what is stored of old tokens is packed; keys by `window` tokens per channel, values per token."""

    def __post_init__(self) -> None:
        if self.window < 0:
            raise InputError(f"a window of {self.window} tokens", do="give 0 or more")
        if self.tumbling and self.window == 0:
            raise InputError("a tumbling window of 0 tokens", do="give a window of 1 or more, or tumbling=False")
        shape = self.projections.shape
        if shape.bits is not None and (shape.bits, shape.window) != (self.bits, self.window):
            found = f"projections trained for bits={shape.bits}, window={shape.window}"
            do = "use these settings, or train projections for yours"
            raise InputError(f"a CSKV cache with bits={self.bits}, window={self.window}", found=found, do=do)
        if self.bits is not None and self.window and self.window % 8:
            found = f"keys are packed by {self.window} tokens"
            raise InputError(
                f"a CSKV cache with bits={self.bits}", found=found, do="give a window that 8 divides, or 0"
            )
        if self.bits is not None:
            Grid(self.bits, "channels")
        self.projections.check(self.model)

    def layer(self, site: Site) -> KVLayer:
        shape = self.projections.shape
        whole = shape.keep == shape.values == 1
        schedule = Schedule(NEVER if whole else self.window, self.tumbling, self.bits is not None)
        return CSKVLayer(
            site, source_of(site), self._restoring[site.layer], schedule=schedule, packing=self._packing(site)
        )

    @cached_property
    def _restoring(self) -> dict[int, Restoring]:
        """Layer to factors in the model's type and place, shared by all caches."""
        made = {}
        for site in growing(self.model):
            source = source_of(site)
            place = source.keys.device, source.keys.dtype
            keys, values = (
                Factors(one.down.to(*place), one.up.to(*place)) for one in self.projections.layers[site.layer]
            )
            biases, turned = (source.key_bias, source.value_bias), Rotation(self.model, site)
            made[site.layer] = Restoring(keys, values, *biases, source.key_norm, turned, site.kv_heads)
        return made

    def _packing(self, site: Site) -> Packing:
        if self.bits is None:
            return Packing(None, None, site.kv_heads)
        keys, values = (factors.rank // site.kv_heads for factors in self.projections.layers[site.layer])
        each = [-(-width // 8) * 8 for width in (keys, values)]  # a group is a head's slice
        of_keys = Grid(self.bits, "tokens", self.window) if self.window else Grid(self.bits, "channels", each[0])
        return Packing(of_keys, Grid(self.bits, "channels", each[1]), site.kv_heads)

    def warn_below_break_even(self, tokens: int) -> None:
        """Says so where `tokens` are too few for the saving to pay for the factors."""
        least = self.break_even()
        if tokens < least:
            message = (
                f"{tokens} tokens are below {least}, from which on the cache saves more than the factors' "
                f"{self.projections.nbytes()} bytes"
            )
            warnings.warn(message, UserWarning, stacklevel=2)

    def break_even(self) -> float:
        """Tokens, in one sequence, from which on memory is saved: what the factors take is then won."""
        saved, extra = 0.0, 0
        for site in growing(self.model):
            size = torch.empty(0, dtype=source_of(site).keys.dtype).element_size()
            keys, values = self.projections.layers[site.layer]
            saved += size * (2 * site.kv_heads * site.head_dim - keys.rank - values.rank)
            extra += size * sum(one.down.numel() + one.up.numel() for one in (keys, values))
        return float("inf") if saved <= 0 else -(-extra // int(saved))


class CSKVCache(KVCache):
    """`model.generate(..., past_key_values=CSKVCache(model, projections))`; settings as those of `CSKV`.

    Raises:
        UnsupportedModelError: a model that is not handled, with the reason.
        InputError: see `CSKV`.
    """

    def __init__(
        self,
        model: nn.Module,
        projections: Projections,
        *,
        window: int = 32,
        tumbling: bool = False,
        bits: int | None = None,
    ) -> None:
        super().__init__(model, CSKV(model, projections, window, tumbling, bits))


def cskv(
    model: nn.Module, projections: Projections, *, window: int = 32, tumbling: bool = False, bits: int | None = None
) -> AbstractContextManager[Session]:
    """`with niwaki.kv.cskv(model, projections): model.generate(...)`: the same for every cache made inside.

    Raises:
        UnsupportedModelError: a model that is not handled, with the reason.
        InputError: see `CSKV`; the model is in such a block already.
    """
    return compressed(model, CSKV(model, projections, window, tumbling, bits))
