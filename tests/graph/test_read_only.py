"""Tracing changes nothing: values in memory, modes, gradients, random states, a model without memory."""

import contextlib
import functools
import gc
import random
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from labelled import Net, group_of
from torch import nn

import niwaki
from niwaki.graph.labels import LabelSpace
from niwaki.graph.recorder import Recorder
from niwaki.graph.skeleton import copy_with, walk


def real_only(net: Any, x: torch.Tensor) -> torch.Tensor:
    """A forward that cannot run on the meta device."""
    assert float(x.sum()) == float(x.sum())
    return net.b(net.bn(net.a(x)).relu())


def norm_net(forward: Any = None) -> Net:
    return Net(
        forward or (lambda n, x: n.b(n.bn(n.a(x)).relu())), a=nn.Linear(4, 8), bn=nn.BatchNorm1d(8), b=nn.Linear(8, 2)
    )


@pytest.mark.parametrize("forward", [None, real_only], ids=["meta", "real"])
def test_a_model_in_training_mode_stays_so_and_its_statistics_too(forward: Any) -> None:
    net = norm_net(forward).train()
    net.bn.eval()  # mixed on purpose
    before = {name: t.clone() for name, t in net.state_dict().items()}
    graph = niwaki.trace(net, torch.randn(3, 4))
    assert graph.device == ("meta" if forward is None else "cpu")
    assert [m.training for m in net.modules()] == [True, True, False, True]
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


@pytest.mark.parametrize("forward", [None, real_only], ids=["meta", "real"])
def test_gradients_flags_and_hooks_stay(forward: Any) -> None:
    net = norm_net(forward)
    calls: list[int] = []
    net.a.register_forward_hook(lambda *_: calls.append(1))
    net.a.weight.grad = torch.ones(8, 4)
    net.b.weight.requires_grad_(False)
    niwaki.trace(net, torch.randn(3, 4))
    assert torch.equal(net.a.weight.grad, torch.ones(8, 4)) and net.b.weight.grad is None
    assert [p.requires_grad for p in net.parameters()] == [True, True, True, True, False, True]
    assert len(net.a._forward_hooks) == 1
    assert not nn.modules.module._global_forward_hooks and not nn.modules.module._global_forward_pre_hooks


def test_a_model_without_memory_stays_without() -> None:
    with torch.device("meta"):
        net = norm_net()
    graph = niwaki.trace(net, torch.zeros(3, 4))
    assert all(t.is_meta for t in (*net.parameters(), *net.buffers()))
    assert group_of(graph, "a.weight", 0).units == 8
    real = niwaki.trace(norm_net(), torch.zeros(3, 4))
    assert graph.to_json()["groups"] == real.to_json()["groups"]


def test_a_model_without_memory_and_an_example_without() -> None:
    with torch.device("meta"):
        net = norm_net()
        example = torch.zeros(3, 4)
    assert niwaki.trace(net, example).macs == 3 * (32 + 16)


def test_a_forward_that_changes_its_weights_changes_a_copy() -> None:
    """Weights clipped in forward, on real tensors."""

    def forward(n: Any, x: torch.Tensor) -> torch.Tensor:
        n.a.weight.data.clamp_(-0.01, 0.01)
        return real_only(n, x)

    net = norm_net(forward)
    before = net.a.weight.detach().clone()
    niwaki.trace(net, torch.randn(3, 4))
    assert torch.equal(net.a.weight, before)


def test_an_embedding_that_renormalises_its_rows_is_left_alone() -> None:
    net = Net(
        lambda n, i: n.b(n.e(i)) if int(i.sum()) >= 0 else n.b(-n.e(i)),
        e=nn.Embedding(5, 6, max_norm=0.1),
        b=nn.Linear(6, 2),
    )
    before = net.e.weight.detach().clone()
    assert niwaki.trace(net, torch.arange(5)).device == "cpu"
    assert torch.equal(net.e.weight, before)


