"""Where keys and values of an attention module come from: weights, biases, norms and rotation, read off the module."""

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from niwaki.errors import InputError
from niwaki.kv.support import Site

STEADY = ("default", "linear", "llama3", "yarn", "proportional")
"""Rotary kinds whose angles depend on the position alone; others change with the length of the sequence."""


@dataclass(frozen=True, eq=False)
class Source:
    """One attention module's two projections, which both read its hidden states."""

    keys: Float[Tensor, "out width"]
    values: Float[Tensor, "out width"]
    key_bias: Tensor | None
    value_bias: Tensor | None
    key_norm: nn.Module | None
    """Between a head's projected key and its rotation, or None."""

    @property
    def width(self) -> int:
        return self.keys.shape[1]

    def projected(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Keys, neither normalised nor rotated, and values of `[..., width]`, without their biases."""
        return functional.linear(hidden, self.keys), functional.linear(hidden, self.values)


def source_of(site: Site) -> Source:
    """The projections of an attention module: `k_proj` and `v_proj`, or the last rows of `qkv_proj`.

    Raises:
        InputError: projections of another kind, or norms on values or over all heads.
    """
    module: Any = site.module
    out = site.kv_heads * site.head_dim
    for name in ("v_norm", "kv_norm"):
        if getattr(module, name, None) is not None:
            raise _refused(site, f"a norm on values ({name})")
    norm = getattr(module, "k_norm", None) or getattr(module, "key_layernorm", None)
    if norm is not None and sum(p.numel() for p in norm.parameters()) not in (0, site.head_dim):
        raise _refused(site, "a norm over the keys of all heads")
    if (fused := getattr(module, "qkv_proj", None)) is not None:
        weight, bias = _linear(site, fused, "qkv_proj")
        if len(weight) != (site.heads + 2 * site.kv_heads) * site.head_dim:
            raise _refused(site, f"a qkv_proj of {len(weight)} rows")
        key_bias, value_bias = (None, None) if bias is None else (bias[-2 * out : -out], bias[-out:])
        return Source(weight[-2 * out : -out], weight[-out:], key_bias, value_bias, norm)
    found = [_linear(site, getattr(module, name, None), name) for name in ("k_proj", "v_proj")]
    for name, (weight, _) in zip(("k_proj", "v_proj"), found, strict=True):
        if len(weight) != out:
            raise _refused(site, f"a {name} of {len(weight)} rows for {site.kv_heads} heads of {site.head_dim}")
    return Source(found[0][0], found[1][0], found[0][1], found[1][1], norm)


class Rotation:
    """Turns keys that were not rotated to absolute positions, as the model itself does."""

    def __init__(self, model: nn.Module, site: Site) -> None:
        """
        Raises:
            InputError: the model keeps its rotary embedding elsewhere, or one that changes with the length.
        """
        rotary = getattr(model.get_decoder(), "rotary_emb", None)  # type: ignore[operator]
        apply = getattr(sys.modules.get(type(site.module).__module__), "apply_rotary_pos_emb", None)
        if rotary is None or apply is None:
            raise _refused(site, "no rotary_emb on its decoder, or no apply_rotary_pos_emb beside its class")
        kinds = getattr(rotary, "rope_type", "default")
        for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
            if kind not in STEADY:
                raise _refused(site, f"rotary positions of the kind {kind!r}, which change with the length")
        self._rotary, self._apply = rotary, apply
        self._by_layer = "layer_type" in inspect.signature(rotary.forward).parameters
        self._layer_type = getattr(site.module, "layer_type", None)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Rotation":
        return self

    def table(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of `[batch, tokens]`."""
        given = {"layer_type": self._layer_type} if self._by_layer else {}
        cos, sin = self._rotary(like, positions, **given)
        return cos, sin

    def __call__(self, keys: Tensor, positions: Tensor) -> Tensor:
        """`[batch, heads, tokens, head_dim]` at positions `[batch, tokens]`; channels beyond the table stand still."""
        cos, sin = self.table(keys, positions)
        turned: Callable[..., tuple[Tensor, Tensor]] = self._apply
        turning, still = keys.split([cos.shape[-1], keys.shape[-1] - cos.shape[-1]], dim=-1)
        turning = turned(turning, turning, cos, sin)[1]
        return torch.cat((turning, still), dim=-1) if still.shape[-1] else turning


def turns_halves(site: Site) -> bool:
    """Whether channels j and j + head_dim / 2 rotate together, as in Llama; False too where that cannot be told.

    Asks the function beside the module's class to turn every channel alone, by a quarter.
    """
    apply = getattr(sys.modules.get(type(site.module).__module__), "apply_rotary_pos_emb", None)
    if apply is None:
        return False
    alone = torch.eye(site.head_dim)
    sine = torch.ones(1, site.head_dim, site.head_dim)
    try:
        turned = apply(alone[None, None], alone[None, None], torch.zeros_like(sine), sine)[1]
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False  # of another form: complex numbers, or both axes' positions
    return bool(turned.shape[-2:] == alone.shape and (turned[0, 0].abs() == alone.roll(site.head_dim // 2, 1)).all())


def _linear(site: Site, layer: Any, name: str) -> tuple[Tensor, Tensor | None]:
    if not isinstance(layer, nn.Linear) or not layer.weight.is_floating_point():
        raise _refused(site, f"a {name} of type {type(layer).__name__}" if layer is not None else f"no {name}")
    return layer.weight.detach(), None if layer.bias is None else layer.bias.detach()


def _refused(site: Site, found: str) -> InputError:
    do = (
        "use a model with linear k_proj and v_proj (Llama, Mistral, Qwen, Gemma) or qkv_proj (Phi-3), and fold adapters"
    )
    where = f"{site.name} ({type(site.module).__name__})"
    return InputError("project keys and values to fewer channels", found=found, where=where, do=do)
