"""Bugs in growing."""

from typing import Any

import numpy as np

from laws.mutants.registry import Patch, module, mutant, wrap


@mutant("growth", "chain", "residual_add", "dense_concat")
def what_reads_new_units_is_not_zero(patch: Patch) -> None:
    def apply(original: Any, tensor: Any, cuts: Any, name: str, **how: Any) -> Any:
        return original(tensor, [{**cut, "zero": False} for cut in cuts], name, **how)

    wrap(patch, module("surgery.cut"), "apply_cuts", apply)


@mutant("growth", "chain", "residual_add")
def everything_of_new_units_is_zero(patch: Patch) -> None:
    def apply(original: Any, tensor: Any, cuts: Any, name: str, **how: Any) -> Any:
        return original(tensor, cuts, name, zero="all")

    wrap(patch, module("surgery.cut"), "apply_cuts", apply)


@mutant("growth", "chain", "residual_add")
def new_units_cost_nothing(patch: Patch) -> None:
    def counts(original: Any, self: Any, alive: np.ndarray) -> Any:
        return original(self, alive > 0)

    widths = module("graph.cost").Widths
    patch.setattr(widths, "counts", lambda self, alive, original=widths.counts: counts(original, self, alive))


@mutant("growth", "cat_flatten", "siamese", "custom_activation")
def pixels_of_a_channel_are_copied_one_by_one(patch: Patch) -> None:
    def along(original: Any, units: np.ndarray, times: np.ndarray) -> Any:
        often = times[units].astype(np.int64)
        places = np.repeat(np.arange(units.size), often)
        return places, np.arange(places.size) - np.repeat(np.cumsum(often) - often, often)

    wrap(patch, module("graph.plans"), "along", along)
    wrap(patch, module("surgery.check"), "along", along)


@mutant("growth", "chain", "residual_add")
def a_file_forgets_how_often_units_are_there(patch: Patch) -> None:
    plan = module("plan").Plan
    original = plan.from_json.__func__

    def from_json(cls: Any, text: str) -> Any:
        found = original(cls, text)
        object.__setattr__(found, "kept", {name: tuple(sorted(set(keep))) for name, keep in found.kept.items()})
        return found

    patch.setattr(plan, "from_json", classmethod(from_json))


@mutant("growth", "chain", "dense_concat")
def the_copy_is_of_the_next_unit(patch: Patch) -> None:
    def apply(original: Any, tensor: Any, cuts: Any, name: str, **how: Any) -> Any:
        moved = []
        for cut in cuts:
            keep = list(cut["keep"])
            for place in cut.get("new", ()):
                keep[place] = (keep[place] + 1) % tensor.shape[cut["axis"]]
            moved.append({**cut, "keep": keep})
        return original(tensor, moved, name, **how)

    wrap(patch, module("surgery.cut"), "apply_cuts", apply)


@mutant("growth", "two_tower", "pixel_attention")
def units_heard_by_one_another_count_as_silent(patch: Patch) -> None:
    wrap(patch, module("graph.plans"), "heard", lambda original, graph: original(graph) & False)
