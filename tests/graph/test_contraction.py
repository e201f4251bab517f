"""Matrix products, convolutions of every rank and kind, einsum, tensordot: what is tied, and the cost, by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from labelled import Net, coupled, cut_and_judge, group_of
from torch import nn

import niwaki

CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def picture(rank: int, channels: int, size: int = 5) -> torch.Tensor:
    return torch.randn(2, channels, *(size,) * rank)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_plain_convolutions(rank: int) -> None:
    """3 -> 8 -> 2, kernel 3 then 1, on 5^rank without padding: 3^rank positions, MACs by hand."""
    conv = CONVS[rank]
    net = nn.Sequential(conv(3, 8, 3), nn.ReLU(), conv(8, 2, 1))
    graph = niwaki.trace(net, picture(rank, 3))
    assert coupled(graph, "0.weight:0", "0.bias:0", "2.weight:1")
    n = 2 * 3**rank  # batch x positions
    assert graph.macs == n * 3 * 8 * 3**rank + n * 8 * 2
    plan, small, receipt = cut_and_judge(net, picture(rank, 3))
    assert (small[0].out_channels, small[2].in_channels) == (4, 4)
    assert plan.promised["macs"] == n * 3 * 4 * 3**rank + n * 4 * 2
    assert receipt.exact and receipt.passed


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_transposed_convolutions(rank: int) -> None:
    """The weight is [in, out, ...]; each input position writes a whole kernel: MACs = in positions x in x
    out x kernel.
    """
    net = nn.Sequential(CONVS[rank](3, 8, 1), TRANSPOSED[rank](8, 6, 2, stride=2), CONVS[rank](6, 2, 1))
    graph = niwaki.trace(net, picture(rank, 3, 3))
    assert coupled(graph, "0.weight:0", "1.weight:0") and coupled(graph, "1.weight:1", "1.bias:0", "2.weight:1")
    n, m = 2 * 3**rank, 2 * 6**rank
    assert graph.macs == n * 3 * 8 + n * 8 * 6 * 2**rank + m * 6 * 2
    _, small, receipt = cut_and_judge(net, picture(rank, 3, 3))
    assert (small[1].in_channels, small[1].out_channels) == tuple(small[1].weight.shape[:2])
    assert receipt.passed


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_depthwise_convolutions(rank: int) -> None:
    """Each channel is one with its filter; with a multiplier of 2 each unit has two outputs."""
    conv = CONVS[rank]
    for multiplier in (1, 2):
        net = nn.Sequential(conv(3, 8, 1), conv(8, 8 * multiplier, 3, groups=8), conv(8 * multiplier, 2, 1))
        graph = niwaki.trace(net, picture(rank, 3))
        group = group_of(graph, "1.weight", 0)
        assert (group.units, group.fixed) == (8, None)
        outputs = {m.tensor: m.unit.tolist() for m in group.members if m.axis == 0 and m.tensor.startswith("1.")}
        assert outputs["1.weight"] == [i // multiplier for i in range(8 * multiplier)]
        _, small, receipt = cut_and_judge(net, picture(rank, 3))
        assert (small[1].groups, small[1].in_channels, small[1].out_channels) == (4, 4, 4 * multiplier)
        assert receipt.exact and receipt.passed


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("grids", ["rows", "columns"])
def test_grouped_convolutions(rank: int, grids: str) -> None:
    """12 -> 8 in 4 groups: 4 rows of 3 inputs and of 2 outputs. Whole groups go, or equally many channels of each."""
    conv = CONVS[rank]
    net = nn.Sequential(conv(3, 12, 1), conv(12, 8, 3, groups=4), conv(8, 2, 1))
    graph = niwaki.trace(net, picture(rank, 3))
    group = group_of(graph, "0.weight", 0)
    assert (group.kind, group.rows, group.fixed) == ("grid", 4, None)
    inner = next(m for g in graph.groups for m in g.members if (m.tensor, m.axis) == ("1.weight", 1))
    assert inner.blocks == 4
    _, small, receipt = cut_and_judge(net, picture(rank, 3), keep=0.6 if grids == "rows" else 0.8, grids=grids)
    layer = small[1]
    assert layer.groups == 4 if grids == "columns" else layer.groups < 4
    assert tuple(layer.weight.shape[:2]) == (layer.out_channels, layer.in_channels // layer.groups)
    assert receipt.exact and receipt.passed


def test_grouped_transposed_convolution() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 4, 2, groups=2), nn.Conv2d(4, 2, 1))
    _, small, receipt = cut_and_judge(net, picture(2, 3), keep=0.6)
    assert receipt.exact and receipt.passed
    assert small[1].weight.shape[0] == small[1].in_channels


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_padding_of_every_mode(mode: str) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, padding_mode=mode),
        nn.Conv2d(8, 2, 3, padding="same", dilation=2, padding_mode=mode),
    )
    _, small, receipt = cut_and_judge(net, picture(2, 3))
    assert small[0].out_channels == 4 and receipt.passed


def test_pictures_without_a_batch() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
    graph = niwaki.trace(net, torch.randn(3, 5, 5))
    assert graph.macs == 9 * 3 * 8 * 9 + 9 * 8 * 2
    _, small, receipt = cut_and_judge(net, torch.randn(3, 5, 5))
    assert small[0].out_channels == 4 and receipt.passed


def test_one_channel_in_or_out() -> None:
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Conv2d(6, 1, 3), nn.Conv2d(1, 4, 1), nn.Conv2d(4, 2, 1))
    graph = niwaki.trace(net, torch.randn(1, 1, 7, 7))
    assert graph.macs == 25 * 6 * 9 + 9 * 6 * 9 + 9 * 4 + 9 * 4 * 2
    _, small, receipt = cut_and_judge(net, torch.randn(1, 1, 7, 7))
    assert small[1].out_channels == 1 and receipt.passed


# a: [2, 3 tokens, 8] by the first layer, w: [8, 6], then a layer of 6 -> 2
PRODUCTS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "matmul": lambda n, a: a @ n.w,
    "matmul of vectors": lambda n, a: torch.stack([torch.stack([row @ n.w for row in item]) for item in a]),
    "mm": lambda n, a: torch.mm(a.flatten(0, 1), n.w).unflatten(0, (2, 3)),
    "addmm": lambda n, a: torch.addmm(n.bias, a.flatten(0, 1), n.w).unflatten(0, (2, 3)),
    "addmm beta 0": lambda n, a: torch.addmm(n.bias, a.flatten(0, 1), n.w, beta=0).unflatten(0, (2, 3)),
    "addmm alpha": lambda n, a: torch.addmm(n.bias, a.flatten(0, 1), n.w, alpha=2.0).unflatten(0, (2, 3)),
    "bmm": lambda n, a: torch.bmm(a, n.w.expand(2, 8, 6)),
    "baddbmm": lambda n, a: torch.baddbmm(n.bias.expand(2, 3, 6), a, n.w.expand(2, 8, 6)),
    "linear": lambda n, a: F.linear(a, n.w.t(), n.bias),
    "linear without bias": lambda n, a: F.linear(a, n.w.mT),
    "einsum": lambda n, a: torch.einsum("btk,kn->btn", a, n.w),
    "einsum with dots": lambda n, a: torch.einsum("...k,kn->...n", a, n.w),
    "einsum transposed": lambda n, a: torch.einsum("nk,btk->btn", n.w.t(), a),
    "einsum to the front": lambda n, a: torch.einsum("btk,kn->nbt", a, n.w).permute(1, 2, 0),
    "einsum of three": lambda n, a: torch.einsum("btk,k,kn->btn", a, n.scale, n.w),
    "tensordot": lambda n, a: torch.tensordot(a, n.w, 1),
    "tensordot of axes": lambda n, a: torch.tensordot(a, n.w.t(), ([2], [1])),
    "product and sum": lambda n, a: (a.unsqueeze(-1) * n.w).sum(2),
    "inner": lambda n, a: torch.inner(a, n.w.t()),
    "chain": lambda n, a: torch.linalg.multi_dot([a.flatten(0, 1), n.w, n.square]).unflatten(0, (2, 3)),
    "addmv": lambda n, a: torch.stack([torch.addmv(n.bias, n.w.t(), row) for row in a.flatten(0, 1)]).unflatten(
        0, (2, 3)
    ),
    "addmm_ in place": lambda n, a: a.new_zeros(6, 6).addmm_(a.flatten(0, 1), n.w).unflatten(0, (2, 3)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_every_spelling_of_a_product_ties_the_contracted_axis(name: str) -> None:
    net = Net(
        lambda n, x: n.out(PRODUCTS[name](n, n.first(x))),
        first=nn.Linear(4, 8),
        out=nn.Linear(6, 2),
        w=nn.Parameter(torch.randn(8, 6)),
        bias=nn.Parameter(torch.randn(6)),
        scale=nn.Parameter(torch.randn(8)),
        square=nn.Parameter(torch.randn(6, 6)),
    )
    example = torch.randn(2, 3, 4)
    graph = niwaki.trace(net, example)
    assert not graph.unknown
    assert coupled(graph, "first.weight:0", "w:0")
    assert group_of(graph, "w", 0).fixed is None and group_of(graph, "w", 1).fixed is None
    if name != "chain":
        assert coupled(graph, "w:1", "out.weight:1")
    if "chain" not in name and "three" not in name and "product and sum" not in name:
        assert graph.macs == 6 * 4 * 8 + 6 * 8 * 6 + 6 * 6 * 2
    plan, _small, receipt = cut_and_judge(net, example)
    assert plan.promised["units"] == 0.5 * plan.promised["units_before"]
    assert receipt.passed, receipt


def test_outer_product_keeps_both_axes() -> None:
    net = Net(lambda n, x: n.c(torch.outer(n.a(x), n.b(x))), a=nn.Linear(4, 3), b=nn.Linear(4, 6), c=nn.Linear(6, 2))
    graph = niwaki.trace(net, torch.randn(4))
    assert coupled(graph, "b.weight:0", "c.weight:1")
    assert group_of(graph, "a.weight", 0).fixed == "output of the model"


def test_bilinear_einsum_over_two_axes() -> None:
    """b i, i j o, b j -> b o: both contracted axes are tied to their producers."""
    net = Net(
        lambda n, x: torch.einsum("bi,ijo,bj->bo", n.a(x), n.w, n.b(x)),
        a=nn.Linear(4, 6),
        b=nn.Linear(4, 8),
        w=nn.Parameter(torch.randn(6, 8, 2)),
    )
    graph = niwaki.trace(net, torch.randn(3, 4))
    assert coupled(graph, "a.weight:0", "w:0")
    assert group_of(graph, "b.weight", 0).fixed is None and group_of(graph, "w", 2).fixed == "output of the model"
    _, small, receipt = cut_and_judge(net, torch.randn(3, 4))
    tensors = dict(small.named_parameters())
    assert tensors["w"].shape == (tensors["a.weight"].shape[0], tensors["b.weight"].shape[0], 2)
    assert receipt.passed


def test_embedding_rows_are_fixed_and_columns_free() -> None:
    net = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 2))
    example = torch.randint(10, (2, 5))
    graph = niwaki.trace(net, example)
    assert group_of(graph, "0.weight", 0).fixed == "rows of a table picked by data"
    assert coupled(graph, "0.weight:1", "1.weight:1")
    _, small, receipt = cut_and_judge(net, example)
    assert small[0].embedding_dim == 4 and receipt.passed


@pytest.mark.parametrize("kind", ["norm", "renorm"])
def test_a_norm_that_is_changed_by_zeros_is_declared(kind: str) -> None:
    """The smallest entry changes when zeros are removed, and renorm's norm runs across what `dim` does not name."""
    change = {
        "norm": lambda y: y / (1 + torch.linalg.vector_norm(y, float("-inf"), dim=1, keepdim=True)),
        "renorm": lambda y: torch.renorm(torch.sigmoid(y), 2, 0, 1.0),
    }[kind]
    net = Net(lambda n, x: n.b(change(n.a(x))), a=nn.Linear(4, 8), b=nn.Linear(8, 2))
    assert not group_of(niwaki.trace(net, torch.randn(3, 4)), "a.weight", 0).exact


