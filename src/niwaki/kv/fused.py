"""One decoded token against a thin cache in one Triton kernel: thin keys are read as they are, by their channels.

The old and the whole part are cut into spans; each program attends to one span of one head's tokens with all queries of
its group, and a second kernel joins the spans by their largest logits, as in flash decoding. Reads every stored number
once, writes no logits. Tried in Triton's interpreter (float32, float16) and compiled for CUDA; never run on a GPU,
never timed, and off unless asked for.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from niwaki.kv.attention import Call, hidden_tokens
from niwaki.kv.dense import Dense
from niwaki.kv.segments import Part, Segment

SPAN = 512
"""Tokens of a program: enough programs at 16k tokens of few heads to fill a GPU."""
BLOCK = {torch.float16: 64, torch.bfloat16: 64, torch.float32: 32}
"""Tokens in one step of a program; fewer where numbers are wide, for the sake of shared memory."""
SMALLEST = 16
"""Of a side of a matrix product in Triton."""


def suits(call: Call, parts: Sequence[Part]) -> bool:
    """Whether the kernel can do this call: one new token, dense rows of a floating type, two parts at most."""
    return (
        call.new == 1
        and len(parts) <= 2
        and all(
            isinstance(one, Segment) and isinstance(one.keys, Dense) and isinstance(one.values, Dense) for one in parts
        )
        and all(one.key_channels is None and one.value_channels is None for one in parts[1:])  # type: ignore[attr-defined]
        and call.query.dtype in BLOCK
    )


def decode(call: Call, parts: Sequence[Segment]) -> Tensor:
    """Attention of one new token, `[batch, 1, query heads, head_dim]`; parts as `suits` wants them."""
    batch, query_heads, _, width = call.query.shape
    heads = call.keys.shape[1]
    rows, group = batch * heads, query_heads // heads
    first, last = parts[0], parts[-1]
    old = first.tokens if len(parts) == 2 else 0
    thin = first if old else last
    keys, values = thin.keys.read().contiguous(), thin.values.read().contiguous()
    spans_old, spans = -(-old // SPAN), -(-old // SPAN) + -(-last.tokens // SPAN)
    query = call.query.reshape(rows, group, width).contiguous()
    hidden = hidden_tokens(call, parts)
    top = query.new_empty(rows, spans, group, dtype=torch.float32)
    total = torch.empty_like(top)
    mixed = query.new_zeros(rows, spans, group, width, dtype=torch.float32)
    wide = max(SMALLEST, triton.next_power_of_2(width))
    _attend[(rows, spans)](
        query,
        keys,
        values,
        last.keys.read().contiguous(),
        last.values.read().contiguous(),
        thin.key_channels if thin.key_channels is not None else query,
        thin.value_channels if thin.value_channels is not None else query,
        query if hidden is None else hidden,
        top,
        total,
        mixed,
        call.scaling,
        call.softcap or 1.0,
        old,
        last.tokens,
        spans_old,
        spans,
        KEYS=keys.shape[-1],
        VALUES=values.shape[-1],
        WIDTH=width,
        GROUP=group,
        CHANNELS=wide,
        QUERIES=max(SMALLEST, triton.next_power_of_2(group)),
        STEP=BLOCK[call.query.dtype],
        LENGTH=SPAN,
        THIN_KEYS=thin.key_channels is not None and bool(old),
        THIN_VALUES=thin.value_channels is not None and bool(old),
        MASKED=hidden is not None,
        CAPPED=call.softcap is not None,
    )
    output = torch.empty_like(query)
    _join[(rows, group)](top, total, mixed, output, spans, WIDTH=width, GROUP=group, CHANNELS=wide)
    return output.view(batch, 1, query_heads, width)


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    query,
    old_keys,
    old_values,
    new_keys,
    new_values,
    key_channels,
    value_channels,
    hidden,
    top,
    total,
    mixed,
    scaling,
    cap,
    old,
    new,
    spans_old,
    spans,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
    QUERIES: tl.constexpr,
    STEP: tl.constexpr,
    LENGTH: tl.constexpr,
    THIN_KEYS: tl.constexpr,
    THIN_VALUES: tl.constexpr,
    MASKED: tl.constexpr,
    CAPPED: tl.constexpr,
):
    row, span = tl.program_id(0).to(tl.int64), tl.program_id(1)
    is_old = span < spans_old
    tokens = tl.where(is_old, old, new)
    begin = tl.where(is_old, span, span - spans_old) * LENGTH
    end = tl.minimum(begin + LENGTH, tokens)
    width_keys, width_values = tl.where(is_old, KEYS, WIDTH), tl.where(is_old, VALUES, WIDTH)
    column, member = tl.arange(0, CHANNELS), tl.arange(0, QUERIES)
    from_keys, to_values = column, column
    if THIN_KEYS:
        listed = tl.load(key_channels + row * KEYS + column, mask=column < tl.where(is_old, KEYS, 0), other=0).to(
            tl.int32
        )
        from_keys = tl.where(is_old, listed, column)
    if THIN_VALUES:
        named = tl.load(value_channels + row * VALUES + column, mask=column < tl.where(is_old, VALUES, 0), other=0).to(
            tl.int32
        )
        to_values = tl.where(is_old, named, column)
    asked = tl.load(
        query + (row * GROUP + member)[:, None] * WIDTH + from_keys[None, :],
        mask=(member < GROUP)[:, None] & (column < width_keys)[None, :],
        other=0.0,
    )
    keys, values = new_keys, new_values
    if is_old:
        keys, values = old_keys, old_values
    keys += row * tokens * width_keys
    values += row * tokens * width_values
    most = tl.full((QUERIES,), float("-inf"), tl.float32)
    weight = tl.zeros((QUERIES,), tl.float32)
    sums = tl.zeros((QUERIES, CHANNELS), tl.float32)
    for at in range(begin, end, STEP):
        token = at + tl.arange(0, STEP)
        here = token < end
        stored = tl.load(
            keys + token[:, None].to(tl.int64) * width_keys + column[None, :],
            mask=here[:, None] & (column < width_keys)[None, :],
            other=0.0,
        )
        logits = tl.dot(asked, tl.trans(stored), input_precision="ieee") * scaling
        if CAPPED:
            logits = (2 * tl.sigmoid(2 * logits / cap) - 1) * cap
        if MASKED:
            place = row * (old + new) + tl.where(is_old, 0, old) + token
            here = here & (tl.load(hidden + place, mask=here, other=1) == 0)
        logits = tl.where(here[None, :], logits, float("-inf"))
        higher = tl.maximum(most, tl.max(logits, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        share = tl.exp(logits - base[:, None])
        fade = tl.exp(most - base)
        taken = tl.load(
            values + token[:, None].to(tl.int64) * width_values + column[None, :],
            mask=(token < end)[:, None] & (column < width_values)[None, :],
            other=0.0,
        )
        sums = sums * fade[:, None] + tl.dot(share.to(taken.dtype), taken, input_precision="ieee")
        weight = weight * fade + tl.sum(share, axis=1)
        most = higher
    place = (row * spans + span) * GROUP + member
    tl.store(top + place, most, mask=member < GROUP)
    tl.store(total + place, weight, mask=member < GROUP)
    tl.store(
        mixed + place[:, None] * WIDTH + to_values[None, :],
        sums,
        mask=(member < GROUP)[:, None] & (column < width_values)[None, :],
    )


@triton.jit
def _join(  # type: ignore[no-untyped-def]
    top, total, mixed, output, spans, WIDTH: tl.constexpr, GROUP: tl.constexpr, CHANNELS: tl.constexpr
):
    row, member = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, CHANNELS)
    inside = column < WIDTH
    most = -float("inf")
    weight = 0.0
    sums = tl.zeros((CHANNELS,), tl.float32)
    for span in range(spans):
        place = (row * spans + span) * GROUP + member
        higher = tl.maximum(most, tl.load(top + place))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        fade, share = tl.exp(most - base), tl.exp(tl.load(top + place) - base)
        weight = weight * fade + tl.load(total + place) * share
        sums = sums * fade + tl.load(mixed + place * WIDTH + column, mask=inside, other=0.0) * share
        most = higher
    tl.store(output + (row * GROUP + member) * WIDTH + column, sums / weight, mask=inside)
