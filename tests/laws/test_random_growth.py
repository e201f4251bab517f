"""The law of growth over random architectures; what no door can grow is refused, and nothing else happens."""

import os

from hypothesis import HealthCheck, Phase, given, note, settings

import niwaki
from laws import test_growth as growth
from niwaki.errors import CannotCutError
from niwaki.graph.plans import plan_of
from random_nets import Description, build, descriptions

FUZZ = os.environ.get("NIWAKI_FUZZ")
GREW: list[bool] = []


@settings(
    max_examples=int(FUZZ or 60),
    deadline=None,
    derandomize=not FUZZ,
    phases=[Phase.generate],
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(descriptions())
def grow(description: Description) -> None:
    note(f"description = {description!r}")
    model, example = build(description)
    model, example = model.double(), example.double()
    graph = niwaki.trace(model, example)
    groups = growth.candidates(graph)
    if not groups:
        return
    plan = plan_of(graph, growth.wider(graph, groups))
    try:
        big = niwaki.cut(model, plan)
    except CannotCutError as refused:
        assert "does not grow" in str(refused)
        GREW.append(False)
        return
    growth.check(model, big, plan, example)
    growth.travels(model, big, plan)
    growth.back(model, big, plan, example)
    GREW.append(True)


def test_random_growth() -> None:
    """Of those with groups that may grow, most do (all of them at once, so that one that does not is enough)."""
    GREW.clear()
    grow()
    assert len(GREW) > 20 and sum(GREW) > 0.6 * len(GREW), f"{sum(GREW)} of {len(GREW)} grew"