@pytest.mark.parametrize("kind", ["torch", "python", "numpy"])
def test_random_states_are_as_before(kind: str) -> None:
    """A forward that draws numbers."""
    draw = {"torch": lambda: float(torch.rand(())), "python": random.random, "numpy": lambda: float(np.random.rand())}[
        kind
    ]
    net = Net(lambda n, x: n.b(n.a(x)) * (1 + 0 * draw()), a=nn.Linear(4, 8), b=nn.Linear(8, 2))

    def state() -> Any:
        return (
            torch.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tolist(),
            np.random.get_state()[2],
        )

    before = state()
    niwaki.trace(net, torch.randn(1, 4))  # the example's own numbers are drawn before
    after = state()
    torch.manual_seed(0)
    assert before[1:] == after[1:]
    if kind == "torch":
        example = torch.randn(1, 4)
        before = state()
        niwaki.trace(net, example)
        assert state() == before


def test_the_example_is_left_alone() -> None:
    net = Net(lambda n, x: n.b(n.a(x.mul_(2))) if float(x.sum()) != 0.5 else x, a=nn.Linear(4, 8), b=nn.Linear(8, 2))
    example = torch.ones(1, 4)
    niwaki.trace(net, example)
    assert example.tolist() == [[1.0, 1.0, 1.0, 1.0]]


def test_an_exception_in_forward_leaves_no_hook_and_no_mode() -> None:
    def forward(n: Any, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("broken")

    fast = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(niwaki.errors.InputError, match="ValueError: broken"):
        niwaki.trace(norm_net(forward), torch.randn(3, 4))
    assert not nn.modules.module._global_forward_hooks
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert niwaki.trace(norm_net(), torch.randn(3, 4)).macs == 144


def test_recurrent_and_training_only_parts() -> None:
    """A head that only runs in training mode is labelled too, and shares widths with what it reads."""

    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.aside = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> Any:
            y = self.a(x).relu()
            return (self.b(y), self.aside(y)) if self.training else self.b(y)

    net = Aside().eval()
    graph = niwaki.trace(net, torch.randn(1, 4))
    assert {m.tensor for m in group_of(graph, "a.weight", 0).members} == {
        "a.weight",
        "a.bias",
        "b.weight",
        "aside.weight",
    }
    assert graph.macs == 32 + 16  # the second look is not counted


def test_heads_of_training_that_keep_statistics_of_single_samples() -> None:
    """Batch norm refuses one sample of one position while training; its widths are known all the same."""

    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)
            self.aside = nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))

        def forward(self, x: torch.Tensor) -> Any:
            y = self.a(x).relu()
            return (self.b(y), self.aside(y)) if self.training else self.b(y)

    graph = niwaki.trace(Aside().eval(), torch.randn(1, 4))
    group = group_of(graph, "aside.0.weight", 0)
    assert group.fixed is None
    assert {m.tensor for m in group.members} >= {"aside.0.weight", "aside.1.weight", "aside.1.running_var"}


def test_what_only_a_failing_training_forward_saw_is_fixed() -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> Any:
            y = self.a(x)
            if self.training:
                self.b(y)
                raise ValueError("targets are missing")
            return y[:, :2]

    graph = niwaki.trace(Aside().eval(), torch.randn(1, 4))
    assert group_of(graph, "b.weight", 0).fixed == "the forward in training mode fails"
    assert "c.weight" in graph.unused


