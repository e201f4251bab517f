"""The second door: the same numbers, any batch, training, moves, saving as data."""

import copy
import json
from typing import Any

import pytest
import torch
from planned import Hard, keeping
from torch import Tensor, nn

import niwaki
from niwaki.errors import FileDamagedError
from niwaki.graph.plans import alive_of
from niwaki.surgery import surgery_of
from niwaki.surgery.exported import Exported, cut_exported, rebuild
from niwaki.surgery.graph_json import _target

X = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))


def made(model: nn.Module | None = None, kept: dict[str, list[int]] | None = None) -> tuple[nn.Module, Any, Any]:
    model = (model or Hard()).eval()
    plan = keeping(model, X, kept or {"a": [0, 2, 5]})
    return model, niwaki.cut(model, plan), plan


def test_the_numbers_of_the_kept_units() -> None:
    model, small, plan = made()
    assert isinstance(small, Exported) and surgery_of(small).door == "exported"
    keep = [0, 2, 5]
    hidden = (X @ model.a.weight[keep].T + model.a.bias[keep]).relu()
    assert torch.allclose(small(X), hidden @ model.b.weight[:, keep].T + model.b.bias, atol=1e-6)
    assert {name: tuple(p.shape) for name, p in small.named_parameters()} == {
        "a.weight": (3, 3),
        "a.bias": (3,),
        "b.weight": (2, 3),
        "b.bias": (2,),
    }
    assert niwaki.verify(model, small, plan, X).passed


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_any_batch(batch: int) -> None:
    _, small, _ = made()
    x = torch.randn(batch, 3)
    assert small(x).shape == (batch, 2)
    assert torch.allclose(small(x)[0], small(x[:1])[0], atol=1e-6)


def test_it_trains_in_training_mode_too() -> None:
    _, small, _ = made()
    small.train()
    small(X).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_dropout_and_batch_norm_follow_the_mode() -> None:
    class Noisy(Hard):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.drop(self.norm(self.a(x)).view(-1, 8).relu()))

    _, small, _ = made(Noisy())
    assert torch.equal(small(X), small(X))
    before = small.get_buffer("norm.running_mean").clone()
    small.train()
    assert not torch.equal(small(X), small(X))
    assert not torch.equal(small.get_buffer("norm.running_mean"), before)


def test_it_follows_a_change_of_precision() -> None:
    _, small, _ = made()
    assert copy.deepcopy(small).double()(X.double()).dtype == torch.float64


def test_parameters_keep_their_flags_and_ties() -> None:
    model = Hard()
    model.a.weight.requires_grad_(False)
    _, small, _ = made(model)
    assert {name: p.requires_grad for name, p in small.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }


def test_as_data_and_back_bit_for_bit() -> None:
    _, small, _ = made()
    text = json.dumps(surgery_of(small).graph)
    tensors = {name: t.detach().clone() for name, t in small.state_dict().items()}
    again = rebuild(json.loads(text), tensors, dict.fromkeys(tensors, True)).eval()
    assert torch.equal(again(X), small(X))


def test_a_model_that_only_exports_for_evaluation_says_so_in_training() -> None:
    class Branch(Hard):
        def forward(self, x: Tensor) -> Tensor:
            if self.training and float(x.sum()) > 0:
                x = x + 1
            return super().forward(x)

    _, small, _ = made(Branch())
    assert small(X).shape == (2, 2)
    with pytest.raises(RuntimeError, match=r"no training graph: .*; call eval\(\) first"):
        small.train()(X)


