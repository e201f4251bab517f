"""ThinK's scores and choices, with the numbers of a worked example; and what a thin cache computes and holds."""

import copy
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

import kv_zoo
from niwaki.errors import InputError, NotFiniteError, NothingChangedWarning
from niwaki.kv import Call, Compression, KVCache, Observation, Segment, Site, ThinK, ThinKCache, compressed, think
from niwaki.kv.channels import best, stay
from niwaki.kv.compressed_layer import CompressedLayer
from niwaki.kv.dense import Dense
from niwaki.kv.think import value_scores
from niwaki.measure.memory import _Live

QUERIES = [[1.0, 0, 2, 0], [3, 1, 0, 0]]
KEYS = [[1.0, 4, 0, 1], [0, 3, 1, 1], [2, 0, 1, 1]]


def site(head_dim: int = 4, *, heads: int = 1, kv_heads: int = 1) -> Site:
    return Site("layer", torch.nn.Identity(), 0, heads, kv_heads, head_dim, head_dim, None)


def observed(query: Tensor, keys: Tensor, values: Tensor | None = None, *, scaling: float = 1.0) -> Observation:
    """`[batch, heads, tokens, head_dim]` each."""
    values = keys if values is None else values
    call = Call(query, keys, values, None, scaling, None, own=lambda k, v: query)
    return Observation(call, Segment(Dense(keys), Dense(values), width=keys.shape[-1], start=0), None)


def example() -> Observation:
    # three queries, of which the last two are asked
    query = torch.tensor([[9.0, 9, 9, 9], *QUERIES])[None, None]
    return observed(query, torch.tensor(KEYS)[None, None])


def test_the_score_is_the_norm_of_the_rank_one_term() -> None:
    scores = ThinK(window=2).key_scores(example())[0, 0]
    assert scores.tolist() == pytest.approx([math.sqrt(50), 5.0, math.sqrt(8), 0.0])
    query, keys = torch.tensor(QUERIES), torch.tensor(KEYS)
    for channel in range(4):
        term = torch.outer(query[:, channel], keys[:, channel])
        assert float(scores[channel]) == pytest.approx(float(torch.linalg.matrix_norm(term)))
    # the paper's code: mean of squared queries times mean of squared keys; another scale, the same order
    code = (query**2).mean(0) * (keys**2).mean(0)
    assert code.tolist() == pytest.approx([8.3333, 4.1667, 1.3333, 0], abs=1e-4)
    assert code.argsort(descending=True).tolist() == scores.argsort(descending=True).tolist()


def test_half_of_the_channels_and_what_is_lost() -> None:
    keys, values = ThinK(keep=0.5, window=2).choose(example(), site())
    assert keys is not None and keys.tolist() == [[[0, 1]]] and keys.dtype == torch.int16 and values is None
    query, rows = torch.tensor(QUERIES), torch.tensor(KEYS)
    lost = {}
    for pair in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)):
        kept = query[:, pair] @ rows[:, pair].T
        lost[pair] = float(torch.linalg.matrix_norm(query @ rows.T - kept))
    expected = [math.sqrt(8), 5.0, math.sqrt(33), math.sqrt(50), math.sqrt(66), math.sqrt(99)]
    assert list(lost.values()) == pytest.approx(expected)
    assert min(lost, key=lambda pair: lost[pair]) == (0, 1)


def test_greedy_is_an_upper_bound_and_ties_go_to_the_first() -> None:
    query, rows = torch.tensor([[1.0, 1, 1]]), torch.tensor([[1.0, -1, 0.9]])
    seen = observed(query[None, None], rows[None, None])
    scores = ThinK(window=1).key_scores(seen)[0, 0]
    assert scores.tolist() == pytest.approx([1, 1, 0.9])
    kept = best(scores, 1)
    assert kept.tolist() == [0]  # of two equal ones the first
    lost = [abs(float((query @ rows.T - query[:, [j]] @ rows[:, [j]].T).item())) for j in range(3)]
    assert lost == pytest.approx([0.1, 1.9, 0.0], abs=1e-6)  # the optimum is {2}; the scores do not see cross terms
    for chosen in range(3):
        dropped = sum(float(scores[j]) for j in range(3) if j != chosen)
        assert lost[chosen] <= dropped + 1e-6


