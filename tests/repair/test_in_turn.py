"""Layers refitted in turn to inputs of the cut network: by hand, by a solver, sums, and what is left alone."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import niwaki
from niwaki.errors import InputError, NotFiniteError
from niwaki.repair import LeastSquares
from niwaki.repair.normal_equations import NormalEquations, raised
from niwaki.units import map_tensors, run, tensors_in
from repair.test_constants import keeping
from zoo import named

CORNERS = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
"""Two inputs of variance 1 that tell nothing of each other."""


def in_turn(model: nn.Module, kept: dict[str, list[int]], x: Tensor, **settings: Any) -> tuple[Any, tuple[str, ...]]:
    plan = keeping(model, x, kept)
    small = niwaki.cut(model, plan)
    settings = {"raises": 0, **settings}
    return small, LeastSquares(inputs="cut", **settings)(model, small, plan, batches=x.chunk(2))


class Block(nn.Module):
    """x + b(a(x))"""

    def __init__(self, first: list[float], second: list[float]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.a.weight.copy_(torch.tensor(first).diag())
            self.b.weight.copy_(torch.tensor(second).diag())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.a(x))


def two() -> nn.Sequential:
    """(x1, x2) -> (4 x1, 6 x2) -> (8 x1, 12 x2)"""
    return nn.Sequential(Block([1.0, 1.0], [3.0, 5.0]), Block([1.0, 1.0], [1.0, 1.0]))


def test_by_hand() -> None:
    """The first block has lost x2 and puts out (4 x1, x2). The second one's first layer still reads 6 x2 there if it
    takes it six times, and its second one, which puts out 6 x2, owes 6 x2 and the 5 x2 that are missing beside it.
    """
    small, skipped = in_turn(two(), {"0.a": [0]}, CORNERS, ridge=1e-9)
    assert skipped == ()
    assert small[0].b.weight.ravel().tolist() == pytest.approx([3.0, 0.0], abs=1e-6)
    assert small[1].a.weight.ravel().tolist() == pytest.approx([1.0, 0.0, 0.0, 6.0], abs=1e-5)
    assert small[1].b.weight.ravel().tolist() == pytest.approx([1.0, 0.0, 0.0, 11 / 6], abs=1e-5)
    assert torch.allclose(small(CORNERS), two()(CORNERS), atol=1e-4)
    for linear in small.modules():
        if isinstance(linear, nn.Linear) and linear.bias is not None:
            assert float(linear.bias.detach().abs().max()) < 1e-5


def test_the_ridge_by_hand() -> None:
    """Inputs (4 x1, x2) have variances 16 and 1, so a ridge of 2 / 17 is a price of 1; the weight 1 leaves 5 x2 owing,
    of which it takes 5 / (1 + 1): 3.5.
    """
    small, _ = in_turn(two(), {"0.a": [0]}, CORNERS, ridge=2 / 17)
    assert small[1].a.weight.ravel().tolist() == pytest.approx([1.0, 0.0, 0.0, 3.5], abs=1e-5)


def test_halves_that_agree_leave_the_ridge_and_others_raise_it() -> None:
    """One input x and what is missing, y, in two halves. Where y = 2 x in both, the least ridge is best. Where y is x
    in one half and -x in the other, each one's answer is the other's fault, and the more it is held back the better.
    """
    x = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64).reshape(1, 4, 1)

    def half(factor: float) -> NormalEquations:
        sums = NormalEquations.of(torch.zeros(1, 1, 1, dtype=torch.float64))
        sums.add(x, factor * x)
        return sums

    assert raised(half(2.0), half(2.0), 0.01, 5) == 0.01
    assert raised(half(1.0), half(-1.0), 0.01, 5) == pytest.approx(1000.0)
    assert raised(half(1.0), half(-1.0), 0.01, 2) == pytest.approx(1.0)
    assert raised(half(1.0), half(-1.0), 0.01, 0) == 0.01
    change, shift = half(2.0).solved(1.0)  # 2 / (1 + 1)
    assert (change.item(), shift.item()) == pytest.approx((1.0, 0.0))
    assert half(2.0).missed(change, shift) == pytest.approx(4 * (1.0 - 4.0))  # squares of x, less those of 2 x


def test_few_positions_for_many_inputs() -> None:
    """A head of 40 inputs, 12 pictures: as given the ridge takes what is by chance for what is so."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 80), nn.Tanh(), nn.Linear(80, 3)).eval()
    kept = {"0": list(range(40))}
    x, unseen = torch.randn(12, 6), torch.randn(500, 6)
    apart = []
    for raises in (0, 5):
        small, _ = in_turn(model, kept, x, raises=raises, ridge=1e-4)
        with torch.no_grad():
            apart.append(float((small(unseen) - model(unseen)).square().mean()))
    assert apart[1] < apart[0]


