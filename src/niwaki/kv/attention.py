"""Attention of new tokens to a cache in parts, and its dispatch through transformers' registry of attention functions.

A cache layer hands the new keys on with itself attached (`tagged`); the registered function finds it there and lets it
attend. Calls without such keys go to the model's own attention function, untouched.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from niwaki.errors import InputError
from niwaki.kv.segments import Part

PREFIX = "niwaki_"
MOST_LOGITS = 2**25
"""Logits that are in memory at once when many tokens attend: 128 MiB of float32."""
_TAG = "_niwaki_layer"
_HANDLED = frozenset({"scaling", "softcap", "dropout", "is_causal"})
_NO_EFFECT = frozenset(
    {"sliding_window", "position_ids", "use_cache", "cache_position", "return_dict", "logits_to_keep"}
    | {"output_attentions", "output_hidden_states", "output_router_logits", "num_items_in_batch"}
    | {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
)
"""Arguments that change no score of eager and sdpa attention: what they say is in the mask, or is for others. Every
other one is refused, since it might."""


@dataclass(frozen=True)
class Inputs:
    """What an attention module was called with; collected for layers that declare `wants_inputs`."""

    module: nn.Module
    hidden: Tensor
    """`[batch, new, width]`, normalised: what the projections read."""
    rotary: tuple[Tensor, Tensor]
    """Cosines and sines of the new tokens' positions, `[batch, new, rotated channels]`."""
    positions: Tensor | None = None
    """The positions themselves, `[batch or 1, new]`, where the model's layers hand them on."""


@dataclass(frozen=True)
class Call:
    """One call of an attention function: new tokens that want to see all that was before, and each other."""

    query: Tensor
    """`[batch, query heads, new, head_dim]`, rotated."""
    keys: Tensor
    """Of the new tokens, rotated: `[batch, heads, new, head_dim]`."""
    values: Tensor
    mask: Tensor | None
    """Over every token so far, evicted ones too: bool (True is seen) or added, `[batch, 1 or heads, new, seen]`.

    None: causal.
    """
    scaling: float
    softcap: float | None
    own: Callable[[Tensor, Tensor], Tensor]
    """The model's own attention of these queries to the keys and values given: what a whole cache must use."""
    inputs: Inputs | None = None

    @property
    def new(self) -> int:
        return self.query.shape[-2]

    def real(self) -> Tensor | None:
        """Which tokens are no padding: bool `[batch, seen]`; None for all. What the last token sees tells it."""
        return None if self.mask is None else seen(self.mask[:, 0, -1, :])


class Layer(Protocol):
    def attend(self, call: Call) -> Tensor: ...


