"""A cache with fewer tokens, fewer channels and fewer bits: each of the three by a block of its own, or not at all."""

import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from typing import final

from niwaki.errors import InputError, MissingExtraError, NothingChangedWarning
from niwaki.kv.arithmetic import settings_bytes
from niwaki.kv.cache import How, Load
from niwaki.kv.channels import Channels
from niwaki.kv.compressed_layer import CompressedLayer
from niwaki.kv.eviction import Eviction
from niwaki.kv.packed import Bits
from niwaki.kv.settings import Settings
from niwaki.kv.support import Site


@final
@dataclass(frozen=True)
class Compression(How):
    """After the prompt tokens are evicted, then channels left out, then what stays is packed; in this order.

    The newest tokens are stored whole. What the prompt itself sees is never compressed, and channels are chosen once,
    by the first prompt.

    Raises:
        InputError: nothing to do, settings that exclude each other, or a number out of range.
    """

    channels: Channels | None = None
    """Which channels of keys and values stay (`ThinK`)."""
    tokens: Eviction | None = None
    """Which tokens stay (`SnapKV`, `H2O`, `StreamingLLM`)."""
    bits: Bits | None = None
    """How what stays is packed (`KIVI`)."""
    recent: int = 32
    """Newest tokens that are stored whole; 0 or more."""
    flush_every: int | None = None
    """Generated tokens that pile up behind the `recent` ones before they are compressed like the prompt; 0: never.

    None: as the papers do, never for channels and SnapKV, each `group` with bits, each token with policies that go on.
    """

    fused: bool = False
    """Decode single tokens by one Triton kernel on CUDA, where nothing is packed; elsewhere and otherwise by PyTorch.

    Tried in Triton's interpreter and compiled, never run on a GPU.
    """

    def __post_init__(self) -> None:
        if self.fused and find_spec("triton") is None:
            raise MissingExtraError("decode by a fused kernel: needs triton", do="pip install triton, or fused=False")
        if self.channels is None and self.tokens is None and self.bits is None:
            raise InputError("compress a cache", found="nothing to leave out", do="give channels, tokens or bits")
        if self.recent < 0 or (self.flush_every or 0) < 0:
            found = f"recent {self.recent}, flush_every {self.flush_every}"
            raise InputError("compress a cache", found=found, do="give 0 or more")
        ongoing = self.tokens is not None and self.tokens.ongoing
        if ongoing and self.bits is not None:
            do = "use SnapKV, which evicts before packing"
            raise InputError(f"{type(self.tokens).__name__} with packed tokens", found="they share scales", do=do)
        if ongoing and self.flush_every == 0:
            do = "leave flush_every at None, or give 1 or more"
            raise InputError(f"{type(self.tokens).__name__}(...) with flush_every=0", found="it never evicts", do=do)
        if self.bits is not None and self._flush % self.bits.group:
            do = f"give a multiple of {self.bits.group}, or 0"
            raise InputError(f"flush_every={self._flush}", found=f"keys are packed by {self.bits.group} tokens", do=do)

    @property
    def steady(self) -> bool:
        """Whether nothing is chosen, packed or evicted while tokens are generated."""
        return self._flush == 0

    @property
    def period(self) -> int:
        return max(1, self._flush, 0 if self.bits is None else self.bits.group)

    @property
    def _flush(self) -> int:
        if self.flush_every is not None:
            return self.flush_every
        if self.tokens is not None and self.tokens.ongoing:
            return 1
        return self.bits.group if self.bits is not None else 0

    def layer(self, site: Site) -> CompressedLayer:
        keys, values = (site.head_dim, site.head_dim) if self.channels is None else self.channels.widths(site)
        if self.channels is not None and keys == values == site.head_dim and not _asks_for_all(self.channels):
            message = f"{self.channels} leaves out none of {site.head_dim} channels: nothing is pruned"
            warnings.warn(message, NothingChangedWarning, stacklevel=4)
        if self.channels is not None and self.channels.per_query_head and site.heads != site.kv_heads:
            times = site.heads // site.kv_heads
            message = (
                f"one choice per query head keeps {times} copies of keys and values: up to {times} times the bytes"
            )
            warnings.warn(message, UserWarning, stacklevel=4)
        return CompressedLayer(self._settings(), site)

    def layer_bytes(self, site: Site, load: Load) -> int:
        return settings_bytes(self._settings(), site, load)

    def _settings(self) -> Settings:
        return Settings(self.channels, self.tokens, self.bits, self.recent, self._flush, self.fused)


def _asks_for_all(channels: Channels) -> bool:
    """Whether the settings themselves say that every channel stays: then nothing need be said."""
    return getattr(channels, "keep", None) == 1 and getattr(channels, "values", 1) == 1