def test_of_the_uncut_networks_inputs_nothing_behind_changes() -> None:
    model, x = two(), CORNERS
    plan = keeping(model, x, {"0.a": [0]})
    small = niwaki.cut(model, plan)
    LeastSquares(ridge=1e-9)(model, small, plan, batches=[x])
    assert torch.equal(small[1].a.weight, model[1].a.weight)
    assert torch.equal(small[1].b.weight, model[1].b.weight)


def test_what_lost_nothing_stays() -> None:
    """The head is cut; what runs before it gets what it got, and stays to rounding."""
    torch.manual_seed(0)
    model = Residual().eval()
    small, _ = in_turn(model, {"last": [0, 2, 3]}, torch.randn(16, 3, 8, 8))
    for name in ("stem", "a", "b"):
        before, after = getattr(model, name).weight, getattr(small, name).weight
        assert torch.allclose(before, after, atol=1e-6)
    assert not torch.allclose(small.head.weight, model.head.weight[:, [0, 2, 3]], atol=1e-3)


class Residual(nn.Module):
    """Convolutions and norms; two residual branches, the second one with a projection that runs last."""

    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        self.in_place = in_place
        self.stem, self.ns = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.a, self.na = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b, self.nb = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.c, self.nc = nn.Conv2d(8, 12, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(12)
        self.d, self.nd = nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.p, self.np = nn.Conv2d(8, 12, 1, stride=2, bias=False), nn.BatchNorm2d(12)
        self.last, self.head = nn.Conv2d(12, 6, 1), nn.Linear(6, 4)
        for norm in self.modules():
            if isinstance(norm, nn.BatchNorm2d):
                nn.init.uniform_(norm.weight, 0.5, 1.5)
                nn.init.normal_(norm.bias)
                nn.init.normal_(norm.running_mean)
                nn.init.uniform_(norm.running_var, 0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.ns(self.stem(x)))
        out = self.nb(self.b(F.relu(self.na(self.a(x)))))
        if self.in_place:
            out += x
            x = out.relu_()
        else:
            x = F.relu(x + out)
        out = self.nd(self.d(F.relu(self.nc(self.c(x)))))
        x = F.relu(out + self.np(self.p(x)))
        return self.head(F.relu(self.last(x)).mean((2, 3)))


@pytest.mark.parametrize("in_place", [False, True])
def test_sums_against_a_solver(in_place: bool) -> None:
    """`b` and, for the second sum, `p`, which runs after `d`: solved by torch from the inputs of the cut network and
    what the sums are to be; norms behind are undone, constants are in their running means."""
    torch.manual_seed(0)
    model, x = Residual(in_place).eval(), torch.randn(24, 3, 8, 8)
    small, skipped = in_turn(model, {"stem": [0, 1, 2, 4, 5, 7], "c": [0, 3, 4, 7, 9]}, x, ridge=1e-9, samples=10**6)
    assert skipped == ()
    keep = [0, 1, 2, 4, 5, 7]
    seen: dict[str, dict[str, Tensor]] = {}
    for name, network in (("whole", model), ("cut", small)):
        found = seen.setdefault(name, {})

        def save(path: str, found: dict[str, Tensor]) -> Any:
            def hear(module: Any, args: Any, out: Tensor) -> None:
                found[path], found[f"{path}, in"] = out.clone(), args[0].clone()

            return hear

        for path, module in network.named_modules():
            if path:
                module.register_forward_hook(save(path, found))
        with torch.no_grad():
            network(x)
    whole, cut = seen["whole"], seen["cut"]
    rows = F.unfold(cut["b, in"], 3, padding=1).transpose(1, 2).flatten(0, 1)
    solved(rows, (whole["nb"] + whole["a, in"])[:, keep] - cut["a, in"], cut["nb"])
    solved(cut["p, in"][:, :, ::2, ::2].movedim(1, -1).flatten(0, 2), whole["nd"] + whole["np"] - cut["nd"], cut["np"])
    solved(F.unfold(cut["d, in"], 3, padding=1).transpose(1, 2).flatten(0, 1), whole["nd"], cut["nd"])


def solved(rows: Tensor, wanted: Tensor, got: Tensor) -> None:
    """What is put out is the best affine function of these inputs; several have it where an input is always zero."""
    told = torch.cat([rows, torch.ones(len(rows), 1)], 1).double()
    best = told @ torch.linalg.lstsq(told, wanted.movedim(1, -1).flatten(0, 2).double(), driver="gelsd").solution
    assert torch.allclose(got.movedim(1, -1).flatten(0, 2).double(), best, atol=1e-3)
    assert not torch.allclose(wanted.movedim(1, -1).flatten(0, 2).double(), best, atol=0.1)


def test_it_is_nearer_than_of_whole_inputs_on_unseen_pictures() -> None:
    torch.manual_seed(0)
    model = Residual().eval()
    plan = keeping(model, torch.zeros(1, 3, 8, 8), {"a": [0, 3, 5], "c": [1, 4, 6, 7, 11], "last": [0, 1, 2, 4]})
    apart = []
    for inputs in ("whole", "cut"):
        small = niwaki.cut(model, plan)
        how = LeastSquares(inputs=inputs)  # type: ignore[arg-type]
        assert niwaki.repair(small, [torch.randn(64, 3, 8, 8)], how=how, model=model, plan=plan) == ()
        x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            apart.append(float((small(x) - model(x)).square().mean()))
    assert apart[1] < 0.8 * apart[0]


class Scaled(nn.Module):
    """Blocks as ConvNeXt has them: channels last in linear layers, a factor each before the sum, and others for all."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 1)
        self.up = nn.ModuleList(nn.Linear(4, 6) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(6, 4) for _ in range(2))
        self.factor = nn.ParameterList(torch.rand(4, 1, 1) + 0.5 for _ in range(2))
        self.all = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for up, down, factor in zip(self.up, self.down, self.factor, strict=True):
            x = x + 0.5 * (factor * down(F.gelu(up(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2) * self.all)
        return x


def test_a_factor_and_turned_axes_before_the_sum() -> None:
    """The last layer's target is the whole sum less what the cut network has beside it, by the factor."""
    torch.manual_seed(0)
    model, x = Scaled().eval(), torch.randn(32, 2, 5, 5)
    small, _ = in_turn(model, {"up.0": [0, 1, 4]}, x, ridge=1e-9)
    seen: dict[str, Tensor] = {}
    small.up[1].register_forward_hook(lambda module, args, out: seen.update(beside=args[0], hidden=F.gelu(out)))
    with torch.no_grad():
        small(x)
        wanted = (model(x).permute(0, 2, 3, 1) - seen["beside"]) / (0.35 * model.factor[1].ravel())
    told = torch.cat([seen["hidden"].flatten(0, 2), torch.ones(32 * 25, 1)], 1).double()
    best = torch.linalg.lstsq(told, wanted.flatten(0, 2).double()).solution.T
    assert torch.allclose(small.down[1].weight.double(), best[:, :-1], atol=5e-3)
    assert torch.allclose(small.down[1].bias.double(), best[:, -1], atol=5e-3)


def test_norms_hold_the_statistics_of_what_was_fitted() -> None:
    """Estimated again on the same pictures they compute the same, as they would not with those they had."""
    torch.manual_seed(0)
    model, x = Residual().eval(), torch.randn(64, 3, 8, 8)
    plan = keeping(model, x, {"a": [0, 3], "c": [1, 4, 6, 7], "stem": [0, 1, 2, 5, 6]})
    small: Any = niwaki.cut(model, plan)
    LeastSquares(inputs="cut")(model, small, plan, batches=[x])
    with torch.no_grad():
        fitted = small.eval()(x)
    assert float((small.nb.weight - model.nb.weight[[0, 1, 2, 5, 6]]).detach().abs().max()) > 0.05
    niwaki.repair(small, [x])
    other: Any = niwaki.cut(model, plan)
    LeastSquares(inputs="cut", settle=False)(model, other, plan, batches=[x])
    assert torch.equal(other.nb.weight, model.nb.weight[[0, 1, 2, 5, 6]])
    with torch.no_grad():
        assert torch.allclose(small(x), fitted, atol=1e-4)
        assert torch.allclose(other.eval()(x), fitted, atol=1e-4)
        niwaki.repair(other, [x])
        assert not torch.allclose(other(x), fitted, atol=0.1)


class NormAndBend(nn.BatchNorm2d):
    """A batch norm with an activation of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


def test_a_constant_that_lies_in_a_norm_of_its_own_kind() -> None:
    """It can't be followed through to a sum; what its running mean holds since the first pass is reckoned with."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1, bias=False), NormAndBend(4)).eval()
    nn.init.normal_(model[3].running_mean)  # type: ignore[arg-type]
    x = torch.randn(16, 2, 5, 5)
    small, _ = in_turn(model, {"0": [1, 4]}, x, ridge=1e-9)
    with torch.no_grad():
        hidden = small[:2](x)
        told = torch.cat([hidden, torch.ones(16, 1, 5, 5)], 1).movedim(1, -1).flatten(0, 2).double()
        wanted = model[:3](x).movedim(1, -1).flatten(0, 2).double()
        best = told @ torch.linalg.lstsq(told, wanted, driver="gelsd").solution
        assert torch.allclose(small(x), model[3](best.float().unflatten(0, (16, 5, 5)).movedim(-1, 1)), atol=1e-3)


class Otherwise(nn.Module):
    """May do something else: another operator ahead of the sum, or its layers in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.what = ""
        self.stem, self.u, self.v = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.last, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).tanh()
        first, second = (self.v, self.u) if self.what == "order" else (self.u, self.v)
        beside = first(x)
        beside = F.softplus(beside) if self.what == "operator" else F.relu(beside)
        x = beside + self.last(beside)
        return self.head(second(x))


@pytest.mark.parametrize("what", ["operator", "order"])
def test_where_it_runs_otherwise_a_layer_keeps_its_own_target(what: str) -> None:
    """What it is added to is not known to be what it was."""
    torch.manual_seed(0)
    model, x = Otherwise().eval(), torch.randn(200, 3)
    plan = keeping(model, x, {"stem": [0, 1, 3], "u": [0, 1, 3], "v": [0, 1, 3]})
    small: Any = niwaki.cut(model, plan)
    small.what = what
    LeastSquares(inputs="cut", ridge=1e-9, raises=0)(model, small, plan, batches=x.chunk(2))
    seen: dict[str, Tensor] = {}
    small.last.register_forward_hook(lambda module, args, out: seen.update(cut=args[0], out=out))
    model.last.register_forward_hook(lambda module, args, out: seen.update(whole=out))
    with torch.no_grad():
        small(x)
        model(x)
    wanted = seen["whole"][:, [0, 1, 3]] if seen["out"].shape[1] == 3 else seen["whole"]
    told = torch.cat([seen["cut"], torch.ones(len(x), 1)], 1).double()
    best = told @ torch.linalg.lstsq(told, wanted.double(), driver="gelsd").solution
    assert torch.allclose(seen["out"].double(), best, atol=1e-3)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.twice = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4, bias=False)
        self.also = nn.Linear(4, 4, bias=False)
        self.also.weight = self.tied.weight
        self.never = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(F.relu(self.a(x)))
        return self.also(self.tied(self.twice(self.twice(x))))


def test_shared_layers_and_modes_are_left_alone() -> None:
    torch.manual_seed(0)
    model = Twice()
    model.b.eval()
    small, _ = in_turn(model, {"a": [0, 1, 2]}, torch.randn(64, 4))
    for name in ("twice", "tied", "also", "never"):
        assert torch.equal(getattr(small, name).weight, getattr(model, name).weight)
    for network in (model, small):
        assert network.training and not network.b.training
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_layers_too_large_are_left_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 2, 1))
    x = torch.randn(4, 2, 4, 4)
    small, _ = in_turn(model, {"0": [0, 1, 2, 3]}, x, largest=5)
    assert not torch.equal(small[1].weight, model[1].weight[:, :4])
    assert torch.equal(small[2].weight, model[2].weight)


@pytest.mark.parametrize("groups", [2, 8])
def test_groups_against_a_solver(groups: int) -> None:
    """A grouped or depthwise convolution is solved group by group; it is not told to be left."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=groups),
        nn.Conv2d(8, 2, 1),
    ).eval()
    x = torch.randn(16, 3, 6, 6)
    small, skipped = in_turn(model, {"0": [0, 1, 5], "2": [0, 1, 2, 4, 5, 6]}, x, ridge=1e-9, samples=10**6)
    assert skipped == ()
    keep = [0, 1, 2, 4, 5, 6] if groups == 8 else list(range(8))  # what is depthwise puts out what it reads
    with torch.no_grad():
        hidden, wanted, got = small[:4](x), model[:5](x)[:, keep], small[:5](x)
        each, outputs = 6 // small[4].groups, small[4].out_channels // small[4].groups
        for group in range(small[4].groups):
            rows = F.unfold(hidden[:, each * group : each * (group + 1)], 3).transpose(1, 2).flatten(0, 1)
            at = slice(outputs * group, outputs * (group + 1))
            told = torch.cat([rows, torch.ones(len(rows), 1)], 1).double()
            aim = wanted[:, at].movedim(1, -1).flatten(0, 2).double()
            best = told @ torch.linalg.lstsq(told, aim, driver="gelsd").solution
            assert torch.allclose(got[:, at].movedim(1, -1).flatten(0, 2).double(), best, atol=1e-3)


