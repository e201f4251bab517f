"""Queries of padding count for nothing, and beams carry everything that a layer keeps."""

from typing import Any

import pytest
import torch
from test_eviction import layers
from torch import Tensor

import kv_zoo
from niwaki.kv import H2O, Call, Compression, KVCache, Observation, Segment, SnapKV, ThinK, ThinKCache
from niwaki.kv.dense import Dense
from niwaki.kv.think import value_scores


def observed(query: Tensor, keys: Tensor, values: Tensor, padding: int) -> Observation:
    """One head, causal, the first `padding` tokens hidden as transformers' sdpa mask hides them."""
    tokens = keys.shape[2]
    mask = torch.ones(tokens, tokens).tril().bool() & (torch.arange(tokens) >= padding)
    call = Call(query, keys, values, mask[None, None] if padding else None, 1.0, None, own=lambda k, v: query)
    return Observation(call, Segment(Dense(keys), Dense(values), keys.shape[-1], start=0), call.real())


def padded_and_alone(padding: int, width: int = 4) -> tuple[Observation, Observation]:
    """The same text of 5 tokens; what stands at padding is large, and would win every sum."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 1, 1, padding + 5, width, generator=generator)
    rows[..., :padding, 0] = 50.0
    return observed(*rows, padding=padding), observed(*rows[:, :, :, padding:], padding=0)


@pytest.mark.parametrize("window", [2, 6, 32])
def test_scores_of_channels_and_tokens_are_those_without_padding(window: int) -> None:
    padded, alone = padded_and_alone(3)
    assert padded.real is not None and padded.real.tolist() == [[False] * 3 + [True] * 5]
    for how in (ThinK(window=window).key_scores, lambda seen: value_scores(seen, window)):
        torch.testing.assert_close(how(padded), how(alone))
    for asked in (window, None):  # SnapKV's window, and every query, as H2O asks
        outputs, weights = padded.attention(asked)
        expected_outputs, expected = alone.attention(asked)
        assert weights[..., :3].eq(0).all()
        torch.testing.assert_close(weights[..., 3:], expected)
        count = expected_outputs.shape[2]
        torch.testing.assert_close(outputs[:, :, -count:], expected_outputs)
        assert outputs[:, :, :-count].eq(0).all()


def test_weights_of_a_worked_example() -> None:
    """Query 1 sees tokens 1; query 2 sees 1 and 2 alike: 1.5 and 0.5, the padded token and its query nothing."""
    rows = torch.zeros(3, 1, 1, 3, 2)
    rows[2, 0, 0] = torch.tensor([[7.0, 7], [2, 0], [0, 4]])
    seen = observed(*rows, padding=1)
    outputs, weights = seen.attention(None)
    assert weights.tolist() == [[[0.0, 1.5, 0.5]]]
    assert outputs[0, 0].tolist() == [[0, 0], [2, 0], [1, 2]]
    assert value_scores(seen, 3)[0, 0].tolist() == pytest.approx([5**0.5, 2.0])


@pytest.mark.parametrize(
    "settings",
    [
        {"channels": ThinK(keep=0.4, values=0.6), "recent": 4},
        {"tokens": SnapKV(keep=12, window=8), "recent": 4},
        {"tokens": H2O(keep=10), "recent": 2},
        {"tokens": H2O(keep=10), "channels": ThinK(keep=0.5), "recent": 2},
    ],
    ids=["thin", "snapkv", "h2o", "h2o, thin"],
)
def test_prompts_shorter_than_the_window_are_as_alone(settings: dict[str, Any]) -> None:
    """16 tokens behind 24 of padding: the last 32 queries are half padding."""
    model, one, step = kv_zoo.llama(), kv_zoo.prompt(16, seed=3), kv_zoo.prompt(1, seed=8)
    how = Compression(**settings)
    alone, batch = KVCache(model, how), KVCache(model, how)
    given = kv_zoo.padded([one, kv_zoo.prompt(40, seed=2)])
    places = (given["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    mask = torch.cat([given["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    with torch.no_grad():
        model(one, past_key_values=alone)
        model(**given, position_ids=places, past_key_values=batch)
        found = [(kept(layer, 0), of) for layer, of in zip(layers(batch), map(kept, layers(alone)), strict=True)]
        logits = model(step, past_key_values=alone).logits[0]
        together = model(
            step.expand(2, -1), attention_mask=mask, position_ids=places[:, -1:] + 1, past_key_values=batch
        ).logits[0]
    for (channels, tokens), (expected_channels, expected_tokens) in found:
        assert channels == expected_channels
        assert [place - 24 for place in tokens] == expected_tokens
    torch.testing.assert_close(together, logits, atol=1e-4, rtol=1e-4)


def kept(layer: Any, row: int = 0) -> tuple[list[Any], list[int]]:
    """Channels of keys and values of the old part, and places of tokens of both parts where some were evicted."""
    channels: list[Any] = []
    if layer.old is not None:
        both = (layer.old.key_channels, layer.old.value_channels)
        channels = [None if one is None else one[row].tolist() for one in both]
    places = [part.positions[row] for part in (layer.old, layer.whole) if part and part.positions is not None]
    return channels, torch.cat(places, dim=-1)[0].tolist() if places else []


def test_beams_carry_weights_and_places_of_evicting_caches() -> None:
    model, ids = kv_zoo.llama(), kv_zoo.prompt(40, batch=3)
    how = Compression(tokens=H2O(keep=20), recent=4)
    order = torch.tensor([2, 0, 0])
    cache, fresh = KVCache(model, how), KVCache(model, how)
    steps = [kv_zoo.prompt(1, batch=3, seed=seed) for seed in range(6)]
    with torch.no_grad():
        model(ids, past_key_values=cache)
        before = [(layer._weights.clone(), layer.old.positions.clone()) for layer in layers(cache)]  # type: ignore[union-attr]
        cache.reorder_cache(order)
        for layer, (weights, positions) in zip(layers(cache), before, strict=True):
            assert layer._weights is not None and layer.old is not None and layer.old.positions is not None
            assert not torch.equal(weights[0], weights[2]) and not torch.equal(positions[0], positions[2])
            assert torch.equal(layer._weights, weights[order])
            assert torch.equal(layer.old.positions, positions[order])
        model(ids[order], past_key_values=fresh)
        for step in steps:  # what is evicted later goes by what was carried
            one, other = (model(step, past_key_values=each).logits for each in (cache, fresh))
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    for one, other in zip(layers(cache), layers(fresh), strict=True):
        assert torch.equal(one.old.positions, other.old.positions)  # type: ignore[union-attr, arg-type]


def test_a_choice_per_query_head_decodes_as_heads_of_their_own_do() -> None:
    """The same model with its key heads repeated has one for each query head: the same choice, the same logits."""
    model, twin, ids = kv_zoo.llama(), kv_zoo.llama(kv_heads=4), kv_zoo.prompt(50)
    with torch.no_grad():
        known = model.state_dict()
        for name, rows in twin.state_dict().items():
            value = known[name]
            if name.endswith(("k_proj.weight", "v_proj.weight")):
                value = value.view(2, 8, -1).repeat_interleave(2, dim=0).flatten(0, 1)
            rows.copy_(value)
        with pytest.warns(UserWarning, match="2 copies"):
            cache = KVCache(model, Compression(channels=ThinK(keep=0.5, values=0.75, per_query_head=True)))
        wanted = ThinKCache(twin, keep=0.5, values=0.75)
        for piece in (ids, *kv_zoo.prompt(3, seed=3).split(1, dim=1), kv_zoo.prompt(4, seed=4)):
            one, other = model(piece, past_key_values=cache).logits, twin(piece, past_key_values=wanted).logits
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(layers(cache), layers(wanted), strict=True):
        assert torch.equal(ours.old.key_channels, theirs.old.key_channels)  # type: ignore[union-attr, arg-type]
