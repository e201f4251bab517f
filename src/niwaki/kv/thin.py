"""ThinK in one line: a cache, and a context."""

from contextlib import AbstractContextManager

from torch import nn

from niwaki.kv.cache import KVCache, Session, compressed
from niwaki.kv.compression import Compression
from niwaki.kv.eviction import Eviction
from niwaki.kv.kivi import KIVI
from niwaki.kv.think import ThinK


class ThinKCache(KVCache):
    """`model.generate(..., past_key_values=ThinKCache(model, keep=0.6))`: keys of the prompt with fewer channels.

    `keep` is the share of key channels that stay, `values` that of value channels, `tokens` a policy that evicts
    first, `bits` 2, 4 or 8 to pack what stays. Other settings: `KVCache(model, Compression(...))`.

    Raises:
        UnsupportedModelError: a model that is not handled, with the reason.
        InputError: settings out of range, or that exclude each other.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        keep: float = 0.6,
        values: float = 1.0,
        tokens: Eviction | None = None,
        bits: int | None = None,
    ) -> None:
        super().__init__(model, _settings(keep, values, tokens, bits))


def think(
    model: nn.Module,
    *,
    keep: float = 0.6,
    values: float = 1.0,
    tokens: Eviction | None = None,
    bits: int | None = None,
) -> AbstractContextManager[Session]:
    """`with niwaki.kv.think(model, keep=0.6): model.generate(...)`: the same for every cache made inside.

    Raises:
        UnsupportedModelError: a model that is not handled, with the reason.
        InputError: settings out of range, or that exclude each other; the model is in such a block already.
    """
    return compressed(model, _settings(keep, values, tokens, bits))


def _settings(keep: float, values: float, tokens: Eviction | None, bits: int | None) -> Compression:
    packed = None if bits is None else KIVI(bits=bits)
    return Compression(channels=ThinK(keep=keep, values=values), tokens=tokens, bits=packed)
