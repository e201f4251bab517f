"""CSKV caches on transformers: prompts untouched, windows by their schedule, bytes by the formula, batches as alone."""

import copy
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_cskv import batches, text
from torch import Tensor
from transformers.cache_utils import DynamicCache

import kv_zoo
from niwaki.errors import InputError
from niwaki.kv import CSKV, CSKVCache, KVCache, Load, Projections, Rounding, cskv, outlined, plan, project, reconstruct
from niwaki.kv.cskv_layer import CSKVLayer
from niwaki.kv.low_rank import LowRank
from niwaki.kv.projections import growing

pytestmark = pytest.mark.filterwarnings("ignore:a CSKV cache of:UserWarning")  # every prompt here is a short one


def projections(model: Any, **settings: Any) -> Projections:
    return project(model, batches(), **{"keep": 0.5, **settings})


def logits(model: Any, cache: Any, *pieces: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [model(piece, past_key_values=cache).logits for piece in pieces]


def layers(cache: Any) -> list[CSKVLayer]:
    return [layer for layer in cache.layers if isinstance(layer, CSKVLayer)]


def counts(cache: Any) -> tuple[int, int]:
    """Projected and whole tokens, of the first layer of ours."""
    first = layers(cache)[0]
    return (0 if first.old is None else first.old.tokens), (0 if first.window is None else first.window.tokens)


def through_factors(model: Any) -> Projections:
    """Factors of full rank that are not taken for a bypass, as keep=1 is: all but the window is restored."""
    made = projections(model, keep=1.0)
    return replace(made, shape=replace(made.shape, keep=0.9, values=0.9))


@pytest.mark.parametrize("name", kv_zoo.ZOO)
def test_prompts_are_bit_identical_and_factors_of_full_rank_give_the_models_logits(name: str) -> None:
    model, ids = kv_zoo.ZOO[name](), kv_zoo.prompt(50)
    pieces = ids[:, :40], *ids[:, 40:].split(1, dim=1)
    plain = logits(model, DynamicCache(config=model.config), *pieces)
    for keep in (0.25, 0.5):
        lossy = CSKVCache(model, projections(model, keep=keep), window=8)
        assert torch.equal(logits(model, lossy, ids[:, :40])[0], plain[0])
        assert counts(lossy) == (32, 8)
    cache = CSKVCache(model, through_factors(model), window=4)
    for one, other in zip(logits(model, cache, *pieces), plain, strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=2e-3)
    assert counts(cache) == (46, 4)


@pytest.mark.parametrize("name", ["llama, grouped", "llama, eager", "gemma2, soft-capping", "qwen3, key norms"])
def test_whole_windows_and_keep_1_are_the_model_itself(name: str) -> None:
    model, ids = kv_zoo.ZOO[name](), kv_zoo.prompt(40)
    wanted = kv_zoo.generate(model, ids)
    with cskv(model, projections(model, keep=0.25), window=64):
        assert torch.equal(kv_zoo.generate(model, ids), wanted)
    with cskv(model, projections(model, keep=1.0), window=4):
        assert torch.equal(kv_zoo.generate(model, ids), wanted)
    plain = logits(model, DynamicCache(config=model.config), ids[:, :30], ids[:, 30:31], ids[:, 31:])
    found = logits(model, CSKVCache(model, projections(model), window=64), ids[:, :30], ids[:, 30:31], ids[:, 31:])
    assert all(torch.equal(one, other) for one, other in zip(found, plain, strict=True))


def slow(model: Any, made: Projections, ids: Tensor, *, prompt: int, window: int) -> list[Tensor]:
    """Decoding by the definition, on a whole cache: what left the window is overwritten by what it comes back as."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    cache, found, hidden, handles = DynamicCache(config=model.config), [], {}, []
    for site in growing(model):

        def keep(module: Any, args: Any, kwargs: Any, layer: int = site.layer) -> None:
            hidden[layer] = (
                torch.cat([hidden[layer], kwargs["hidden_states"]], 1) if layer in hidden else kwargs["hidden_states"]
            )

        handles.append(site.module.register_forward_pre_hook(keep, with_kwargs=True))
    with torch.no_grad():
        model(ids[:, :prompt], past_key_values=cache)
        for at in range(prompt, ids.shape[1]):
            old = at - window
            whole = []
            for site in growing(model):
                one = cache.layers[site.layer]
                whole.append((one.keys, one.values))
                x = hidden[site.layer][:, :old]
                keys, values = (
                    f.restored(f.compressed(x)).view(1, old, site.kv_heads, -1).transpose(1, 2)
                    for f in made.layers[site.layer]
                )
                if site.module.k_proj.bias is not None:
                    keys = keys + site.module.k_proj.bias.view(1, site.kv_heads, 1, -1)
                    values = values + site.module.v_proj.bias.view(1, site.kv_heads, 1, -1)
                cos, sin = model.model.rotary_emb(x, torch.arange(old)[None])
                keys = apply_rotary_pos_emb(keys, keys, cos, sin)[1]
                one.keys = torch.cat([keys, one.keys[:, :, old:]], 2)
                one.values = torch.cat([values, one.values[:, :, old:]], 2)
            found.append(model(ids[:, at : at + 1], past_key_values=cache).logits)
            for site, (keys, values) in zip(growing(model), whole, strict=True):
                one = cache.layers[site.layer]
                one.keys = torch.cat([keys, one.keys[:, :, -1:]], 2)
                one.values = torch.cat([values, one.values[:, :, -1:]], 2)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(
    "name", ["llama, multi-head", "llama, grouped", "llama, attention biases", "llama, wide heads"]
)
@pytest.mark.parametrize("per_head", [False, True])
def test_decoding_is_as_defined(name: str, per_head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("niwaki.kv.low_rank.TILE", 7)
    model, ids = kv_zoo.ZOO[name](), kv_zoo.prompt(36)
    made = projections(model, keep=0.5, values=0.25, per_head=per_head)
    wanted = slow(model, made, ids, prompt=30, window=5)
    cache = CSKVCache(model, made, window=5)
    found = logits(model, cache, ids[:, :30], *ids[:, 30:].split(1, dim=1))[1:]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert counts(cache) == (31, 5)


def test_the_tumbling_schedule() -> None:
    model, ids = kv_zoo.llama(), kv_zoo.prompt(97)
    cache, used = CSKVCache(model, projections(model), window=32, tumbling=True), []
    logits(model, cache, ids[:, :70])
    assert counts(cache) == (64, 6)
    for at in range(70, 97):
        projected, whole = counts(cache)
        used.append((projected, whole + 1))
        logits(model, cache, ids[:, at : at + 1])
    assert used[25] == (64, 32), "the 26th token completes the block, and still sees it whole"
    assert used[26] == (96, 1), "the 27th sees itself only"
    whole = CSKVCache(model, projections(model), window=32, tumbling=True)
    logits(model, whole, ids[:, :64])
    assert counts(whole) == (64, 0), "a prompt of whole blocks leaves none in the window"


@pytest.mark.parametrize(("window", "prompt", "after"), [(32, 70, (38, 32)), (32, 20, (0, 20)), (0, 20, (20, 0))])
def test_the_sliding_schedule(window: int, prompt: int, after: tuple[int, int]) -> None:
    model, ids = kv_zoo.llama(), kv_zoo.prompt(prompt + 3)
    cache = CSKVCache(model, projections(model), window=window)
    logits(model, cache, ids[:, :prompt])
    assert counts(cache) == after
    logits(model, cache, *ids[:, prompt:].split(1, dim=1))
    assert sum(counts(cache)) == prompt + 3 and counts(cache)[1] == min(window, prompt + 3)


def test_packed_keys_leave_a_sliding_window_by_blocks() -> None:
    model, ids = kv_zoo.llama(), kv_zoo.prompt(60)
    cache = CSKVCache(model, projections(model), window=8, bits=4)
    logits(model, cache, ids[:, :30])
    found = [counts(cache)]
    for at in range(30, 60):
        logits(model, cache, ids[:, at : at + 1])
        found.append(counts(cache))
    assert found[0] == (16, 14) and found[1] == (16, 15) and found[2] == (24, 8)
    assert all(projected % 8 == 0 and 8 <= whole <= 15 for projected, whole in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bytes_are_the_formula(dtype: torch.dtype) -> None:
    model = kv_zoo.llama(dtype=dtype, head_dim=16)  # 3 layers, 2 key heads of 16
    ids, size = kv_zoo.prompt(70, batch=2), torch.empty(0, dtype=dtype).element_size()
    made = project(model, batches(), keep=0.5, values=0.25)
    cache = CSKVCache(model, made, window=32)
    logits(model, cache, ids)
    keys, values = 2 * 8, 2 * 4
    history = 38 * (keys + values) * size
    window = 32 * (2 * 2 * 16 + keys + values) * size  # their projections are kept beside them
    assert cache.nbytes() == 3 * 2 * (history + window + 4)  # 4: how far each sequence is padded
    logits(model, cache, ids[:, :1])
    assert cache.nbytes() == 3 * 2 * (history + (keys + values) * size + window + 4)
    extra = sum(one.down.numel() + one.up.numel() for pair in made.layers.values() for one in pair)
    assert extra == 3 * (keys + values) * (32 + 32) and made.nbytes() == 4 * extra
    full = DynamicCache(config=model.config)
    logits(model, full, ids[:, :39])
    assert sum(layer.keys.nbytes + layer.values.nbytes for layer in full.layers) == 3 * 2 * 39 * 2 * 2 * 16 * size


def test_bytes_of_packed_projections() -> None:
    model = kv_zoo.llama(head_dim=16, kv_heads=2)
    cache = CSKVCache(model, projections(model, keep=0.5), window=8, bits=4)
    logits(model, cache, kv_zoo.prompt(30))
    # 16 tokens are packed: keys 2 groups x 16 channels x (8 / 2 bytes + 4), values 16 x 2 heads x (8 / 2 bytes + 4)
    old = 2 * 16 * 8 + 16 * 2 * 8
    window = 14 * (2 * 2 * 16 + 16 + 16) * 4
    assert cache.nbytes() == 3 * (old + window + 4)


def test_break_even_is_where_the_factors_are_won_back() -> None:
    model = kv_zoo.llama(head_dim=16, dtype=torch.float16)
    made = project(model, batches(), keep=0.5)
    promised = plan(model, CSKV(model, made, window=0))
    # saved per token and layer: 2 * (64 - 32) bytes, less 4 for the padding; taken per layer: 2 * 32 * (32 + 32)
    assert promised.extra == 3 * 2 * 32 * 64
    assert promised.break_even() == 65 and promised.per_token() == (3 * 2 * 64, 3 * 2 * 32)
    assert plan(model, CSKV(model, project(model, batches(), keep=1.0))).break_even() is None
    with pytest.warns(UserWarning, match="saves 12276 bytes, and its factors take 12288"):
        logits(model, CSKVCache(model, made, window=0), kv_zoo.prompt(64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits(model, CSKVCache(model, made, window=0), kv_zoo.prompt(65))


@pytest.mark.parametrize("settings", [{}, {"tumbling": True}, {"bits": 4}, {"window": 0}, {"window": 0, "bits": 2}])
@pytest.mark.parametrize("per_head", [False, True])
def test_a_plan_promises_the_bytes(settings: dict[str, Any], per_head: bool) -> None:
    model, ids = kv_zoo.llama(head_dim=16), kv_zoo.prompt(60, batch=2)
    how = CSKV(model, projections(model, keep=0.5, values=0.4, per_head=per_head), **{"window": 8, **settings})
    light = CSKV(model, outlined(model, keep=0.5, values=0.4, per_head=per_head), **{"window": 8, **settings})
    for prompt, generated in ((30, 0), (30, 17), (3, 2), (32, 9)):
        cache = KVCache(model, how)
        logits(model, cache, ids[:, :prompt], *(ids[:, at : at + 1] for at in range(prompt, prompt + generated)))
        assert plan(model, how).bytes(Load(prompt, generated, 2)) == cache.nbytes()
    with torch.device("meta"):
        empty = type(model)(model.config)
    bare = CSKV(empty, outlined(empty, keep=0.5, values=0.4, per_head=per_head), **{"window": 8, **settings})
    assert plan(empty, bare).bytes(Load(60)) == plan(model, how).bytes(Load(60))
    with pytest.raises(InputError, match="projections without numbers"):
        KVCache(model, light)


@pytest.mark.parametrize("settings", [{"window": 8}, {"window": 0}, {"window": 0, "bits": 4}])
def test_a_padded_batch_is_as_alone(settings: dict[str, Any]) -> None:
    model = kv_zoo.llama()
    prompts = [kv_zoo.prompt(length, seed=length) for length in (30, 41, 36)]
    with cskv(model, projections(model), **settings):
        together = kv_zoo.generate(model, kv_zoo.padded(prompts))
        for row, one in enumerate(prompts):
            assert torch.equal(kv_zoo.generate(model, one)[0], together[row])


@pytest.mark.parametrize("settings", [{"tumbling": True}, {"bits": 4}, {"bits": 4, "tumbling": True}])
def test_a_batch_is_as_alone_where_blocks_are_counted_alike(settings: dict[str, Any]) -> None:
    model = kv_zoo.llama()
    prompts = [kv_zoo.prompt(41, seed=seed) for seed in range(3)]
    with cskv(model, projections(model), window=8, **settings):
        together = kv_zoo.generate(model, torch.cat(prompts))
        for row, one in enumerate(prompts):
            assert torch.equal(kv_zoo.generate(model, one)[0], together[row])


@pytest.mark.parametrize("bits", [None, 4])
def test_several_tokens_at_once_are_as_one_by_one_where_the_window_holds_them(bits: int | None) -> None:
    model, ids = kv_zoo.llama(), kv_zoo.prompt(44)
    made = projections(model)
    # a block stays whole until it is full: 40 tokens leave 8 * 5 compressed, 3 more are whole either way
    one, other = (CSKVCache(model, made, window=8, tumbling=True, bits=bits) for _ in range(2))
    at_once = logits(model, one, ids[:, :40], ids[:, 40:])[1]
    singly = torch.cat(logits(model, other, ids[:, :40], *ids[:, 40:].split(1, dim=1))[1:], dim=1)
    torch.testing.assert_close(at_once, singly, atol=1e-5, rtol=1e-5)
    assert counts(one) == counts(other) == (40, 4)


def test_beams_carry_their_history() -> None:
    model, ids = kv_zoo.llama(), kv_zoo.prompt(40)
    wanted = kv_zoo.generate(model, ids, num_beams=3)
    with cskv(model, projections(model, keep=0.25), window=64):
        assert torch.equal(kv_zoo.generate(model, ids, num_beams=3), wanted)
    exact = through_factors(model)
    with cskv(model, exact, window=4):
        assert torch.equal(kv_zoo.generate(model, ids, num_beams=3), wanted)


def test_rows_are_reordered_repeated_and_chosen() -> None:
    model = kv_zoo.llama()
    made = projections(model)
    ids = kv_zoo.prompt(24, batch=3)
    cache = CSKVCache(model, made, window=8, bits=4)
    logits(model, cache, ids)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    fresh = CSKVCache(model, made, window=8, bits=4)
    logits(model, fresh, ids[[2, 0, 0]])
    step = kv_zoo.prompt(1, batch=3, seed=5)
    torch.testing.assert_close(logits(model, cache, step)[0], logits(model, fresh, step)[0], atol=1e-5, rtol=1e-5)
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    assert logits(model, cache, step[:2])[0].shape[0] == 2


def test_tokens_are_taken_back() -> None:
    model, ids = kv_zoo.llama(), kv_zoo.prompt(40)
    made = projections(model)
    cache, fresh = (CSKVCache(model, made, window=8) for _ in range(2))
    logits(model, cache, ids[:, :30], ids[:, 30:34])
    cache.crop(-4)
    assert counts(cache) == (26, 4) and cache.get_seq_length() == 30  # what left the window does not come back
    logits(model, cache, ids[:, 30:36])
    assert counts(cache) == (28, 8)
    cache.crop(-16)
    assert counts(cache) == (20, 0)
    logits(model, cache, ids[:, 20:21])
    assert counts(cache) == (20, 1)
    cache.crop(-21)
    assert counts(cache) == (0, 0) and cache.nbytes() == 0
    again, first = logits(model, cache, ids)[0], logits(model, fresh, ids)[0]
    assert torch.equal(again, first)
    packed = CSKVCache(model, made, window=8, bits=4)
    logits(model, packed, ids[:, :30])
    packed.crop(-14)
    assert counts(packed) == (16, 0)
    with pytest.raises(InputError, match="groups of 8"):
        packed.crop(-3)
    assert counts(packed) == (16, 0)


def test_copies_go_on_apart() -> None:
    model, ids = kv_zoo.llama(), kv_zoo.prompt(30)
    cache = CSKVCache(model, projections(model), window=8)
    logits(model, cache, ids)
    twin = copy.deepcopy(cache)
    step, other = kv_zoo.prompt(1, seed=7), kv_zoo.prompt(1, seed=8)
    first = logits(model, cache, step, step)
    logits(model, twin, other)
    twin.crop(-1)
    assert counts(twin) == (23, 7)
    third = copy.deepcopy(cache)
    assert torch.equal(logits(model, cache, step)[0], logits(model, third, step)[0])
    assert len(first) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [None, 4])
def test_half_precision(dtype: torch.dtype, bits: int | None) -> None:
    model, ids = kv_zoo.llama(dtype=dtype), kv_zoo.prompt(40)
    exact = through_factors(model)
    plain = logits(model, DynamicCache(config=model.config), ids[:, :36], *ids[:, 36:].split(1, dim=1))
    cache = CSKVCache(model, exact, window=8, bits=bits)
    found = logits(model, cache, ids[:, :36], *ids[:, 36:].split(1, dim=1))
    assert torch.equal(found[0], plain[0])
    scale = plain[0].abs().max().item()
    for one, other in zip(found[1:], plain[1:], strict=True):
        assert one.dtype == dtype and (one - other).abs().max().item() < (0.3 if bits else 0.1) * scale


def test_values_are_never_restored() -> None:
    """The widest tensor that values become is the output's; their rank is what attention weights meet."""
    model, ids = kv_zoo.llama(head_dim=16), kv_zoo.prompt(300)
    cache = CSKVCache(model, projections(model, keep=0.5, values=0.25), window=8)
    logits(model, cache, ids)
    old = layers(cache)[0].old
    assert isinstance(old, LowRank)
    weights = torch.rand(1, 2, 2, 1, old.tokens)
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = function(*args, **(kwargs or {}))
            if isinstance(made, Tensor) and not made._is_view():
                sizes.append(made.numel())
            return made

    with Watch():
        mixed = old.mix(weights)
    values = old.values.read()[:, 0]
    wanted = (values @ old.how.values.up[0]).view(1, -1, 2, 16).transpose(1, 2)
    torch.testing.assert_close(mixed.flatten(2, 3), weights.flatten(2, 3) @ wanted, atol=1e-4, rtol=1e-4)
    assert max(sizes) <= wanted.numel() / 4, "nothing as large as the values was made"


def test_projections_for_something_else_are_refused() -> None:
    model = kv_zoo.llama()
    made = projections(model)
    other = kv_zoo.llama(kv_heads=4)
    with pytest.raises(InputError, match="project this model"):
        CSKVCache(other, made)
    changed = kv_zoo.llama()
    with torch.no_grad():
        changed.model.layers[0].self_attn.k_proj.weight[0, 0] += 1
    with pytest.raises(InputError, match="project this model"):
        CSKVCache(changed, made)
    trained, _ = reconstruct(model, made, text(8), rounding=Rounding(bits=4, window=16))
    with pytest.raises(InputError, match="trained for bits=4, window=16"):
        CSKVCache(model, trained)
    with pytest.raises(InputError, match="trained for bits=4, window=16"):
        CSKVCache(model, trained, bits=4, window=32)
    CSKVCache(model, trained, bits=4, window=16)


def test_settings_out_of_range_are_refused() -> None:
    model = kv_zoo.llama()
    made = projections(model)
    for settings, found in (
        ({"window": -1}, "0 or more"),
        ({"window": 0, "tumbling": True}, "window of 1 or more"),
        ({"window": 12, "bits": 4}, "8 divides"),
        ({"bits": 3}, "not 2, 4 or 8"),
    ):
        with pytest.raises(InputError, match=found):
            CSKVCache(model, made, **settings)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_bits_with_nothing_projected_are_refused() -> None:
    model = kv_zoo.llama()
    made = projections(model, keep=1.0)
    with pytest.raises(InputError, match=r"bits=4.*keep=1.*keep below 1"):
        CSKVCache(model, made, bits=4)
    CSKVCache(model, made)


def test_what_cannot_be_restored_is_refused() -> None:
    model, ids = kv_zoo.llama(), kv_zoo.prompt(20)
    made = projections(model)
    how = CSKV(model, made)
    handle = model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(InputError, match="keys that are not hidden states times weights"):
        logits(model, KVCache(model, how), ids)
    handle.remove()
    with pytest.raises(InputError, match="do not follow each other"), torch.no_grad():
        model(ids, past_key_values=KVCache(model, how), position_ids=torch.arange(20)[None] * 2)
    mask = torch.ones(1, 20, dtype=torch.long)
    mask[:, -3:] = 0
    with pytest.raises(InputError, match="padding on the right"), torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=KVCache(model, how))
    stretched = kv_zoo.llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    with pytest.raises(InputError, match="change with the length"):
        CSKVCache(stretched, projections(stretched))
    model.model.layers[1].self_attn.k_proj = torch.nn.Sequential(model.model.layers[1].self_attn.k_proj)
    with pytest.raises(InputError, match="k_proj of type Sequential"):
        projections(model)