@pytest.mark.parametrize(
    ("keep", "channels", "stays"),
    [(0.7, 128, 90), (0.6, 128, 77), (0.5, 128, 64), (0.4, 128, 52), (0.3, 128, 39), (0.6, 64, 39), (0.71, 100, 71)],
)
def test_the_number_removed_is_floored(keep: float, channels: int, stays: int) -> None:
    assert stay(keep, channels) == stays  # 0.3 removes 38, 0.4 51, 0.5 64, 0.6 76, 0.7 89 of 128
    assert stay(keep, channels, round_to=8) == -(-stays // 8) * 8


def test_value_scores_are_norms_of_the_attention_output() -> None:
    # softmax weights [[.5, .5], [1, 0]]: the first query sees both tokens alike, the second the first only
    query = torch.tensor([[0.0, 0], [200, 0]])
    keys = torch.tensor([[1.0, 0], [0, 0]])
    values = torch.tensor([[2.0, 0], [0, 4]])
    call = Call(query[None, None], keys[None, None], values[None, None], torch.ones(1, 1, 2, 2).bool(), 1.0, None, None)  # type: ignore[arg-type]
    seen = Observation(call, Segment(Dense(keys[None, None]), Dense(values[None, None]), width=2, start=0), None)
    assert value_scores(seen, 2)[0, 0].tolist() == pytest.approx([math.sqrt(5), 2.0])
    assert ThinK(keep=1.0, values=0.5).choose(seen, site(2))[1].tolist() == [[[0]]]  # type: ignore[union-attr]
    assert values.norm(dim=0).argmax() == 1  # the values' own norm prefers the other


def test_value_scores_are_causal() -> None:
    torch.manual_seed(3)
    query, keys, values = (torch.randn(1, 1, 5, 4) for _ in range(3))
    found = value_scores(observed(query, keys, values, scaling=0.5), 3)
    logits = query[0, 0] @ keys[0, 0].T * 0.5
    logits = logits.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    expected = (logits.softmax(-1) @ values[0, 0])[-3:].norm(dim=0)
    assert torch.allclose(found[0, 0], expected, atol=1e-6)


def test_a_group_shares_its_choice_by_the_stacked_norm() -> None:
    torch.manual_seed(4)
    query, keys = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    found = ThinK(window=3).key_scores(observed(query, keys))
    for row in range(2):
        for head in range(2):
            stacked = query[row, 2 * head : 2 * head + 2, -3:].reshape(-1, 8)
            expected = stacked.norm(dim=0) * keys[row, head].norm(dim=0)
            assert torch.allclose(found[row, head], expected, rtol=1e-5)


def test_permuted_channels_and_scales() -> None:
    torch.manual_seed(5)
    query, keys, how = torch.randn(1, 2, 40, 16), torch.randn(1, 2, 40, 16), ThinK(keep=0.4)
    plain = how.choose(observed(query, keys), site(16, heads=2, kv_heads=2))[0]
    assert plain is not None and plain.shape[-1] == 7
    order = torch.randperm(16)
    moved = how.choose(observed(query[..., order], keys[..., order]), site(16))[0]
    assert moved is not None
    assert torch.equal(order[moved.long()].sort(dim=-1).values, plain.long())
    for factor in (1e-3, 7.0):
        assert torch.equal(how.choose(observed(query * factor, keys), site(16))[0], plain)  # type: ignore[arg-type]
        assert torch.equal(how.choose(observed(query, keys * factor), site(16))[0], plain)  # type: ignore[arg-type]


def test_pairs_stay_together() -> None:
    torch.manual_seed(6)
    query, keys = torch.randn(1, 1, 40, 16), torch.randn(1, 1, 40, 16)
    turning = replace(site(16), module=kv_zoo.llama().model.layers[0].self_attn)
    chosen = ThinK(keep=0.4, pairwise=True).choose(observed(query, keys), turning)[0]
    assert chosen is not None and chosen.shape[-1] == 8  # 7 of 16, rounded up to pairs
    assert torch.equal(chosen[..., :4] + 8, chosen[..., 4:])


def test_pairs_of_neighbours_are_refused() -> None:
    """Cohere rotates channels 2j and 2j + 1 together."""
    how = Compression(channels=ThinK(keep=0.5, pairwise=True))
    with pytest.raises(InputError, match="do not rotate as pairs"):
        KVCache(kv_zoo.model("Cohere"), how)
    for kind in ("Qwen2", "Phi3"):
        KVCache(kv_zoo.model(kind), how).close()


def test_scores_of_half_precision_keys_do_not_overflow() -> None:
    keys = torch.full((1, 1, 40, 4), 300.0, dtype=torch.float16)
    keys[..., 2] = 400
    assert torch.isinf(keys.square()).any()  # what the paper's code would square
    chosen = ThinK(keep=0.25).choose(observed(keys, keys), site())[0]
    assert chosen is not None and chosen.tolist() == [[[2]]]


def test_numbers_that_are_not_finite_are_refused_by_place() -> None:
    keys = torch.ones(2, 2, 40, 4)
    keys[1, 1, 5, 3] = torch.nan
    with pytest.raises(NotFiniteError, match="layer, sequence 1, head 1, channel 3"):
        ThinK().choose(observed(torch.ones(2, 2, 40, 4), keys), site())


@pytest.mark.parametrize("settings", [{"keep": 0.0}, {"keep": 1.2}, {"values": -0.5}, {"window": 0}, {"round_to": 0}])
def test_settings_out_of_range(settings: dict[str, float]) -> None:
    with pytest.raises(InputError):
        ThinK(**settings)  # type: ignore[arg-type]


# --- in a cache ---------------------------------------------------------------------------------------------------


def first_layer(cache: KVCache) -> CompressedLayer:
    return next(one for one in cache.layers if isinstance(one, CompressedLayer))


@pytest.mark.parametrize("name", kv_zoo.ZOO)
def test_keep_everything_gives_identical_tokens(name: str) -> None:
    model, ids = kv_zoo.ZOO[name](), kv_zoo.prompt(48)
    with torch.no_grad():
        plain, ours = DynamicCache(config=model.config), ThinKCache(model, keep=1.0)
        assert torch.equal(model(ids, past_key_values=ours).logits, model(ids, past_key_values=plain).logits)
        kept = first_layer(ours)
        assert kept.old is None and kept.whole is not None and kept.whole.plain
    expected = kv_zoo.generate(model, ids)
    assert torch.equal(kv_zoo.generate(model, ids, past_key_values=ThinKCache(model, keep=1.0)), expected)


@pytest.mark.parametrize("name", kv_zoo.ZOO)
def test_a_thin_cache_equals_zeroed_channels(name: str) -> None:
    """Prefill is bit-identical; afterwards logits are those of full keys whose dropped channels are zero."""
    model, ids, more = kv_zoo.ZOO[name](), kv_zoo.prompt(60), kv_zoo.prompt(5, seed=3)
    with torch.no_grad():
        ours, plain = ThinKCache(model, keep=0.5, values=0.7), DynamicCache(config=model.config)
        assert torch.equal(model(ids, past_key_values=ours).logits, model(ids, past_key_values=plain).logits)
        for layer, full in zip(ours.layers, plain.layers, strict=True):
            if not isinstance(layer, CompressedLayer):
                continue
            old, whole = layer.old, layer.whole
            assert old is not None and whole is not None
            assert (old.tokens, whole.tokens) == (28, 32)
            assert torch.equal(whole.keys.read(), full.keys[:, :, 28:])  # recent ones to the bit
            assert old.key_channels is not None and old.value_channels is not None
            for rows, channels, stored in (
                (full.keys, old.key_channels, old.keys),
                (full.values, old.value_channels, old.values),
            ):
                left_out = torch.ones_like(rows[:, :, 0]).scatter(-1, channels.long(), 0.0)
                rows[:, :, :28] *= 1 - left_out[:, :, None]
                assert stored.read().shape[-1] == channels.shape[-1] < rows.shape[-1]
        for step in (more[:, :1], more[:, 1:]):  # one token, then several at once
            found, expected = (model(step, past_key_values=cache).logits for cache in (ours, plain))
            assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("values", [1.0, 0.6])
def test_a_padded_batch_is_as_alone(attention: str, values: float) -> None:
    model = kv_zoo.llama(attention=attention)
    prompts = [kv_zoo.prompt(length, seed=length) for length in (61, 33, 90)]
    with think(model, keep=0.4, values=values):
        together = kv_zoo.generate(model, kv_zoo.padded(prompts))
        for row, one in enumerate(prompts):
            assert torch.equal(kv_zoo.generate(model, one)[0], together[row])


def test_padding_changes_no_channel() -> None:
    model, one = kv_zoo.llama(), kv_zoo.prompt(50)
    alone, batch = ThinKCache(model, keep=0.4), ThinKCache(model, keep=0.4)
    with torch.no_grad():
        model(one, past_key_values=alone)
        given = kv_zoo.padded([one, kv_zoo.prompt(80, seed=2)])
        places = (given["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        model(**given, position_ids=places, past_key_values=batch)
    for a, b in zip(alone.layers, batch.layers, strict=True):
        assert torch.equal(a.old.key_channels[0], b.old.key_channels[0])


def test_padding_on_the_right_is_refused() -> None:
    model, mask = kv_zoo.llama(), torch.ones(2, 40)
    mask[1, -3:] = 0
    with pytest.raises(InputError, match="padding on the right"), think(model):
        model(kv_zoo.prompt(40, batch=2), attention_mask=mask)


def test_beams_reorder_thin_keys_and_their_channels() -> None:
    model, ids = kv_zoo.llama(), kv_zoo.prompt(50, batch=2)
    cache = ThinKCache(model, keep=0.5, values=0.5)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        before = [layer.old for layer in cache.layers]
        cache.reorder_cache(torch.tensor([1, 1]))
        step = kv_zoo.prompt(1, batch=2, seed=8)
        step[:] = step[:1]
        logits = model(step, past_key_values=cache).logits
    assert torch.equal(logits[0], logits[1])
    for layer, old in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.old.key_channels[0], old.key_channels[1])
        assert torch.equal(layer.old.values.read()[0], old.values.read()[1])
    # beam search with a cache of one's own and with the block's gives the same
    expected = kv_zoo.generate(model, ids, num_beams=3, past_key_values=ThinKCache(model, keep=0.5))
    with think(model, keep=0.5):
        assert torch.equal(kv_zoo.generate(model, ids, num_beams=3), expected)


def test_new_tokens_change_no_channel_and_chats_go_on() -> None:
    model, ids, turn = kv_zoo.llama(), kv_zoo.prompt(50), kv_zoo.prompt(9, seed=4)
    cache, twin = ThinKCache(model, keep=0.5), ThinKCache(model, keep=0.5)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        chosen = first_layer(cache).old
        assert chosen is not None
        together = model(turn, past_key_values=cache).logits
        after = first_layer(cache).old
        assert after is chosen
        model(ids, past_key_values=twin)
        one_by_one = torch.cat([model(turn[:, i : i + 1], past_key_values=twin).logits for i in range(9)], dim=1)
    assert torch.allclose(together, one_by_one, rtol=1e-4, atol=1e-4)


def test_many_questions_to_one_cache_give_the_same_bytes() -> None:
    model, ids = kv_zoo.llama(), kv_zoo.prompt(50)
    cache = ThinKCache(model, keep=0.5)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        first = cache.nbytes()
        answers = []
        for _ in range(2):
            answers.append(model(kv_zoo.prompt(6, seed=6), past_key_values=cache).logits)
            cache.crop(-6)
            assert cache.nbytes() == first
    assert torch.equal(*answers)


@pytest.mark.parametrize("settings", [{"prompt_lookup_num_tokens": 4}, {"assistant_model": 1}])
def test_speculation_chooses_when_the_guesses_are_judged(settings: dict[str, Any]) -> None:
    """Channels are chosen by the prompt and the first accepted guesses; then tokens are greedy on that cache."""
    model, ids = kv_zoo.llama(), kv_zoo.prompt(50)
    ids[:, 40:] = ids[:, 30:40]  # something to look up
    if "assistant_model" in settings:
        settings = {"assistant_model": kv_zoo.llama(num_hidden_layers=1)}
    cache = ThinKCache(model, keep=0.5)
    found = kv_zoo.generate(model, ids, past_key_values=cache, **settings)
    layer = first_layer(cache)
    assert layer.old is not None and layer.old.key_channels is not None
    known = layer.old.tokens + 32 - 50  # generated tokens that the choice saw
    assert 0 <= known < 6
    sequence = torch.cat((ids, found), dim=1)
    again = ThinKCache(model, keep=0.5)
    with torch.no_grad():
        logits = model(sequence[:, : 50 + known], past_key_values=again).logits
        for at in range(50 + known, sequence.shape[1]):
            assert int(logits[0, -1].argmax()) == int(sequence[0, at])
            logits = model(sequence[:, at : at + 1], past_key_values=again).logits


def test_speculation_on_a_cache_of_the_block_is_refused() -> None:
    model, ids = kv_zoo.llama(), kv_zoo.prompt(50)
    ids[:, 40:] = ids[:, 30:40]
    with pytest.raises(InputError, match="give generate a cache"), think(model):
        kv_zoo.generate(model, ids, prompt_lookup_num_tokens=4)


def test_short_prompts_are_stored_whole_with_a_warning() -> None:
    model, ids = kv_zoo.llama(), kv_zoo.prompt(32)
    expected = kv_zoo.generate(model, ids)
    with pytest.warns(NothingChangedWarning, match="32 tokens") as said:
        cache = ThinKCache(model, keep=0.5)
        assert torch.equal(kv_zoo.generate(model, ids, past_key_values=cache), expected)
    assert len(said) == 1  # once per cache, not per layer
    assert first_layer(cache).old is None
    with think(model, keep=0.5):  # a prompt of one token more is pruned
        kv_zoo.generate(model, kv_zoo.prompt(33))


def test_nothing_to_prune_is_said() -> None:
    model = kv_zoo.llama()  # heads of 8 channels: 5 % of them is none
    with pytest.warns(NothingChangedWarning, match="none of 8 channels"):
        cache = ThinKCache(model, keep=0.95)
    ids = kv_zoo.prompt(50)
    assert torch.equal(kv_zoo.generate(model, ids, past_key_values=cache), kv_zoo.generate(model, ids))


def test_the_reference_mode_repeats_heads_and_says_so() -> None:
    model, ids = kv_zoo.llama(), kv_zoo.prompt(50)
    with pytest.warns(UserWarning, match="2 copies"):
        cache = KVCache(model, Compression(channels=ThinK(keep=0.5, per_query_head=True)))
    with torch.no_grad():
        plain = DynamicCache()
        model(ids, past_key_values=plain)
        logits = model(ids, past_key_values=cache).logits
        assert logits.shape[1] == 50
        layer = first_layer(cache)
        assert layer.old is not None and layer.old.keys.read().shape[1] == 4  # query heads
        assert layer.old.key_channels is not None
        # a head of its own: as the score says for one query head and its keys
        step = kv_zoo.prompt(1, seed=3)
        found = model(step, past_key_values=cache).logits
        keys = plain.layers[0].keys
        for head in range(4):
            kept = set(layer.old.key_channels[0, head].tolist())
            assert torch.allclose(layer.old.keys.read()[0, head], keys[0, head // 2][:18][:, sorted(kept)], atol=0)
        assert torch.isfinite(found).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model, ids = kv_zoo.llama(dtype=dtype), kv_zoo.prompt(50)
    cache = ThinKCache(model, keep=0.5)
    tokens = kv_zoo.generate(model, ids, past_key_values=cache)
    assert tokens.shape == (1, 12)
    old = first_layer(cache).old
    assert old is not None and old.keys.read().dtype == dtype
    with compressed(model, Compression(channels=ThinK(keep=1.0))):
        assert torch.equal(kv_zoo.generate(model, ids), kv_zoo.generate(model, ids))


def test_generated_tokens_follow_when_asked() -> None:
    model, ids = kv_zoo.llama(), kv_zoo.prompt(50)
    how = Compression(channels=ThinK(keep=0.5), recent=8, flush_every=4)
    cache = KVCache(model, how)
    kv_zoo.generate(model, ids, new=14, past_key_values=cache)  # 50 + 13 tokens stored
    layer = first_layer(cache)
    assert layer.old is not None and layer.whole is not None
    assert layer.old.tokens == 42 + 12 and layer.whole.tokens == 9
    assert layer.whole.start == 54


def test_choosing_takes_little_memory_beside_what_is_stored() -> None:
    """Besides the thin copy: at most one layer's keys; really a few pieces of 1024 tokens."""
    tokens, width = 8_000, 64
    query, keys, values = (torch.randn(1, 2, tokens, width).bfloat16() for _ in range(3))
    layer = Compression(channels=ThinK(keep=0.5)).layer(site(width, heads=2, kv_heads=2))
    call = Call(query, keys, values, None, 0.125, None, own=lambda k, v: query)
    known = {one.untyped_storage()._cdata for one in (query, keys, values)}
    with _Live(known) as live:
        layer.take(call)
    extra = live.peak - layer.nbytes()
    assert extra <= keys.untyped_storage().nbytes() / 2
    assert live.peak >= layer.nbytes()  # it was seen at all
    assert layer.nbytes() == 2 * (tokens - 32) * (32 + 64) * 2 + 2 * 32 * 128 * 2 + 2 * 32 * 2


def test_a_copied_cache_goes_on_by_itself_and_copies_no_model() -> None:
    model, ids = kv_zoo.llama(), kv_zoo.prompt(50)
    cache = ThinKCache(model, keep=0.5)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        twin = copy.deepcopy(cache)
        assert first_layer(twin).site.module is first_layer(cache).site.module
        steps = [model(kv_zoo.prompt(1, seed=3), past_key_values=one).logits for one in (cache, twin)]
        assert torch.equal(*steps)
        model(kv_zoo.prompt(1, seed=4), past_key_values=twin)
    assert (cache.get_seq_length(), twin.get_seq_length()) == (51, 52)


def test_threads_with_caches_of_their_own_do_not_meet() -> None:
    model = kv_zoo.llama()
    prompts = [kv_zoo.prompt(60, seed=seed) for seed in range(4)]
    keeps = [0.5, 1.0, 0.5, 0.25]

    def work(number: int) -> torch.Tensor:
        cache = ThinKCache(model, keep=keeps[number])
        return kv_zoo.generate(model, prompts[number], past_key_values=cache)

    expected = [work(number) for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for one, other in zip(expected, pool.map(work, range(4)), strict=True):
            assert torch.equal(one, other)
    assert model.config._attn_implementation == "sdpa"


def test_a_window_longer_than_the_prompt_asks_all_of_it() -> None:
    torch.manual_seed(9)
    query, keys = torch.randn(1, 1, 12, 8), torch.randn(1, 1, 12, 8)
    seen = observed(query, keys)
    assert torch.equal(ThinK(window=100).key_scores(seen), ThinK(window=12).key_scores(seen))


def test_the_choice_beats_the_keys_own_norm_chance_and_its_opposite() -> None:
    """What is lost of Q K^T, for the queries asked, over several draws with uneven channels."""
    lost = dict.fromkeys(("think", "keys", "random", "worst"), 0.0)
    for seed in range(8):
        torch.manual_seed(seed)
        scale = torch.rand(2, 32) * 3
        query, keys = torch.randn(1, 1, 32, 32) * scale[0], torch.randn(1, 1, 200, 32) * scale[1]
        tail = torch.cat((torch.zeros(1, 1, 168, 32), query), dim=2)  # asked last, behind a prompt of 200
        scores = ThinK(window=32).key_scores(observed(tail, keys))
        found = {
            "think": best(scores, 16),
            "keys": best(keys.norm(dim=2), 16),
            "random": torch.randperm(32)[None, None, :16],
            "worst": best(-scores, 16),
        }
        for name, kept in found.items():
            whole = query @ keys.transpose(-1, -2)
            part = query[..., kept[0, 0]] @ keys[..., kept[0, 0]].transpose(-1, -2)
            lost[name] += float((whole - part).norm())
    assert lost["think"] < lost["keys"] < lost["random"] < lost["worst"]
