"""Bugs in what tracing leaves behind, in plans, optimisers and files."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

import niwaki
from laws.common import tensors_of
from laws.mutants.registry import MUTANTS, Mutant, Patch, first_n, module, mutant, wrap


def after_tracing(patch: Patch, harm: Callable[[nn.Module], Any]) -> None:
    def trace(original: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        graph = original(model, *args, **kwargs)
        harm(model)
        return graph

    wrap(patch, module("graph"), "trace", trace)


HARMS: dict[str, Callable[[nn.Module], Any]] = {
    "eval_mode": lambda model: model.eval(),
    "a_hook": lambda model: model.register_forward_hook(lambda *args: None),
    "an_attribute": lambda model: setattr(next(iter(model.children())), "traced", True),
    "the_random_state": lambda model: torch.rand(1),
    "the_gradients": lambda model: model.zero_grad(),
    "frozen_parameters": lambda model: model.requires_grad_(True),
    "a_running_mean": lambda model: [b.data.add_(1e-7) for n, b in model.named_buffers() if "mean" in n],
    "gradients_switched_off": lambda model: torch.set_grad_enabled(False),
    "the_fast_path": lambda model: torch.backends.mha.set_fastpath_enabled(False),
}
for what, harm in HARMS.items():
    MUTANTS.append(Mutant(f"trace_leaves_{what}", partial(after_tracing, harm=harm), "untouched", ("chain",)))


@mutant("plans travel", "chain", "grouped_convolution", "gpt")
def reading_a_plan_loses_a_cut(patch: Patch) -> None:
    original = niwaki.Plan.from_json.__func__  # type: ignore[attr-defined]
    patch.setattr(niwaki.Plan, "from_json", classmethod(lambda cls, text: _shorter(original(cls, text))))


def _shorter(plan: Any) -> Any:
    return replace(plan, cuts=plan.cuts[:-1])


@mutant("refuses", "residual_add", "bare_batch_norm")
def every_model_has_the_same_fingerprint(patch: Patch) -> None:
    patch.setattr(module("graph.trace"), "_digest", lambda *listings: "0" * 16)


@mutant("optimizer", "chain", "residual_add")
def momentum_is_not_sliced(patch: Patch) -> None:
    """The right shape, the wrong slice."""
    patch.setattr(module("surgery.optimizer"), "apply_cuts", lambda tensor, cuts, name, **how: first_n(tensor, cuts))


def after_optimizer(patch: Patch, harm: Callable[[Any], Any]) -> None:
    def cut_optimizer_(original: Any, optimizer: Any, *args: Any) -> None:
        original(optimizer, *args)
        harm(optimizer)

    wrap(patch, niwaki.surgery, "cut_optimizer_", cut_optimizer_)


@mutant("optimizer", "chain", "gpt")
def layers_drop_out_of_the_optimizer(patch: Patch) -> None:
    after_optimizer(patch, lambda optimizer: optimizer.param_groups[0]["params"].pop())


@mutant("adamw", "chain")
def second_moments_start_again(patch: Patch) -> None:
    after_optimizer(patch, lambda optimizer: [s["exp_avg_sq"].zero_() for s in optimizer.state.values()])


@mutant("adamw", "chain")
def steps_start_again(patch: Patch) -> None:
    after_optimizer(patch, lambda optimizer: [s["step"].zero_() for s in optimizer.state.values()])


@mutant("optimizer", "chain")
def the_optimizer_still_holds_the_old_model(patch: Patch) -> None:
    patch.setattr(niwaki.surgery, "cut_optimizer_", lambda *args: None)


@mutant("save and load", "chain", "residual_add")
def files_hold_half_precision(patch: Patch) -> None:
    def read(original: Any, path: Any) -> Any:
        tensors = original(path)
        return {name: t.half().to(t.dtype) if t.is_floating_point() else t for name, t in tensors.items()}

    wrap(patch, module("methods.run"), "read_tensors", read)


@mutant("save and load", "chain", "residual_add")
def loading_forgets_the_buffers(patch: Patch) -> None:
    def load(original: Any, folder: Any, factory: Any) -> nn.Module:
        model = original(folder, factory)
        for name, tensor in tensors_of(model).items():
            if name.endswith("running_mean"):
                tensor.data.zero_()
        return model

    wrap(patch, module("methods"), "load", load)