def test_bad_settings_and_inputs() -> None:
    with pytest.raises(InputError, match=r"inputs='both'.*known: whole, cut"):
        LeastSquares(inputs="both")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"raises=-1.*fewer than 0"):
        LeastSquares(raises=-1)
    model = two()
    plan = keeping(model, CORNERS, {"0.a": [0]})
    small = niwaki.cut(model, plan)
    how = LeastSquares(inputs="cut")
    with pytest.raises(InputError, match="no batches"):
        how(model, small, plan, batches=[])
    with pytest.raises(InputError, match=r"2 kinds of shapes.*first axis only"):
        how(model, small, plan, batches=[CORNERS, CORNERS[:, None]])
    with pytest.raises(NotFiniteError, match=r"NaN or infinite.*look for it"):
        how(model, small, plan, batches=[CORNERS / 0])


@pytest.mark.parametrize("name", ["bare_batch_norm", "mixer", "message_passing", "llama", "layer_scaled", "einsum"])
def test_networks_of_every_kind(name: str) -> None:
    """Norms without statistics, tokens as channels, single vectors, gates, factors, and widths cut in the stream."""
    case = named(name)
    model, example = case.make().eval(), case.example()
    torch.manual_seed(0)
    graph = niwaki.trace(model, example)
    how = niwaki.scores.Random(seed=0)
    scores = niwaki.score(graph, niwaki.collect(model, graph, how.needs), how=how)
    plan = niwaki.choose(graph, scores, niwaki.Budget(keep=0.6, of="units"), how=niwaki.budgets.Uniform())

    def near() -> Any:
        return map_tensors(example, lambda t: t + 0.3 * torch.randn_like(t) if t.is_floating_point() else t)

    batches, unseen = [near() for _ in range(4)], near()
    apart = []
    for inputs in ("whole", "cut"):
        small = niwaki.cut(model, plan)
        LeastSquares(inputs=inputs)(model, small, plan, batches=batches)  # type: ignore[arg-type]
        with torch.no_grad():
            pairs = zip(tensors_in(run(small, unseen)), tensors_in(run(model, unseen)), strict=True)
            apart.append(sum(float((a - b).square().sum()) for a, b in pairs))
    assert apart[1] < 1.05 * apart[0], apart
