"""Bytes: counted by distinct storages, promised by arithmetic, and the same."""

from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

import kv_zoo
from niwaki.errors import InputError
from niwaki.kv import (
    H2O,
    KIVI,
    Compression,
    How,
    KVCache,
    KVLayer,
    Load,
    Site,
    SnapKV,
    StreamingLLM,
    ThinK,
    cache_bytes,
    plan,
    storage_bytes,
)

HOWS: dict[str, dict[str, Any]] = {
    "thin": {"channels": ThinK(keep=0.6)},
    "thin, rounded": {"channels": ThinK(keep=0.6, round_to=4), "recent": 5},
    "thin keys and values": {"channels": ThinK(keep=0.5, values=0.3), "recent": 0},
    "thin, flushed": {"channels": ThinK(keep=0.5), "recent": 8, "flush_every": 4},
    "snapkv": {"tokens": SnapKV(keep=40)},
    "snapkv, thin": {"tokens": SnapKV(keep=0.6), "channels": ThinK(keep=0.5)},
    "h2o": {"tokens": H2O(keep=0.4), "recent": 4},
    "h2o, thin": {"tokens": H2O(keep=20), "channels": ThinK(keep=0.5), "recent": 4},
    "streaming": {"tokens": StreamingLLM(keep=24), "recent": 8},
    "4 bits": {"bits": KIVI(4)},
    "2 bits, thin, as the paper": {"bits": KIVI(2), "channels": ThinK(keep=0.6), "recent": 0},
    "snapkv, thin, 4 bits": {
        "tokens": SnapKV(keep=70),
        "channels": ThinK(keep=0.6, values=0.6),
        "bits": KIVI(4, group=8),
    },
}


@pytest.mark.parametrize("name", HOWS)
@pytest.mark.parametrize(("prompt", "generated"), [(100, 0), (100, 37), (33, 3), (20, 30)])
@pytest.mark.filterwarnings("ignore::niwaki.errors.NothingChangedWarning")
def test_what_is_promised_is_what_is_held(name: str, prompt: int, generated: int) -> None:
    model = kv_zoo.llama(head_dim=12, num_hidden_layers=2)
    how = Compression(**HOWS[name])
    cache, full = KVCache(model, how), DynamicCache()
    promised = plan(model, how)
    with torch.no_grad():
        for step in (kv_zoo.prompt(prompt, batch=3), *(kv_zoo.prompt(1, batch=3, seed=i) for i in range(generated))):
            model(step, past_key_values=cache)
            model(step, past_key_values=full)
    load = Load(prompt, generated, batch=3)
    assert cache.nbytes() == promised.bytes(load)
    assert cache_bytes(full) == promised.full_bytes(load) == 2 * 2 * 3 * 2 * (prompt + generated) * 12 * 4


def test_the_page_s_figures() -> None:
    """Llama-3-8B: 32 layers, 8 of 32 heads, 128 channels, 2 bytes: 131 072 bytes a token; 104 960 with 77 channels."""

    def bytes_at(how: Compression, tokens: int) -> int:
        site = Site("attention", None, 0, 32, 8, 128, 128, None)
        return 32 * how.layer_bytes(site, Load(tokens))

    thin = Compression(channels=ThinK(keep=0.6))
    slope = (bytes_at(thin, 2000) - bytes_at(thin, 1000)) / 1000
    assert slope == 32 * 8 * 2 * (77 + 128) == 104_960
    assert 32 * 8 * 2 * 2 * 128 == 131_072
    heads = Compression(channels=ThinK(keep=0.6, per_query_head=True))
    assert (bytes_at(heads, 2000) - bytes_at(heads, 1000)) / 1000 == 419_840
    # saving k/(2D) S_p/(S_p+S_u) with 1024 tokens of which 32 are whole: 19.3 %, less 154 bytes a head
    saved = 1 - (bytes_at(thin, 1024) - 32 * 8 * 2 * 77) / (131_072 * 1024)
    assert saved == pytest.approx(51 / 256 * 992 / 1024) == pytest.approx(0.193, abs=5e-4)


def test_two_bits_as_on_the_page() -> None:
    """Groups of 32, scale and least value in float16: 48 + 48 bytes a head and token; 28.9 + 48 with 77 channels."""
    site = Site("attention", None, 0, 32, 32, 128, 128, None)

    def slope(how: Compression) -> float:
        return (how.layer_bytes(site, Load(6400)) - how.layer_bytes(site, Load(3200))) / 3200 / 32

    assert slope(Compression(bits=KIVI(2))) == 96
    assert slope(Compression(bits=KIVI(2), channels=ThinK(keep=0.6))) == pytest.approx(48 + 77 * 48 / 128)


