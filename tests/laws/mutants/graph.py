"""Bugs in the graph: what is tied, fixed, exact."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from laws.mutants.registry import Patch, module, mutant, set_rule, wrap, wrap_rule
from niwaki.graph.rules import RULES


@mutant("permutation", "dense_concat", "cat_flatten", "unet")
def cat_is_off_by_one(patch: Patch) -> None:
    def rule(original: Any, call: Any) -> Any:
        labels = original(call)
        return tuple(np.roll(f, 1, axis=[a for a, n in enumerate(f.shape) if n > 1]) for f in labels)

    wrap_rule(patch, ("cat",), rule)


@mutant("cut equals mask", "cross_attention", "gpt", "channel_shuffle")
def split_gives_the_parts_in_the_wrong_order(patch: Patch) -> None:
    wrap_rule(patch, ("split", "split_with_sizes", "chunk"), lambda original, call: list(reversed(original(call))))


@mutant("cut equals mask", "residual_add", "depthwise")
def addition_ties_nothing(patch: Patch) -> None:
    """The graph drops a union."""

    def rule(call: Any) -> Any:
        value = call.value(next(t for t in call.args if isinstance(t, torch.Tensor)))
        return value.get(call.space)

    for name in ("add", "add_"):
        set_rule(patch, name, rule)


@mutant("reach", "chain", "dense_concat", "perceptron")
def everything_is_tied_to_its_neighbour(patch: Patch) -> None:
    """Too many unions: half as many units."""

    def contract(original: Any, self: Any, a: Any, b: Any) -> None:
        original(self, a, b)
        flat = np.asarray(a).ravel()
        if flat.size > 3:
            original(self, flat[:1], flat[1:2])

    labels = module("graph.labels").LabelSpace
    original = labels.unite
    patch.setattr(labels, "unite", lambda self, a, b: contract(original, self, a, b))


@mutant("reach", "chain", "fused_qkv", "unet")
def everything_is_fixed(patch: Patch) -> None:
    """A graph that removes nothing obeys every other law."""

    def fix_outputs(original: Any, recorder: Any, output: Any, reason: str = "output of the model") -> None:
        recorder.space.fix(np.arange(recorder.space.count), reason)

    wrap(patch, module("graph.trace"), "fix_outputs", fix_outputs)


@mutant("reach", "chain", "output_features", "inception")
def outputs_may_be_cut(patch: Patch) -> None:
    patch.setattr(module("graph.trace"), "fix_outputs", lambda *args, **kwargs: None)


@mutant("cut equals mask", "layer_scale", "rms_normed", "mixer")
def nothing_is_inexact(patch: Patch) -> None:
    patch.setattr(module("graph.labels").LabelSpace, "mark_inexact", lambda self, *args, **kwargs: None)


@mutant("reach", "chain", "residual_add", "gpt")
def everything_is_inexact(patch: Patch) -> None:
    """Whoever calls all plans inexact is never refuted by the judge."""
    groups = module("graph.trace")

    def make_groups(original: Any, *args: Any) -> Any:
        return [replace(group, exact=False, inexact="who knows") for group in original(*args)]

    wrap(patch, groups, "make_groups", make_groups)


@mutant("reach", "custom_operation")
def unknown_operations_pass_silently(patch: Patch) -> None:
    patch.setattr(module("graph.recorder").Recorder, "_give_up", lambda self, name, inputs: None)


@mutant("cut equals mask", "transposed_convolution")
def transposed_convolutions_are_read_as_plain(patch: Patch) -> None:
    def rule(original: Any, call: Any) -> Any:
        w = call.value(call["weight"])
        if w.shape[0] != w.shape[1]:
            call.args = (*call.args[:6], False, *call.args[7:])  # transposed
        return original(call)

    wrap_rule(patch, ("convolution",), rule)


@mutant("permutation", "chain", "conv1d")
def batch_norm_mixes_up_its_statistics(patch: Patch) -> None:
    def rule(original: Any, call: Any) -> Any:
        call.kwargs = {**call.kwargs, "running_mean": None}
        return original(call)

    names = tuple(name for name in RULES if "batch_norm" in name)
    wrap_rule(patch, names, rule)


@mutant("cut equals mask", "residual_stage")
def any_bend_behind_a_sum_is_idle(patch: Patch) -> None:
    """A block whose ReLU meets what no ReLU has bent before is left out."""
    patch.setattr(module("graph.blocks"), "_settled", lambda record, call, source: True)


@mutant("cut equals mask", "layer_scaled")
def whatever_can_be_zero_passes_its_input(patch: Patch) -> None:
    """A gate, which halves its input, counts as a block."""

    def state(original: Any, record: Any, given: Any, state: Any, settled: Any) -> Any:
        return (
            "zero"
            if record.name == "sigmoid"
            else "same"
            if record.name == "mul"
            else original(record, given, state, settled)
        )

    wrap(patch, module("graph.blocks"), "_state", state)
    patch.setattr(module("graph.blocks"), "ADDS", frozenset({"add", "sub", "rsub", "mul"}))


@mutant("cost", "pre_norm_tower", "layer_scaled")
def a_block_left_out_still_costs_its_macs(patch: Patch) -> None:
    wrap(patch, module("graph.trace"), "_times", lambda original, term, block: term)


@mutant("cut equals mask", "masked_linear")
def a_triangle_counts_nothing(patch: Patch) -> None:
    """Rows and columns of a triangular weight go apart."""
    patch.setattr(module("graph.rules.triangles"), "counted", lambda call, one, other, what: None)
