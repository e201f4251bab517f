"""Distillation: one loss between outputs or features of a student and its teacher per file, and a task with them."""

from niwaki.distill.loss import Loss

# isort: split
from niwaki.distill.box_outputs import BoxOutputs, HeadOutputs, Heads, OutputTaught
from niwaki.distill.channel_wise import ChannelWise
from niwaki.distill.distilled import Distilled, Tap, Weighted
from niwaki.distill.features import Features
from niwaki.distill.logits import Logits
from niwaki.distill.spatial_attention import SpatialAttention
from niwaki.distill.taught import Covering, Taught, covering

__all__ = [
    "BoxOutputs",
    "ChannelWise",
    "Covering",
    "Distilled",
    "Features",
    "HeadOutputs",
    "Heads",
    "Logits",
    "Loss",
    "OutputTaught",
    "SpatialAttention",
    "Tap",
    "Taught",
    "Weighted",
    "covering",
]
