"""Tied parameters, parameters used twice, buffers, constants made in forward, loose tensors."""

from typing import Any

import pytest
import torch
from labelled import Net, coupled, cut_and_judge, group_of
from torch import nn

import niwaki


def test_a_module_called_twice_ties_both_calls() -> None:
    """x -> a -> shared -> shared -> b: in and out of the shared layer are one axis."""
    net = Net(lambda n, x: n.b(n.s(n.s(n.a(x)).relu())), a=nn.Linear(4, 8), s=nn.Linear(8, 8), b=nn.Linear(8, 2))
    graph = niwaki.trace(net, torch.randn(1, 4))
    assert coupled(graph, "a.weight:0", "s.weight:0", "s.weight:1", "s.bias:0", "b.weight:1")
    assert graph.macs == 4 * 8 + 2 * 64 + 16
    plan, small, receipt = cut_and_judge(net, torch.randn(1, 4))
    assert small.s.weight.shape == (4, 4) and receipt.passed
    assert plan.promised["macs"] == 4 * 4 + 2 * 16 + 8


def test_one_parameter_under_two_names() -> None:
    """Embedding and head share a [10, 6] table: counted once, listed under both names, one tensor after the cut."""
    net = Net(
        lambda n, i: n.head(n.body(n.table(i))),
        table=nn.Embedding(10, 6),
        body=nn.Linear(6, 6),
        head=nn.Linear(6, 10, bias=False),
    )
    net.head.weight = net.table.weight
    example = torch.arange(5)[None]
    graph = niwaki.trace(net, example)
    assert graph.params == 60 + 36 + 6
    assert graph.names["table.weight"] == ("table.weight", "head.weight")
    assert coupled(graph, "table.weight:1", "body.weight:0", "body.weight:1")
    plan, small, receipt = cut_and_judge(net, example)
    assert small.head.weight is small.table.weight and small.head.weight.shape == (10, 3)
    assert {cut["tensor"] for cut in plan.cuts} == {"table.weight", "head.weight", "body.weight", "body.bias"}
    assert plan.promised["params"] == sum(p.numel() for p in small.parameters()) == 30 + 9 + 3
    assert receipt.passed


def test_two_parameters_on_one_storage() -> None:
    """b.weight = Parameter(a.weight) holds the same memory: one set of numbers, before and after."""
    a, b = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
    b.weight = nn.Parameter(a.weight)
    net = nn.Sequential(nn.Linear(3, 6, bias=False), a, b, nn.Linear(6, 2, bias=False))
    assert a.weight.data_ptr() == b.weight.data_ptr()
    graph = niwaki.trace(net, torch.randn(1, 3))
    assert graph.params == 18 + 36 + 12
    _, small, receipt = cut_and_judge(net, torch.randn(1, 3))
    assert small[1].weight.data_ptr() == small[2].weight.data_ptr()
    assert receipt.passed


def test_a_transposed_tie() -> None:
    """An autoencoder that decodes with the encoder's weight: [6, 4] read both ways."""
    net = Net(lambda n, x: torch.nn.functional.linear(n.e(x).relu(), n.e.weight.t()), e=nn.Linear(4, 6))
    graph = niwaki.trace(net, torch.randn(1, 4))
    assert group_of(graph, "e.weight", 0).fixed is None
    _, small, receipt = cut_and_judge(net, torch.randn(1, 4))
    assert small.e.weight.shape == (3, 4) and receipt.passed


def test_one_bias_in_two_places_ties_both_widths() -> None:
    shared = nn.Parameter(torch.randn(8))
    net = Net(
        lambda n, x: n.c(n.a(x) + n.shared) + n.d(n.b(x) * n.shared),
        a=nn.Linear(4, 8),
        b=nn.Linear(4, 8),
        c=nn.Linear(8, 2),
        d=nn.Linear(8, 2),
        shared=shared,
    )
    assert coupled(
        niwaki.trace(net, torch.randn(1, 4)), "a.weight:0", "b.weight:0", "shared:0", "c.weight:1", "d.weight:1"
    )
    assert cut_and_judge(net, torch.randn(1, 4))[2].passed


