"""Law: what a search is told of a masked network, of which only the end is computed, is true of the cut one."""

import copy

import numpy as np
import pytest
import torch

import niwaki
from laws.common import AnyTask, double, trace
from niwaki.errors import CannotCutError
from niwaki.graph.plans import plan_of
from niwaki.search import Candidate, Masked
from zoo import ZOO, Case

GROUPS = 3
"""Of each network: the first, one in the middle and the last, after a cut of the one before."""


def law(case: Case) -> None:
    model, example, graph = trace(case)
    model = copy.deepcopy(model).double().eval() if not any(p.dtype.is_complex for p in model.parameters()) else model
    batches = [double(batch) for batch in AnyTask(example).batches[:2]]
    task = AnyTask(batches[0])
    judge = Masked(model, graph, task, batches)
    choices = judge.choices()
    taken = [choices[i] for i in sorted({0, len(choices) // 2, len(choices) - 1})] if choices else []
    gone: dict[str, int] = {}
    for choice in taken[:GROUPS]:
        for count in {1, choice.size - choice.least} - {0}:
            alive = judge.kept({**gone, choice.name: count})
            try:
                small = niwaki.cut(model, plan_of(graph, alive)).eval()
            except CannotCutError:
                continue
            found = judge(Candidate(gone, choice.name, count))["loss"]
            with torch.no_grad():
                rows = [len(next(t for t in niwaki.units.tensors_in(batch))) for batch in batches]
                wanted = sum(n * float(task.loss(small, b)) for n, b in zip(rows, batches, strict=True))
            assert np.isclose(found, wanted, rtol=1e-7, atol=1e-9), f"{choice.name}: {found} masked, {wanted} cut"
        gone[choice.name] = 1


CASES = [pytest.param(case, marks=() if number % 5 == 0 else pytest.mark.slow) for number, case in enumerate(ZOO)]
"""Each is traced, cut and run several times: a fifth of them every time."""


@pytest.mark.parametrize("case", CASES, ids=str)
def test_masked_losses(case: Case) -> None:
    if "rigid" in case.facts or "inference" in case.facts:
        pytest.skip("runs in one manner only")
    law(case)