@pytest.mark.parametrize(("prompt", "generated"), [(8, 0), (8, 3), (8, 9), (12, 0), (12, 1), (40, 0), (40, 1), (40, 7)])
@pytest.mark.filterwarnings("ignore::niwaki.errors.NothingChangedWarning")
def test_layers_that_slide_are_counted_as_they_are_held(prompt: int, generated: int) -> None:
    """They look back 12 tokens. A prompt's view keeps all of it alive; the next token makes a tensor of 12."""
    model = kv_zoo.ZOO["gemma3, slides but for the last"]()
    how = Compression(channels=ThinK(keep=0.5), recent=4)
    cache, full, promised = KVCache(model, how), DynamicCache(config=model.config), plan(model, how)
    with torch.no_grad():
        for step in (kv_zoo.prompt(prompt, batch=2), *(kv_zoo.prompt(1, batch=2, seed=i) for i in range(generated))):
            model(step, past_key_values=cache)
            model(step, past_key_values=full)
    load = Load(prompt, generated, batch=2)
    assert cache.nbytes() == promised.bytes(load)
    held = prompt if not generated else min(prompt + generated, 12)
    token = 2 * 2 * 2 * 16 * 4  # keys and values, batch, heads, channels, float32
    assert cache_bytes(full) == promised.full_bytes(load) == 2 * held * token + (prompt + generated) * token


def test_plans_of_models_that_slide_are_of_caches_that_generate() -> None:
    model = kv_zoo.ZOO["gemma3, slides but for the last"]()
    promised = plan(model, Compression(channels=ThinK(keep=0.5), recent=4))
    token = 2 * 2 * 16 * 4
    assert promised.per_token() == (token, token * 3 / 4)  # of one layer of three
    (told,) = promised.facts((100,))["lengths"]
    assert told["bytes"] == (100 + 2 * 12) * token
    assert promised.at(1) == Load(1) and promised.at(100, 3) == Load(99, 1, 3)
    assert promised.facts()["context"] == 512
    assert plan(kv_zoo.llama(), Compression(channels=ThinK(keep=0.5))).at(100, 3) == Load(100, 0, 3)


def test_savings_that_go_up_and_down_pay_from_the_last_time_on() -> None:
    """40 tokens of a group are whole until it is full: it pays from 40 to 59, and from 80 on."""

    class Ripple(How):
        period = 40  # type: ignore[assignment]

        def layer(self, site: Site) -> KVLayer:
            return Compression(channels=ThinK(keep=0.5)).layer(site)

        def layer_bytes(self, site: Site, load: Load) -> int:
            full, off = 2 * 2 * 8 * 4 * load.prompt, load.prompt % 40
            return full - load.prompt + 3 * off  # saves the tokens, costs three times those of an open group

    promised = plan(kv_zoo.llama(), Ripple())
    saves = [n for n in range(1, 400) if 3 * (n % 40) < n]
    assert saves[:20] == list(range(40, 60)) and 79 not in saves and saves[20:] == list(range(80, 400))
    assert promised.break_even() == 80


def test_zeroed_channels_save_nothing() -> None:
    """What simulations do: the count must see through it, and through slices that keep the whole tensor alive."""
    model, ids = kv_zoo.llama(), kv_zoo.prompt(100)
    zeroed = DynamicCache()
    with torch.no_grad():
        model(ids, past_key_values=zeroed)
        before = cache_bytes(zeroed)
        for layer in zeroed.layers:
            layer.keys[..., 4:] = 0
    promised = plan(model, Compression(channels=ThinK(keep=0.5), recent=0))
    assert cache_bytes(zeroed) == before == promised.full_bytes(Load(100))
    assert promised.bytes(Load(100)) < before
    for layer in zeroed.layers:
        layer.keys = layer.keys[..., :4]
    assert cache_bytes(zeroed) == before


def test_storages_are_counted_once() -> None:
    tensor = torch.zeros(10, dtype=torch.float32)
    assert storage_bytes([tensor, tensor[3:], tensor.view(2, 5), torch.zeros(3, dtype=torch.int16)]) == 46


def test_lengths_from_which_it_pays() -> None:
    model = kv_zoo.llama()
    promised = plan(model, Compression(channels=ThinK(keep=0.5)))
    # a head: 32 whole tokens, then 4 of 8 channels saved per token (16 bytes) against 8 bytes of places, once
    assert promised.break_even() == 33
    noticed = promised.noticed()
    assert noticed is not None
    saving = promised.full_bytes(Load(noticed)) - promised.bytes(Load(noticed))
    assert saving >= 0.05 * (promised.weights + promised.full_bytes(Load(noticed)))
    full, ours = promised.per_token()
    assert (full, ours) == (3 * 2 * 2 * 8 * 4, 3 * 2 * (8 + 4) * 4)
    facts = promised.facts((100,))
    assert facts["lengths"] == [{"tokens": 100, "bytes": 100 * full, "compressed_bytes": promised.bytes(Load(100))}]
    with torch.device("meta"):
        assert plan(kv_zoo.llama(), Compression(channels=ThinK(keep=0.5))).facts((100,)) == facts


def test_a_cache_that_never_pays() -> None:
    with pytest.warns(UserWarning, match="2 copies"):
        promised = plan(kv_zoo.llama(), Compression(channels=ThinK(keep=0.8, per_query_head=True)))
    assert promised.break_even() is None and promised.noticed() is None


def test_unknown_layers_are_not_counted() -> None:
    from transformers.cache_utils import Cache, LinearAttentionLayer

    with pytest.raises(InputError, match="LinearAttentionLayer"):
        cache_bytes(Cache(layers=[LinearAttentionLayer()]))
