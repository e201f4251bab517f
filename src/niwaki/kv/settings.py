"""What a compressed layer is told."""

from dataclasses import dataclass

from niwaki.kv.channels import Channels
from niwaki.kv.eviction import Eviction
from niwaki.kv.packed import Bits


@dataclass(frozen=True)
class Settings:
    """The three axes and the window, with defaults filled in."""

    channels: Channels | None
    tokens: Eviction | None
    bits: Bits | None
    recent: int
    flush: int
    fused: bool = False

    def whole(self, tokens: int) -> int:
        """How many of `tokens` that stay are stored whole after a prompt: recent ones, and what fills no group."""
        old = max(0, tokens - self.recent)
        return tokens - (old - old % self.bits.group if self.bits is not None else old)
