"""Bugs in costs, budgets and scores."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from laws.mutants.registry import Patch, module, mutant, wrap


@mutant("cost", "grouped_convolution", "channel_shuffle", "grouped_transposed")
def cost_ignores_groups(patch: Patch) -> None:
    term = module("graph.cost").Term

    def build(original: Any, terms: dict[str, list[Any]]) -> Any:
        flat = [term(t.constant, tuple(f.reshape(1, -1) for f in t.factors)) for t in terms["macs"]]
        return original({**terms, "macs": flat})

    wrap(patch, module("graph.trace"), "build", build)


@mutant("cost", "chain", "fused_qkv")
def cost_counts_biases(patch: Patch) -> None:
    graph = module("graph.trace").ChannelGraph
    original = graph.cost

    def cost(self: Any, alive: Any) -> dict[str, int]:
        found = original(self, alive)
        vectors = sum(shape[0] for shape in self.shapes.values() if len(shape) == 1)
        return {**found, "macs": found["macs"] + vectors}

    patch.setattr(graph, "cost", cost)


@mutant("cost", "chain", "explicit_softmax", "conv3d")
def cost_shrinks_with_one_side_only(patch: Patch) -> None:
    """A channel less is cheaper for its producer, but its reader is forgotten."""
    term = module("graph.cost").Term

    def build(original: Any, terms: dict[str, list[Any]]) -> Any:
        half = [
            term(t.constant * (t.factors[0].size if len(t.factors) > 1 else 1), t.factors[1:] or t.factors)
            if all(f.shape[0] == 1 for f in t.factors)
            else t
            for t in terms["macs"]
        ]
        return original({**terms, "macs": half})

    wrap(patch, module("graph.trace"), "build", build)


@mutant("cost", "gpt", "tied_embedding")
def tied_parameters_are_counted_twice(patch: Patch) -> None:
    def terms(original: Any, *given: Any) -> Any:
        found = original(*given)
        return [*found, found[0]]

    wrap(patch, module("graph.trace"), "_parameter_terms", terms)


@mutant("budget", "chain", "fused_qkv")
def choose_exceeds_the_budget_by_one(patch: Patch) -> None:
    def refill(original: Any, ledger: Any, full: Any, gone: Any, *args: Any) -> None:
        original(ledger, full, gone, *args)
        gone[np.flatnonzero(gone)[:1]] = False

    wrap(patch, module("budgets.choose"), "refill", refill)


@mutant("budget", "chain", "dense_concat")
def choose_stops_early(patch: Patch) -> None:
    patch.setattr(module("budgets.choose"), "refill", lambda *args: None)


@mutant("budget", "residual_add", "chain")
def only_the_first_budget_holds(patch: Patch) -> None:
    def remove(original: Any, ledger: Any, full: Any, order: Any, limits: dict[str, float]) -> Any:
        first = dict(list(limits.items())[:1])
        for name in list(limits)[1:]:
            limits[name] = np.inf
        return original(ledger, full, order, first)

    wrap(patch, module("budgets.choose"), "remove", remove)


@mutant("floors", "chain", "residual_add")
def floors_are_forgotten(patch: Patch) -> None:
    def chunks(original: Any, atoms: Any, priority: Any, budgets: Any, *rest: Any) -> Any:
        return original(atoms, priority, tuple(replace(b, floor=1) for b in budgets), *rest)

    wrap(patch, module("budgets.choose"), "_chunks", chunks)


def each_score(patch: Patch, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    package = module("scores")
    for name in package.__all__:
        thing = getattr(package, name)
        if isinstance(thing, type) and "__call__" in vars(thing) and not getattr(thing, "__abstractmethods__", None):
            original = thing.__call__
            patch.setattr(thing, "__call__", lambda self, view, original=original: change(original(self, view)))


@mutant("permutation", "chain", "residual_add", "llama")
def scores_come_back_in_another_order(patch: Patch) -> None:
    each_score(patch, lambda numbers: numbers.flip(0))


@mutant("permutation", "chain", "dense_concat")
def scores_depend_on_the_position(patch: Patch) -> None:
    each_score(patch, lambda numbers: numbers + torch.arange(numbers.numel()) * 1e-3)


@mutant("determinism", "chain", "gpt")
def scores_use_the_global_random_state(patch: Patch) -> None:
    each_score(patch, lambda numbers: numbers + torch.rand(numbers.shape) * 10)
