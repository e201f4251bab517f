"""The quick check of a cut: it holds where every call is the traced one cut down, and there the full one holds."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import niwaki
from laws.common import closest, random_scores
from niwaki.graph.kernels import Kernels
from niwaki.graph.plans import alive_of, plan_of
from niwaki.surgery.astray import Astray
from niwaki.surgery.check import example_of, retrace
from niwaki.surgery.cut import sliced
from niwaki.surgery.evidence import Sizes, regular, stays_of
from niwaki.surgery.mending import agreement
from niwaki.surgery.replay import replays
from zoo import named


class Halves(nn.Module):
    """Eight channels, of which the second four are read: by a number that the module keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.out = nn.Linear(3, 8), nn.Linear(4, 2)
        self.half = 4

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.wide(x)[:, self.half :])


def parts(model: nn.Module, example: Any, gone: list[int]) -> tuple[Any, ...]:
    """The cut model as it is before its integers are mended, and what the quick check is given besides."""
    graph = niwaki.trace(model, example)
    alive = np.ones(graph.units.count, bool)
    group = next(g for g in graph.groups if g.fixed is None)
    alive[group.ids[gone]] = False
    alive = alive_of(graph, plan_of(graph, alive))
    return sliced(model, plan_of(graph, alive)), graph, alive, example_of(graph, model), Sizes(stays_of(graph, alive))


def test_a_chain_is_the_traced_one() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    assert replays(*parts(model.eval(), torch.zeros(1, 3, 5, 5), [1, 3])).same


def test_integers_that_were_not_mended_end_it() -> None:
    small, *rest = parts(Halves(), torch.zeros(1, 3), [1])
    assert not replays(small, *rest).same  # of eight channels one went: those from the fourth on would be others
    small.half = 4 - int((~rest[1][rest[0].axes[0].units][:4]).sum())
    small.out.in_features = small.out.weight.shape[1]
    assert replays(small, *rest).same


class Counted(nn.Module):
    """Channels times their numbers, which the forward makes anew, in a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.out = nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 2, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[-1], device=x.device)[:, None] - torch.arange(x.shape[-1], device=x.device)
        return self.out(self.wide(x) * places)


def test_tensors_that_the_forward_makes_do_not_end_it() -> None:
    assert replays(*parts(Counted(), torch.zeros(1, 3, 5, 5), [0, 5])).same


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.heads = nn.Linear(3, 8), 2

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(x).view(-1, self.heads, 4).sum(1)


class Outer(nn.Module):
    """Where views of its part no longer fit, it says so in words of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.part, self.out = nn.Linear(3, 3), Inner(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.out(self.part(self.first(x)))
        except RuntimeError as error:
            raise ValueError("no heads") from error


def test_what_fails_is_told_as_by_the_full_check() -> None:
    small, graph, alive, example, sizes = parts(Outer(), torch.zeros(1, 3), [0])
    small.part.heads = 3
    told = replays(small, graph, alive, example, sizes)
    seen = retrace(small, graph, alive, example, sizes=sizes)
    assert (told.same, told.problem) == (False, "forward fails in part: ValueError: no heads")
    assert (seen.problem, seen.where, seen.ran) == (told.problem, "part", told.ran)
    assert told.ran == {"", "first", "part", "part.wide"}
    assert (told.done, told.where, frozenset({"part"})) == agreement(seen, graph, sizes)
    assert told.done == len([record for record in graph.records if record.module in ("first", "part.wide")])


class Reads(nn.Module):
    """Four channels times a number that the forward reads: of its own making, or the sum of a table as wide as they."""

    def __init__(self, of: str) -> None:
        super().__init__()
        self.wide, self.out, self.of = nn.Linear(3, 4), nn.Linear(4, 2), of
        self.register_buffer("table", torch.ones(4))
        self.steps = torch.tensor([2.0, 3.0])

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(x) + self.table
        if self.of == "steps":
            first, second = self.steps
            return self.out(x * float(first + second))
        if self.of == "made":
            return self.out(x * int(torch.arange(3).sum()))
        if self.of == "as many":
            return self.out(x * int(self.steps[0].expand(x.shape[1]).sum()))
        return self.out(x * int(self.table.sum()))


@pytest.mark.parametrize("of", ["steps", "made"])
def test_numbers_of_constants_are_followed(of: str) -> None:
    small, *rest = parts(Reads(of).eval(), torch.zeros(1, 3), [0])
    assert replays(small, *rest).same
    small.steps = torch.tensor([2.0, 4.0])
    assert replays(small, *rest).same == (of == "made")


@pytest.mark.parametrize("of", ["table", "as many"])
def test_numbers_of_what_is_cut_are_left_to_the_full_check(of: str) -> None:
    """A table of four ones adds up to three once one of them went, as four of anything do: another factor, by which the
    full check mends."""
    small, *rest = parts(Reads(of).eval(), torch.zeros(1, 3), [0])
    graph, alive, example, sizes = rest
    told = replays(small, *rest)
    assert (told.same, told.problem) == (False, "")
    assert [scale.factor for scale in retrace(small, graph, alive, example, sizes=sizes).scales] == [4 / 3]


class Strays(nn.Module):
    """A view by a number of its own gives another shape than it should, and what comes after it fails, or does not."""

    def __init__(self, *, fails: bool) -> None:
        super().__init__()
        self.wide, self.act, self.out, self.fails = nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2), fails
        self.sizes = (8,)
        self.steps = torch.tensor([1.0, 2.0])

    def forward(self, x: Tensor) -> Tensor:
        wide = self.wide(x)
        for size in self.sizes:
            x = wide.reshape(-1, size)
        x, steps = self.act(x), self.steps * 1
        x = x * float(steps[1])
        return self.out(x) if self.fails else x.sum(-1, keepdim=True).sum(0) * self.out.weight


