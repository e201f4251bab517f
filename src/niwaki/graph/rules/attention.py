"""Scaled-dot-product attention in all its kernels, and embedding look-ups."""

import numpy as np
from torch import Tensor

from niwaki.graph.labels import varying
from niwaki.graph.rules.contraction import contract
from niwaki.graph.rules.registry import Call, rule
from niwaki.graph.rules.triangles import counted
from niwaki.graph.values import Labels, Value, join


@rule(
    "scaled_dot_product_attention",
    "_scaled_dot_product_attention_math",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_attention_math_for_mps",
)
def attention(call: Call) -> Labels:
    """q, k, v are [..., heads, tokens, head size]; fewer key/value heads than query heads are repeated."""
    q, k, v = (call.value(call[name]) for name in ("query", "key", "value"))
    heads = q.shape[-3] if len(q.shape) > 3 else 1
    k, v = repeat_heads(call, k, heads), repeat_heads(call, v, heads)
    if call["is_causal"]:
        counted(call, (q, -2), (k, -2), "a causal mask that counts its positions")
    lead = "abcdefg"[: len(q.shape) - 2]
    scores = contract(call, q, k, f"{lead}qd,{lead}kd->{lead}qk")
    zero = call.zero
    shape = (*q.shape[:-1], k.shape[-2])
    for name in ("attn_mask", "attn_bias"):
        if call.has(name) and isinstance(call[name], Tensor):
            mask = call.value(call[name])
            scores = join(call.space, [(shape, scores, q.why), (mask.shape, mask.get(call.space), mask.why)], shape)
    for labels in scores:
        if labels.shape[-1] > 1:
            call.space.mark_inexact(labels, (labels.ndim - 1,), "softmax runs along it")
    weights = Value(shape, scores, why=q.why, zero=zero)
    return contract(call, weights, v, f"{lead}qk,{lead}kd->{lead}qd")


def repeat_heads(call: Call, value: Value, heads: int) -> Value:
    if len(value.shape) < 4 or value.shape[-3] == heads:
        return value
    n = heads // value.shape[-3]
    fields = tuple(np.repeat(f, n, axis=-3) if f.shape[-3] > 1 else f for f in value.get(call.space))
    shape = (*value.shape[:-3], heads, *value.shape[-2:])
    return Value(shape, fields, why=value.why, zero=value.zero)


@rule("embedding")
def embedding(call: Call) -> Labels:
    """Rows of a table picked by data: the rows' axis is fixed, the others pass to the end of the result."""
    table = call.value(call["weight"])
    call.zero = table.zero
    arrays = []
    for labels in table.get(call.space):
        if labels.shape[0] > 1:
            call.fix(labels, "rows of a table picked by data")
            continue
        arrays.append(labels.reshape((1,) * (len(call.shape) - 1) + labels.shape[1:]))
    for array in arrays:
        call.space.role(array, "out")
    return tuple(array for array in arrays if varying(array))