def test_a_parameter_used_along_two_axes_with_one_size() -> None:
    """w @ w over a square: rows are what columns are."""
    net = Net(lambda n, x: n.b(x @ n.w @ n.w), w=nn.Parameter(torch.randn(6, 6)), b=nn.Linear(6, 2))
    graph = niwaki.trace(net, torch.randn(1, 6))
    assert group_of(graph, "w", 0).fixed == group_of(graph, "w", 1).fixed == "meets input of the model"


class Buffered(nn.Module):
    """A scale and a shift that are not trained."""

    def __init__(self, persistent: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)
        self.register_buffer("scale", torch.rand(8) + 0.5, persistent=persistent)
        self.register_buffer("count", torch.tensor(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b((self.a(x) * self.scale).relu())


@pytest.mark.parametrize("persistent", [True, False])
def test_buffers_are_cut_and_not_counted(persistent: bool) -> None:
    net = Buffered(persistent)
    graph = niwaki.trace(net, torch.randn(1, 4))
    assert coupled(graph, "a.weight:0", "scale:0", "b.weight:1")
    assert graph.params == 40 + 18
    plan, small, receipt = cut_and_judge(net, torch.randn(1, 4))
    keep = list(plan.kept[group_of(graph, "a.weight", 0).name])
    assert torch.equal(small.scale, net.scale[keep])
    assert ("scale" in small.state_dict()) is persistent and int(small.count) == 3
    assert receipt.passed


def test_uniform_constants_of_forward_fit_any_width() -> None:
    """zeros, ones, full of the traced size: any number of them will do."""
    for make in (torch.zeros, torch.ones, lambda n, device: torch.full((n,), 2.0, device=device)):
        net = Net(
            lambda n, x, make=make: n.b(n.a(x) + make(n.width, device=x.device)),
            a=nn.Linear(4, 8),
            b=nn.Linear(8, 2),
            width=8,
        )
        graph = niwaki.trace(net, torch.randn(1, 4))
        assert group_of(graph, "a.weight", 0).fixed is None
        _, small, receipt = cut_and_judge(net, torch.randn(1, 4))
        assert small.get_parameter("a.weight").shape == (4, 4) and receipt.passed


def test_constants_that_vary_are_fixed_with_the_reason() -> None:
    net = Net(lambda n, x: n.b(n.a(x) + torch.arange(8, device=x.device)), a=nn.Linear(4, 8), b=nn.Linear(8, 2))
    group = group_of(niwaki.trace(net, torch.randn(1, 4)), "a.weight", 0)
    assert group.fixed == "meets a constant made in forward by arange"


def test_loose_tensors_are_constants_that_nobody_cuts() -> None:
    """A plain attribute is neither parameter nor buffer: what meets it is fixed, and it is copied all the same."""
    net = Net(
        lambda n, x: n.b(n.a(x) * n.loose.to(x.device)), a=nn.Linear(4, 8), b=nn.Linear(8, 2), loose=torch.rand(8)
    )
    graph = niwaki.trace(net, torch.randn(1, 4))
    assert (group_of(graph, "a.weight", 0).fixed or "").startswith("meets ")


def test_the_shortcut_that_is_padded_and_strided() -> None:
    """x[:, :, ::2, ::2] padded by one channel on each side (residual networks without projections)."""

    def forward(n: Any, x: torch.Tensor) -> torch.Tensor:
        y = n.stem(x)
        return n.head(n.block(y) + nn.functional.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1)))

    net = Net(forward, stem=nn.Conv2d(3, 4, 1), block=nn.Conv2d(4, 6, 3, stride=2, padding=1), head=nn.Conv2d(6, 2, 1))
    graph = niwaki.trace(net, torch.randn(1, 3, 8, 8))
    parts = {m.tensor: m.index.tolist() for m in group_of(graph, "stem.weight", 0).members}
    assert parts["block.weight"] == [1, 2, 3, 4] or set(parts["block.weight"]) == {0, 1, 2, 3}
    _, _small, receipt = cut_and_judge(net, torch.randn(1, 3, 8, 8), keep=0.6)
    assert receipt.exact and receipt.passed
