"""Language models, mixers, recurrent networks and what else works on sequences."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.registry import case, numbers, reals

TOKENS = reals(2, 5, 6)
WORDS = numbers(11, 2, 6)


class Rms(nn.Module):
    """Root mean square norm, as language models write it."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


def rotate_half(x: Tensor) -> Tensor:
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-second, first), dim=-1)


def repeat_kv(x: Tensor, times: int) -> Tensor:
    b, heads, t, d = x.shape
    return x[:, :, None].expand(b, heads, times, t, d).reshape(b, heads * times, t, d)


class GroupedQueries(nn.Module):
    """Fewer key/value heads than query heads, rotary positions."""

    def __init__(self, width: int, heads: int, kv_heads: int, size: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = heads, kv_heads, size
        self.num_key_value_groups = heads // kv_heads
        self.q_proj = nn.Linear(width, heads * size, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * size, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * size, bias=False)
        self.o_proj = nn.Linear(heads * size, width, bias=False)
        inv_freq = 1.0 / (10000 ** (torch.arange(0, size, 2, dtype=torch.float32) / size))
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        angles = torch.outer(torch.arange(t, device=x.device, dtype=self.inv_freq.dtype), self.inv_freq)
        cos, sin = torch.cat((angles, angles), -1).cos().to(x.dtype), torch.cat((angles, angles), -1).sin().to(x.dtype)
        q = self.q_proj(x).view(b, t, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(b, t, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(b, t, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        k, v = repeat_kv(k, self.num_key_value_groups), repeat_kv(v, self.num_key_value_groups)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).contiguous().view(b, t, -1))


@case(
    WORDS,
    "tokens",
    "attention",
    "grid",
    "integers",
    "inexact",
    free={"attn.v_proj.weight:0": 0, "attn.o_proj.weight:1": 0, "gate.weight:0": 10, "embed.weight:1": 0},
)
class Llama(nn.Module):
    """Grouped queries with rotary positions, RMS norms, gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.norm1, self.norm2, self.norm3 = Rms(12), Rms(12), Rms(12)
        self.attn = GroupedQueries(12, heads=4, kv_heads=2, size=4)
        self.gate, self.up = nn.Linear(12, 10, bias=False), nn.Linear(12, 10, bias=False)
        self.down = nn.Linear(10, 12, bias=False)
        self.lm_head = nn.Linear(12, 11, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.attn(self.norm1(x))
        y = self.norm2(x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return self.lm_head(self.norm3(x))


class TransposedLinear(nn.Module):
    """A linear layer that keeps its weight as inputs x outputs (GPT-2's)."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.nf = outputs
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.size()[:-1], self.nf)


@case(
    WORDS,
    "tokens",
    "attention",
    "grid",
    "integers",
    "inexact",
    "shared",
    free={"c_attn.weight:1": 0, "c_proj.weight:0": 0, "c_fc.weight:1": 16, "wte.weight:1": 0, "wpe.weight:1": 0},
    fixed=("wte.weight:0",),
)
class Gpt(nn.Module):
    """GPT-2: learned positions, q, k, v split off one transposed layer, the embedding is also the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.n_embd, self.n_head = 8, 2
        self.wte, self.wpe = nn.Embedding(11, 8), nn.Embedding(6, 8)
        self.ln_1, self.ln_2, self.ln_f = nn.LayerNorm(8), nn.LayerNorm(8), nn.LayerNorm(8)
        self.c_attn, self.c_proj = TransposedLinear(24, 8), TransposedLinear(8, 8)
        self.c_fc, self.c_out = TransposedLinear(16, 8), TransposedLinear(8, 16)
        self.lm_head = nn.Linear(8, 11, bias=False)
        self.lm_head.weight = self.wte.weight

    def attention(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        q = q.view(b, t, self.n_head, c // self.n_head).transpose(1, 2)
        k = k.view(b, t, self.n_head, c // self.n_head).transpose(1, 2)
        v = v.view(b, t, self.n_head, c // self.n_head).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c))

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.size(1), dtype=torch.long, device=tokens.device)
        x = self.wte(tokens) + self.wpe(positions)
        x = x + self.attention(self.ln_1(x))
        x = x + self.c_out(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))
        return self.lm_head(self.ln_f(x))


@case(WORDS, "tokens", "shared", free={"embedding.weight:1": 8, "inner.weight:0": 6, "back.weight:0": 8})
class TiedEmbedding(nn.Module):
    """The embedding's weight is the head's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.inner, self.back = nn.Linear(8, 6), nn.Linear(6, 8)
        self.head = nn.Linear(8, 11)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head(x + self.back(torch.tanh(self.inner(x))))


@case(TOKENS, free={"both.weight:0": 0, "gated.weight:0": 0, "out.weight:1": 8})
class SplitGlu(nn.Module):
    """Gated linear units: one layer's output split in value and gate, by `chunk` and by `glu`."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Linear(6, 14)
        self.gated = nn.Linear(7, 16)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.both(x).chunk(2, dim=-1)
        return self.out(F.glu(self.gated(value * F.gelu(gate)), dim=-1))


@case(TOKENS, "recurrent", free={"before.weight:0": 7, "after.weight:0": 5})
class LstmClassifier(nn.Module):
    """Two bidirectional layers of LSTM; the last state is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(6, 7)
        self.lstm = nn.LSTM(7, 4, num_layers=2, batch_first=True, bidirectional=True)
        self.after = nn.Linear(8, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(torch.relu(self.before(x)))
        return self.head(torch.relu(self.after(y[:, -1])))


@case(WORDS, "recurrent", "tokens", free={"embed.weight:1": 6, "after.weight:0": 5})
class GruClassifier(nn.Module):
    """Embedded words through a GRU; the mean of the outputs and the last state are classified."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6, padding_idx=0)
        self.gru = nn.GRU(6, 5, batch_first=True)
        self.after = nn.Linear(10, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        y, last = self.gru(self.embed(tokens))
        return self.head(F.relu(self.after(torch.cat([y.mean(1), last[-1]], -1))))


@case(TOKENS, "recurrent", free={"before.weight:0": 7, "after.weight:0": 5})
class CellLoop(nn.Module):
    """A recurrent cell called step by step, its state made of zeros, its outputs stacked."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(6, 7)
        self.cell = nn.LSTMCell(7, 4)
        self.after = nn.Linear(4, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.before(x))
        state = (x.new_zeros(x.size(0), 4), x.new_zeros(x.size(0), 4))
        outputs = []
        for step in range(x.size(1)):
            state = self.cell(x[:, step], state)
            outputs.append(state[0])
        return self.head(F.relu(self.after(torch.stack(outputs, 1))))


@case(
    TOKENS,
    "inexact",
    free={"embed.weight:0": 0, "tokens1.weight:0": 9, "channels1.weight:0": 12},
    fixed=("tokens2.weight:0",),
)
class Mixer(nn.Module):
    """An MLP over tokens, an MLP over channels (MLP-Mixer)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.tokens1, self.tokens2 = nn.Linear(5, 9), nn.Linear(9, 5)
        self.channels1, self.channels2 = nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.tokens2(F.gelu(self.tokens1(self.norm1(x).transpose(1, 2)))).transpose(1, 2)
        x = x + self.channels2(F.gelu(self.channels1(self.norm2(x))))
        return self.head(x.mean(dim=1))


@case(TOKENS, "inexact", free={"inner.weight:0": 10, "stream.weight:0": 0})
class RmsNormed(nn.Module):
    """torch's own RMS norm, and the handwritten one."""

    def __init__(self) -> None:
        super().__init__()
        self.stream = nn.Linear(6, 8)
        self.norm = nn.RMSNorm(8, eps=1e-6)
        self.inner, self.back = nn.Linear(8, 10), nn.Linear(10, 8)
        self.final = Rms(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stream(x)
        x = x + self.back(F.silu(self.inner(self.norm(x))))
        return self.head(self.final(x))


@case(reals(2, 4, 5), free={"a:1": 0, "b:0": 0, "c.weight:1": 7}, fixed=("c.weight:0",))
class Einsum(nn.Module):
    """Tensor networks: einsum and tensordot over bare parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(5, 6))
        self.b = nn.Parameter(torch.randn(6, 4, 7))
        self.c = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("bij,jk->bik", x, self.a)
        return self.c(torch.tensordot(y.tanh(), self.b, dims=([2, 1], [0, 1])).relu())


@case(TOKENS, "grid", "inexact", free={"w1:2": 10, "w2:1": 10, "embed.weight:0": 0, "router.weight:1": 0})
class Experts(nn.Module):
    """Three experts in one tensor, all evaluated by `bmm`, mixed by a softmax router (which notices a missing one)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.router = nn.Linear(8, 3, bias=False)
        self.w1, self.w2 = nn.Parameter(torch.randn(3, 8, 10)), nn.Parameter(torch.randn(3, 10, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(0, 1)
        weights = self.router(x).softmax(-1)
        y = torch.bmm(F.silu(torch.bmm(x.expand(3, -1, -1), self.w1)), self.w2)
        return self.head(x + (y * weights.t().unsqueeze(-1)).sum(0))


@case(TOKENS, free={"in_proj.weight:0": 0, "conv.weight:0": 0, "decay:0": 0, "out_proj.weight:1": 0})
class StateSpace(nn.Module):
    """A gated diagonal state space: causal depthwise convolution, a scan along the tokens, a state per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Linear(6, 16)
        self.conv = nn.Conv1d(8, 8, 3, padding=2, groups=8)
        self.decay = nn.Parameter(torch.zeros(8, 2))
        self.b_proj, self.c_proj = nn.Linear(8, 2), nn.Linear(8, 2)
        self.skip = nn.Parameter(torch.ones(8))
        self.out_proj = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u = F.silu(self.conv(u.transpose(1, 2))[..., : x.size(1)].transpose(1, 2))
        decay, b, c = torch.exp(-F.softplus(self.decay)), self.b_proj(u), self.c_proj(u)
        state = torch.zeros(x.size(0), *self.decay.shape, dtype=x.dtype, device=x.device)
        outputs = []
        for t in range(x.size(1)):
            state = state * decay + u[:, t, :, None] * b[:, t, None, :]
            outputs.append((state * c[:, t, None, :]).sum(-1))
        y = torch.stack(outputs, dim=1) + u * self.skip
        return x + self.out_proj(y * F.silu(z))
