"""Attention in its spellings: heads are a grid, the kernels agree, grouped queries keep their ratio."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from labelled import Net, cut_and_judge, group_of
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import niwaki


def heads(x: Tensor, size: int) -> Tensor:
    return x.unflatten(-1, (-1, size)).transpose(1, 2)


def together(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) / q.shape[-1] ** 0.5).softmax(-1) @ v


def by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bhqd,bhkd->bhqk", q * q.shape[-1] ** -0.5, k).softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v)


def by_bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h = q.shape[:2]
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    return torch.bmm((torch.bmm(q, k.mT) * q.shape[-1] ** -0.5).softmax(-1), v).unflatten(0, (b, h))


SPELLINGS: dict[str, Callable[..., Tensor]] = {"fused": fused, "by hand": by_hand, "einsum": by_einsum, "bmm": by_bmm}


class Attention(nn.Module):
    """Width 16, 4 query heads of 4, as many or fewer key/value heads."""

    def __init__(self, spelling: str = "fused", kv: int = 4) -> None:
        super().__init__()
        self.size, self.spelling, self.repeat = 4, spelling, 4 // kv
        self.q, self.k, self.v = nn.Linear(6, 16), nn.Linear(6, 4 * kv), nn.Linear(6, 4 * kv)
        self.out = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(layer(x), self.size) for layer in (self.q, self.k, self.v))
        if self.repeat > 1 and self.spelling == "gqa":
            return self.out(together(F.scaled_dot_product_attention(q, k, v, enable_gqa=True)))
        if self.repeat > 1:
            k, v = k.repeat_interleave(self.repeat, 1), v.repeat_interleave(self.repeat, 1)
        return self.out(together(SPELLINGS.get(self.spelling, fused)(q, k, v)))


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("grids", ["rows", "columns"])
def test_heads_are_a_grid_in_every_spelling(spelling: str, grids: str) -> None:
    net, example = Attention(spelling), torch.randn(2, 3, 6)
    graph = niwaki.trace(net, example)
    for name in ("q", "k", "v"):
        group = group_of(graph, f"{name}.weight", 0)
        assert (group.kind, group.rows, group.fixed) == ("grid", 4, None)
    _, small, receipt = cut_and_judge(net, example, keep=0.6, grids=grids)
    widths = [small.get_parameter(f"{name}.weight").shape[0] for name in "qkv"]
    if grids == "rows":
        assert widths[0] == widths[1] == widths[2] < 16 and widths[0] % 4 == 0
    else:
        assert widths[0] == widths[1] and all(w % 4 == 0 for w in widths) and min(widths) < 16
    assert receipt.exact and receipt.passed, receipt


@pytest.mark.parametrize("kv", [1, 2])
@pytest.mark.parametrize("spelling", ["gqa", "fused"])
def test_grouped_queries_keep_their_ratio(kv: int, spelling: str) -> None:
    """4 query heads on kv key/value heads: after the cut still 4 / kv queries for each."""
    net, example = Attention(spelling, kv), torch.randn(2, 3, 6)
    graph = niwaki.trace(net, example)
    assert group_of(graph, "k.weight", 0).fixed is None
    _plan, small, receipt = cut_and_judge(net, example, keep=0.6)
    q, k, v = (small.get_parameter(f"{name}.weight").shape[0] for name in "qkv")
    assert q / k == 4 / kv and q < 16
    if kv == 2:  # one key/value head with its two queries went; a single one can't go, its columns can
        assert (q, k, v) == (8, 4, 4)
    assert receipt.passed


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_kernels_give_the_same_graph(backend: SDPBackend) -> None:
    """Flash attention and the math kernel on real tensors, and the meta device."""
    net, example = Attention(), torch.randn(2, 3, 6)
    meta = niwaki.trace(net, example, device="meta").to_json()
    with sdpa_kernel([backend]):
        real = niwaki.trace(net, example, device="cpu").to_json()
    assert real["groups"] == meta["groups"]
    assert real["macs"] == meta["macs"]


@pytest.mark.parametrize(
    "name",
    [
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_attention_math",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_fused_attention_overrideable",
    ],
)
def test_kernels_of_other_devices(name: str) -> None:
    """Called by their own name on the meta device, as a CUDA forward would record them."""
    op = getattr(torch.ops.aten, name).default

    def forward(net: Any, x: Tensor) -> Tensor:
        q, k, v = (heads(layer(x), 4) for layer in (net.q, net.k, net.v))
        names = [a.name for a in op._schema.arguments]
        extra = [None] if "attn_bias" in names and names.index("attn_bias") == 3 else []
        extra += [False] if "compute_log_sumexp" in names else []
        return net.out(together(op(q, k, v, *extra)[0]))

    net = Net(forward, q=nn.Linear(6, 16), k=nn.Linear(6, 16), v=nn.Linear(6, 16), out=nn.Linear(16, 6))
    try:
        graph = niwaki.trace(net, torch.randn(2, 3, 6), device="meta")
    except niwaki.errors.InputError as error:
        if "NotImplementedError" in str(error) or "no fake impl" in str(error):
            pytest.skip("no meta kernel in this torch")
        raise
    reference = niwaki.trace(Attention(), torch.randn(2, 3, 6), device="meta")
    wanted = [(g.units, g.kind, g.rows, len(g.members)) for g in reference.groups]
    assert [(g.units, g.kind, g.rows, len(g.members)) for g in graph.groups] == wanted
    assert not graph.unknown and graph.macs == reference.macs


def test_macs_of_attention_by_hand() -> None:
    """Batch 2, 3 tokens: q, k, v and out 6 x 16 each, scores and values 4 heads x 3 x 3 x 4 each."""
    graph = niwaki.trace(Attention(), torch.randn(2, 3, 6))
    assert graph.macs == 2 * 3 * 4 * 6 * 16 + 2 * 2 * 4 * 3 * 3 * 4


def test_a_mask_does_not_tie_heads() -> None:
    """A constant mask [tokens, tokens] is broadcast over heads."""
    mask = torch.ones(3, 3).tril().bool()

    def forward(net: Any, x: Tensor) -> Tensor:
        q, k, v = (heads(layer(x), 4) for layer in (net.q, net.k, net.v))
        return net.out(together(F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(x.device))))

    net = Net(forward, q=nn.Linear(6, 16), k=nn.Linear(6, 16), v=nn.Linear(6, 16), out=nn.Linear(16, 6))
    graph = niwaki.trace(net, torch.randn(2, 3, 6))
    assert group_of(graph, "q.weight", 0).fixed is None


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("tokens", ["queries", "keys", "both"])
def test_a_causal_mask_counts_tokens_that_are_learned(tokens: str, device: str) -> None:
    """Six learned tokens against nine given ones: without the third, the fourth would see what the third saw. Where
    both are the learned ones, both lose the third. The width stays free either way.
    """

    def forward(net: Any, x: Tensor) -> Tensor:
        learned, given = (heads(t, 4) for t in (net.tokens.expand(x.shape[0], -1, -1), net.given(x)))
        q, k = {"queries": (learned, given), "keys": (given, learned), "both": (learned, learned)}[tokens]
        return net.out(together(F.scaled_dot_product_attention(q, k, k, is_causal=net.causal))).mean(1) + given.mean()

    for causal in True, False:
        net = Net(forward, given=nn.Linear(8, 16), out=nn.Linear(16, 4), tokens=nn.Parameter(torch.randn(1, 6, 16)))
        net.causal = causal
        graph = niwaki.trace(net, torch.randn(2, 9, 8), device=device)
        fixed = group_of(graph, "tokens", 1).fixed
        assert (fixed is not None and fixed.endswith("that counts its positions")) == (causal and tokens != "both")
        assert group_of(graph, "tokens", 2).fixed is None


def test_a_bias_per_head_goes_with_its_head() -> None:
    """A learned table [heads, tokens, tokens], as in relative positions: one row per head."""

    def forward(net: Any, x: Tensor) -> Tensor:
        q, k, v = (heads(layer(x), 4) for layer in (net.q, net.k, net.v))
        return net.out(together(F.scaled_dot_product_attention(q, k, v, attn_mask=net.bias)))

    parts = {name: nn.Linear(6, 16) for name in ("q", "k", "v")}
    net = Net(forward, **parts, out=nn.Linear(16, 6), bias=nn.Parameter(torch.randn(4, 3, 3)))
    _, small, receipt = cut_and_judge(net, torch.randn(2, 3, 6), keep=0.6)
    assert small.bias.shape == (small.q.out_features // 4, 3, 3)
    assert receipt.exact and receipt.passed


@pytest.mark.parametrize("kv", [None, 12])
def test_multi_head_attention_of_torch(kv: int | None) -> None:
    """Packed projections, or separate ones for keys and values of another width."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha = nn.MultiheadAttention(16, 4, batch_first=True, kdim=kv, vdim=kv)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.mha(x, y, y, need_weights=False)[0]

    net = Own().eval()
    example = (torch.randn(2, 3, 16), torch.randn(2, 5, kv or 16))
    graph = niwaki.trace(net, example)
    assert any(g.kind == "grid" and g.fixed is None for g in graph.groups)
    plan, _small, receipt = cut_and_judge(net, example, keep=0.6)
    assert plan.kept and receipt.passed
