"""Law: a plan that keeps everything changes nothing, bit for bit."""

import pytest

import niwaki
from laws.common import choose, difference, has_free_units, outputs, random_scores, same_bits, tensors_of, trace
from zoo import ZOO, Case


def law(case: Case) -> None:
    model, example, graph = trace(case)
    if not has_free_units(graph):
        return
    plan = choose(graph, random_scores(model, graph, seed=0), niwaki.Budget(keep=1.0, of="macs"))
    assert plan.promised["macs"] == plan.promised["macs_before"] == graph.macs
    assert plan.promised["params"] == plan.promised["params_before"] == graph.params
    for whole in (niwaki.cut(model, plan), niwaki.mask(model, plan)):
        assert whole is not model
        before, after = outputs(model, example), outputs(whole, example)
        assert len(before) == len(after) and all(same_bits(a, b) for a, b in zip(before, after, strict=True)), (
            f"outputs differ by {difference(before, after)}"
        )
    small = niwaki.cut(model, plan)
    left, right = tensors_of(model), tensors_of(small)
    assert list(left) == list(right), "names of tensors changed"
    changed = [name for name in left if not same_bits(left[name], right[name])]
    assert not changed, f"tensors changed: {changed}"
    shared = [name for name in left if left[name].data_ptr() == right[name].data_ptr() and left[name].numel()]
    assert not shared, f"the new model shares memory with the old one: {shared}"


@pytest.mark.parametrize("case", ZOO, ids=str)
def test_identity(case: Case) -> None:
    law(case)
