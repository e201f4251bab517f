"""Which tokens stay, with numbers worked out by hand, and what a cache without the others computes."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

import kv_zoo
from niwaki.errors import InputError, NothingChangedWarning
from niwaki.kv import H2O, KIVI, Compression, KVCache, SnapKV, StreamingLLM, ThinK, Tokens, compressed
from niwaki.kv.compressed_layer import CompressedLayer


def tokens(
    attention: list[float] | None, count: int, budget: int, *, first: int = 0, seen: int | None = None
) -> Tokens:
    places = torch.arange(count)[None, None]
    real = None if not first else places >= first
    weights = None if attention is None else torch.tensor(attention)[None, None]
    return Tokens(places, weights, real, torch.tensor([first]), count, budget)


def test_streaming_keeps_the_first_and_the_newest() -> None:
    assert StreamingLLM(keep=5, sinks=2).choose(tokens(None, 10, 5), 5).tolist() == [[[0, 1, 7, 8, 9]]]
    # behind three of padding the text begins at 3
    assert StreamingLLM(keep=5, sinks=2).choose(tokens(None, 10, 5, first=3), 5).tolist() == [[[3, 4, 7, 8, 9]]]


def test_h2o_keeps_heavy_hitters_and_the_newest() -> None:
    attention = [0.1, 9, 0.2, 8, 0.3, 7, 0, 0, 0, 0]
    # six stay: the three newest, and of the others the three that got most
    assert H2O(keep=6).choose(tokens(attention, 10, 6), 6).tolist() == [[[1, 3, 5, 7, 8, 9]]]
    assert H2O(keep=4, recent=0.0).choose(tokens(attention, 10, 4), 4).tolist() == [[[1, 3, 4, 5]]]
    # padding goes first, whatever it got
    assert H2O(keep=4, recent=0.0).choose(tokens(attention, 10, 4, first=2), 4).tolist() == [[[2, 3, 4, 5]]]


def test_snapkv_keeps_the_window_and_what_it_sees_smoothed() -> None:
    attention = [0.0, 0, 5, 0, 0, 0, 0, 1, 0, 0, 0, 0]
    how = SnapKV(keep=6, window=2, kernel=3)
    # a token's score is the largest of its neighbours': 1, 2, 3 share the 5, then 6 is the first of those with the 1
    assert how.choose(tokens(attention, 12, 6), 6).tolist() == [[[1, 2, 3, 6, 10, 11]]]


def test_budgets() -> None:
    assert SnapKV(keep=64).budget(1000) == 64
    assert SnapKV(keep=64).budget(50) == 50
    assert SnapKV(keep=0.25).budget(1000) == 250
    assert SnapKV(keep=0.25).budget(40) == 32  # the window stays in any case
    assert H2O(keep=0.2).budget(1000) == 200


@pytest.mark.parametrize(
    "made",
    [
        lambda: SnapKV(keep=32),
        lambda: SnapKV(keep=0.0),
        lambda: SnapKV(kernel=4),
        lambda: H2O(keep=1.5),
        lambda: H2O(recent=2.0),
        lambda: StreamingLLM(keep=4),
        lambda: StreamingLLM(sinks=-1),
        lambda: Compression(),
        lambda: Compression(channels=ThinK(), recent=-1),
        lambda: Compression(tokens=H2O(), bits=KIVI()),
        lambda: Compression(tokens=H2O(), flush_every=0),
        lambda: Compression(bits=KIVI(), flush_every=16),
    ],
)
def test_settings_that_cannot_be(made: Any) -> None:
    with pytest.raises(InputError):
        made()


def layers(cache: KVCache) -> list[CompressedLayer]:
    return [layer for layer in cache.layers if isinstance(layer, CompressedLayer)]


def reference_weights(model: Any, ids: Tensor) -> list[Tensor]:
    """transformers' own attention weights of every layer, `[query heads, tokens, tokens]`."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(ids, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    return [one[0] for one in found]


def test_h2o_accumulates_what_every_query_gave() -> None:
    model, ids = kv_zoo.llama(num_hidden_layers=1), kv_zoo.prompt(40)
    cache = KVCache(model, Compression(tokens=H2O(keep=40), recent=4))
    with torch.no_grad():
        model(ids[:, :30], past_key_values=cache)  # nothing is evicted yet: 40 may stay
        for at in range(30, 40):
            model(ids[:, at : at + 1], past_key_values=cache)
    weights = reference_weights(model, ids)[0]  # one layer: evictions of others do not matter
    expected = weights.view(2, 2, 40, 40).sum(dim=(1, 2))  # over the group and the queries
    found = layers(cache)[0]._weights
    assert found is not None
    assert torch.allclose(found[0], expected, atol=1e-5)


