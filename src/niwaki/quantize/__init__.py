"""Whole numbers for weights and activations: grids, packing, ranges, and the network that computes on them."""

from niwaki.quantize.packing import pack, packed_sizes, packed_state, unpack, unpacked_state
from niwaki.quantize.quantised import Quantised
from niwaki.quantize.range_table import Grid, Ranges
from niwaki.quantize.ranges import from_batch_norm, from_inputs
from niwaki.quantize.simulate import Simulated, simulated
from niwaki.quantize.uniform import Uniform

__all__ = [
    "Grid",
    "Quantised",
    "Ranges",
    "Simulated",
    "Uniform",
    "from_batch_norm",
    "from_inputs",
    "pack",
    "packed_sizes",
    "packed_state",
    "simulated",
    "unpack",
    "unpacked_state",
]