def test_what_strays_and_then_fails_is_told_as_by_the_full_check() -> None:
    """Seven channels of four rows in rows of fourteen: nothing is wrong with that until they are read."""
    small, graph, alive, example, sizes = parts(Strays(fails=True).eval(), torch.zeros(4, 3), [0])
    reshaped = next(i for i, record in enumerate(graph.records) if record.name.endswith(("view", "reshape")))
    for small.sizes in ((14,), (14, 7, 14)):  # the second is what it should be, and comes too late
        told = replays(small, graph, alive, example, sizes)
        seen = retrace(small, graph, alive, example, sizes=sizes)
        assert told.problem == seen.problem
        assert "same reduction dim" in told.problem
        assert (told.where, told.wrong) == (seen.where, "") == ("out", "")
        assert (told.done, told.wrong, told.off) == agreement(seen, graph, sizes)
        assert told.done > reshaped  # what other modules do right behind it counts
        assert seen.ran == told.ran == {"", "wide", "act", "out"}
    small.sizes = (7,)
    assert replays(small, graph, alive, example, sizes).same


def test_what_strays_and_does_not_fail_is_left_to_the_full_check() -> None:
    small, graph, alive, example, sizes = parts(Strays(fails=False).eval(), torch.zeros(4, 3), [0])
    small.sizes = (14,)
    told = replays(small, graph, alive, example, sizes)
    assert (told.same, told.problem) == (False, "")
    assert retrace(small, graph, alive, example, sizes=sizes).problem is not None


def test_one_call_more_is_left_to_the_full_check() -> None:
    """After everything that was traced, and of no use to anybody."""

    class More(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.out, self.more = nn.Linear(3, 4), nn.Linear(4, 2), 0

        def forward(self, x: Tensor) -> Tensor:
            x = self.out(self.wide(x))
            for _ in range(self.more):
                x.sum()
            return x

    small, *rest = parts(More(), torch.zeros(1, 3), [0])
    assert replays(small, *rest).same
    small.more = 1
    told = replays(small, *rest)
    assert (told.same, told.problem) == (False, "")


def test_what_is_computed_along_is_forgotten_once_it_is_overwritten() -> None:
    astray, steps = Astray(Kernels(), {}), torch.ones(2)
    assert astray.of(nn.Parameter(steps)) is None  # training changes it
    tripled = astray(torch.ops.aten.mul.Tensor, (steps, 3), {})
    assert torch.equal(astray.of(tripled), torch.tensor([3.0, 3.0]))
    assert astray.of(astray(torch.ops.aten.mul.Tensor, (torch.ones(2, device="meta"), 3), {})) is None
    astray.write([steps])
    assert astray.of(steps) is astray.of(steps[1]) is None
    assert astray.of(tripled) is not None


def test_numbers_that_the_forward_overwrites_are_left_to_the_full_check() -> None:
    """Astray, by another path than was traced: a table is written to before it strays, and read after it has."""

    class Writes(Strays):
        def forward(self, x: Tensor) -> Tensor:
            self.steps.add_(1)
            x = self.wide(x).reshape(-1, self.sizes[0])
            return self.out(x if self.sizes[0] < 9 else x * float(self.steps[1]))

    small, graph, alive, example, sizes = parts(Writes(fails=True).eval(), torch.zeros(4, 3), [0])
    small.sizes = (14,)
    told = replays(small, graph, alive, example, sizes)
    assert (told.same, told.problem) == (False, "")
    assert "meta" in (retrace(small, graph, alive, example, sizes=sizes).problem or "")


def test_it_leaves_the_model_as_it_was() -> None:
    small, *rest = parts(nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 2)), torch.zeros(1, 3), [2])
    small.train()
    small.register_forward_hook(lambda *_: pytest.fail("a hook of the user ran"))
    before = {name: (id(tensor), tensor.clone()) for name, tensor in small.state_dict(keep_vars=True).items()}
    assert replays(small, *rest).same
    after = small.state_dict(keep_vars=True)
    assert before.keys() == after.keys()
    assert all(id(after[name]) == at and torch.equal(after[name], was) for name, (at, was) in before.items())
    assert all(module.training for module in small.modules())
    assert len(small._forward_hooks) == 1


