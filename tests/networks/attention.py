"""Networks of attention: every way that users write heads."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.registry import case, numbers, reals

TOKENS = reals(2, 5, 6)


class SelfAttention(nn.Module):
    """Own q, k, v layers, fused call without a scale, heads kept as an integer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.head_dim = width // heads
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k(x).view(b, t, self.num_heads, self.head_dim).transpose(1, 2)
        v = self.v(x).view(b, t, self.num_heads, self.head_dim).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(b, t, -1))


HEADS = ("attention", "grid", "integers")


@case(TOKENS, *HEADS, free={"attn.q.weight:0": 0, "attn.v.weight:0": 0, "attn.proj.weight:1": 0, "embed.weight:0": 12})
class FusedCallAttention(nn.Module):
    """Self-attention whose scale is the default of the fused call, in a residual stream without norms."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 12)
        self.attn = SelfAttention(12, 3)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.attn(x))


@case(TOKENS, *HEADS, free={"to_q.weight:0": 0, "to_v.weight:0": 0, "to_out.weight:1": 0})
class ExplicitSoftmax(nn.Module):
    """Self-attention spelt out: q k^T * scale, softmax, v, with an inner width of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, dim_head = 2, 4
        self.scale = dim_head**-0.5
        self.to_q = nn.Linear(6, 8, bias=False)
        self.to_k = nn.Linear(6, 8, bias=False)
        self.to_v = nn.Linear(6, 8, bias=False)
        self.to_out = nn.Linear(8, 6)

    def split(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        return x.reshape(b, t, self.heads, c // self.heads).permute(0, 2, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.to_q(x)), self.split(self.to_k(x)), self.split(self.to_v(x))
        weights = (torch.matmul(q, k.transpose(-1, -2)) * self.scale).softmax(dim=-1)
        y = torch.matmul(weights, v).permute(0, 2, 1, 3).flatten(2)
        return x + self.to_out(y)


@case(TOKENS, *HEADS, "inexact", free={"qkv.weight:0": 0, "proj.weight:1": 0, "fc1.weight:0": 10})
class FusedQkv(nn.Module):
    """A ViT block: one layer for q, k and v, reshaped to 3 x heads x size and unbound; layer norms, MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.embed = nn.Linear(6, 8)
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.proj = nn.Linear(8, 8)
        self.fc1, self.fc2 = nn.Linear(8, 10), nn.Linear(10, 8)
        self.out = nn.Linear(8, 3)

    def attention(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, scale=1 / math.sqrt(C // self.heads))
        return self.proj(y.transpose(1, 2).reshape(B, N, C))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attention(self.norm1(x))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.out(x)


@case(
    lambda: (reals(2, 5, 6)(), reals(2, 4, 7, seed=8)()),
    *HEADS,
    free={"query.weight:0": 0, "key_value.weight:0": 0, "out.weight:1": 0},
)
class CrossAttention(nn.Module):
    """Queries from one sequence, keys and values (one layer, chunked) from another."""

    def __init__(self) -> None:
        super().__init__()
        self.n_heads = 2
        self.query = nn.Linear(6, 8)
        self.key_value = nn.Linear(7, 16)
        self.out = nn.Linear(8, 6)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q = self.query(x)
        k, v = self.key_value(context).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(1, 2).flatten(-2))


@case(reals(5, 2, 6), "attention", "grid", free={"before.weight:0": 0})
class TorchMultihead(nn.Module):
    """torch's own multi-head attention, tokens first, with the weights of the heads also asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(6, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.after = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.before(x))
        y, _ = self.attention(x, x, x, need_weights=False)
        return self.after(x + y)


@case(TOKENS, "attention", "grid", "inexact", free={"encoder.layers.0.linear1.weight:0": 10, "embed.weight:0": 0})
class TorchEncoder(nn.Module):
    """torch's own encoder layer, whose fast path must not hide it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=10, batch_first=True, norm_first=False)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


@case(
    reals(2, 3, 8, 8),
    *HEADS,
    "inexact",
    free={"patch.weight:0": 0, "cls_token:2": 0, "pos_embed:2": 0, "qkv.weight:0": 0},
)
class VisionTransformer(nn.Module):
    """Patches by a strided convolution, a class token, learned positions, one block, the class token read."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, stride=4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 8))
        self.norm = nn.LayerNorm(8)
        self.num_heads, self.head_dim = 4, 2
        self.qkv = nn.Linear(8, 24, bias=False)
        self.proj = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        b, n, _ = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
        x = x + self.proj((attn.softmax(-1) @ v).transpose(1, 2).reshape(b, n, self.num_heads * self.head_dim))
        return self.head(x[:, 0])


@case(reals(2, 4, 4, 6), *HEADS, free={"qkv.weight:0": 0, "proj.weight:1": 0})
class ShiftedWindows(nn.Module):
    """Swin: roll, windows of 2 x 2, a table of relative positions per head gathered by a constant index, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.qkv = nn.Linear(6, 24)
        self.proj = nn.Linear(8, 6)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))
        grid = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")).flatten(1)
        offset = grid[:, :, None] - grid[:, None, :] + 1
        self.register_buffer("relative_position_index", offset[0] * 3 + offset[1])

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        y = torch.roll(x, shifts=(-1, -1), dims=(1, 2))
        y = y.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        qkv = self.qkv(y).reshape(y.size(0), 4, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0] * 0.5, qkv[1], qkv[2]
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)].view(4, 4, -1).permute(2, 0, 1)
        attn = F.softmax(q.matmul(k.transpose(-2, -1)) + bias.unsqueeze(0), dim=-1)
        y = self.proj(attn.matmul(v).transpose(1, 2).reshape(y.size(0), 4, -1))
        y = y.view(b, h // 2, w // 2, 2, 2, -1).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return x + torch.roll(y, shifts=(1, 1), dims=(1, 2))


@case(TOKENS, "attention", "grid", free={"w_qkv:1": 0, "w_qkv:3": 0, "w_o:0": 0, "w_o:1": 0})
class EinsumHeads(nn.Module):
    """Attention written with einsum over parameters that have an axis of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.w_qkv = nn.Parameter(torch.randn(3, 2, 6, 4))
        self.w_o = nn.Parameter(torch.randn(2, 4, 6))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = torch.einsum("btc,nhcd->nbhtd", x, self.w_qkv)
        weights = torch.einsum("bhtd,bhsd->bhts", q, k).mul(0.5).softmax(-1)
        return x + torch.einsum("bhts,bhsd,hdc->btc", weights, v, self.w_o)


@case(TOKENS, *HEADS, free={"query_key_value.weight:0": 0, "dense.weight:1": 0})
class Baddbmm(nn.Module):
    """Bloom: q, k, v interleaved per head, an additive bias per head (ALiBi), `baddbmm` on flattened heads."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 2, 4
        self.inv_norm_factor = 1.0 / math.sqrt(self.head_dim)
        self.query_key_value = nn.Linear(6, 24)
        self.dense = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        fused = self.query_key_value(x).view(b, t, self.num_heads, 3, self.head_dim)
        q, k, v = (fused[..., i, :].transpose(1, 2).reshape(b * self.num_heads, t, -1) for i in range(3))
        slopes = torch.tensor([2.0 ** -(i + 1) for i in range(self.num_heads)], dtype=x.dtype, device=x.device)
        alibi = slopes[:, None, None] * torch.arange(t, device=x.device, dtype=x.dtype)[None, None, :]
        alibi = alibi.expand(b, self.num_heads, 1, t).reshape(b * self.num_heads, 1, t)
        scores = torch.baddbmm(alibi.expand(-1, t, -1), q, k.transpose(1, 2), beta=1.0, alpha=self.inv_norm_factor)
        y = torch.bmm(scores.softmax(-1), v).view(b, self.num_heads, t, -1).transpose(1, 2).reshape(b, t, -1)
        return x + self.dense(y)


@case(TOKENS, *HEADS, "inexact", free={"to_qkv.weight:0": 16, "to_out.weight:1": 8})
class LinearAttention(nn.Module):
    """Attention without a token-by-token matrix: softmax over the features of a key, context first."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.to_qkv = nn.Linear(6, 24, bias=False)
        self.to_out = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (z.reshape(b, t, self.heads, -1).transpose(1, 2) for z in self.to_qkv(x).chunk(3, dim=-1))
        q, k = q.softmax(dim=-1), k.softmax(dim=-2)
        context = torch.einsum("bhnd,bhne->bhde", k, v)
        y = torch.einsum("bhnd,bhde->bhne", q, context)
        return x + self.to_out(y.transpose(1, 2).reshape(b, t, -1))


@case(reals(2, 4, 3, 3), "attention", free={"f.weight:0": 3, "g.weight:0": 3, "h.weight:0": 5}, fixed=("v.weight:0",))
class PixelAttention(nn.Module):
    """One head over pixels (SAGAN), with a learned scalar gain, after a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.h = nn.Conv1d(4, 3, 1), nn.Conv1d(4, 3, 1), nn.Conv1d(4, 5, 1)
        self.v = nn.Conv1d(5, 4, 1)
        self.gamma = nn.Parameter(torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        beta = torch.bmm(self.f(flat).transpose(1, 2), self.g(flat)).softmax(dim=1)
        return self.gamma * self.v(torch.bmm(self.h(flat), beta)).view(x.size()) + x


@case(numbers(11, 2, 6), "tokens", *HEADS, free={"k_proj.weight:0": 0, "o_proj.weight:1": 0})
class MultiQuery(nn.Module):
    """Four query heads on one key/value head, broadcast, with a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.size = 4, 3
        self.embed = nn.Embedding(11, 8)
        self.q_proj = nn.Linear(8, 12)
        self.k_proj, self.v_proj = nn.Linear(8, 3), nn.Linear(8, 3)
        self.o_proj = nn.Linear(12, 8)
        self.head = nn.Linear(8, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        b, t, _ = x.shape
        q = self.q_proj(x).view(b, t, self.heads, self.size).transpose(1, 2)
        k, v = self.k_proj(x)[:, None], self.v_proj(x)[:, None]
        scores = q @ k.transpose(2, 3) / self.size**0.5
        causal = torch.ones(t, t, dtype=torch.bool, device=x.device).tril()
        scores = scores.masked_fill(~causal, float("-inf"))
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, self.heads * self.size)
        return self.head(x + self.o_proj(y))


@case(TOKENS, *HEADS, free={"qkv.weight:0": 0, "mix.weight:0": 0, "proj.weight:1": 0})
class TalkingHeads(nn.Module):
    """A layer over the heads before the softmax: queries and keys have heads of their own, values theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.size = 4, 3
        self.embed = nn.Linear(6, 10)
        self.qkv = nn.Linear(10, 36)
        self.mix = nn.Linear(4, 4)
        self.proj = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(self.embed(x)).reshape(b, n, 3, self.heads, self.size)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scores = self.mix((q @ k.transpose(-2, -1)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        y = scores.softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(b, n, -1))


@case(TOKENS, "inexact", free={"embed.weight:0": 8, "mix.weight:0": 4})
class TokenGram(nn.Module):
    """Biases along the tokens are still there where a channel is gone, and enter a product of two activations."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.mix = nn.Linear(5, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(self.embed(x).transpose(1, 2))
        return self.out((y.transpose(1, 2) @ y).sum(1))


class PositionBias(nn.Module):
    """A number for every head and every pair of positions; asked for by a method, never called."""

    def __init__(self, tokens: int, heads: int) -> None:
        super().__init__()
        self.tokens, self.heads = tokens, heads
        self.table = nn.Parameter(torch.zeros(tokens * tokens, heads))

    def bias(self) -> Tensor:
        return self.table.view(self.tokens, self.tokens, self.heads).permute(2, 0, 1)


@case(TOKENS, *HEADS, free={"qkv.weight:0": 0, "position.table:1": 0, "proj.weight:1": 0})
class BiasByMethod(nn.Module):
    """Attention with a bias of positions from a module that keeps the number of heads for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.size = 4, 3
        self.qkv = nn.Linear(6, 36)
        self.position = PositionBias(5, 4)
        self.proj = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, self.size).permute(2, 0, 3, 1, 4).unbind(0)
        y = (q @ k.transpose(-2, -1) * self.size**-0.5 + self.position.bias()).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(b, n, -1))


class Outlook(nn.Module):
    """Every position weighs the windows around it: unfolded, mixed by heads of window x window, folded again."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.embed = nn.Linear(3, 8)
        self.v = nn.Linear(8, 8, bias=False)
        self.attn = nn.Linear(8, 2 * 4 * 4)
        self.proj = nn.Linear(8, 3)

    def mixed(self, x: Tensor) -> Tensor:
        b, h, w, _ = x.shape
        v = F.unfold(self.v(x).permute(0, 3, 1, 2), 2, stride=2)
        v = v.reshape(b, self.heads, -1, 4, h * w // 4).permute(0, 1, 4, 3, 2)
        attn = F.avg_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
        attn = self.attn(attn).reshape(b, h * w // 4, self.heads, 4, 4).permute(0, 2, 1, 3, 4)
        y = (attn.softmax(-1) @ v).permute(0, 1, 4, 3, 2)  # [batch, heads, channels, window, windows]
        return y.reshape(b, -1, h * w // 4)


@case(reals(2, 4, 4, 3), *HEADS, free={"v.weight:0": 0, "attn.weight:0": 0, "proj.weight:1": 0, "embed.weight:0": 8})
class FoldedOutlook(Outlook):
    """What is unfolded into windows and weighed is folded into a picture again."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.fold(self.mixed(self.embed(x)), x.shape[1:3], 2, stride=2)
        return self.proj(y.permute(0, 2, 3, 1))
