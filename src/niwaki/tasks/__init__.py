"""What a batch means: loss, metric, inputs."""

from niwaki.tasks.detector import Detector
from niwaki.tasks.heads import Boundary, Depth, Head, Normals, Segmentation
from niwaki.tasks.task import Task

# isort: split
from niwaki.tasks.augmentation import Augmentation
from niwaki.tasks.classification import Classification
from niwaki.tasks.custom import Custom
from niwaki.tasks.detection import Detection, Reading
from niwaki.tasks.facts import Facts
from niwaki.tasks.joined import Joined
from niwaki.tasks.language_modelling import LanguageModelling
from niwaki.tasks.long_text import LongText
from niwaki.tasks.multitask import Multitask
from niwaki.tasks.needle import Needle
from niwaki.tasks.reading import Cached, Whole
from niwaki.tasks.retrieval import Retrieval

__all__ = [
    "Augmentation",
    "Boundary",
    "Cached",
    "Classification",
    "Custom",
    "Depth",
    "Detection",
    "Detector",
    "Facts",
    "Head",
    "Joined",
    "LanguageModelling",
    "LongText",
    "Multitask",
    "Needle",
    "Normals",
    "Reading",
    "Retrieval",
    "Segmentation",
    "Task",
    "Whole",
]
