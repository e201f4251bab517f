"""Which models' key/value caches can be compressed: read off the attention modules' structure, never their names.

Written for the cache layers and the `AttentionInterface` of transformers 5.23, the only version tried.
"""

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from niwaki.errors import InputError, MissingExtraError

OLDEST = (5, 23)
IMPLEMENTATIONS = ("eager", "sdpa")
"""Attention implementations that prefill is left to; both give one mask per token and run on every device."""


class UnsupportedModelError(InputError):
    """A model whose cache cannot be compressed: names the model, the module and the reason."""


@dataclass(frozen=True)
class Site:
    """One attention module: where keys and values of one layer come from."""

    name: str
    """Its path in the model."""
    module: Any
    """The module itself, with transformers' names: `config`, `scaling`, projections."""
    layer: int
    """Its number in the cache."""
    heads: int
    """Query heads."""
    kv_heads: int
    """Heads of keys and values; divides `heads`."""
    head_dim: int
    rotated: int
    """Channels of a head that rotate with the position; the rest stand still."""
    sliding: int | None
    """Tokens it looks back at; None where it sees all. Sliding layers are left to transformers."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Site":
        """A copied cache is of the same model."""
        return self


def transformers() -> Any:
    """The package, imported when it is first needed.

    Raises:
        MissingExtraError: it is not installed, or older than 5.23.
    """
    try:
        import transformers as package
    except ImportError as cause:
        do = 'pip install "niwaki[llm]"'
        raise MissingExtraError("compress a key/value cache: needs transformers", do=do) from cause
    found = tuple(int(part) for part in package.__version__.split(".")[:2])
    if found < OLDEST:
        raise MissingExtraError(
            "compress a key/value cache: needs transformers 5.23 or newer",
            found=package.__version__,
            do='pip install -U "transformers>=5.23"',
        )
    return package


def sites(model: nn.Module) -> tuple[Site, ...]:
    """The attention modules of a causal language model of transformers, in the cache's order.

    Raises:
        UnsupportedModelError: not such a model, or one with a structure that is not handled, with the reason.
        MissingExtraError: transformers is missing or too old.
    """
    package = transformers()
    if not isinstance(model, package.PreTrainedModel):
        raise _refused(model, "it is not a model of transformers")
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise _refused(model, "it is an encoder-decoder: cross-attention caches are written once and read whole")
    kinds = _kinds(model, config)
    found = [(name, module) for name, module in model.named_modules() if _writes_a_cache(module)]
    if len(found) != len(kinds):
        why = f"{len(found)} of its {len(kinds)} layers have an attention module with a cache of its own"
        raise _refused(model, why)
    for name, module in found:
        if why := _reason(module):
            raise _refused(model, why, where=f"{name} ({type(module).__name__})")
    return tuple(
        Site(
            name=name,
            module=module,
            layer=int(module.layer_idx),  # type: ignore[arg-type]
            heads=_heads(module),
            kv_heads=_heads(module) // int(module.num_key_value_groups),  # type: ignore[arg-type]
            head_dim=int(module.head_dim),  # type: ignore[arg-type]
            rotated=_rotated(module),
            sliding=kinds[int(module.layer_idx)],  # type: ignore[arg-type, index]
        )
        for name, module in sorted(found, key=lambda item: int(item[1].layer_idx))  # type: ignore[arg-type]
    )


def implementation(model: nn.Module, found: tuple[Site, ...]) -> str:
    """The attention implementation that the model runs with, `eager` or `sdpa`.

    Raises:
        UnsupportedModelError: another one.
    """
    name = getattr(found[0].module.config, "_attn_implementation", None) or "eager"
    if name not in IMPLEMENTATIONS:
        raise _refused(
            model,
            f"its attention runs as {name!r}, whose masks are of another kind",
            do='load it with attn_implementation="sdpa" or "eager"',
        )
    return str(name)


def _kinds(model: nn.Module, config: Any) -> list[int | None]:
    from transformers.cache_utils import get_layer_types_and_kwargs

    types, settings = get_layer_types_and_kwargs(config)
    for number, kind in enumerate(types):
        if kind not in ("full_attention", "sliding_attention"):
            raise _refused(model, f"layer {number} is of type {kind!r}; only full and sliding attention are handled")
    return [setting.get("sliding_window") for setting in settings]


def _writes_a_cache(module: nn.Module) -> bool:
    """An attention module: numbered, takes `past_key_values`, and calls its `update`."""
    if not isinstance(getattr(module, "layer_idx", None), int):
        return False
    forward = inspect.unwrap(type(module).forward)
    taken = inspect.signature(forward).parameters
    return ("past_key_values" in taken or "layer_past" in taken) and "update" in forward.__code__.co_names


def _reason(module: nn.Module) -> str:
    """Why this attention module cannot be handled; empty where it can."""
    forward = inspect.unwrap(type(module).forward)
    taken, used = inspect.signature(forward).parameters, forward.__code__.co_names
    if "alibi" in taken:
        return "its positions are biases on the scores (ALiBi)"
    if hasattr(module, "kv_lora_rank") or hasattr(module, "kv_a_proj_with_mqa"):
        return "its keys are already low-rank (multi-head latent attention)"
    if getattr(module, "sinks", None) is not None:
        return "it has learned attention sinks beside the keys"
    if getattr(module, "is_kv_shared_layer", False):
        return "it reads the keys of another layer"
    if getattr(module, "is_cross_attention", False):
        return "it is cross-attention"
    if "ALL_ATTENTION_FUNCTIONS" not in used:
        return "its attention does not go through transformers' attention-interface registry"
    if "position_embeddings" not in taken:
        return "its positions are not rotary"
    lacking = [name for name in ("head_dim", "num_key_value_groups", "config") if not hasattr(module, name)]
    return f"it does not say its {lacking[0]}" if lacking else ""


def _rotated(module: Any) -> int:
    factor = getattr(module.config, "partial_rotary_factor", None)
    rope = getattr(module.config, "rope_parameters", None) or {}
    return int(int(module.head_dim) * (factor or rope.get("partial_rotary_factor") or 1.0))


def _heads(module: Any) -> int:
    return int(module.config.num_attention_heads)


def _refused(model: nn.Module, why: str, *, where: str = "", do: str = "") -> UnsupportedModelError:
    return UnsupportedModelError(
        f"compress the key/value cache of {type(model).__name__}",
        found=why,
        where=where,
        do=do
        or "use a decoder with rotary, multi-head or grouped-query attention (Llama, Mistral, Qwen, Gemma, Phi-3)",
    )
