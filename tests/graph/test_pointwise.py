"""Pointwise calls: every operator that torch tags, those the tag misses, and what becomes of operands that meet."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from labelled import Net, Seen, coupled, cut_and_judge, group_of, tied

import niwaki
from niwaki.graph.rules import RULES
from niwaki.graph.rules.pointwise import MISSING_TAG, is_pointwise

aten = torch.ops.aten
UNARY: dict[str, Callable[[torch.Tensor], Any]] = {
    **{
        name: getattr(F, name)
        for name in (
            "celu",
            "elu",
            "gelu",
            "hardshrink",
            "hardsigmoid",
            "hardswish",
            "hardtanh",
            "leaky_relu",
            "logsigmoid",
            "mish",
            "relu",
            "relu6",
            "selu",
            "sigmoid",
            "silu",
            "softplus",
            "softshrink",
            "softsign",
            "tanh",
            "tanhshrink",
            "rrelu",
        )
    },
    **{
        name: getattr(torch, name)
        for name in (
            "abs",
            "acos",
            "acosh",
            "asin",
            "asinh",
            "atan",
            "atanh",
            "ceil",
            "cos",
            "cosh",
            "deg2rad",
            "digamma",
            "erf",
            "erfc",
            "erfinv",
            "exp",
            "exp2",
            "expm1",
            "fix",
            "floor",
            "frac",
            "i0",
            "isfinite",
            "isnan",
            "lgamma",
            "log",
            "log10",
            "log1p",
            "log2",
            "logit",
            "nan_to_num",
            "neg",
            "rad2deg",
            "reciprocal",
            "round",
            "rsqrt",
            "sgn",
            "sign",
            "signbit",
            "sin",
            "sinc",
            "sinh",
            "sqrt",
            "square",
            "tan",
            "trunc",
        )
    },
    "threshold": lambda x: F.threshold(x, 0.1, 0.2),
    "clamp": lambda x: x.clamp(-1, 1),
    "clamp min": lambda x: x.clamp_min(0.1),
    "clamp max": lambda x: x.clamp_max(0.1),
    "clip": lambda x: torch.clip(x, max=1.0),
    "pow": lambda x: x**2,
    "pow of a number": lambda x: 2**x,
    "reflected subtraction": lambda x: 1 - x,
    "division of a number": lambda x: 1 / x,
    "comparison": lambda x: (x > 0).float(),
    "fmod": lambda x: torch.fmod(x, 2.0),
    "remainder": lambda x: x % 2.0,
    "masked fill": lambda x: x.masked_fill(x > 0, 0.0),
    "where": lambda x: torch.where(x > 0, x, 0.0 * x),
    "where with a number": lambda x: torch.where(x > 0, x, 0.5),
    "prelu of one": lambda x: F.prelu(x, torch.full((1,), 0.2, device=x.device)),
    "complex parts": lambda x: torch.complex(x, x).abs(),
    "fill like": lambda x: torch.full_like(x, 3.0),
    "uniform like": torch.rand_like,
    "bernoulli": torch.bernoulli,
}
IN_PLACE: dict[str, Callable[[torch.Tensor], Any]] = {
    name: (lambda x, name=name: getattr(x, name)())
    for name in ("relu_", "sigmoid_", "tanh_", "exp_", "zero_", "neg_", "abs_", "sqrt_")
} | {
    "add_": lambda x: x.add_(1),
    "mul_": lambda x: x.mul_(2),
    "div_": lambda x: x.div_(2),
    "sub_": lambda x: x.sub_(1),
    "clamp_": lambda x: x.clamp_(0, 1),
    "masked_fill_": lambda x: x.masked_fill_(x > 0, 1.0),
    "fill_": lambda x: x.fill_(2.0),
    "hardswish_": lambda x: F.hardswish(x, inplace=True),
    "hardtanh_": lambda x: F.hardtanh(x, inplace=True),
    "silu_": lambda x: F.silu(x, inplace=True),
    "elu_": lambda x: F.elu(x, inplace=True),
    "mish_": lambda x: F.mish(x, inplace=True),
    "leaky_relu_": lambda x: F.leaky_relu(x, inplace=True),
    "relu6": lambda x: F.relu6(x, inplace=True),
    "threshold_": lambda x: F.threshold(x, 0.1, 0.2, inplace=True),
    "lerp_": lambda x: x.lerp_(x, 0.5),
    "uniform_": lambda x: x.uniform_(),
    "normal_": lambda x: x.normal_(),
    "copy_": lambda x: x.copy_(x),
}
BINARY: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "atan2": torch.atan2,
    "hypot": torch.hypot,
    "pow": torch.pow,
    "logaddexp": torch.logaddexp,
    "fmax": torch.fmax,
    "copysign": torch.copysign,
    "xlogy": torch.xlogy,
    "rsub": torch.rsub,
    "gt": lambda a, b: (a > b).float(),
    "lerp": lambda a, b: torch.lerp(a, b, 0.3),
    "addcmul": lambda a, b: torch.addcmul(a, a, b),
    "addcdiv": lambda a, b: torch.addcdiv(a, a, b),
    "where": lambda a, b: torch.where(a > 0, a, b),
    "floor_divide": torch.floor_divide,
    "ldexp": torch.ldexp,
    "heaviside": torch.heaviside,
    "nextafter": torch.nextafter,
    "add_": lambda a, b: a.add_(b),
    "mul_": lambda a, b: a.mul_(b),
    "copy_": lambda a, b: a.clone().copy_(b),
    "isclose": lambda a, b: torch.isclose(a, b).float(),
    "complex": lambda a, b: torch.complex(a, b).real,
    "polar": lambda a, b: torch.polar(a, b).abs(),
    "sub alpha": lambda a, b: torch.sub(a, b, alpha=2),
    "add out": lambda a, b: torch.add(a, b, out=torch.empty_like(a)),
}


def test_every_tagged_operator_is_pointwise() -> None:
    """All of torch.ops.aten that carries the tag, by asking torch."""
    count = 0
    for name in dir(aten):
        packet = getattr(aten, name)
        for overload in getattr(packet, "overloads", list)():
            func = getattr(packet, overload)
            if torch.Tag.pointwise in func.tags:
                assert is_pointwise(func, name)
                count += 1
    assert count > 400


def test_names_without_the_tag_are_operators_of_torch() -> None:
    unknown = [name for name in MISSING_TAG if not hasattr(aten, name)]
    assert unknown == []


def composite(func: Any) -> bool:
    try:
        return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    except RuntimeError:  # an operator of TorchScript, not of tensors
        return True


def test_other_overloads_of_what_is_known_are_known() -> None:
    """In-place twins and out variants do what the plain operator does, tag or not."""
    unknown = []
    for name in dir(aten):
        packet = getattr(aten, name)
        if not hasattr(packet, "overloads") or name.startswith("__"):
            continue
        plain = name.removesuffix("_")
        family = (
            [packet, getattr(aten, plain)]
            if plain != name and hasattr(getattr(aten, plain, None), "overloads")
            else [packet]
        )
        tagged = any(torch.Tag.pointwise in getattr(p, o).tags for p in family for o in p.overloads())
        if tagged or plain in RULES:
            for overload in packet.overloads():
                func = getattr(packet, overload)
                if (
                    name not in RULES
                    and not is_pointwise(func, name)
                    and not composite(func)
                    and "backward" not in name
                ):
                    unknown.append(f"{name}.{overload}")
    assert unknown == []


@pytest.mark.parametrize("name", UNARY)
def test_one_operand_keeps_its_labels(name: str) -> None:
    for axes in ((0,), (1,), (0, 1)):
        seen = Seen(UNARY[name], (4, 6), axes)
        assert not seen.recorder.unknown
        assert not seen.space.fixed
        (labels,) = seen.fields()
        assert np.array_equal(labels, seen.labels)


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_calls_keep_the_tensor_and_its_labels(name: str) -> None:
    seen = Seen(IN_PLACE[name], (4, 6), (1,))
    assert seen.result is seen.input
    assert np.array_equal(seen.fields()[0], seen.labels)
    assert not seen.recorder.unknown and not seen.space.fixed


@pytest.mark.parametrize("name", BINARY)
def test_two_operands_meet_index_by_index(name: str) -> None:
    """First three positions against the last three: 0-3, 1-4, 2-5 are one, and nothing else is."""
    seen = Seen(lambda x: BINARY[name](x[:, :3], x[:, 3:]), (4, 6), (1,))
    component = tied(seen.space, 6)
    assert not seen.recorder.unknown and not seen.space.fixed
    assert (component[:3] == component[3:]).all() and len(set(component.tolist())) == 3
    assert component[seen.fields()[0].ravel()].tolist() == component[:3].tolist()


def test_operands_broadcast() -> None:
    """[4, 1] x [1, 6]: both axes stay labelled and nothing is tied."""
    rows, columns = torch.nn.Linear(3, 4), torch.nn.Linear(3, 6)
    net = Net(
        lambda n, x: n.out((n.rows(x)[:, :, None] * n.columns(x)[:, None]).sum(1)),
        rows=rows,
        columns=columns,
        out=torch.nn.Linear(6, 2),
    )
    graph = niwaki.trace(net, torch.ones(2, 3))
    assert group_of(graph, "rows.weight", 0).units == 4
    assert coupled(graph, "columns.weight:0", "columns.bias:0", "out.weight:1")
    assert not coupled(graph, "rows.weight:0", "columns.weight:0")


def test_a_labelled_axis_that_meets_a_bare_one_is_fixed_with_the_reason() -> None:
    net = Net(lambda n, x: n.b(n.a(x) + x), a=torch.nn.Linear(4, 4), b=torch.nn.Linear(4, 2))
    graph = niwaki.trace(net, torch.ones(1, 4))
    assert group_of(graph, "a.weight", 0).fixed == "meets input of the model"


@pytest.mark.parametrize("name", ["gelu", "hardswish", "hardsigmoid", "mish", "softplus", "exp", "cos", "prelu"])
def test_activations_that_are_or_are_not_zero_at_zero_are_exact_all_the_same(name: str) -> None:
    """Removing is judged at the consumer, so exp(0) = 1 does no harm."""
    act: Any = torch.nn.PReLU(8) if name == "prelu" else UNARY[name]
    net = Net(
        lambda n, x: n.b(act(n.a(x)) if name != "prelu" else n.act(n.a(x))),
        a=torch.nn.Linear(4, 8),
        b=torch.nn.Linear(8, 2),
        **({"act": act} if name == "prelu" else {}),
    )
    _plan, small, receipt = cut_and_judge(net, torch.randn(3, 4))
    assert small.a.weight.shape == (4, 4)
    assert receipt.exact and receipt.passed
    if name == "prelu":
        assert small.act.weight.shape == (4,) and small.act.num_parameters == 4


def test_glu_ties_the_halves_of_one_axis() -> None:
    """12 -> 6: position i of the first half meets position i of the second."""
    seen = Seen(lambda x: F.glu(x, 1), (4, 12), (1,))
    component = tied(seen.space, 12)
    assert (component[:6] == component[6:]).all() and len(set(component.tolist())) == 6
    net = Net(lambda n, x: n.b(F.glu(n.a(x))), a=torch.nn.Linear(4, 12), b=torch.nn.Linear(6, 2))
    _, small, receipt = cut_and_judge(net, torch.randn(3, 4))
    assert (tuple(small.a.weight.shape), tuple(small.b.weight.shape)) == ((6, 4), (2, 3))
    assert receipt.passed
