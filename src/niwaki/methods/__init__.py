"""Methods: one paper per file, a frozen dataclass whose fields are its settings; and the call that runs one."""

from niwaki.methods.group_channel_pruning import GroupChannelPruning
from niwaki.methods.job import Job, Method, Outcome
from niwaki.methods.magnitude import Magnitude
from niwaki.methods.norm_scale import NormScale
from niwaki.methods.on_disk import StoredOutcome, compress_stored
from niwaki.methods.optimal_brain_surgeon import OptimalBrainSurgeon
from niwaki.methods.pagcp import PAGCP
from niwaki.methods.precropping import PreCropping
from niwaki.methods.random import Random
from niwaki.methods.run import compress, load
from niwaki.methods.taylor import Taylor
from niwaki.methods.udfc import UDFC
from niwaki.methods.yolov8_cwd import YOLOv8CWD

__all__ = [
    "PAGCP",
    "UDFC",
    "GroupChannelPruning",
    "Job",
    "Magnitude",
    "Method",
    "NormScale",
    "OptimalBrainSurgeon",
    "Outcome",
    "PreCropping",
    "Random",
    "StoredOutcome",
    "Taylor",
    "YOLOv8CWD",
    "compress",
    "compress_stored",
    "load",
]
