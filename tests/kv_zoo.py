"""Tiny, random decoders of transformers of every shape that a compressed cache must handle."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def model(
    kind: str,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    **more: Any,
) -> Any:
    """`{kind}ForCausalLM` with weights large enough that attention is far from uniform."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}{'TextConfig' if kind == 'Gemma3' else 'Config'}")(
        **{**SIZES, "num_attention_heads": heads, "num_key_value_heads": kv_heads, **more}
    )
    config._attn_implementation = attention
    made = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                nn.init.normal_(parameter, std=0.25)
    made.generation_config.eos_token_id = None
    return made.to(dtype)


def llama(**more: Any) -> Any:
    return model("Llama", **more)


ZOO: dict[str, Callable[[], Any]] = {
    "llama, multi-head": lambda: llama(kv_heads=4),
    "llama, grouped": llama,
    "llama, one key head": lambda: llama(kv_heads=1),
    "llama, attention biases": lambda: llama(attention_bias=True),
    "llama, eager": lambda: llama(attention="eager"),
    "llama, wide heads": lambda: llama(head_dim=16),
    "mistral": lambda: model("Mistral", sliding_window=None, head_dim=8),
    "qwen2, biases": lambda: model("Qwen2"),
    "qwen2, some layers slide": lambda: model("Qwen2", use_sliding_window=True, sliding_window=12, max_window_layers=1),
    "qwen3, key norms": lambda: model("Qwen3", head_dim=16),
    "gemma2, soft-capping": lambda: model(
        "Gemma2",
        head_dim=16,
        attention="eager",
        sliding_window=12,
        query_pre_attn_scalar=16,
        attn_logit_softcapping=5.0,
    ),
    "gemma3, slides but for the last": lambda: model(
        "Gemma3",
        head_dim=16,
        sliding_window=12,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
    "phi3, one projection": lambda: model("Phi3"),
}


def prompt(length: int, *, batch: int = 1, seed: int = 1) -> torch.Tensor:
    """Token numbers, `[batch, length]`; never the padding token."""
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(prompts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Prompts `[1, length]` as one batch, padded on the left with token 0."""
    longest = max(one.shape[1] for one in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, one in enumerate(prompts):
        ids[row, longest - one.shape[1] :] = one[0]
        mask[row, longest - one.shape[1] :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def generate(made: Any, ids: torch.Tensor | dict[str, torch.Tensor], *, new: int = 12, **options: Any) -> torch.Tensor:
    """Greedy tokens, `[batch, new]`; `ids` may be a padded batch's dictionary."""
    given = ids if isinstance(ids, dict) else {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    settings = {"do_sample": False, "max_new_tokens": new, **options}
    return made.generate(**given, **settings)[:, given["input_ids"].shape[1] :]
