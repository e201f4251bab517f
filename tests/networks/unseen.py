"""Networks written from a one-line description of an architecture, by someone who has not seen how they are traced."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.registry import case, numbers, reals

IMAGES = reals(2, 3, 8, 8)
TOKENS = reals(2, 5, 6)


class DoubleConv(nn.Module):
    """Twice convolution, batch norm, relu."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(c_in, c_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(c_out),
            nn.ReLU(inplace=True),
            nn.Conv2d(c_out, c_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(c_out),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class AttentionGate(nn.Module):
    """Additive attention of a gating signal over a skip connection."""

    def __init__(self, f_g: int, f_l: int, f_int: int) -> None:
        super().__init__()
        self.W_g = nn.Sequential(nn.Conv2d(f_g, f_int, 1), nn.BatchNorm2d(f_int))
        self.W_x = nn.Sequential(nn.Conv2d(f_l, f_int, 1), nn.BatchNorm2d(f_int))
        self.psi = nn.Sequential(nn.Conv2d(f_int, 1, 1), nn.BatchNorm2d(1), nn.Sigmoid())

    def forward(self, g: Tensor, x: Tensor) -> Tensor:
        return x * self.psi(F.relu(self.W_g(g) + self.W_x(x)))


@case(
    IMAGES,
    free={
        "enc1.net.0.weight:0": 4,
        "enc1.net.3.weight:0": 4,
        "enc2.net.0.weight:0": 8,
        "enc2.net.3.weight:0": 8,
        "mid.net.3.weight:0": 12,
        "up2.weight:1": 8,
        "att2.W_g.0.weight:0": 4,
        "att1.W_x.0.weight:0": 3,
        "dec2.net.0.weight:0": 8,
        "dec1.net.3.weight:0": 4,
    },
    fixed=("out.weight:0", "enc1.net.0.weight:1"),
)
class AttentionUNet(nn.Module):
    """A U-Net whose skip connections pass through attention gates."""

    def __init__(self) -> None:
        super().__init__()
        self.enc1, self.enc2, self.mid = DoubleConv(3, 4), DoubleConv(4, 8), DoubleConv(8, 12)
        self.up2, self.up1 = nn.ConvTranspose2d(12, 8, 2, stride=2), nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.att2, self.att1 = AttentionGate(8, 8, 4), AttentionGate(4, 4, 3)
        self.dec2, self.dec1 = DoubleConv(16, 8), DoubleConv(8, 4)
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        e1 = self.enc1(x)
        e2 = self.enc2(F.max_pool2d(e1, 2))
        m = self.mid(F.max_pool2d(e2, 2))
        d2 = self.up2(m)
        d2 = self.dec2(torch.cat((self.att2(g=d2, x=e2), d2), dim=1))
        d1 = self.up1(d2)
        d1 = self.dec1(torch.cat((self.att1(g=d1, x=e1), d1), dim=1))
        return self.out(d1)


@case(
    lambda: (numbers(20, 3, 6)(), reals(3, 3, 8, 8)()),
    "tokens",
    "inexact",
    free={
        "token_embedding.weight:1": 8,
        "text_fc.weight:0": 10,
        "text_projection:1": 6,
        "image.0.weight:0": 5,
        "image.3.weight:0": 8,
        "image_projection.weight:0": 6,
    },
    fixed=("token_embedding.weight:0", "image.0.weight:1"),
)
class TwoTower(nn.Module):
    """CLIP in small: a text tower and an image tower meet in a scaled cosine similarity."""

    def __init__(self) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(20, 8)
        self.positional_embedding = nn.Parameter(torch.randn(6, 8) * 0.1)
        self.ln = nn.LayerNorm(8)
        self.text_fc, self.text_out = nn.Linear(8, 10), nn.Linear(10, 8)
        self.text_projection = nn.Parameter(torch.randn(8, 6) * 0.3)
        self.image = nn.Sequential(
            nn.Conv2d(3, 5, 3, stride=2, padding=1),
            nn.BatchNorm2d(5),
            nn.ReLU(),
            nn.Conv2d(5, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.image_projection = nn.Linear(8, 6, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_text(self, text: Tensor) -> Tensor:
        x = self.token_embedding(text) + self.positional_embedding
        x = x + self.text_out(F.gelu(self.text_fc(self.ln(x))))
        return x[torch.arange(x.shape[0]), text.argmax(dim=-1)] @ self.text_projection

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        t = self.encode_text(text)
        i = self.image_projection(self.image(image))
        t = t / t.norm(dim=-1, keepdim=True)
        i = i / i.norm(dim=-1, keepdim=True)
        return self.logit_scale.exp() * i @ t.t()


class GatedResidual(nn.Module):
    """One layer of WaveNet: a causal dilated convolution, tanh times sigmoid, residual and skip outputs."""

    def __init__(self, residual: int, gate: int, skip: int, dilation: int) -> None:
        super().__init__()
        self.pad = dilation
        self.filter = nn.Conv1d(residual, gate, 2, dilation=dilation)
        self.gate = nn.Conv1d(residual, gate, 2, dilation=dilation)
        self.res = nn.Conv1d(gate, residual, 1)
        self.skip = nn.Conv1d(gate, skip, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.pad(x, (self.pad, 0))
        z = torch.tanh(self.filter(y)) * torch.sigmoid(self.gate(y))
        return x + self.res(z), self.skip(z)


@case(
    reals(2, 1, 16),
    free={
        "causal.weight:0": 6,
        "layers.0.filter.weight:0": 8,
        "layers.2.gate.weight:0": 8,
        "layers.1.skip.weight:0": 5,
        "end1.weight:0": 7,
    },
    fixed=("end2.weight:0",),
)
class WaveStack(nn.Module):
    """WaveNet in small: dilations 1, 2, 4, and the sum of all skip outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.causal = nn.Conv1d(1, 6, 2)
        self.layers = nn.ModuleList([GatedResidual(6, 8, 5, 2**i) for i in range(3)])
        self.end1, self.end2 = nn.Conv1d(5, 7, 1), nn.Conv1d(7, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.causal(F.pad(x, (1, 0)))
        skips: float | Tensor = 0
        for layer in self.layers:
            x, skip = layer(x)
            skips = skips + skip
        return self.end2(F.relu(self.end1(F.relu(skips))))


@case(
    reals(7, 5),
    free={"encode.weight:0": 8, "message.0.weight:0": 12, "message.2.weight:0": 6, "update.weight:0": 10},
    fixed=("encode.weight:1", "readout.weight:0"),
)
class MessagePassing(nn.Module):
    """A graph network: messages over a fixed edge list, summed at the target by `index_add`, two rounds."""

    def __init__(self) -> None:
        super().__init__()
        edges = [[0, 1, 2, 3, 4, 5, 6, 0, 2, 4], [1, 2, 3, 4, 5, 6, 0, 3, 5, 1]]
        self.register_buffer("edges", torch.tensor(edges))
        self.encode = nn.Linear(5, 8)
        self.message = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 6))
        self.update = nn.Linear(8 + 6, 10)
        self.project = nn.Linear(10, 8)
        self.readout = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        src, dst = self.edges[0], self.edges[1]
        h = self.encode(x)
        for _ in range(2):
            m = self.message(torch.cat([h[src], h[dst]], dim=-1))
            total = torch.zeros(h.size(0), m.size(1), dtype=m.dtype, device=m.device).index_add(0, dst, m)
            h = h + self.project(F.relu(self.update(torch.cat([h, total], dim=-1))))
        return self.readout(h.mean(dim=0))


class ConvLstmCell(nn.Module):
    """An LSTM cell whose gates are one convolution over input and state."""

    def __init__(self, c_in: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.conv = nn.Conv2d(c_in + hidden, 4 * hidden, 3, padding=1)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h, c = state
        i, f, o, g = torch.split(self.conv(torch.cat([x, h], dim=1)), self.hidden, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


@case(
    reals(2, 3, 2, 6, 6),
    "integers",
    free={"cell1.conv.weight:0": 0, "cell2.conv.weight:0": 0, "head.weight:1": 0},
    fixed=("head.weight:0",),
)
class ConvLstm(nn.Module):
    """Two ConvLSTM layers over three frames; the next frame is predicted."""

    def __init__(self) -> None:
        super().__init__()
        self.cell1, self.cell2 = ConvLstmCell(2, 6), ConvLstmCell(6, 5)
        self.head = nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _, h, w = x.shape
        first = tuple(torch.zeros(b, self.cell1.hidden, h, w, dtype=x.dtype, device=x.device) for _ in range(2))
        second = tuple(torch.zeros(b, self.cell2.hidden, h, w, dtype=x.dtype, device=x.device) for _ in range(2))
        for step in range(t):
            first = self.cell1(x[:, step], first)
            second = self.cell2(first[0], second)
        return self.head(second[0])


class Expert(nn.Module):
    """A two-layer perceptron."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)))


@case(
    TOKENS,
    free={"embed.weight:0": 8, "experts.0.w1.weight:0": 10, "experts.3.w1.weight:0": 10},
    fixed=("head.weight:0",),
)
class MaskedExperts(nn.Module):
    """Four experts, all evaluated; a mask of the two largest router weights says which count."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.router = nn.Linear(8, 4, bias=False)
        self.experts = nn.ModuleList([Expert(8, 10) for _ in range(4)])
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.embed(x))
        probabilities = self.router(x).softmax(dim=-1)
        top = probabilities.topk(2, dim=-1).indices
        mask = torch.zeros_like(probabilities).scatter(-1, top, 1.0)
        gates = probabilities * mask
        gates = gates / gates.sum(-1, keepdim=True)
        y = sum(gates[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))
        return self.head(y)


class FilmBlock(nn.Module):
    """A residual block whose second map is scaled and shifted by the condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width, affine=False)

    def forward(self, x: Tensor, film: Tensor) -> Tensor:
        gamma, beta = film.chunk(2, dim=1)
        x = F.relu(self.conv1(x))
        y = self.bn(self.conv2(x))
        y = (1 + gamma[:, :, None, None]) * y + beta[:, :, None, None]
        return x + F.relu(y)


@case(
    lambda: (reals(2, 3, 8, 8)(), numbers(9, 2, 4)()),
    "tokens",
    free={
        "stem.0.weight:0": 6,
        "blocks.0.conv1.weight:0": 8,
        "blocks.1.conv2.weight:0": 8,
        "film.weight:0": 0,
        "embed.weight:1": 5,
        "gru.weight_hh_l0:1": 0,
        "classifier.0.weight:0": 9,
    },
    fixed=("classifier.4.weight:0",),
)
class Film(nn.Module):
    """A residual CNN modulated by a question that a recurrent layer has read."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.gru = nn.Embedding(9, 5), nn.GRU(5, 7, batch_first=True)
        self.film = nn.Linear(7, 2 * 2 * 8)
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 1))
        self.blocks = nn.ModuleList([FilmBlock(8), FilmBlock(8)])
        self.classifier = nn.Sequential(
            nn.Conv2d(8, 9, 1), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(9, 4)
        )

    def forward(self, image: Tensor, question: Tensor) -> Tensor:
        _, hidden = self.gru(self.embed(question))
        films = self.film(hidden[-1]).view(image.shape[0], len(self.blocks), -1)
        x = self.stem(image)
        for i, block in enumerate(self.blocks):
            x = block(x, films[:, i])
        return self.classifier(x)


@case(
    reals(2, 9, 6),
    "inexact",
    free={
        "encode.weight:0": 8,
        "to_q.weight:0": 10,
        "to_v.weight:0": 10,
        "mlp.0.weight:0": 12,
        "slots_mu:2": 8,
        "gru.weight_hh:1": 8,
    },
    fixed=("decode.weight:0",),
)
class SlotAttention(nn.Module):
    """Three slots compete for the inputs (softmax over slots), updated by a GRU cell for two rounds."""

    def __init__(self) -> None:
        super().__init__()
        self.num_slots, self.eps = 3, 1e-8
        self.encode = nn.Linear(6, 8)
        self.slots_mu = nn.Parameter(torch.randn(1, 1, 8))
        self.slots_offset = nn.Parameter(torch.randn(1, 3, 8))
        self.norm_input, self.norm_slots, self.norm_mlp = nn.LayerNorm(8), nn.LayerNorm(8), nn.LayerNorm(8)
        self.to_q, self.to_k, self.to_v = nn.Linear(8, 10), nn.Linear(8, 10), nn.Linear(8, 10)
        self.gru = nn.GRUCell(10, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))
        self.decode = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_input(self.encode(x))
        b, _, d = x.shape
        slots = self.slots_mu.expand(b, self.num_slots, -1) + self.slots_offset
        k, v = self.to_k(x), self.to_v(x)
        for _ in range(2):
            q = self.to_q(self.norm_slots(slots))
            attention = torch.einsum("bid,bjd->bij", q, k).mul(d**-0.5).softmax(dim=1) + self.eps
            updates = torch.einsum("bjd,bij->bid", v, attention / attention.sum(dim=-1, keepdim=True))
            slots = self.gru(updates.reshape(-1, updates.shape[-1]), slots.reshape(-1, d)).reshape(b, -1, d)
            slots = slots + self.mlp(self.norm_mlp(slots))
        return self.decode(slots)


@case(
    lambda: (reals(4, 5, 3)(), reals(4, 3, seed=8)()),
    free={
        "layers.0.weight:0": 12,
        "layers.2.weight:0": 12,
        "layers.4.weight:0": 12,
        "feature.weight:0": 10,
        "view.weight:0": 6,
    },
    fixed=("rgb.weight:0", "sigma.weight:0", "layers.0.weight:1"),
)
class Nerf(nn.Module):
    """A radiance field: sines and cosines of the position, a skip concatenation, then volume rendering."""

    def __init__(self) -> None:
        super().__init__()
        self.skips = [2]
        width, encoded, directions = 12, 3 + 3 * 2 * 3, 3 + 3 * 2 * 2
        self.layers = nn.ModuleList(
            [nn.Linear(encoded, width)]
            + [nn.Linear(width + encoded if i in self.skips else width, width) for i in range(4)]
        )
        self.sigma, self.feature = nn.Linear(width, 1), nn.Linear(width, 10)
        self.view, self.rgb = nn.Linear(10 + directions, 6), nn.Linear(6, 3)

    @staticmethod
    def encode(x: Tensor, frequencies: int) -> Tensor:
        parts = [x]
        for i in range(frequencies):
            parts += [torch.sin(2.0**i * x), torch.cos(2.0**i * x)]
        return torch.cat(parts, dim=-1)

    def forward(self, points: Tensor, direction: Tensor) -> Tensor:
        encoded = self.encode(points, 3)
        h = encoded
        for i, layer in enumerate(self.layers):
            h = F.relu(layer(h))
            if i in self.skips:
                h = torch.cat([encoded, h], dim=-1)
        sigma = F.softplus(self.sigma(h)).squeeze(-1)
        seen = self.encode(direction / direction.norm(dim=-1, keepdim=True), 2)
        h = torch.cat([self.feature(h), seen[:, None].expand(-1, points.shape[1], -1)], dim=-1)
        rgb = torch.sigmoid(self.rgb(F.relu(self.view(h))))
        alpha = 1 - torch.exp(-sigma * 0.1)
        ones = torch.ones_like(alpha[:, :1])
        transmittance = torch.cumprod(torch.cat([ones, 1 - alpha + 1e-10], dim=-1), dim=-1)[:, :-1]
        return ((alpha * transmittance)[..., None] * rgb).sum(dim=1)


class TimeBlock(nn.Module):
    """A residual block of a diffusion network: group norm, silu, convolution, and the time added in between."""

    def __init__(self, c_in: int, c_out: int, time: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(2, c_in), nn.Conv1d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(time, c_out)
        self.norm2, self.conv2 = nn.GroupNorm(4, c_out), nn.Conv1d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv1d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time(F.silu(t))[..., None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.shortcut(x)


@case(
    lambda: (reals(2, 2, 16)(), torch.tensor([3, 40])),
    "tokens",
    "grid",
    "inexact",
    "integers",
    free={
        "time_mlp.0.weight:0": 16,
        "time_mlp.2.weight:0": 10,
        "stem.weight:0": 0,
        "down1.conv1.weight:0": 0,
        "down2.conv2.weight:0": 0,
        "mid.conv1.weight:0": 0,
        "up.weight:1": 0,
    },
    fixed=("out.weight:0", "stem.weight:1", "time_mlp.0.weight:1"),
)
class DiffusionUNet(nn.Module):
    """A one-dimensional diffusion U-Net: sinusoidal time embedding, group norms, one level down and up."""

    def __init__(self) -> None:
        super().__init__()
        self.dim = 8
        self.time_mlp = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 10))
        self.stem = nn.Conv1d(2, 8, 3, padding=1)
        self.down1, self.downsample = TimeBlock(8, 8, 10), nn.Conv1d(8, 8, 3, stride=2, padding=1)
        self.down2, self.mid = TimeBlock(8, 16, 10), TimeBlock(16, 16, 10)
        self.up = nn.ConvTranspose1d(16, 8, 4, stride=2, padding=1)
        self.up1 = TimeBlock(16, 8, 10)
        self.norm, self.out = nn.GroupNorm(4, 8), nn.Conv1d(8, 2, 1)

    def embed_time(self, t: Tensor) -> Tensor:
        half = self.dim // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / (half - 1))
        angles = t[:, None].to(self.stem.weight.dtype) * frequencies[None]
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = self.time_mlp(self.embed_time(t))
        x = self.stem(x)
        skip = self.down1(x, t)
        x = self.mid(self.down2(self.downsample(skip), t), t)
        x = self.up1(torch.cat((self.up(x), skip), dim=1), t)
        return self.out(F.silu(self.norm(x)))


@case(
    reals(2, 1, 12, 12),
    "unknown",
    free={
        "localization.0.weight:0": 4,
        "localization.3.weight:0": 6,
        "fc_loc.0.weight:0": 8,
        "conv1.weight:0": 5,
        "conv2.weight:0": 7,
        "fc1.weight:0": 10,
    },
    fixed=("fc_loc.2.weight:0", "fc2.weight:0"),
)
class SpatialTransformer(nn.Module):
    """A localisation network turns the picture upright before a small CNN classifies it."""

    def __init__(self) -> None:
        super().__init__()
        self.localization = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.MaxPool2d(2, stride=2), nn.ReLU(True), nn.Conv2d(4, 6, 3), nn.ReLU(True)
        )
        self.fc_loc = nn.Sequential(nn.Linear(6 * 3 * 3, 8), nn.ReLU(True), nn.Linear(8, 3 * 2))
        self.fc_loc[2].bias.data.copy_(torch.tensor([1, 0, 0, 0, 1, 0], dtype=torch.float))
        self.conv1, self.conv2 = nn.Conv2d(1, 5, 3), nn.Conv2d(5, 7, 3)
        self.fc1, self.fc2 = nn.Linear(7 * 4 * 4, 10), nn.Linear(10, 4)

    def stn(self, x: Tensor) -> Tensor:
        xs = self.localization(x)
        theta = self.fc_loc(xs.view(-1, 6 * 3 * 3)).view(-1, 2, 3)
        return F.grid_sample(x, F.affine_grid(theta, list(x.size()), align_corners=False), align_corners=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(self.stn(x)))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return F.log_softmax(self.fc2(F.relu(self.fc1(x.view(-1, 7 * 4 * 4)))), dim=1)


@case(
    IMAGES,
    "unknown",
    free={"features.weight:0": 8, "offset.0.weight:0": 6, "mix.weight:0": 7},
    fixed=("offset.2.weight:0", "head.weight:0"),
)
class WarpedFeatures(nn.Module):
    """A flow field predicted from feature maps warps those same maps by `grid_sample`."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 8, 3, padding=1)
        self.offset = nn.Sequential(nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 2, 1), nn.Tanh())
        self.mix, self.head = nn.Conv2d(16, 7, 1), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        f = F.relu(self.features(x))
        b, _, h, w = f.shape
        theta = torch.eye(2, 3, dtype=x.dtype, device=x.device).expand(b, 2, 3)
        grid = F.affine_grid(theta, [b, 1, h, w], align_corners=True) + 0.2 * self.offset(f).permute(0, 2, 3, 1)
        warped = F.grid_sample(f, grid, padding_mode="border", align_corners=True)
        return self.head(F.relu(self.mix(torch.cat([f, warped], dim=1))).mean(dim=(-2, -1)))


@case(
    lambda: (reals(2, 1, 10, 10)(), reals(2, 1, 10, 10, seed=8)()),
    free={"encoder.0.weight:0": 4, "encoder.3.weight:0": 6, "encoder.6.weight:0": 10, "out.0.weight:0": 5},
    fixed=("out.2.weight:0",),
)
class Siamese(nn.Module):
    """One encoder for both pictures; the absolute difference of the codes is judged."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.LeakyReLU(0.2),
            nn.Conv2d(4, 6, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(6 * 3 * 3, 10),
            nn.Sigmoid(),
        )
        self.out = nn.Sequential(nn.Linear(10, 5), nn.ReLU(), nn.Linear(5, 1))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        difference = torch.abs(self.encoder(a) - self.encoder(b))
        return torch.sigmoid(self.out(difference)).squeeze(1)


@case(
    TOKENS,
    free={"embed.weight:0": 8, "log_decay:0": 8, "log_decay:1": 4, "B:1": 4, "C:0": 8, "mix.weight:0": 10},
    fixed=("head.weight:0",),
)
class DiagonalStateSpace(nn.Module):
    """S4D in small: a bank of decays per channel, the recurrence written by `cumsum` of rescaled inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.log_decay = nn.Parameter(torch.rand(8, 4))
        self.B, self.C = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(8, 4))
        self.skip = nn.Parameter(torch.ones(8))
        self.mix, self.head = nn.Linear(8, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        u = self.embed(x)
        rate = F.softplus(self.log_decay) * 0.1
        steps = torch.arange(u.shape[1], dtype=u.dtype, device=u.device)[:, None, None]
        growth = torch.exp(rate * steps)  # time x channel x state
        states = torch.cumsum(u[..., None] * self.B * growth, dim=1) / growth
        y = (states * self.C).sum(dim=-1) + self.skip * u
        return self.head(F.gelu(self.mix(y)))


@case(
    lambda: (reals(2, 5, 6)(), reals(2, 4, seed=8)()),
    "grid",
    free={"hyper.0.weight:0": 10, "inner.weight:0": 8, "make_weight.weight:0": 0, "make_bias.weight:0": 7},
    fixed=("head.weight:0", "hyper.0.weight:1"),
)
class HyperNetwork(nn.Module):
    """A network of the context writes weight and bias of a layer of the main network, per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.n_in, self.n_out = 8, 7
        self.hyper = nn.Sequential(nn.Linear(4, 10), nn.ReLU())
        self.make_weight, self.make_bias = nn.Linear(10, self.n_out * self.n_in), nn.Linear(10, self.n_out)
        self.inner, self.head = nn.Linear(6, 8), nn.Linear(7, 3)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        z = self.hyper(context)
        weight = self.make_weight(z).view(-1, self.n_out, self.n_in)
        bias = self.make_bias(z).unsqueeze(1)
        x = F.relu(self.inner(x))
        x = torch.bmm(x, weight.transpose(1, 2)) + bias
        return self.head(torch.tanh(x))


class TNet(nn.Module):
    """Predicts a k x k matrix from a cloud of k-dimensional points."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k
        self.conv1, self.conv2 = nn.Conv1d(k, 6, 1), nn.Conv1d(6, 10, 1)
        self.bn1, self.bn2 = nn.BatchNorm1d(6), nn.BatchNorm1d(10)
        self.fc1, self.fc2 = nn.Linear(10, 8), nn.Linear(8, k * k)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        x = torch.max(x, 2, keepdim=True)[0].view(-1, 10)
        x = self.fc2(F.relu(self.fc1(x)))
        identity = torch.eye(self.k, dtype=x.dtype, device=x.device).flatten()[None]
        return (x + identity).view(-1, self.k, self.k)


@case(
    reals(2, 3, 9),
    free={
        "stn.conv1.weight:0": 6,
        "stn.conv2.weight:0": 10,
        "stn.fc1.weight:0": 8,
        "conv1.weight:0": 6,
        "conv2.weight:0": 12,
        "attention.weight:1": 12,
        "fc1.weight:0": 9,
    },
    fixed=("stn.fc2.weight:0", "fc2.weight:0"),
)
class PointNet(nn.Module):
    """A point cloud turned by a T-Net, its features pooled by attention."""

    def __init__(self) -> None:
        super().__init__()
        self.stn = TNet(3)
        self.conv1, self.bn1 = nn.Conv1d(3, 6, 1), nn.BatchNorm1d(6)
        self.conv2, self.bn2 = nn.Conv1d(6, 12, 1), nn.BatchNorm1d(12)
        self.attention = nn.Conv1d(12, 1, 1)
        self.fc1, self.fc2 = nn.Linear(12, 9), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.bmm(x.transpose(2, 1), self.stn(x)).transpose(2, 1)
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        weights = F.softmax(self.attention(x), dim=-1)
        x = (x * weights).sum(dim=-1)
        return F.log_softmax(self.fc2(F.relu(self.fc1(x))), dim=-1)


def rotate_half(x: Tensor) -> Tensor:
    """The second half negated, then the first."""
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


@case(
    numbers(13, 2, 6),
    "tokens",
    "attention",
    "grid",
    "integers",
    "inexact",
    free={"embed.weight:1": 12, "wq.weight:0": 0, "wk.weight:0": 0, "wv.weight:0": 0, "wo.weight:1": 0},
    fixed=("head.weight:0", "embed.weight:0"),
)
class RotaryGrouped(nn.Module):
    """Six query heads on two key heads, rotary positions, causal mask, softmax, all by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = 6, 2, 4
        self.embed = nn.Embedding(13, 12)
        self.norm = nn.LayerNorm(12)
        self.wq = nn.Linear(12, self.n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(12, self.n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(12, self.n_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(self.n_heads * self.head_dim, 12, bias=False)
        self.head = nn.Linear(12, 5)
        self.register_buffer("inv_freq", 1.0 / 10000 ** (torch.arange(0, 4, 2).float() / 4), persistent=False)

    def rotate(self, x: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(x.shape[1], device=x.device).to(x.dtype), self.inv_freq.to(x.dtype))
        angles = torch.cat((angles, angles), dim=-1)[None, :, None]
        return x * angles.cos() + rotate_half(x) * angles.sin()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        b, t, _ = x.shape
        h = self.norm(x)
        q = self.rotate(self.wq(h).view(b, t, self.n_heads, self.head_dim)).transpose(1, 2)
        k = self.rotate(self.wk(h).view(b, t, self.n_kv_heads, self.head_dim)).transpose(1, 2)
        v = self.wv(h).view(b, t, self.n_kv_heads, self.head_dim).transpose(1, 2)
        k = k.repeat_interleave(self.n_heads // self.n_kv_heads, dim=1)
        v = v.repeat_interleave(self.n_heads // self.n_kv_heads, dim=1)
        scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
        mask = torch.triu(torch.full((t, t), float("-inf"), device=x.device, dtype=x.dtype), diagonal=1)
        y = torch.softmax(scores + mask, dim=-1) @ v
        return self.head(x + self.wo(y.transpose(1, 2).contiguous().view(b, t, -1)))


@case(
    lambda: (reals(4, 6)(), numbers(5, 4)()),
    "tokens",
    "shared",
    free={"inp.weight:0": 8, "shared.weight:0": 8, "w:1": 10, "scale:0": 10, "table:1": 10},
    fixed=("table:0", "out.weight:0"),
)
class RawParameters(nn.Module):
    """One layer used at two places, and a matrix, a scale and a table used without any layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.shared = nn.Linear(6, 8), nn.Linear(8, 8)
        self.w = nn.Parameter(torch.randn(8, 10) * 0.3)
        self.scale = nn.Parameter(torch.ones(10))
        self.table = nn.Parameter(torch.randn(5, 10))
        self.back, self.out = nn.Linear(10, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, idx: Tensor) -> Tensor:
        x = torch.relu(self.shared(self.inp(x)))
        x = torch.tanh(x @ self.w * self.scale + self.table[idx])
        x = torch.relu(self.shared(self.back(x)))
        return self.out(x)


@case(IMAGES, "data_dependent", free={"conv1.weight:0": 6, "conv2.weight:0": 8, "fc.weight:1": 8})
class DataBranch(nn.Module):
    """Dark pictures are inverted and features sharpened: both ways use the same layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        dark = bool(x.mean() < 0)
        x = F.relu(self.conv1(-x if dark else x))
        if dark:
            x = x + x.square()
        return self.fc(F.relu(self.conv2(x)).amax(dim=(2, 3)))


class Mish(torch.autograd.Function):
    """x * tanh(softplus(x)), with its own backward that keeps only x."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return x * torch.tanh(F.softplus(x))

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        t = torch.tanh(F.softplus(x))
        return grad * (t + x * (1 - t * t) * torch.sigmoid(x))


@case(IMAGES, free={"conv1.weight:0": 6, "conv2.weight:0": 8, "fc1.weight:0": 10}, fixed=("fc2.weight:0",))
class CustomActivation(nn.Module):
    """An activation with a hand-written backward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3, stride=2)
        self.fc1, self.fc2 = nn.Linear(8 * 2 * 2, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = Mish.apply(self.conv2(Mish.apply(self.conv1(x))))
        return self.fc2(Mish.apply(self.fc1(torch.flatten(x, 1))))


@case(IMAGES, "data_dependent", free={"conv2.weight:0": 8, "fc1.weight:0": 10}, fixed=("fc2.weight:0",))
class NumpyRoundTrip(nn.Module):
    """A per-channel median goes through numpy and comes back as a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(8, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        median = np.median(x.detach().cpu().numpy(), axis=(0, 2, 3))
        x = x - torch.from_numpy(median).to(x)[None, :, None, None]
        x = F.relu(self.conv2(x))
        return self.fc2(F.relu(self.fc1(x.mean(dim=(2, 3)))))


@case(
    reals(2, 9, 7),
    "attention",
    "grid",
    "integers",
    "inexact",
    free={
        "latents:1": 8,
        "to_q.weight:0": 0,
        "to_kv.weight:0": 0,
        "to_out.weight:1": 0,
        "ff.0.weight:0": 16,
        "latents:0": 4,
    },
    fixed=("to_kv.weight:1", "head.weight:0"),
)
class Perceiver(nn.Module):
    """Four learned latents attend to the input twice with the same layers, then are averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, dim_head = 2, 6
        self.scale = dim_head**-0.5
        self.latents = nn.Parameter(torch.randn(4, 8))
        self.norm, self.norm_context = nn.LayerNorm(8), nn.LayerNorm(7)
        self.to_q, self.to_kv = nn.Linear(8, 12, bias=False), nn.Linear(7, 24, bias=False)
        self.to_out = nn.Linear(12, 8)
        self.ff = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 3)

    def attend(self, x: Tensor, context: Tensor) -> Tensor:
        b = x.shape[0]
        q = self.to_q(self.norm(x))
        k, v = self.to_kv(self.norm_context(context)).chunk(2, dim=-1)
        q, k, v = (t.view(b, t.shape[1], self.heads, -1).transpose(1, 2) for t in (q, k, v))
        weights = torch.einsum("bhid,bhjd->bhij", q, k).mul(self.scale).softmax(dim=-1)
        y = torch.einsum("bhij,bhjd->bhid", weights, v)
        return self.to_out(y.transpose(1, 2).reshape(b, x.shape[1], -1))

    def forward(self, data: Tensor) -> Tensor:
        x = self.latents.unsqueeze(0).expand(data.shape[0], -1, -1)
        for _ in range(2):
            x = x + self.attend(x, data)
            x = x + self.ff(x)
        return self.head(x.mean(dim=1))


@case(
    IMAGES,
    "grid",
    free={"z:0": 5, "w1.weight:0": 0, "w2.weight:0": 0, "stem.weight:0": 4, "head.weight:1": 6},
    fixed=("head.weight:0",),
)
class HyperConvolution(nn.Module):
    """The kernel of a convolution is generated from a learned code by two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.z = nn.Parameter(torch.randn(5))
        self.w1, self.w2 = nn.Linear(5, 4 * 7), nn.Linear(7, 6 * 3 * 3)
        self.stem, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.w2(F.relu(self.w1(self.z)).view(4, 7)).view(4, 6, 3, 3).transpose(0, 1)
        x = F.conv2d(F.relu(self.stem(x)), kernel, padding=1)
        return self.head(F.relu(x).mean(dim=[2, 3]))