def test_h2o_goes_on_evicting() -> None:
    """Against a plain loop over transformers' own weights: one layer, so that keys are those of the whole model."""
    model, ids = kv_zoo.llama(num_hidden_layers=1, kv_heads=1), kv_zoo.prompt(24)
    cache = KVCache(model, Compression(tokens=H2O(keep=12, recent=0.5), recent=2))
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
        for at in range(20, 24):
            model(ids[:, at : at + 1], past_key_values=cache)
        full = DynamicCache()
        model(ids, past_key_values=full)
    logits = _logits(model, ids)  # [heads, 24, 24]
    received = logits[:, :20].softmax(-1).sum(dim=(0, 1))[:20]
    kept = _stays(received, list(range(20)), 20, 12, 0)
    received = received[kept]
    for at in range(20, 24):
        row = logits[:, at, [*kept, at]].softmax(-1).sum(0)
        received = torch.cat((received, torch.zeros(1))) + row
        kept = [*kept, at]
        index = _stays(received, kept, at + 1, 12, 2)
        kept, received = [kept[i] for i in index], received[index]
    layer = layers(cache)[0]
    found = torch.cat([part.positions for part in (layer.old, layer.whole)], dim=-1)  # type: ignore[union-attr, misc]
    assert found[0, 0].tolist() == kept
    keys = torch.cat([part.keys.read() for part in (layer.old, layer.whole)], dim=2)  # type: ignore[union-attr]
    assert torch.allclose(keys, full.layers[0].keys[:, :, kept], atol=1e-6)


def _logits(model: Any, ids: Tensor) -> Tensor:
    weights = reference_weights(model, ids)[0]
    return weights.clamp_min(1e-30).log().masked_fill(torch.ones(24, 24).triu(1).bool(), -torch.inf)


