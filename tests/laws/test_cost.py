"""Law: what a plan promises is what PyTorch's own counter finds in the cut model."""

import pytest

import niwaki
from laws.common import counted_macs, counted_params, plans, trace
from zoo import ZOO, Case


def law(case: Case) -> None:
    model, example, graph = trace(case)
    assert graph.macs == counted_macs(model, example), f"the graph says {graph.macs} MACs"
    assert graph.params == counted_params(model), f"the graph says {graph.params} parameters"
    for label, plan in plans(model, graph, kinds=2):
        small = niwaki.cut(model, plan)
        found = {"macs": counted_macs(small, example), "params": counted_params(small)}
        promised = {name: plan.promised[name] for name in found}
        assert promised == found, f"{label}: promised {promised}, counted {found}"
        assert plan.promised["macs_before"] == graph.macs and plan.promised["params_before"] == graph.params


@pytest.mark.parametrize("case", ZOO, ids=str)
def test_cost(case: Case) -> None:
    law(case)
