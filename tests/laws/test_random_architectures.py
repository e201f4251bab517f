"""The laws over random architectures: as many as asked, each small, each reproducible from its description.

`make fuzz N=10000` sets the number; a failure prints the description, and `build(description)` makes the network again.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

import niwaki
from laws import test_cut_equals_mask as cut_equals_mask
from laws import test_permutation as permutation
from laws.common import closest, counted_macs, counted_params, difference, fresh, has_free_units, outputs, random_scores
from random_nets import Description, build, descriptions

DEFAULT = 250
FUZZ = os.environ.get("NIWAKI_FUZZ")

SEARCH = settings(
    max_examples=int(FUZZ or DEFAULT),
    deadline=None,
    derandomize=not FUZZ,  # the default suite always tries the same ones
    phases=[Phase.generate, Phase.shrink] if FUZZ else [Phase.generate],  # shrinking takes minutes
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)

WISHES = st.fixed_dictionaries(
    {
        "of": st.sampled_from(["macs", "params", "units"]),
        "keep": st.sampled_from([0.5, 0.3, 0.7, 0.9]),
        "grids": st.sampled_from(["rows", "columns"]),
        "uneven": st.booleans(),
        "seed": st.integers(0, 99),
    }
)


def law(description: Description, wish: dict[str, Any]) -> None:
    """Trace, plan, cut, mask, compare, count: one random network, one random plan."""
    model, example = build(description)
    model, example = model.double(), example.double()
    graph = niwaki.trace(model, example)
    assert not graph.unknown, graph.unknown
    assert graph.macs == counted_macs(model, example) and graph.params == counted_params(model)
    if not has_free_units(graph):
        return
    scores = random_scores(model, graph, wish["seed"], uneven=wish["uneven"])
    plan, _ = closest(graph, scores, wish["keep"], of=wish["of"], grids=wish["grids"])
    cut_equals_mask.check(model, example, [(str(wish), plan)], seed=wish["seed"])
    small = niwaki.cut(model, plan)
    counted = {"macs": counted_macs(small, example), "params": counted_params(small)}
    assert counted == {name: plan.promised[name] for name in counted}, (
        f"promised {dict(plan.promised)}, counted {counted}"
    )
    other = permutation.permuted(model, graph, permutation.orders_of(graph, wish["seed"]))
    found = difference(outputs(model, fresh(example, 1)), outputs(other, fresh(example, 1)))
    assert found < 1e-9, f"permuting units changed the outputs by {found}"


@SEARCH
@given(descriptions(), WISHES)
def test_random_architectures(description: Description, wish: dict[str, Any]) -> None:
    note(f"description = {description!r}\nwish = {wish!r}")
    law(description, wish)


FOUND = json.loads((Path(__file__).parent / "found.json").read_text(encoding="utf-8"))
"""Networks that once broke the law, as a long search found and shrank them, with the plan they broke it by."""


@pytest.mark.parametrize("number", range(len(FOUND)))
def test_what_was_found_stays_fixed(number: int) -> None:
    law(*FOUND[number])


def test_the_default_suite_tries_enough() -> None:
    assert DEFAULT >= 200


@settings(max_examples=50, derandomize=True, deadline=None, database=None)
@given(descriptions())
def test_descriptions_rebuild(description: Description) -> None:
    """A description is plain data and always gives the same network."""

    again = json.loads(json.dumps(description))
    (left, example), (right, other) = build(description), build(again)
    assert difference(outputs(left, example), outputs(right, other)) == 0.0