class Watcher:
    """A user's hook as an object, as a bound method and as a function."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def __call__(self, *args: Any) -> None:
        self.calls.append(args)

    def method(self, module: nn.Module, *args: Any) -> None:
        self.calls.append(args)


@pytest.mark.parametrize("forward", [None, real_only], ids=["meta", "real"])
@pytest.mark.parametrize("kind", ["object", "method", "function", "partial"])
def test_the_users_hooks_do_not_run(forward: Any, kind: str) -> None:
    """A deep copy of an object counts for itself, so what runs is seen by a list that all copies share."""
    calls: list[int] = []
    seen = type("Seen", (Watcher,), {"__deepcopy__": lambda self, memo: self, "calls": None})()
    seen.calls = calls
    hook = {
        "object": seen,
        "method": seen.method,
        "function": lambda *_: calls.append(1),
        "partial": functools.partial(lambda *_: calls.append(1), 0),
    }[kind]
    net = norm_net(forward)
    net.a.register_forward_hook(hook)
    net.bn.register_forward_pre_hook(hook)
    graph = niwaki.trace(net, torch.randn(3, 4))
    scores = niwaki.score(graph, niwaki.collect(net, graph, set()), how=niwaki.scores.Random())
    assert niwaki.cut(net, niwaki.choose(graph, scores, niwaki.Budget(keep=0.9))).a.out_features < 8
    assert not calls and len(net.a._forward_hooks) == len(net.bn._forward_pre_hooks) == 1


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("wrap", ["weight_norm", "spectral_norm"])
def test_hooks_that_torch_computes_weights_in_stay(wrap: str) -> None:
    def made(wrapped: Any) -> Net:
        return Net(lambda n, x: n.b(n.a(x).relu()), a=wrapped(nn.Linear(4, 8)), b=nn.Linear(8, 2))

    net = made(getattr(nn.utils, wrap))
    assert net.a._forward_pre_hooks
    net.a.register_forward_pre_hook(lambda *_: 1 / 0)
    graph = niwaki.trace(net, torch.randn(3, 4))
    assert len(net.a._forward_pre_hooks) == 2
    assert ("a.weight_g" if wrap == "weight_norm" else "a.weight_orig") not in graph.unused


@pytest.mark.parametrize("model", [3, None, lambda x: x, nn.Linear], ids=["number", "none", "function", "class"])
def test_what_is_no_network_is_refused(model: Any) -> None:
    x = torch.zeros(1, 4)
    plan = niwaki.Plan("", "Net", {}, {}, (), {})
    for call in (
        lambda: niwaki.trace(model, x),
        lambda: niwaki.measure(model, x),
        lambda: niwaki.cut(model, plan),
        lambda: niwaki.mask(model, plan),
    ):
        with pytest.raises(niwaki.errors.InputError, match=r"not an nn\.Module"):
            call()


def test_hooks_of_the_models_own_package_stay_in_the_copy() -> None:
    """A forward that goes on with what hooks of its own package took down (hidden states) needs them."""
    taken: list[torch.Tensor] = []

    class Taking(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(4, 6), torch.nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            taken.clear()
            self.a(x)
            return self.b(taken[0])

    def take(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        taken.append(output)

    Taking.__module__, take.__module__ = "package.models", "package.hooks"
    net = Taking()
    net.a.register_forward_hook(take)
    net.b.register_forward_hook(lambda *_: 1 / 0)
    graph = niwaki.trace(net, torch.randn(1, 4))
    assert [group.units for group in graph.groups if group.fixed is None] == [6]


def test_no_copy_of_the_model_is_left_behind() -> None:
    """What a cycle holds stays until Python looks for cycles: seconds later, or never where that is switched off."""

    class Own(nn.Linear):
        pass

    net = nn.Sequential(Own(4, 8), nn.ReLU(), Own(8, 2))

    def alive() -> int:
        return sum(type(thing) is Own for thing in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        graph = niwaki.trace(net, torch.zeros(1, 4))
        assert alive() == 2
        how = niwaki.scores.Random()
        scores = niwaki.score(graph, niwaki.collect(net, graph, how.needs), how=how)
        plan = niwaki.choose(graph, scores, niwaki.Budget(keep=0.5, of="units"))
        small = niwaki.cut(net, plan)
        assert alive() == 4
        gone = weakref.ref(small)
        del small
        assert gone() is None and alive() == 2
    finally:
        gc.enable()


def test_a_module_that_torch_compiles_is_left_alone_and_traced_as_it_is_written() -> None:
    net = norm_net()
    net.a.compile(backend="eager")
    told = vars(net.a)["_compiled_call_impl"]
    graph = niwaki.trace(net, torch.zeros(1, 4))
    assert vars(net.a)["_compiled_call_impl"] is told and "_compiled_call_impl" not in vars(net.b)
    assert [record.module for record in graph.records if record.name == "addmm"] == ["a", "b"]


class Fails(nn.Module):
    error = ValueError("not today")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise self.error


def test_after_a_part_that_fails_the_caller_runs() -> None:
    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        try:
            x = net.odd(net.a(x))
        except ValueError:
            x = net.a(x)
        return net.b(x.relu())

    holder = nn.Sequential(Net(forward, a=nn.Linear(4, 8), odd=Fails(), b=nn.Linear(8, 2)), nn.Tanh())
    graph = niwaki.trace(holder, torch.zeros(1, 4))
    where = {record.name: record.module for record in graph.records}
    assert where["relu"] == "0" and where["tanh"] == "1"
    assert "0.odd" not in graph.features and set(graph.features) == {"0.a", "0.b", "0", "1", ""}


def test_an_error_is_told_of_the_innermost_part() -> None:
    def told(net: Any, x: torch.Tensor) -> torch.Tensor:
        try:
            return net.odd(net.a(x))
        except ValueError as error:
            raise TypeError("nor tomorrow") from error

    def other(net: Any, x: torch.Tensor) -> torch.Tensor:
        with contextlib.suppress(ValueError):
            net.odd(x)
        raise TypeError(str(net.a(x).shape))

    for forward, place in ((told, "0.odd"), (other, "0")):
        holder = nn.Sequential(Net(forward, a=nn.Linear(4, 8), odd=Fails()))
        recorder = Recorder(LabelSpace(), walk(holder))
        with recorder, pytest.raises(TypeError) as caught:
            holder(torch.zeros(1, 4))
        assert recorder.where(caught.value) == place
        assert recorder.where(RuntimeError()) == ""


def test_an_error_that_was_met_before_is_told_of_where_it_is_now() -> None:
    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        with contextlib.suppress(ValueError):
            net.a(x)
        answer: torch.Tensor = net.b(x)
        return answer

    holder = nn.Sequential(Net(forward, a=Fails(), b=Fails()))
    recorder = Recorder(LabelSpace(), walk(holder))
    with recorder, pytest.raises(ValueError) as caught:
        holder(torch.zeros(1, 4))
    assert recorder.where(caught.value) == "0.b"


@pytest.mark.parametrize("hooked", [False, True])
def test_a_copy_has_tables_of_its_own(hooked: bool) -> None:
    net = norm_net()
    if hooked:
        net.a.register_forward_hook(lambda *_: None)
    copy = copy_with(net, lambda tensor: tensor.detach().clone())
    for (_, old), (_, new) in zip(walk(net), walk(copy), strict=True):
        tables = {name: table for name, table in vars(old).items() if isinstance(table, (dict, set))}
        assert len(tables) > 12 and list(vars(new)) == list(vars(old))
        for name, table in tables.items():
            twin = vars(new)[name]
            assert twin is not table and type(twin) is type(table) and len(twin) == len(table)
        own = [id(vars(new)[name]) for name in tables]
        assert len(set(own)) == len(own)


def test_modules_that_a_forward_makes_belong_to_who_makes_them() -> None:
    net = norm_net(lambda n, x: n.b(nn.Softplus()(n.a(x))))
    graph = niwaki.trace(net, torch.zeros(1, 4))
    assert next(record.module for record in graph.records if record.name == "softplus") == ""
    assert len(graph.features[""]) == 1 and graph.features[""][0] is graph.results[0]


@pytest.mark.parametrize("kept", [False, True], ids=["nothing frozen", "frozen by the user"])
def test_the_search_for_cycles_goes_on_as_before(kept: bool) -> None:
    if kept:
        gc.freeze()
    frozen = gc.get_freeze_count()
    try:
        net = nn.Sequential(*[nn.Linear(8, 8) for _ in range(60)])
        searches: list[str] = []
        gc.collect()
        gc.callbacks.append(lambda phase, _: searches.append(phase))
        graph = niwaki.trace(net, torch.zeros(1, 8))
        found = len(searches)
        gc.callbacks.pop()
        assert gc.isenabled() and bool(frozen) == kept and len(graph.records) > 60
        assert 0.99 * frozen <= gc.get_freeze_count() <= frozen  # what was freed since is not counted
        assert kept or not found
    finally:
        gc.unfreeze()
