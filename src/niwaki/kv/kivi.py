"""Keys per channel and values per token, in 2 or 4 bits."""

from dataclasses import dataclass
from typing import final

from torch import Tensor

from niwaki.kv.packed import Bits, Grid, Packed


@final
@dataclass(frozen=True)
class KIVI(Bits):
    """Keys in groups of `group` tokens per channel, values in groups of `group` channels per token.

    Source: Liu et al. 2024, arXiv:2402.02750, sec. 3. Least value and scale per group, float16; packed.

    Raises:
        InputError: bits that are not 2, 4 or 8, or a group that is no multiple of 8.
    """

    bits: int = 4
    """Of a code: 2, 4 or 8."""
    group: int = 32
    """Numbers that share a scale; tokens for keys, channels for values."""

    def __post_init__(self) -> None:
        self.grids()

    def grids(self) -> tuple[Grid, Grid]:
        """Of keys and of values."""
        return Grid(self.bits, "tokens", self.group), Grid(self.bits, "channels", self.group)

    def pack(self, keys: Tensor, values: Tensor) -> tuple[Packed, Packed]:
        """`[batch, heads, tokens, width]` each; tokens a multiple of `group`."""
        of_keys, of_values = self.grids()
        return Packed.of(keys, of_keys), Packed.of(values, of_values)
