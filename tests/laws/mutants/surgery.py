"""Bugs in cutting and masking."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import niwaki
from laws.mutants.registry import MUTANTS, Mutant, Patch, first_n, module, mutant, wrap


def wrong_slice_for(ending: str) -> Callable[[Patch], None]:
    def plant(patch: Patch) -> None:
        def apply(original: Any, tensor: Any, cuts: Any, name: str) -> Any:
            return first_n(tensor, cuts) if name.endswith(ending) else original(tensor, cuts, name)

        wrap(patch, module("surgery.cut"), "apply_cuts", apply)

    return plant


for ending, cases in (
    ("bias", ("chain", "fused_qkv", "transposed_convolution")),
    ("running_mean", ("chain", "bare_batch_norm")),
    ("running_var", ("residual_add", "bare_batch_norm")),
):
    MUTANTS.append(Mutant(f"cut_takes_the_first_{ending}", wrong_slice_for(ending), "cut equals mask", cases))


@mutant("cut equals mask", "chain", "dense_concat", "split_glu")
def cut_shifts_kept_positions_by_one(patch: Patch) -> None:
    def apply(original: Any, tensor: Any, cuts: Any, name: str) -> Any:
        moved = []
        for cut in cuts:
            size = tensor.shape[cut["axis"]]
            keep = cut["keep"]
            if cut.get("blocks", 1) == 1 and keep and keep[-1] + 1 < size:
                keep = [i + 1 for i in keep]
            moved.append({**cut, "keep": keep})
        return original(tensor, moved, name)

    wrap(patch, module("surgery.cut"), "apply_cuts", apply)


@mutant("cut equals mask", "grouped_convolution", "grouped_transposed")
def cut_gives_every_block_the_first_ones_positions(patch: Patch) -> None:
    def apply(original: Any, tensor: Any, cuts: Any, name: str) -> Any:
        same = [
            {**cut, "keep": [cut["keep"][0][: len(keep)] or keep for keep in cut["keep"]]}
            if cut.get("blocks", 1) > 1
            else cut
            for cut in cuts
        ]
        return original(tensor, same, name)

    wrap(patch, module("surgery.cut"), "apply_cuts", apply)


@mutant("cut equals mask", "fused_call_attention", "cross_attention")
def attention_takes_the_scale_of_the_new_head_size(patch: Patch) -> None:
    patch.setattr(module("surgery.cut"), "fold", lambda small, seen: ([], None))


@mutant("cut equals mask", "chain", "unet")
def cut_keeps_the_old_memory_alive(patch: Patch) -> None:
    """Slices that are views save nothing."""

    def like(original: Any, tensor: Any, data: Any) -> Any:
        bigger = torch.empty(data.numel() * 2 + 8, dtype=data.dtype)
        view = bigger[: data.numel()].view(data.shape)
        view.copy_(data)
        return original(tensor, view)

    wrap(patch, module("surgery.cut"), "like", like)


@mutant("identity", "chain", "gpt", "buffers")
def cut_shares_uncut_tensors_with_the_model(patch: Patch) -> None:
    def copy_with(original: Any, model: nn.Module, change: Any) -> Any:
        return original(model, lambda t: t)

    wrap(patch, module("surgery.cut"), "copy_with", copy_with)


@mutant("untouched", "residual_add", "llama")
def cut_unfreezes_parameters(patch: Patch) -> None:
    def like(original: Any, tensor: Any, data: Any) -> Any:
        return nn.Parameter(data) if isinstance(tensor, nn.Parameter) else original(tensor, data)

    wrap(patch, module("surgery.cut"), "like", like)


@mutant("plans travel", "chain", "gpt")
def cut_works_in_half_precision(patch: Patch) -> None:
    def apply(original: Any, tensor: Any, cuts: Any, name: str) -> Any:
        return original(tensor, cuts, name).half().to(tensor.dtype)

    wrap(patch, module("surgery.cut"), "apply_cuts", apply)


def mask_sees(patch: Patch, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    """The mask works on changed cuts, the cut on the right ones."""

    def mask(original: Any, model: nn.Module, plan: Any) -> nn.Module:
        return original(model, replace(plan, cuts=tuple(change([dict(cut) for cut in plan.cuts]))))

    wrap(patch, niwaki.surgery, "mask", mask)


@mutant("cut equals mask", "chain", "residual_add")
def mask_zeroes_the_neighbours(patch: Patch) -> None:
    def change(cuts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for cut in cuts:
            if cut.get("blocks", 1) == 1 and cut["keep"][0] > 0:
                cut["keep"] = [i - 1 for i in cut["keep"]]
        return cuts

    mask_sees(patch, change)


@mutant("cut equals mask", "conv3d", "buffers", "bare_batch_norm")
def mask_forgets_the_readers(patch: Patch) -> None:
    """Zeroing what produces a channel is not enough where zero does not stay zero."""
    mask_sees(patch, lambda cuts: [cut for cut in cuts if cut["axis"] != 1])


@mutant("cut equals mask", "chain", "buffers")
def mask_changes_what_stays(patch: Patch) -> None:
    def mask(original: Any, model: nn.Module, plan: Any) -> nn.Module:
        masked = original(model, plan)
        with torch.no_grad():
            next(p for p in masked.parameters() if p.dim() == 1).mul_(1.001)
        return masked

    wrap(patch, niwaki.surgery, "mask", mask)


@mutant("cut equals mask", "strided_groups")
def integers_of_windows_are_mended_too(patch: Patch) -> None:
    """A stride equal to a number of groups shrinks with it, and the check on the spot does not look."""
    patch.setattr(module("surgery.modules"), "settings", lambda module: frozenset())
    patch.setattr(module("surgery.check"), "_calls", lambda *args: None)


@mutant("cut equals mask", "residual_stage", "layer_scaled")
def what_stands_for_a_block_bends_its_input(patch: Patch) -> None:
    place = module("surgery.blocks").PassThrough
    patch.setattr(place, "forward", lambda self, x, *_, **__: x.relu() * 0.9)


@mutant("optimizer", "residual_stage", "pre_norm_tower")
def the_optimiser_keeps_what_left_with_its_block(patch: Patch) -> None:
    """Parameters of a block that is gone stay in their group and are trained for nothing."""

    def follow(original: Any, optimizer: Any, model: Any, small: Any, plan: Any) -> None:
        gone = [p for name, p in model.named_parameters() if plan.drops(name)]
        original(optimizer, model, small, plan)
        optimizer.param_groups[0]["params"].extend(gone)

    wrap(patch, niwaki.surgery, "cut_optimizer_", follow)


@mutant("cut equals mask", "fused_call_attention", "cross_attention")
def the_quick_check_lets_everything_through(patch: Patch) -> None:
    patch.setattr(module("surgery.cut"), "replays", lambda *args: True)


@mutant("cut equals mask", "pieces_by_size")
def nobody_counts_the_calls_of_a_loop(patch: Patch) -> None:
    """Fewer and other pieces than there were pass for the same where each of them is only scaled."""
    patch.setattr(module("surgery.check"), "_others", lambda *args: None)
