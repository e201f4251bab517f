"""CSKV: keys and values as low-rank projections of the hidden states, with a window of whole tokens."""

import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import final

from torch import nn

from niwaki.errors import InputError
from niwaki.kv.cache import How, KVCache, Load, Session, compressed
from niwaki.kv.cskv_layer import OFFSET, CSKVLayer, Packing, Schedule, WholeLayer
from niwaki.kv.factors import Factors
from niwaki.kv.layer import KVLayer
from niwaki.kv.low_rank import Restoring
from niwaki.kv.packed import Grid
from niwaki.kv.projections import Projections, growing
from niwaki.kv.sources import Rotation, source_of
from niwaki.kv.support import Site


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
        if shape.as_published:
            found = f"projections trained for {shape.quantiser}: a quantiser that is not ours"
            do = "train them with Rounding(as_published=False)"
            raise InputError(f"a CSKV cache with bits={self.bits}, window={self.window}", found=found, do=do)
        if shape.bits is not None and (shape.bits, shape.window) != (self.bits, self.window):
            found = f"projections trained for {shape.quantiser}"
            do = "use these settings, or train projections for yours"
            raise InputError(f"a CSKV cache with bits={self.bits}, window={self.window}", found=found, do=do)
        if self.bits is not None and self.window and self.window % 8:
            found = f"keys are packed by {self.window} tokens"
            raise InputError(
                f"a CSKV cache with bits={self.bits}", found=found, do="give a window that 8 divides, or 0"
            )
        if self.bits is not None:
            Grid(self.bits, "channels")
        if self.bits is not None and self._whole:
            found = "projections of keep=1, with which the model's own cache is kept whole"
            do = "project with a keep below 1, leave bits out, or pack by Compression(bits=KIVI(...))"
            raise InputError(f"a CSKV cache with bits={self.bits}", found=found, do=do)
        self.projections.check(self.model)

    def layer(self, site: Site) -> KVLayer:
        if self._whole:
            return WholeLayer()
        parts = source_of(site), self._restoring[site.layer]
        made = CSKVLayer(site, *parts, schedule=self._schedule, packing=self._packing(site))
        made.heard = self.warn_if_too_short
        return made

    def layer_bytes(self, site: Site, load: Load) -> int:
        tokens = load.prompt + load.generated
        channels = 2 * site.kv_heads * site.head_dim
        if self._whole:
            return load.batch * tokens * channels * load.element
        keys, values = (factors.rank for factors in self.projections.layers[site.layer])
        window = 0
        for new in (load.prompt, *[1] * load.generated):
            window += new
            window -= self._schedule.leaving(window)
        whole = window * (channels + keys + values) * load.element
        packing = self._packing(site)
        old = packing.nbytes(tokens - window, keys, packing.keys, load.element)
        old += packing.nbytes(tokens - window, values, packing.values, load.element)
        return load.batch * (whole + old + OFFSET)

    @property
    def period(self) -> int:
        return max(1, self.window)

    def extra_bytes(self, site: Site, element: int) -> int:
        return 0 if self._whole else element * sum(one.count() for one in self.projections.layers[site.layer])

    @property
    def _whole(self) -> bool:
        """Whether there is nothing to leave out: keep=1 is the model's own cache."""
        return self.projections.shape.keep == self.projections.shape.values == 1

    @property
    def _schedule(self) -> Schedule:
        return Schedule(self.window, self.tumbling, self.bits is not None)

    @cached_property
    def _restoring(self) -> dict[int, Restoring]:
        """Layer to factors in the model's type and place, shared by all caches."""
        made = {}
        for site in growing(self.model):
            source = source_of(site)
            place = source.keys.device, source.keys.dtype
            if self.projections.outlined and not source.keys.is_meta:
                do = "project the model first: niwaki.kv.project(model, batches)"
                raise InputError("compress a cache", found="projections without numbers", do=do)
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

    def warn_if_too_short(self, load: Load) -> None:
        """Says so where a cache saves less than the factors take."""
        found = growing(self.model)
        saved = sum(
            2 * site.kv_heads * site.head_dim * load.batch * load.prompt * load.element - self.layer_bytes(site, load)
            for site in found
        )
        extra = sum(self.extra_bytes(site, load.element) for site in found)
        if saved < extra:
            message = (
                f"a CSKV cache of {load.batch} x {load.prompt} tokens saves {saved} bytes, and its factors take "
                f"{extra}: below the break-even length"
            )
            warnings.warn(message, UserWarning, stacklevel=2)


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
