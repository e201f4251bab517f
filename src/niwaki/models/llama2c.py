"""Llama-shaped networks of llama2.c, from its binary files."""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import torch
from torch import Tensor, nn

from niwaki.errors import FileDamagedError, InputError, MissingExtraError
from niwaki.models import Built, ModelSource

HEADER = struct.Struct("<7i")
MAGIC = 0x616B3432
"""First word of llama2.c's later formats ("ak42")."""
MOST = 2**20
"""No width, vocabulary or context beyond; a larger number is another kind of file."""
TOKENS = 16
"""Of the example."""


class Sizes(NamedTuple):
    """What stands at the beginning of the file, in its order."""

    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    """Negative where the output has weights of its own."""
    context: int

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def tied(self) -> bool:
        return self.vocabulary > 0

    def parts(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names in transformers and shapes of what each layer has, in the file's order."""
        kv = self.kv_heads * self.head_dim
        return [
            ("input_layernorm", (self.width,)),
            ("self_attn.q_proj", (self.width, self.width)),
            ("self_attn.k_proj", (kv, self.width)),
            ("self_attn.v_proj", (kv, self.width)),
            ("self_attn.o_proj", (self.width, self.width)),
            ("post_attention_layernorm", (self.width,)),
            ("mlp.gate_proj", (self.hidden, self.width)),
            ("mlp.down_proj", (self.width, self.hidden)),
            ("mlp.up_proj", (self.hidden, self.width)),
        ]

    def numbers(self) -> int:
        """How many follow the header: weights, and two rotary tables that nobody reads."""
        words = abs(self.vocabulary) * self.width
        layers = self.layers * sum(math.prod(shape) for _, shape in self.parts())
        return words * (1 if self.tied else 2) + layers + self.width + self.context * self.head_dim


@final
@dataclass(frozen=True)
class Llama2c(ModelSource):
    """`llama2c:FILE`: a checkpoint of llama2.c (version 0, float32) as `LlamaForCausalLM`. Takes no arguments.

    There, rotary positions turn neighbouring pairs of a head's channels; in transformers a channel and the one half a
    head further on: rows of queries and keys are put in that order.

    Source: the format as https://github.com/karpathy/llama2.c writes and reads it.

    Raises:
        InputError: no such file, arguments, or a shape that is not one number of tokens within the context.
        FileDamagedError: truncated, too long, of another format, or with sizes that contradict each other.
        MissingExtraError: transformers is not installed.
    """

    def build(self, *, stored: bool) -> Built:
        path = Path(self.name).expanduser()
        if self.arguments:
            found, do = ", ".join(sorted(self.arguments)), "leave them out: the file says all sizes"
            raise InputError(f"arguments of llama2c:{self.name}", found=found, do=do)
        sizes = read_sizes(path)
        tokens = min(TOKENS, sizes.context)
        if self.shape is not None:
            if len(self.shape) != 1 or not 1 <= self.shape[0] <= sizes.context:
                do = f"give one number of tokens, 1 to {sizes.context}"
                raise InputError(f"an input for llama2c:{self.name}", found=f"shape {self.shape}", do=do)
            tokens = self.shape[0]
        model = _network(sizes)
        if stored:
            _fill_(model, sizes, path)
        example = {"input_ids": torch.zeros(1, tokens, dtype=torch.int64), "use_cache": False}
        return Built(model.eval(), example, stored=stored)


def read_sizes(path: Path) -> Sizes:
    """The sizes of a llama2.c file, after a check that the file is as long as they say.

    Raises:
        InputError: no such file.
        FileDamagedError: see `Llama2c`.
    """
    if not path.is_file():
        do = "name a .bin file that llama2.c wrote"
        raise InputError(f"model llama2c:{path}", found="no such file", where=str(path), do=do)
    try:
        length = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(HEADER.size)
    except OSError as cause:
        raise _damaged(path, str(cause)) from cause
    if len(head) < HEADER.size:
        raise _damaged(path, f"{length} bytes, shorter than its header of {HEADER.size}")
    sizes = Sizes(*HEADER.unpack(head))
    if sizes.width == MAGIC:
        raise _damaged(path, "a later version of the format", do="export it again with --version 0")
    positive = (*sizes[:5], abs(sizes.vocabulary), sizes.context)
    if not all(0 < size <= MOST for size in positive):
        raise _damaged(path, f"sizes {tuple(sizes)}, which no network has")
    if sizes.width % sizes.heads or sizes.heads % sizes.kv_heads or sizes.head_dim % 2:
        found = f"width {sizes.width}, {sizes.heads} heads, {sizes.kv_heads} key/value heads, which do not divide"
        raise _damaged(path, found)
    wanted = HEADER.size + 4 * sizes.numbers()
    if length != wanted:
        what = "truncated" if length < wanted else "too long, or another format"
        raise _damaged(path, f"{length} bytes where its sizes make {wanted}: {what}")
    return sizes


def _network(sizes: Sizes) -> Any:
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as cause:
        raise MissingExtraError("llama2c: models need transformers", do='pip install "niwaki[llm]"') from cause
    config = LlamaConfig(
        vocab_size=abs(sizes.vocabulary),
        hidden_size=sizes.width,
        intermediate_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        max_position_embeddings=sizes.context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=sizes.tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def _fill_(model: Any, sizes: Sizes, path: Path) -> None:
    numbers = torch.from_numpy(np.fromfile(path, "<f4", offset=HEADER.size).astype(np.float32, copy=False))
    at = 0

    def take(*shape: int) -> Tensor:
        nonlocal at
        start, at = at, at + math.prod(shape)
        return numbers[start:at].view(*shape)

    def filled(weight: Tensor, values: Tensor) -> None:
        weight.copy_(values)

    body: nn.Module = model.model
    turned = {"self_attn.q_proj": sizes.heads, "self_attn.k_proj": sizes.kv_heads}
    with torch.no_grad():
        filled(model.model.embed_tokens.weight, take(abs(sizes.vocabulary), sizes.width))
        for name, shape in sizes.parts():
            for layer, values in enumerate(take(sizes.layers, *shape)):
                if name in turned:
                    values = _half_apart(values, turned[name])
                filled(body.get_submodule(f"layers.{layer}.{name}").weight, values)  # type: ignore[arg-type]
        filled(model.model.norm.weight, take(sizes.width))
        if not sizes.tied:
            at += sizes.context * sizes.head_dim  # the rotary tables
            filled(model.lm_head.weight, take(abs(sizes.vocabulary), sizes.width))


def _half_apart(weight: Tensor, heads: int) -> Tensor:
    """Rows 0, 2, 4, ... of each head, then its rows 1, 3, 5, ...: pairs half a head apart instead of side by side."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _damaged(
    path: Path, found: str, do: str = "get the file again, or name one that llama2.c wrote"
) -> FileDamagedError:
    return FileDamagedError("read a llama2.c checkpoint", found=found, where=str(path), do=do)
