"""torch's multi-head attention with an inner width of its own.

`nn.MultiheadAttention` takes heads x head size to be the width of its input. After a cut they differ, so the cut copy's
attention modules become this class: the same parameters under the same names, the same arguments, the same results.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from niwaki.graph import ChannelGraph
from niwaki.graph.skeleton import walk
from niwaki.surgery.fitting import fit_

Mend = dict[str, Any]


class CutMultiheadAttention(nn.MultiheadAttention):
    """Multi-head attention whose queries and values have `num_heads` x their own size; made by `cut`, not by hand."""

    query_width: int
    """Heads x size of queries and keys; the rest of the stacked projection is values."""
    scale: float
    """What scores are multiplied by: that of the uncut head size."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        batched = query.dim() == 3
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q, k, v = self._project(query, key, value)
        heads = self.num_heads
        q, k, v = (t.unflatten(-1, (heads, t.shape[-1] // heads)).transpose(1, 2) for t in (q, k, v))
        mask = self._mask(attn_mask, key_padding_mask, q)
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.scale
            weights = F.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, self.dropout, self.training) if self.dropout else weights
            out = weights @ v
        else:
            dropout = self.dropout if self.training else 0.0
            causal = is_causal and mask is None
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=self.scale)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        w = self.query_width
        biases: tuple[Tensor | None, ...] = (None, None, None)
        if self.in_proj_bias is not None:
            biases = (self.in_proj_bias[:w], self.in_proj_bias[w : 2 * w], self.in_proj_bias[2 * w :])
        if self.in_proj_weight is None:
            weights: tuple[Tensor, ...] = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        else:
            if query is key and key is value:
                wide = F.linear(query, self.in_proj_weight, self.in_proj_bias)
                return wide[..., :w], wide[..., w : 2 * w], wide[..., 2 * w :]
            weights = (self.in_proj_weight[:w], self.in_proj_weight[w : 2 * w], self.in_proj_weight[2 * w :])
        q, k, v = (F.linear(x, a, b) for x, a, b in zip((query, key, value), weights, biases, strict=True))
        return q, k, v

    def _mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
        """Both masks as one that is added to the scores, `[batch, heads or 1, queries, keys]`."""
        added: Tensor | None = None
        if attn_mask is not None:
            added = _additive(attn_mask, q)
            added = added.unflatten(0, (q.shape[0], -1)) if added.dim() == 3 else added
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, q)
            padding = padding.reshape(-1, 1, 1, padding.shape[-1])
            added = padding if added is None else added + padding
        return added


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))
    return mask.to(like.dtype)


def adapt_attention(small: nn.Module, graph: ChannelGraph, alive: np.ndarray) -> list[Mend]:
    """Turn torch's attention modules whose inner width or input width was cut into `CutMultiheadAttention`."""
    mends: list[Mend] = []
    axes = {(axis.tensor, axis.axis): axis.units for axis in graph.axes}
    often = np.append(alive, True)
    padded = often > 0
    for path, module in walk(small):
        if type(module) is not nn.MultiheadAttention or module.bias_k is not None or module.add_zero_attn:
            continue
        prefix = f"{path}." if path else ""
        stacked = module.in_proj_weight is not None
        units = axes.get((f"{prefix}{'in_proj_weight' if stacked else 'q_proj_weight'}", 0))
        entry = axes.get((f"{prefix}{'in_proj_weight' if stacked else 'q_proj_weight'}", 1))
        if units is None or ((often[units] == 1).all() and (entry is None or (often[entry] == 1).all())):
            continue
        queries = units[: module.embed_dim]
        stays = queries[padded[queries]]
        heads = int(np.unique(graph.units.row[stays]).size) if (graph.units.in_row[queries]).all() else module.num_heads
        if not padded[queries].all() and graph.units.in_row[queries].all() and heads == 0:
            continue
        mends.append(
            {
                "module": path,
                "class": "CutMultiheadAttention",
                "settings": {
                    "num_heads": heads, "query_width": int(stays.size), "scale": float(module.head_dim) ** -0.5,
                    "embed_dim": int(module.out_proj.weight.shape[0]), "head_dim": int(stays.size) // max(heads, 1),
                    "_qkv_same_embed_dim": False,
                },
            }
        )  # fmt: skip
    apply_classes(small, mends)
    return mends


def apply_classes(small: nn.Module, mends: list[Mend] | tuple[Any, ...]) -> None:
    """Change the class of the modules that a surgery's mends name."""
    modules = dict(walk(small)) if mends else {}
    for mend in mends:
        if mend.get("class") == "CutMultiheadAttention":
            module = modules[mend["module"]]
            if not isinstance(module, nn.MultiheadAttention):
                raise TypeError(f"{mend['module']} is no multi-head attention")
            module.__class__ = CutMultiheadAttention
            for name, value in mend["settings"].items():
                setattr(module, name, value)
        elif mend.get("class") == "Fitting":
            fit_(modules[mend["module"]], mend["settings"]["shapes"])
