"""Law: the same seed gives the same plan, whatever the state of the process."""

import random

import numpy as np
import pytest
import torch

import niwaki
from laws.common import AnyTask, closest, method_blocks, needs_gradients, score_blocks, tensors_of, trace
from zoo import ZOO, Case, named


def law(case: Case) -> None:
    if "rigid" in case.facts:
        return
    for how in score_blocks():
        if needs_gradients(how) and "inference" in case.facts:
            continue
        found = set()
        for round_ in range(2):
            torch.manual_seed(round_)
            np.random.seed(round_)
            random.seed(round_)
            model, example, graph = trace(case)
            evidence = niwaki.collect(model, graph, how.needs, batches=[example], loss=AnyTask(example).loss)
            plan, _ = closest(graph, niwaki.score(graph, evidence, how=how), 0.5, of="macs")
            found.add(plan.to_json())
        assert len(found) == 1, f"{how} decided differently the second time"


@pytest.mark.parametrize("case", ZOO, ids=str)
def test_determinism(case: Case) -> None:
    law(case)


def test_compress_is_deterministic() -> None:
    case = named("residual_add")
    budget = niwaki.Budget(keep=0.5, of="macs")
    for method in method_blocks():
        plans, models = [], []
        for round_ in range(2):
            torch.manual_seed(round_)
            task = AnyTask(case.example())
            outcome = niwaki.compress(case.make(), case.example(), method=method, budget=budget, task=task, seed=3)
            plans.append(outcome.plan.to_json())
            models.append(tensors_of(outcome.model))
        assert plans[0] == plans[1], f"{method} decided differently the second time"
        assert all(torch.equal(t, models[1][name]) for name, t in models[0].items())
