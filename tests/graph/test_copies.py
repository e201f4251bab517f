"""Copies of a model: all their tensors are those they are told to have, and nothing else of them is the original's."""

import copy
from typing import Any

import torch
from labelled import Net
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations

from niwaki.graph.skeleton import Ties, copy_with, identity, like, readied, to_meta


class Holder(nn.Module):
    """Tensors and modules in places of its own, and one list in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 4, 1), nn.ReLU()])
        self.loose = [torch.ones(2), {"in": torch.zeros(3)}]
        self.first: list[Any] = []
        self.again = self.first
        self.sizes = [1, 2]
        self.same = self.sizes
        self.owner = (self.layers[0],)


def traced() -> nn.Module:
    return Net(
        lambda n, x: n.graph(x), graph=fx.symbolic_trace(nn.Sequential(nn.Sequential(nn.Linear(3, 4)), nn.Linear(4, 2)))
    )


def weighted() -> nn.Module:
    return nn.Sequential(nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4))), nn.LSTM(4, 5), nn.BatchNorm1d(5))


def test_nothing_of_a_copy_is_the_originals() -> None:
    """Modules that leave copying to Python, a traced graph that copies itself, and classes made on the fly."""
    for network in (Holder(), traced(), weighted()):
        twin = copy_with(network, lambda t: like(t, t.detach().clone() + 1))
        mine, theirs = list(network.modules()), list(twin.modules())
        assert [type(m).__qualname__ for m in theirs] == [
            type(m).__qualname__ for m in copy.deepcopy(network).modules()
        ]
        assert not {id(m) for m in mine} & {id(m) for m in theirs}
        assert [name for name, _ in twin.named_modules()] == [name for name, _ in network.named_modules()]
        before, after = dict(network.state_dict(keep_vars=True)), dict(twin.state_dict(keep_vars=True))
        assert before.keys() == after.keys() and before
        for name, tensor in before.items():
            assert torch.equal(after[name], tensor + 1) and type(after[name]) is type(tensor)
        for module, other in zip(mine, theirs, strict=True):
            assert list(vars(module)) == list(vars(other)) or isinstance(module, (fx.GraphModule, nn.LSTM))
            tables = [value for value in vars(module).values() if isinstance(value, (dict, list, set))]
            assert not {id(table) for table in tables} & {id(value) for value in vars(other).values()}


def test_what_was_one_object_is_one_in_the_copy() -> None:
    network = Holder()
    twin: Any = copy_with(network, lambda t: like(t, t.detach() * 2))
    assert twin.first is twin.again and twin.first is not network.first
    assert twin.sizes is twin.same and twin.sizes is not network.sizes
    assert twin.owner[0] is twin.layers[0]
    assert twin.loose[0].tolist() == [2, 2] and twin.loose[1]["in"] is not network.loose[1]["in"]


def test_skeletons_have_no_memory_and_are_ready() -> None:
    network = weighted().train()
    skeleton = readied(copy_with(network, to_meta))
    assert all(t.is_meta for t in (*skeleton.parameters(), *skeleton.buffers()))
    assert not any(m.training for m in skeleton.modules()) and network.training
    assert [tuple(t.shape) for t in skeleton.parameters()] == [tuple(t.shape) for t in network.parameters()]


def test_keys_are_equal_where_tensors_are_the_same_memory_in_the_same_shape() -> None:
    base = torch.arange(6.0)
    tensors: list[Tensor] = [base, base.view(6), base.view(2, 3), base[:3], base.view(2, 3), torch.arange(6.0)]
    tensors += [torch.zeros(0), torch.zeros(0), nn.Parameter(base)]
    for order in (tensors, tensors[::-1]):
        ties = Ties()
        keys = [ties.key(tensor) for tensor in order]
        for a, one in zip(keys, order, strict=True):
            for b, other in zip(keys, order, strict=True):
                assert (a == b) == (identity(one) == identity(other))