def test_sums_are_exact_of_zeros_and_means_are_not() -> None:
    """sum over channels of relu(conv) is exact; of sigmoid (0.5 at zero) or a mean it is not."""
    for change, exact in (
        (lambda y: y.relu().sum(1, keepdim=True), True),
        (lambda y: y.sigmoid().sum(1, keepdim=True), False),
        (lambda y: y.mean(1, keepdim=True), False),
        (lambda y: y.amax(1, keepdim=True), False),
        (lambda y: y.softmax(1), False),
        (lambda y: y.abs().sum((1, 2), keepdim=True), True),
    ):
        net = Net(
            lambda n, x, change=change: n.b(n.a(x)) + change(n.a(x)).sum(), a=nn.Conv1d(3, 8, 1), b=nn.Conv1d(8, 2, 1)
        )
        graph = niwaki.trace(net, torch.randn(2, 3, 4))
        assert group_of(graph, "a.weight", 0).exact is (exact or False), change


@pytest.mark.parametrize(
    ("change", "exact"),
    [
        (lambda n, y: y, True),
        (lambda n, y: y * n.gate, True),  # nothing where channels are gone, whatever the gate
        (lambda n, y: y + n.along, True),  # a bias of the channels goes with them
        (lambda n, y: y + n.gate, False),
        (lambda n, y: n.mix(y.transpose(1, 2)).transpose(1, 2), False),
        (lambda n, y: n.conv(y), False),
        (lambda n, y: n.plain(y), True),
        (lambda n, y: y + n.gate.expand(5, 8), False),
        (lambda n, y: torch.cat([y[:, :2], n.gate.expand(2, 5, 8)[:, 2:]], 1), False),
        (lambda n, y: torch.cat([y[:, :2], torch.zeros(2, 3, 8, device=y.device)], 1), True),
        (lambda n, y: torch.stack([y, n.gate.expand(2, 5, 8)], 1).flatten(1, 2), False),
        (lambda n, y: F.layer_norm(y.transpose(1, 2), (5,), n.ends, n.ends).transpose(1, 2), False),
        (lambda n, y: torch.baddbmm(n.gate[None], n.mix.weight[None].expand(2, 5, 5), y), False),
        (lambda n, y: y.slice_scatter(n.gate.expand(2, 5, 8)[:, :2], 1, 0, 2), False),
    ],
)
def test_only_what_a_channel_owns_is_zero_without_it(change: Any, exact: bool) -> None:
    """y^T y over 8 channels: exact where all of y is zero at a channel whose weights are zero."""
    net = Net(
        lambda n, x: change(n, n.a(x)) @ change(n, n.a(x)).transpose(1, 2),
        a=nn.Linear(3, 8),
        gate=nn.Parameter(torch.randn(5, 1)),
        along=nn.Parameter(torch.randn(8)),
        ends=nn.Parameter(torch.randn(5)),
        mix=nn.Linear(5, 5),
        conv=nn.Conv1d(5, 5, 1),
        plain=nn.Conv1d(5, 5, 1, bias=False),
    )
    assert group_of(niwaki.trace(net, torch.randn(2, 5, 3)), "a.weight", 0).exact is exact
    if exact:
        assert cut_and_judge(net, torch.randn(2, 5, 3))[2].passed