def _stays(received: Tensor, places: list[int], seen: int, budget: int, whole: int) -> list[int]:
    """Indices that stay: the newest half of the budget and the last `whole`, then by what was received."""
    forced = [i for i, p in enumerate(places) if p >= seen - budget // 2 or i >= len(places) - whole]
    others = sorted((i for i in range(len(places)) if i not in forced), key=lambda i: (-float(received[i]), i))
    return sorted(forced + others[: max(0, budget - len(forced))])


POLICIES = {
    "snapkv": {"tokens": SnapKV(keep=40)},
    "h2o": {"tokens": H2O(keep=0.5), "recent": 8},
    "streaming": {"tokens": StreamingLLM(keep=0.5), "recent": 8},
    "snapkv, thin": {"tokens": SnapKV(keep=45), "channels": ThinK(keep=0.5)},
    "h2o, thin": {"tokens": H2O(keep=0.5), "channels": ThinK(keep=0.5), "recent": 8},
    "snapkv, thin, 4 bits": {
        "tokens": SnapKV(keep=60),
        "channels": ThinK(keep=0.5),
        "bits": KIVI(4, group=8),
        "recent": 8,
    },
    "4 bits": {"bits": KIVI(4), "recent": 0},
}


@pytest.mark.parametrize("name", POLICIES)
def test_alone_as_in_a_padded_batch(name: str) -> None:
    """Shares count padding as tokens, so the counts are given here."""
    settings = dict(POLICIES[name])
    if name.startswith("h2o"):
        settings["tokens"] = H2O(keep=40, recent=0.5)
    if name.startswith("streaming"):
        settings["tokens"] = StreamingLLM(keep=40)
    if "bits" in settings:  # groups of tokens begin where the row begins: pad by whole groups
        prompts = [kv_zoo.prompt(64, seed=1), kv_zoo.prompt(96, seed=2)]
    else:
        prompts = [kv_zoo.prompt(61, seed=1), kv_zoo.prompt(90, seed=2)]
    model = kv_zoo.llama()
    with compressed(model, Compression(**settings)):
        together = kv_zoo.generate(model, kv_zoo.padded(prompts))
        for row, one in enumerate(prompts):
            assert torch.equal(kv_zoo.generate(model, one)[0], together[row])


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("kind", ["llama, grouped", "gemma2, soft-capping", "qwen2, some layers slide"])
def test_prefill_is_the_same_and_beams_and_turns_work(name: str, kind: str) -> None:
    model, ids, turn = kv_zoo.ZOO[kind](), kv_zoo.prompt(70), kv_zoo.prompt(6, seed=5)
    how = Compression(**POLICIES[name])
    with torch.no_grad():
        cache = KVCache(model, how)
        logits = model(ids, past_key_values=cache).logits
        assert torch.equal(logits, model(ids, past_key_values=DynamicCache(config=model.config)).logits)
        assert torch.isfinite(model(turn, past_key_values=cache).logits).all()
    assert cache.get_seq_length() == 76
    expected = kv_zoo.generate(model, ids, num_beams=2, past_key_values=KVCache(model, how))
    with compressed(model, how):
        assert torch.equal(kv_zoo.generate(model, ids, num_beams=2), expected)


def test_a_turn_sees_what_it_would_see_one_by_one() -> None:
    model, ids, turn = kv_zoo.llama(), kv_zoo.prompt(70), kv_zoo.prompt(6, seed=5)
    for settings in (POLICIES["snapkv, thin"], POLICIES["snapkv"]):
        how = Compression(**settings)
        caches = [KVCache(model, how) for _ in range(2)]
        with torch.no_grad():
            for cache in caches:
                model(ids, past_key_values=cache)
            together = model(turn, past_key_values=caches[0]).logits
            single = torch.cat([model(turn[:, i : i + 1], past_key_values=caches[1]).logits for i in range(6)], dim=1)
        assert torch.allclose(together, single, rtol=1e-4, atol=1e-4)


def test_everything_kept_is_the_whole_cache() -> None:
    model, ids = kv_zoo.llama(), kv_zoo.prompt(60)
    expected = kv_zoo.generate(model, ids)
    for policy in (SnapKV(keep=1.0), H2O(keep=1.0), StreamingLLM(keep=1.0)):
        with compressed(model, Compression(tokens=policy)):
            assert torch.equal(kv_zoo.generate(model, ids), expected)


def test_eight_bits_change_little() -> None:
    model, ids, step = kv_zoo.llama(), kv_zoo.prompt(64), kv_zoo.prompt(1, seed=3)
    off = {}
    for bits in (2, 4, 8):
        cache, full = KVCache(model, Compression(bits=KIVI(bits), recent=0)), DynamicCache()
        with torch.no_grad():
            for one in (cache, full):
                model(ids, past_key_values=one)
            found, expected = (model(step, past_key_values=one).logits for one in (cache, full))
        off[bits] = float((found - expected).norm() / expected.norm())
    assert off[8] < 0.05 and off[8] < off[4] < off[2]


def test_tokens_back_from_an_evicting_cache_are_refused() -> None:
    model, ids, turn = kv_zoo.llama(), kv_zoo.prompt(70), kv_zoo.prompt(4, seed=5)
    with torch.no_grad():
        for policy, why in ((H2O(keep=0.5), "evicts others"), (SnapKV(keep=40), "all 70 tokens of the prompt")):
            cache = KVCache(model, Compression(tokens=policy, recent=4))
            model(ids, past_key_values=cache)
            with pytest.raises(InputError, match=why):
                cache.crop(-1)
            model(turn, past_key_values=cache)
            with pytest.raises(InputError, match=why):  # a step later as well
                cache.crop(-5)
        cache.crop(-4)  # what came after the prompt goes back
        assert cache.get_seq_length() == 70
        cache.crop(-70)  # and all of it
        model(ids, past_key_values=cache)
        assert cache.get_seq_length() == 70


def test_a_crop_beyond_the_whole_part_goes_on_where_it_ended() -> None:
    """Without an answer, the place of the whole part would stay behind what is stored, and its mask with it."""
    model, ids = kv_zoo.llama(), kv_zoo.prompt(64)
    caches = [KVCache(model, Compression(bits=KIVI(8, group=8), recent=8)) for _ in range(2)]
    mask = torch.ones(1, 59, dtype=torch.long)
    with torch.no_grad():
        model(ids, past_key_values=caches[0])
        caches[0].crop(-8 - 8)  # 56 packed tokens and 8 whole ones: 48 packed stay
        model(ids[:, :56], past_key_values=caches[1])
        caches[1].crop(-8)  # the same 48, none of them cropped
        first, second = (
            model(
                kv_zoo.prompt(11, seed=5),
                attention_mask=mask,
                position_ids=torch.arange(48, 59)[None],
                past_key_values=cache,
            ).logits
            for cache in caches
        )
    assert layers(caches[0])[0].whole.start == 48  # type: ignore[union-attr]
    assert torch.equal(first, second)


def test_a_first_chunk_that_is_short_is_said_to_leave_everything() -> None:
    model = kv_zoo.llama()
    cache = KVCache(model, Compression(tokens=SnapKV(keep=40)))
    with torch.no_grad():
        with pytest.warns(NothingChangedWarning, match="a prompt of 30 tokens.*no token is evicted") as said:
            model(kv_zoo.prompt(30), past_key_values=cache)
        assert len(said) == 1  # once per cache, not per layer
        model(kv_zoo.prompt(200), past_key_values=cache)
        assert [layer.whole.tokens for layer in layers(cache)] == [230] * 3  # type: ignore[union-attr]
        for keep in (40, 1.0):  # nothing to be said: the one evicts, the other shall not
            model(kv_zoo.prompt(41), past_key_values=KVCache(model, Compression(tokens=SnapKV(keep=keep))))
