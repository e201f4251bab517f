"""PreCropping beside floors, multiples and repetition."""

from typing import Any

import numpy as np
import pytest
import torch
from test_precropping import EXAMPLE, cropped, network

import niwaki
from niwaki.graph.plans import alive_of
from niwaki.methods import PreCropping


@pytest.mark.parametrize("floor", [6, 0.5])
def test_floors_hold_and_what_is_left_over_is_less_than_a_channel(floor: Any) -> None:
    """No group below its floor; any channel more, of any width, would break the budget."""
    net = network("grouped")
    budget = niwaki.Budget(keep=0.6, of="params", floor=floor)
    result = niwaki.compress(net, EXAMPLE, method=PreCropping(), budget=budget)
    for name, kept in result.plan.kept.items():
        units = result.plan.units[name]
        assert len(kept) >= (floor if isinstance(floor, int) else int(np.ceil(floor * units)))
    graph, alive = result.graph, alive_of(result.graph, result.plan)
    limit = 0.6 * result.plan.promised["params_before"]
    plain = [g for g in graph.groups if g.kind == "channels" and g.fixed is None and not alive[g.ids].all()]
    assert plain
    for group in plain:
        more = alive.copy()
        more[group.ids[~alive[group.ids]][0]] = True
        assert graph.cost(more)["params"] > limit


def test_multiples_of_eight() -> None:
    budget = niwaki.Budget(keep=0.5, of="macs", multiple=8)
    result = niwaki.compress(network(), EXAMPLE, method=PreCropping(), budget=budget)
    assert result.plan.kept and all(len(kept) % 8 == 0 for kept in result.plan.kept.values())
    assert result.plan.promised["macs"] <= 0.5 * result.plan.promised["macs_before"]


def test_a_crop_of_a_crop_to_the_same_budget_changes_nothing() -> None:
    small = cropped(network(), keep=0.5).model
    count = sum(p.numel() for p in small.parameters())
    with pytest.warns(niwaki.errors.NothingChangedWarning):
        again = niwaki.compress(small, EXAMPLE, method=PreCropping(), budget=niwaki.Budget(keep=count, of="params"))
    assert again.plan.kept == {}


def test_a_plan_travels_to_a_fresh_copy() -> None:
    result = cropped(network(), keep=0.5, start="slice")
    plan = niwaki.Plan.from_json(result.plan.to_json())
    small = niwaki.cut(network(), plan).eval()
    probe = torch.randn(1, 3, 8, 8)
    assert torch.equal(small(probe), result.model.eval()(probe))


def test_weights_on_disk_are_refused(tmp_path: Any) -> None:
    with pytest.raises(niwaki.errors.InputError, match="PreCropping on stored weights"):
        niwaki.compress_stored(
            network(),
            EXAMPLE,
            tmp_path,
            tmp_path / "out",
            method=PreCropping(),  # type: ignore[arg-type]
            budget=niwaki.Budget(keep=0.5),
        )