def test_what_forward_writes_to_its_modules_is_taken_back() -> None:
    class Counts(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(x.shape)
            self.last = super().forward(x)
            return self.last

    model = nn.Sequential(Counts(3, 4), nn.Linear(4, 2))
    model[0].seen = [1]
    small, *rest = parts(model, torch.zeros(1, 3), [0])
    assert replays(small, *rest).same
    assert small[0].seen == [1]
    assert not hasattr(small[0], "last")


def test_another_scale_ends_it() -> None:
    """Attention divides by the root of the head's width: the full check tells what that was."""
    case = named("fused_call_attention")
    model, example = case.make(), case.example()
    graph = niwaki.trace(model, example)
    plan, _ = closest(graph, random_scores(model, graph, 0), 0.5, of="units", grids="columns")
    alive = alive_of(graph, plan)
    sizes = Sizes(stays_of(graph, alive))
    small = niwaki.cut(model, plan)
    seen = retrace(small, graph, alive, example_of(graph, model), sizes=sizes)
    assert seen.problem is None
    assert seen.scales
    assert not replays(small, graph, alive, example_of(graph, model), sizes).same


def test_slabs_without_what_they_span_are_not_regular() -> None:
    case = named("grouped_convolution")
    graph = niwaki.trace(case.make(), case.example())
    alive = np.ones(graph.units.count, bool)
    assert regular(graph, alive)
    slab, _ = graph.units.slabs
    alive[slab[0]] = False
    assert not regular(graph, alive)


@pytest.mark.parametrize(
    "name",
    ["residual_add", "dense_concat", "grouped_convolution", "split_glu", "unet", "depthwise", "vision_transformer",
     "talking_heads", "experts"],
)  # fmt: skip
def test_where_it_holds_the_full_check_does(name: str) -> None:
    """Whatever number of a module is set otherwise; it does hold of each of these networks as it was cut."""
    case = named(name)
    model, example = case.make(), case.example()
    graph = niwaki.trace(model, example)
    plan, _ = closest(graph, random_scores(model, graph, 1), 0.5, of="units")
    alive, given = alive_of(graph, plan), example_of(graph, model)
    sizes = Sizes(stays_of(graph, alive))
    small = niwaki.cut(model, plan)
    assert replays(small, graph, alive, given, sizes).same, "nothing would be compared"
    for module in (None, *small.modules()):
        numbers = [k for k, v in vars(module).items() if type(v) is int and v > 1] if module is not None else [""]
        for attribute in numbers:
            if module is not None:
                setattr(module, attribute, getattr(module, attribute) - 1)
            told = replays(small, graph, alive, given, sizes)
            if told.same or told.problem:
                seen = retrace(small, graph, alive, given, sizes=sizes)
                assert (seen.problem or "", seen.scales, seen.where) == (told.problem, (), told.where), attribute
            if told.problem:
                assert agreement(seen, graph, sizes) == (told.done, told.where, frozenset({told.where})), attribute
            if module is not None:
                setattr(module, attribute, getattr(module, attribute) + 1)


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_decoders_are_left_to_the_full_check(name: str) -> None:
    """Tokens that are looked up in a table of cut columns, and heads in a view: not plain by their kind."""
    case = named(name)
    model, example = case.make(), case.example()
    graph = niwaki.trace(model, example)
    plan, _ = closest(graph, random_scores(model, graph, 1), 0.5, of="units")
    alive, given = alive_of(graph, plan), example_of(graph, model)
    small = niwaki.cut(model, plan)
    assert not replays(small, graph, alive, given, Sizes(stays_of(graph, alive))).same
    seen = retrace(small, graph, alive, given, sizes=Sizes(stays_of(graph, alive)))
    assert seen.problem is None
