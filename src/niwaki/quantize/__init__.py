"""Whole numbers for weights and activations: grids, packing, ranges, and the network that computes on them."""

from niwaki.quantize.packing import pack, packed_sizes, packed_state, unpack, unpacked_state
from niwaki.quantize.quantised import Quantised
from niwaki.quantize.uniform import Uniform

__all__ = ["Quantised", "Uniform", "pack", "packed_sizes", "packed_state", "unpack", "unpacked_state"]
