"""What a batch means: loss, metric, inputs."""

from niwaki.tasks.task import Task

# isort: split
from niwaki.tasks.classification import Classification

__all__ = ["Classification", "Task"]
