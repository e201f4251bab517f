"""What every task promises."""

import inspect

import pytest

import niwaki.tasks
from niwaki.tasks import Augmentation, Cached, Detector, Facts, Head, Reading, Task, Whole

PARTS = (Head, Facts, Whole, Cached, Augmentation, Detector, Reading)
"""What tasks are made of: heads, what is hidden in a text, ways to read one, and detectors."""
TASKS = [
    kind
    for name in niwaki.tasks.__all__
    if (kind := getattr(niwaki.tasks, name)) is not Task and not set(PARTS) & set(kind.__mro__)
]


def test_the_base_cannot_be_made():
    with pytest.raises(TypeError, match="abstract"):
        Task()


@pytest.mark.parametrize("kind", TASKS)
def test_every_task_has_the_signatures_of_the_base(kind):
    assert issubclass(kind, Task)
    for name in Task.__abstractmethods__:
        own, base = inspect.getattr_static(kind, name), inspect.getattr_static(Task, name)
        if not isinstance(base, property):
            assert list(inspect.signature(own).parameters) == list(inspect.signature(base).parameters)
