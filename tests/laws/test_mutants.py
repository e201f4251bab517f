"""Every law must find the bugs planted for it, on networks where it holds without them."""

import traceback
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from laws import (
    test_budget,
    test_cost,
    test_cut_equals_mask,
    test_determinism,
    test_growth,
    test_identity,
    test_optimizer,
    test_permutation,
    test_plans_travel,
    test_reach,
    test_save_load,
    test_untouched,
)
from laws.mutants import choice, graph, growth, surgery, travel
from laws.mutants.registry import MUTANTS, Mutant, Patch
from zoo import Case, named

PLANTED = (surgery, graph, growth, choice, travel)  # importing them fills the list
WRONGLY_CALLED = ("positional argument", "unexpected keyword argument", "multiple values for")
Law = Callable[[Case], Any]


def saved(case: Case) -> None:
    with TemporaryDirectory() as folder:
        test_save_load.law(case, Path(folder) / "run")


def refuses(case: Case) -> None:
    test_plans_travel.test_another_model_is_refused(case.name)


LAWS: dict[str, Law] = {
    "reach": test_reach.law,
    "identity": test_identity.law,
    "cut equals mask": test_cut_equals_mask.law,
    "cost": test_cost.law,
    "budget": test_budget.law,
    "floors": test_budget.test_floors_and_multiples,
    "permutation": test_permutation.law,
    "plans travel": test_plans_travel.law,
    "refuses": refuses,
    "optimizer": test_optimizer.law,
    "adamw": partial(test_optimizer.law, kind="adamw"),
    "save and load": saved,
    "determinism": test_determinism.law,
    "growth": test_growth.law,
    "untouched": test_untouched.law,
}


@cache
def passes(law: str, case: str) -> str | None:
    """None where the law holds without any bug, else what it said."""
    try:
        LAWS[law](named(case))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def by_the_fault_itself(error: BaseException) -> bool:
    """Whether what was planted failed in its own lines, as one does that was planted into other code than is there."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return isinstance(error, (AttributeError, NameError, KeyError)) and Path(last.filename).parent.name == "mutants"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_killed(mutant: Mutant, monkeypatch: Patch) -> None:
    """The law holds without the bug and raises with it, on at least one of the named networks."""
    sound = [case for case in mutant.cases if passes(mutant.law, case) is None]
    assert sound, f"the law does not even hold without the bug: {[passes(mutant.law, c) for c in mutant.cases]}"
    grad, fast = torch.is_grad_enabled(), torch.backends.mha.get_fastpath_enabled()
    survived = []
    try:
        for case in sound:
            with monkeypatch.context() as patch:
                mutant.plant(patch)
                try:
                    LAWS[mutant.law](named(case))
                except TypeError as error:  # a fault that is planted wrongly proves nothing
                    assert not any(word in str(error) for word in WRONGLY_CALLED), error
                    return
                except Exception:
                    return
                survived.append(case)
    finally:
        torch.set_grad_enabled(grad)
        torch.backends.mha.set_fastpath_enabled(fast)
    raise AssertionError(f"the law {mutant.law!r} lets it live on {survived}")


def test_there_are_enough_mutants_for_every_law() -> None:
    assert len(MUTANTS) >= 15
    assert {mutant.law for mutant in MUTANTS} == set(LAWS), set(LAWS) - {mutant.law for mutant in MUTANTS}
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