def seen(mask: Tensor) -> Tensor:
    """A mask of either kind as bool, True where a token is seen."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def attend(
    call: Call, parts: Sequence[Part], *, sums: bool = False, counted: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Softmax attention of the call's queries over parts that stand one behind the other, the new tokens in the last.

    Returns `[batch, new, query heads, head_dim]`, and with `sums` each part's weights summed over the new tokens (over
    those that are `counted`, bool `[batch, new]`) and the group, float32 `[batch, heads, tokens]`. Logits are scaled
    by the call's own scaling however many channels are left; softmax is in float32, as in eager attention.
    """
    batch, heads, new, _ = call.query.shape
    kv_heads = call.keys.shape[1]
    query = call.query.view(batch, kv_heads, heads // kv_heads, new, -1)
    total = sum(part.tokens for part in parts)
    step = max(1, MOST_LOGITS // max(1, batch * heads * total))
    outputs, summed = [], [query.new_zeros((), dtype=torch.float32)] * (len(parts) if sums else 0)
    for at in range(0, new, step):
        part_queries = query[..., at : at + step, :]
        logits = _logits(part_queries, parts, call.scaling)
        if call.softcap is not None:
            logits = torch.tanh(logits / call.softcap) * call.softcap
        if (hidden := _hidden(call, parts, at, logits.shape[-2])) is not None:
            logits = logits.masked_fill(hidden, torch.finfo(logits.dtype).min)
        weights = torch.softmax(logits, dim=-1, dtype=torch.float32)
        split = weights.to(query.dtype).split([part.tokens for part in parts], dim=-1)
        mixed = [part.mix(piece) for part, piece in zip(parts, split, strict=True)]
        outputs.append(torch.stack(mixed).sum(dim=0) if len(mixed) > 1 else mixed[0])
        if sums:
            if counted is not None:
                weights = weights * counted[:, None, None, at : at + step, None]
            pieces = weights.sum(dim=(2, 3)).split([part.tokens for part in parts], dim=-1)
            summed = [known + piece for known, piece in zip(summed, pieces, strict=True)]
    output = torch.cat(outputs, dim=-2).reshape(batch, heads, new, -1)
    return output.transpose(1, 2).contiguous(), summed


def _logits(query: Tensor, parts: Sequence[Part], scaling: float) -> Tensor:
    """Scaled products of queries and all parts' keys, `[batch, heads, group, new, tokens]`.

    Products in float16 would leave its range where keys have large biases. There each query is made so small that its
    largest number is at most 1 / head_dim, by a power of two, so that no product is beyond the largest key; the logits
    are float32.
    """
    if query.dtype != torch.float16:
        return torch.cat([part.logits(query) for part in parts], dim=-1) * scaling
    largest = query.abs().amax(dim=-1, keepdim=True).float() * query.shape[-1]
    size = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)
    small = (query.float() / size).to(query.dtype)
    return torch.cat([part.logits(small) for part in parts], dim=-1).float() * (size * scaling)


def hidden_tokens(call: Call, parts: Sequence[Part]) -> Tensor | None:
    """For one new token: which stored ones it does not see, uint8 `[batch, heads, tokens]`; None if it sees all."""
    found = _hidden(call, parts, 0, 1)
    if found is None:
        return None
    if found.shape[2] != 1:
        do = "use a model whose mask is the same for all heads"
        raise InputError("decode in one kernel", found="a mask of its own for each query head", do=do)
    wide = found[:, :, 0, 0].expand(call.keys.shape[0], call.keys.shape[1], found.shape[-1])
    return wide.to(torch.uint8).contiguous()


def _hidden(call: Call, parts: Sequence[Part], at: int, rows: int) -> Tensor | None:
    """True where a token is not seen, `[batch, heads or 1, group or 1, rows, tokens]`; None if every token is."""
    if call.mask is None:
        return _causal(call, parts, at, rows)
    mask = ~seen(call.mask[:, :, at : at + rows, :])  # [batch, 1 or query heads, rows, seen]
    batch, heads = mask.shape[:2]
    kv_heads = call.keys.shape[1]
    grouped = mask.view(batch, kv_heads, heads // kv_heads, rows, -1) if heads > 1 else mask.unsqueeze(1)
    return torch.cat(_of_parts(grouped, parts, kv_heads), dim=-1)


def _of_parts(mask: Tensor, parts: Sequence[Part], kv_heads: int) -> list[Tensor]:
    """The columns of each part of `[batch, heads or 1, group or 1, rows, seen]`, all with the same leading axes."""
    found = []
    for part in parts:
        where = part.columns()
        if isinstance(where, int):
            found.append(mask[..., where : where + part.tokens])
            continue
        index = where.long()[:, :, None, None, :]
        wide = mask.expand(index.shape[0], kv_heads, *mask.shape[2:])
        found.append(wide.gather(-1, index.expand(*wide.shape[:-1], index.shape[-1])))
    leading = torch.broadcast_shapes(*(piece.shape[:-1] for piece in found))
    return [piece.expand(*leading, piece.shape[-1]) for piece in found]


def _causal(call: Call, parts: Sequence[Part], at: int, rows: int) -> Tensor | None:
    """Without a mask every token sees what was before and itself."""
    if call.new == 1:
        return None
    tokens = sum(part.tokens for part in parts)
    behind = torch.arange(tokens, device=call.query.device) - (tokens - call.new)  # the new ones are 0 and up
    own = torch.arange(at, at + rows, device=call.query.device)
    return (behind[None, :] > own[:, None])[None, None, None]


def tagged(keys: Tensor, layer: Layer) -> Tensor:
    """The same keys, carrying the cache layer to the attention function; the caller's tensor is left alone."""
    handed = keys.view(keys.shape)
    setattr(handed, _TAG, layer)
    return handed


def dispatch(name: str, own: Callable[..., Any] | None) -> Callable[..., Any]:
    """The function to register: `name` is the implementation that it stands for, `own` its function.

    Eager attention is not in the registry; each modelling file has its own, found beside the attention class.
    """

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        original = own or eager_of(module)
        layer = getattr(key, _TAG, None)
        if layer is None:
            return original(module, query, key, value, attention_mask, **options)
        _check(module, options)

        def whole(keys: Tensor, values: Tensor) -> Tensor:
            return original(module, query, keys, values, attention_mask, **options)[0]

        scaling = options.get("scaling")
        call = Call(
            query=query,
            keys=key,
            values=value,
            mask=attention_mask,
            scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
            softcap=options.get("softcap"),
            own=whole,
        )
        return layer.attend(call), None

    attention.__name__ = PREFIX + name
    return attention


def eager_of(module: nn.Module) -> Callable[..., Any]:
    """The eager attention function of the file that defines an attention module's class.

    Raises:
        InputError: there is none.
    """
    for kind in type(module).__mro__:
        if own := getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None):
            return own
    found = f"no eager_attention_forward beside {type(module).__name__}"
    raise InputError("run eager attention", found=found, do='load the model with attn_implementation="sdpa"')


def _check(module: nn.Module, options: dict[str, Any]) -> None:
    where = f"layer {getattr(module, 'layer_idx', '?')} ({type(module).__name__})"
    known = _HANDLED | _NO_EFFECT
    if strange := sorted(name for name, value in options.items() if value is not None and name not in known):
        do = "use a model, or a call, without it"
        raise InputError("attend to a compressed cache", found=f"the argument {strange[0]!r}", where=where, do=do)
    if options.get("is_causal") is False:
        do = "use a causal model"
        raise InputError("attend to a compressed cache", found="is_causal=False", where=where, do=do)
    if options.get("dropout"):
        do = "call model.eval() first"
        raise InputError("attend to a compressed cache", found="attention dropout in training mode", where=where, do=do)
