"""Your own network through a factory: two inputs, attention heads, a concatenation, a part that must not change.

From the command line: `niwaki trace python:examples/user_factory.py:captioner` (the factory brings its own example).
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import niwaki


class Captioner(nn.Module):
    """Scores for the next word from a picture and the words so far."""

    def __init__(self, words: int = 50, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.picture = nn.Sequential(nn.Conv2d(3, 16, 4, stride=4), nn.ReLU(), nn.Conv2d(16, width, 1))
        self.embedding = nn.Embedding(words, width)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.head = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, words))

    def forward(self, picture: Tensor, tokens: Tensor) -> Tensor:
        seen = self.picture(picture).flatten(2).transpose(1, 2)  # [batch, places, width]
        stream = torch.cat([seen, self.embedding(tokens)], dim=1)  # [batch, places + tokens, width]
        batch, length, _ = stream.shape
        split = self.qkv(self.norm(stream)).view(batch, length, 3, self.heads, -1)
        query, key, value = split.permute(2, 0, 3, 1, 4)  # each [batch, heads, length, head_dim]
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        stream = stream + self.out(mixed.transpose(1, 2).flatten(2))
        return self.head(stream[:, -1])


def captioner() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """The factory: a network and an example, here a tuple of arguments. Weights would be loaded by --checkpoint."""
    return Captioner(), (torch.zeros(1, 3, 16, 16), torch.zeros(1, 5, dtype=torch.long))


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.manual_seed(0)
    model, example = captioner()

    graph = niwaki.trace(model, example)
    for group in graph.groups:
        print(f"{group.name:14} {group.units:3} units in {group.rows} rows: {group.fixed or group.inexact or 'free'}")

    result = niwaki.compress(
        model,
        example,
        method=niwaki.methods.Magnitude(exact_only=True),  # leaves the stream whole, which a layer norm runs across
        budget=(niwaki.Budget(keep=0.7, of="macs"), niwaki.Budget(keep=0.9, of="params")),  # both hold
        protect=("picture.0",),  # the first layer keeps its width
    )
    print({name: f"{len(kept)} of {result.plan.units[name]}" for name, kept in result.plan.kept.items()})
    print(f"heads: {model.heads} -> {result.model.heads}; judge: {result.receipt.difference:.0e}")

    with tempfile.TemporaryDirectory() as aside:
        folder = result.save(Path(aside) / "run")
        small = niwaki.load(folder, captioner).eval()
        picture, tokens = torch.rand(2, 3, 16, 16), torch.randint(0, 50, (2, 5))
        assert torch.equal(small(picture, tokens), result.model.eval()(picture, tokens))
    print("saved, loaded and equal bit for bit")


if __name__ == "__main__":
    main()
