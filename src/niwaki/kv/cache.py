"""The cache that `generate` is given, and the context in which it makes compressed caches by itself."""

import copy
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicSlidingWindowLayer

from niwaki.errors import InputError
from niwaki.kv.attach import Attachment, attach, detach
from niwaki.kv.layer import KVLayer
from niwaki.kv.sizes import storage_bytes
from niwaki.kv.support import Site


@dataclass(frozen=True)
class Load:
    """What a cache shall hold: the same for every sequence of a batch, which counts no padding."""

    prompt: int
    """Tokens that come at once, first."""
    generated: int = 0
    """Tokens that come one by one behind them and are stored (the last one that `generate` gives is not)."""
    batch: int = 1
    element: int = 2
    """Bytes of one number as the model computes: 2 for bfloat16 and float16, 4 for float32."""


class How(ABC):
    """A way to compress a cache: says which layer stores what one attention module produces."""

    @abstractmethod
    def layer(self, site: Site) -> KVLayer:
        """A new, empty layer for this attention module, which sees all tokens.

        Raises:
            InputError: settings that its heads or channels cannot have.
        """

    def layer_bytes(self, site: Site, load: Load) -> int:
        """Bytes that such a layer will hold, to the byte, by arithmetic alone.

        Raises:
            InputError: this way does not say.
        """
        do = "run it and measure"
        raise InputError("plan a cache", found=f"{type(self).__name__} does not say its bytes", do=do)

    @property
    def period(self) -> int:
        """Tokens within which bytes may go up and down as a cache grows: those of a group, a stretch, a window."""
        return 1

    def extra_bytes(self, site: Site, element: int) -> int:
        """Bytes of weights that the model needs besides its own; none unless said otherwise."""
        return 0


class KVCache(DynamicCache):
    """A cache for one model: `model.generate(..., past_key_values=KVCache(model, how))`.

    The model is attached as long as the cache lives, or until `close`. Layers that slide are transformers' own.

    Raises:
        UnsupportedModelError: a model that is not handled, with the reason.
    """

    def __init__(self, model: nn.Module, how: How) -> None:
        super().__init__()
        self._join(model)
        try:
            self.layers = layers_of(self.attachment.sites, how)  # type: ignore[union-attr]
        except BaseException:
            self.close()
            raise
        self.layer_class_to_replicate = None

    def _join(self, model: nn.Module) -> None:
        self.attachment: Attachment | None = attach(model)
        self._model = model
        self._close = weakref.finalize(self, detach, model)

    def __deepcopy__(self, memo: dict[int, Any]) -> "KVCache":
        """A copy of what is stored, for the same model: one prefilled prompt, many continuations."""
        if self.attachment is None:
            raise InputError("copy a compressed cache", found="it was closed", do="copy it before")
        twin = type(self).__new__(type(self))
        known = {**self.__dict__}
        for name in ("attachment", "_model", "_close"):
            known.pop(name)
        twin.__dict__.update(copy.deepcopy(known, memo))
        twin._join(self._model)
        return twin

    def close(self) -> None:
        """Let the model go; the cache cannot be used any more."""
        self.attachment = None
        self._close()

    def nbytes(self) -> int:
        """Bytes of the distinct storages that the cache keeps alive."""
        return cache_bytes(self)


def layers_of(found: Sequence[Site], how: How) -> list[Any]:
    """A new layer for every attention module.

    Raises:
        InputError: every layer slides, so that there is nothing to compress.
    """
    if all(site.sliding is not None for site in found):
        why = f"every layer looks back {found[0].sliding} tokens only, and keeps no more"
        raise InputError("compress a key/value cache", found=why, do="use a model with layers that see all tokens")
    layers = [
        how.layer(site) if site.sliding is None else DynamicSlidingWindowLayer(sliding_window=site.sliding)
        for site in found
    ]
    next(layer for layer in layers if isinstance(layer, KVLayer)).speaks = True
    return layers


def cache_bytes(cache: Any) -> int:
    """Bytes of the distinct storages behind any growing cache of transformers, ours included.

    Raises:
        InputError: a layer whose tensors are not known.
    """
    tensors = []
    for number, layer in enumerate(cache.layers):
        if isinstance(layer, KVLayer):
            tensors += list(layer.tensors())
        elif isinstance(layer, CacheLayerMixin) and not hasattr(layer, "_quantized_keys"):
            tensors += [part for part in (layer.keys, layer.values) if part is not None]
        else:
            do = "give a growing cache"
            raise InputError("count a cache's bytes", found=type(layer).__name__, where=f"layer {number}", do=do)
    return storage_bytes(tensors)


class Session:
    """What a `with compressed(...)` made."""

    def __init__(self) -> None:
        self.cache: Any = None
        """The cache of the last generation or forward inside; kept until the next one or the end of the block."""

    def nbytes(self) -> int:
        """Bytes that the last cache keeps alive.

        Raises:
            InputError: there is none yet.
        """
        if self.cache is None:
            raise InputError("count a cache's bytes", found="no forward ran yet", do="generate inside the block first")
        return cache_bytes(self.cache)


@contextmanager
def compressed(model: nn.Module, how: How) -> Iterator[Session]:
    """Inside, every cache that the model makes is compressed: `with compressed(model, how): model.generate(...)`.

    The hooks go with the block, also when it ends with an exception. Caches given to `generate` must be empty growing
    ones, which are filled our way, or `KVCache`s of this model, which stay what they are.

    Raises:
        UnsupportedModelError: a model that is not handled, with the reason.
        InputError: the model is in such a block already; inside: a cache of another kind.
    """
    attachment = attach(model)
    session = Session()
    try:
        if attachment.incoming is not None:
            do = "leave the other block first, or give each generate a KVCache of its own"
            raise InputError("compress a model's caches", found="it is in such a block already", do=do)
        layers_of(attachment.sites, how)

        def incoming(given: Any) -> Any:
            session.cache = _adopted(given, attachment, how)
            return session.cache

        attachment.incoming = incoming
        try:
            yield session
        finally:
            attachment.incoming = None
            session.cache = None
    finally:
        detach(model)


def _adopted(given: Any, attachment: Attachment, how: How) -> Any:
    if given is None:
        given = DynamicCache()
    if any(isinstance(layer, KVLayer) for layer in getattr(given, "layers", ())):
        return given
    what = f"a {type(given).__name__}"
    if type(given) is not DynamicCache:
        why = f"{what}, whose layers have a layout of their own"
    elif given.offloading:
        why = f"{what} that moves its layers to the CPU"
    elif given.get_seq_length():
        why = f"{what} that already holds {given.get_seq_length()} tokens"
    else:
        given.layers = layers_of(attachment.sites, how)
        given.layer_class_to_replicate = None
        return given
    do = "give an empty DynamicCache or none (no cache_implementation), or a niwaki.kv.KVCache"
    raise InputError("compress a model's caches", found=why, do=do)
