"""What a batch means: loss, metric, inputs."""

from niwaki.tasks.task import Task

# isort: split
from niwaki.tasks.classification import Classification
from niwaki.tasks.language_modelling import LanguageModelling

__all__ = ["Classification", "LanguageModelling", "Task"]