@pytest.mark.parametrize(
    "forward",
    {
        "split": lambda n, y: torch.cat([p * (i + 1) for i, p in enumerate(y.split([5, 3], 1))], 1),
        "chunk": lambda n, y: torch.cat([c.relu() for c in y.chunk(2, 1)], 1),
        "slice": lambda n, y: (
            torch.cat([y[:, 5:], y[:, :5]], 1)[:, [*range(8)]] if False else torch.cat([y[:, :5].relu(), y[:, 5:]], 1)
        ),
        "unflatten": lambda n, y: y.unflatten(1, (8, 1)).flatten(1),
        "expand": lambda n, y: y + torch.ones(1, 1, device=y.device).expand(1, 8),
        "zeros": lambda n, y: y + torch.zeros(8, device=y.device),
        "layer norm": lambda n, y: nn.functional.layer_norm(y, (8,)),
        "pad": lambda n, y: nn.functional.pad(y[:, :6], (0, 2)).relu() + y * 2,
    }.values(),
    ids=["split", "chunk", "slice", "unflatten", "expand", "zeros", "layer norm", "pad"],
)
def test_sizes_in_a_forward_are_corrected(forward: Any) -> None:
    """Each of these holds a number that the cut changes; whichever door opens, the result is right."""

    class Sized(Hard):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(forward(self, self.a(x)).view(-1, 8).relu())

    model = Sized().eval()
    graph = niwaki.trace(model, X)
    how = niwaki.scores.Random()
    scores = niwaki.score(graph, niwaki.collect(model, graph, how.needs), how=how)
    plan = niwaki.choose(graph, scores, niwaki.Budget(keep=0.7, of="units"))
    small = niwaki.cut(model, plan)
    receipt = niwaki.verify(model, small, plan, X)
    assert plan.kept and receipt.passed


def test_an_argument_named_like_a_builtin() -> None:
    """`nn.Sequential` calls its argument `input`, a name that a copied graph does not keep."""
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    plan = keeping(model, X, {"0": [0, 2, 5]})
    small, reason = cut_exported(model, plan, plan.graph, alive_of(plan.graph, plan))
    assert small is not None, reason
    assert torch.allclose(small(X), niwaki.cut(model, plan)(X), atol=1e-6)


def test_a_forward_that_names_a_device() -> None:
    """The graph holds the device among the plain arguments of `to`; the check runs without numbers all the same."""

    class Placed(Hard):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + torch.ones(1).to(x.device, x.dtype))

    model, small, plan = made(Placed())
    assert isinstance(small, Exported)
    assert niwaki.verify(model, small, plan, X).passed


def test_copies_of_one_position_are_as_many_as_stay() -> None:
    """A bias of one row is repeated for 4 heads; 2 stay. What is repeated whole (3 times 8) keeps its 3 copies."""

    class Repeats(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(24, 2)

        def forward(self, x: Tensor) -> Tensor:
            offset = x.sum(1, keepdim=True).repeat(1, 8)
            return self.b((self.a(x) + offset).view(-1, 8).repeat(1, 3))

    model, small, plan = made(Repeats(), {"a": [0, 2, 5]})
    assert isinstance(small, Exported)
    assert niwaki.verify(model, small, plan, X).passed
    assert [n.args[1] for n in small._programs[False].graph.nodes if "repeat" in str(n.target)] == [[1, 3], [1, 3]]


@torch.library.custom_op("niwaki_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return x * 2


@doubled.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("niwaki_tests::named", mutates_args=())
def named(x: Tensor, file: str) -> Tensor:
    return x * len(file)


def test_operators_of_a_package_are_read_where_they_only_compute() -> None:
    assert _target("call_function", "niwaki_tests::doubled|default") is torch.ops.niwaki_tests.doubled.default
    for name in ("niwaki_tests::named", "niwaki_tests::missing", "profiler::_record_function_enter"):
        with pytest.raises(FileDamagedError, match="a call of"):
            _target("call_function", f"{name}|default")


class Doubling(nn.Module):
    """A width written down, and a call of a package's operator."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.ops.niwaki_tests.doubled(self.a(x).view(-1, 2, 4)).flatten(1))


def test_what_meets_an_operator_of_a_package_stays() -> None:
    graph = niwaki.trace(Doubling(), X)
    assert [unknown.operation for unknown in graph.unknown] == ["niwaki_tests::doubled"]
    assert all(group.fixed for group in graph.groups)
