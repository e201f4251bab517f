"""What a batch means: loss, metric, inputs."""

from niwaki.tasks.heads import Depth, Head, Normals, Segmentation
from niwaki.tasks.task import Task

# isort: split
from niwaki.tasks.classification import Classification
from niwaki.tasks.custom import Custom
from niwaki.tasks.language_modelling import LanguageModelling
from niwaki.tasks.multitask import Multitask

__all__ = [
    "Classification",
    "Custom",
    "Depth",
    "Head",
    "LanguageModelling",
    "Multitask",
    "Normals",
    "Segmentation",
    "Task",
]
