"""A llama2.c file as a Llama of transformers, and its vocabulary as a tokenizer: what the benchmarks read of them."""

import itertools
import re
import struct
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

BOS, FIRST_BYTE = 1, 3
HEADER = struct.Struct("7i")
"""Width, hidden width, layers, heads, key/value heads, vocabulary, context."""


def read_llama(file: Path) -> nn.Module:
    """The network of a llama2.c checkpoint, output tied to the embedding.

    There, rotary positions turn neighbouring pairs of a head's channels; in transformers a channel and the one half a
    head further on: rows of queries and keys are put in that order.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    content = file.read_bytes()
    dim, hidden, layers, heads, pairs, words, context = HEADER.unpack_from(content)
    numbers = torch.from_numpy(np.frombuffer(content, np.float32, offset=HEADER.size).copy())
    config = LlamaConfig(
        vocab_size=abs(words), hidden_size=dim, intermediate_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=pairs, max_position_embeddings=context, rms_norm_eps=1e-5,
        tie_word_embeddings=True, use_cache=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model, size = LlamaForCausalLM(config).eval(), dim // heads
    at = 0

    def take(*shape: int) -> Tensor:
        nonlocal at
        at += int(np.prod(shape))
        return numbers[at - int(np.prod(shape)) : at].view(*shape)

    def turned(weight: Tensor, count: int) -> Tensor:
        return weight.view(count, size // 2, 2, dim).transpose(1, 2).reshape(count * size, dim)

    body = model.model
    parts: list[tuple[str, tuple[int, ...]]] = [
        ("input_layernorm", (dim,)), ("self_attn.q_proj", (dim, dim)), ("self_attn.k_proj", (pairs * size, dim)),
        ("self_attn.v_proj", (pairs * size, dim)), ("self_attn.o_proj", (dim, dim)),
        ("post_attention_layernorm", (dim,)), ("mlp.gate_proj", (hidden, dim)), ("mlp.down_proj", (dim, hidden)),
        ("mlp.up_proj", (hidden, dim)),
    ]  # fmt: skip
    with torch.no_grad():
        body.embed_tokens.weight.copy_(take(abs(words), dim))
        for name, shape in parts:
            for layer, weight in zip(body.layers, take(layers, *shape), strict=True):
                turn = {"self_attn.q_proj": heads, "self_attn.k_proj": pairs}.get(name)
                layer.get_submodule(name).weight.copy_(turned(weight, turn) if turn else weight)
        body.norm.weight.copy_(take(dim))
    return model


class Vocabulary:
    """Pieces of a llama2.c tokenizer: neighbours are joined, the likeliest piece first."""

    def __init__(self, file: Path) -> None:
        content, at = file.read_bytes(), 4
        self.numbers: dict[bytes, int] = {}
        while at < len(content):
            _, length = struct.unpack_from("fi", content, at)
            self.numbers.setdefault(content[at + 8 : at + 8 + length], len(self.numbers))
            at += 8 + length

    def tokens(self, text: str) -> list[int]:
        """Tokens of one story, with the one that begins it; no piece reaches over a space or a line's end."""
        return [BOS, *(token for word in re.findall(r" ?[^ \n]+|\n| ", f" {text}") for token in self._word(word))]

    @cache  # noqa: B019 (one vocabulary a run)
    def _word(self, word: str) -> tuple[int, ...]:
        pieces = [letter.encode() for letter in word]
        while len(pieces) > 1:  # earlier pieces have the higher score
            joined = [self.numbers.get(a + b, len(self.numbers)) for a, b in itertools.pairwise(pieces)]
            best = min(range(len(joined)), key=joined.__getitem__)
            if joined[best] == len(self.numbers):
                break
            pieces[best : best + 2] = [pieces[best] + pieces[best + 1]]
        return tuple(
            token
            for piece in pieces
            for token in ([self.numbers[piece]] if piece in self.numbers else [FIRST_BYTE + byte for byte in piece])
        )
