"""Law: tracing, scoring, choosing, masking, verifying and cutting a copy leave the model as it was, bit for bit."""

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import niwaki
from laws.common import closest, random_scores, same_bits, tensors_of
from niwaki.units import tensors_in
from zoo import ZOO, Case, named


def is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(is_plain(item) for item in value)
    return isinstance(value, (int, float, str, bool, type(None)))


def state(model: nn.Module, example: Any) -> dict[str, Any]:
    """Everything about a model and the process that could have been touched."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    plain = {
        f"{name}.{key}": copy.deepcopy(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if is_plain(value)
    }
    return {
        "tensors": {name: t.detach().clone() for name, t in tensors_of(model).items()},
        "identities": {
            name: (id(t), t.data_ptr() if not t.is_meta else 0, t._version) for name, t in tensors_of(model).items()
        },
        "grads": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "requires_grad": {name: t.requires_grad for name, t in tensors_of(model).items()},
        "training": {name: module.training for name, module in model.named_modules()},
        "attributes": {name: tuple(vars(module)) for name, module in model.named_modules()},
        "plain": plain,
        "hooks": {name: [list(getattr(m, hook)) for hook in hooks] for name, m in model.named_modules()},
        "classes": {name: type(module) for name, module in model.named_modules()},
        "example": [t.clone() for t in tensors_in(example)],
        "torch rng": torch.get_rng_state(),
        "numpy rng": np.random.get_state()[1].tolist(),
        "python rng": random.getstate(),
        "switches": (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.get_default_dtype(),
            torch.backends.mha.get_fastpath_enabled(),
            torch.backends.mkldnn.enabled,
            torch.are_deterministic_algorithms_enabled(),
            torch.get_num_threads(),
            torch.backends.cuda.flash_sdp_enabled(),
            len(nn.modules.module._global_forward_hooks),
            len(nn.modules.module._global_forward_pre_hooks),
        ),
    }


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return same_bits(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def unchanged(before: dict[str, Any], after: dict[str, Any], verb: str) -> None:
    touched = [key for key in before if not equal(before[key], after[key])]
    assert not touched, f"{verb} touched the model's {touched}"


def prepared(case: Case) -> nn.Module:
    """The model with mixed modes, gradients, hooks and frozen parameters, so that restoring means something."""
    model = case.make()
    generator = torch.Generator().manual_seed(1)
    for number, module in enumerate(model.modules()):
        module.training = number % 2 == 0
        module.register_forward_hook(_count)
        module.register_forward_pre_hook(_count)
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.randn(parameter.shape, generator=generator) if number % 3 else None
        parameter.requires_grad_(number % 4 != 3)
    return model


def _count(*_: Any) -> None:
    return None


def law(case: Case) -> None:
    model, example = prepared(case), case.example()
    before = state(model, example)
    graph = niwaki.trace(model, example)
    unchanged(before, state(model, example), "trace")
    if "rigid" in case.facts:
        return
    scores = random_scores(model, graph, seed=0)
    unchanged(before, state(model, example), "collect or score")
    plan, _ = closest(graph, scores, 0.6, of="macs")
    unchanged(before, state(model, example), "choose")
    small = niwaki.cut(model, plan)
    unchanged(before, state(model, example), "cut")
    niwaki.mask(model, plan)
    unchanged(before, state(model, example), "mask")
    niwaki.verify(model, small, plan, example, seed=0)
    unchanged(before, state(model, example), "verify")
    modes = {name: module.training for name, module in small.named_modules()}
    if type(small) is not type(model):
        modes = {"": modes[""]}  # an exported model's inner modules only hold tensors
    assert modes == {name: before["training"][name] for name in modes}, "the cut model is in another mode"
    assert {n: p.requires_grad for n, p in small.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }, "the cut model's frozen parameters differ"


@pytest.mark.parametrize("case", ZOO, ids=str)
def test_untouched(case: Case) -> None:
    law(case)


def without_memory(model: nn.Module) -> nn.Module:
    """A copy on the meta device; tensors with several names stay one tensor (`to` would part them)."""
    memo: dict[int, Any] = {}
    for tensor in tensors_of(model).values():
        meta = tensor.detach().to("meta")
        memo[id(tensor)] = nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta
    return copy.deepcopy(model, memo)


@pytest.mark.parametrize("case", ZOO, ids=str)
def test_meta_gives_the_same_graph(case: Case) -> None:
    """A model without memory is traced to the same groups, and stays without memory; so does its cut."""
    real = case.make()
    meta = without_memory(real)
    if "data_dependent" in case.facts:
        return
    left, right = niwaki.trace(real, case.example()), niwaki.trace(meta, case.example())
    assert left.fingerprint == right.fingerprint and left.macs == right.macs
    assert all(t.is_meta for t in tensors_of(meta).values())
    if any(not t.is_floating_point() and t.dim() for t in real.buffers()):
        return  # tables of positions have no values there, and what they pick is unknown
    assert left.to_json()["groups"] == right.to_json()["groups"]
    if "rigid" in case.facts:
        return
    plan, _ = closest(left, random_scores(real, left, 0), 0.6, of="macs")
    small, thin = niwaki.cut(real, plan), niwaki.cut(meta, plan)
    shapes = {name: tuple(t.shape) for name, t in tensors_of(small).items()}
    assert shapes == {name: tuple(t.shape) for name, t in tensors_of(thin).items()}
    assert all(t.is_meta for t in tensors_of(thin).values())


def test_a_forward_that_fails_leaves_everything_restored() -> None:
    case = named("chain")
    model, example = prepared(case), torch.zeros(2, 5, 8, 8)
    before = state(model, example)
    with pytest.raises(niwaki.errors.InputError):
        niwaki.trace(model, example)
    unchanged(before, state(model, example), "a failed trace")
