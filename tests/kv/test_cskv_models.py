"""What CSKV reads off models and text: which channels rotate, every weight, no padding; and the page's figures."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from test_cskv import batches, text
from test_cskv_cache import layers, logits, projections, through_factors
from torch import Tensor
from transformers.cache_utils import DynamicCache

import kv_zoo
from niwaki.errors import FileDamagedError, InputError
from niwaki.kv import CSKV, CSKVCache, Load, Projections, Rounding, errors_of, outlined, plan, project, reconstruct
from niwaki.kv.calibration import statistics
from niwaki.kv.projections import growing
from niwaki.kv.reconstruction import LayerWise
from niwaki.train import Recovery

pytestmark = pytest.mark.filterwarnings("ignore:a CSKV cache of:UserWarning")  # every prompt here is a short one


@pytest.mark.parametrize(("kind", "turning"), [("Phi", 4), ("StableLm", 2), ("Glm", 4)])
def test_channels_that_stand_still_are_restored_too(kind: str, turning: int) -> None:
    """Half or a quarter of a head's 8 channels rotate; modelling files differ in who splits them."""
    model, ids = kv_zoo.model(kind, head_dim=8) if kind == "Glm" else kv_zoo.model(kind), kv_zoo.prompt(46)
    pieces = ids[:, :40], *ids[:, 40:].split(1, dim=1)
    plain = logits(model, DynamicCache(config=model.config), *pieces)
    cache = CSKVCache(model, through_factors(model), window=4)
    for one, other in zip(logits(model, cache, *pieces), plain, strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=2e-3)
    rotation = layers(cache)[0].how.rotation
    keys = torch.randn(1, 2, 5, 8)
    turned = rotation(keys, torch.arange(3, 8)[None])
    assert torch.equal(turned[..., turning:], keys[..., turning:])
    assert not torch.isclose(turned[..., :turning], keys[..., :turning]).all(dim=2).any()


def test_norms_that_are_not_known_are_refused_with_the_first_prompt() -> None:
    model = kv_zoo.model("Phi", qk_layernorm=True)
    with pytest.raises(InputError, match="keys that are not hidden states times weights"):
        logits(model, CSKVCache(model, projections(model)), kv_zoo.prompt(20))


def test_a_change_of_any_weight_is_noticed() -> None:
    model = kv_zoo.llama(head_dim=64)  # 128 rows of keys: a sample of the first ones would not do
    made = projections(model)
    for name, row, column in (("k_proj", 127, 31), ("v_proj", 100, 0), ("k_proj", 64, 7)):
        other = kv_zoo.llama(head_dim=64)
        weight = getattr(other.model.layers[2].self_attn, name).weight
        with torch.no_grad():
            weight[row, column] = torch.nextafter(weight[row, column], torch.tensor(9.0))
        with pytest.raises(InputError, match="project this model"):
            made.check(other)
    swapped = kv_zoo.llama(head_dim=64)
    with torch.no_grad():
        weight = swapped.model.layers[0].self_attn.v_proj.weight
        weight[:, [3, 4]] = weight[:, [4, 3]]
    with pytest.raises(InputError, match="project this model"):
        made.check(swapped)
    made.check(kv_zoo.llama(head_dim=64))
    half = kv_zoo.llama(head_dim=64, dtype=torch.bfloat16)
    project(half, None, keep=0.5, init="svd").check(half.float())  # the same numbers in another type


def test_files_of_the_older_format_are_refused_by_its_name(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = projections(kv_zoo.llama())
    with monkeypatch.context() as patched:
        patched.setattr("niwaki.kv.projections.FORMAT", "niwaki-cskv-1")
        made.save(tmp_path / "old.safetensors")
    with pytest.raises(FileDamagedError, match="niwaki-cskv-1"):
        Projections.load(tmp_path / "old.safetensors")


def test_projections_for_the_published_quantiser_are_for_comparison_only(tmp_path: Any) -> None:
    model = kv_zoo.llama()
    how = Recovery(epochs=1, lr=1e-3, optimizer="adamw")
    published, ours = Rounding(4, 16, as_published=True), Rounding(4, 16)
    trained, _ = reconstruct(model, projections(model), text(8), how=how, rounding=published)
    trained.save(tmp_path / "p.safetensors")
    for one in (trained, Projections.load(tmp_path / "p.safetensors")):
        assert one.shape.as_published
        with pytest.raises(InputError, match=r"as_published=True: a quantiser that is not ours"):
            CSKVCache(model, one, window=16, bits=4)
    with pytest.raises(InputError, match="trained for bits=4, window=16, as_published=True"):
        reconstruct(model, trained, text(8), how=how, rounding=ours)
    reconstruct(model, trained, text(8), how=how, rounding=published)
    right, _ = reconstruct(model, projections(model), text(8), how=how, rounding=ours)
    assert not right.shape.as_published
    with pytest.raises(InputError, match="trained for bits=4, window=16;"):
        reconstruct(model, right, text(8), how=how, rounding=published)


def alone_and_padded(side: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    prompts = [kv_zoo.prompt(length, seed=length) for length in (40, 25)]
    given = kv_zoo.padded(prompts)
    if side == "right":
        given = {name: rows.clone() for name, rows in given.items()}
        for rows in given.values():
            rows[1] = rows[1].roll(25 - 40)
    places = (given["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return prompts, {**given, "position_ids": places}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_calibration_counts_no_padding(side: str, attention: str) -> None:
    model = kv_zoo.llama(attention=attention)
    prompts, padded = alone_and_padded(side)
    one, other = (statistics(model, growing(model), batches) for batches in (prompts, [padded]))
    for layer, known in one.items():
        assert known.tokens == other[layer].tokens == 65
        torch.testing.assert_close(known.mean, other[layer].mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(known.covariance, other[layer].covariance, rtol=1e-4, atol=1e-5)


def test_training_counts_no_padding() -> None:
    model = kv_zoo.llama()
    made = project(model, batches(), keep=0.25)
    prompts, padded = alone_and_padded("left")
    alone = [errors_of(model, made, [one]) for one in prompts]
    together = errors_of(model, made, [padded])
    for layer, pair in together.items():
        for which, error in enumerate(pair):
            wanted = (40 * alone[0][layer][which] + 25 * alone[1][layer][which]) / 65
            assert error == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_errors_are_those_of_the_projections_and_survive_rotation(kind: str) -> None:
    """Against the keys and values that the model itself stores: rotated ones (Llama), or its layers' outputs."""
    model, ids = kv_zoo.model(kind), kv_zoo.prompt(40)
    made = project(model, batches(), keep=0.25, values=0.5)
    seen: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
    for site in growing(model):
        for name in ("k_proj", "v_proj"):

            def keep(module: Any, args: Any, output: Tensor, where: tuple[int, str] = (site.layer, name)) -> None:
                seen[where] = args[0], output

            getattr(site.module, name).register_forward_hook(keep)
    full = DynamicCache(config=model.config)
    logits(model, full, ids)
    found = errors_of(model, made, [ids])
    for site in growing(model):
        for which, name in enumerate(("k_proj", "v_proj")):
            x, wanted = seen[site.layer, name]
            factors = made.layers[site.layer][which]
            restored = (x @ factors.down) @ factors.up[0]
            assert found[site.layer][which] == pytest.approx(float((restored - wanted).square().mean()), rel=1e-4)
            if kind == "Llama" and which == 0:
                turned = _rotated(model, restored.view(1, 40, 2, 8).transpose(1, 2))
                apart = float((turned - full.layers[site.layer].keys).square().mean())
                assert found[site.layer][0] == pytest.approx(apart, rel=1e-4)
    loss = LayerWise(model, text(4)).loss(_Holding(made), ids)
    assert float(loss) == pytest.approx(sum(map(sum, found.values())), rel=1e-4)


def _rotated(model: Any, keys: Tensor) -> Tensor:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    cos, sin = model.model.rotary_emb(keys, torch.arange(keys.shape[2])[None])
    return apply_rotary_pos_emb(keys, keys, cos, sin)[1]


class _Holding(torch.nn.Module):
    def __init__(self, made: Projections) -> None:
        super().__init__()
        self.made, self.here = made, torch.nn.Parameter(torch.zeros(1))

    def factors(self, layer: int) -> Any:
        return self.made.layers[layer]


@pytest.mark.parametrize(
    ("kv_heads", "keep", "per_token", "break_even"),
    [(32, 0.2, 102_400, 1989), (32, 0.5, 262_144, 8193), (8, 0.2, 25_600, 1243)],
)
def test_the_page_s_sizes(kv_heads: int, keep: float, per_token: int, break_even: int) -> None:
    """LongChat-7B and Mistral-7B: 32 layers of 4096, heads of 128; about 1 990, 8 190 and 1 240 tokens."""
    config = transformers.LlamaConfig(num_key_value_heads=kv_heads, vocab_size=8, intermediate_size=8)
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (32, 4096, 32)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).half()
    promised = plan(model, CSKV(model, outlined(model, keep=keep), window=0))
    whole = 32 * 2 * kv_heads * 128 * 2
    assert promised.per_token() == (whole, per_token)
    # r (h + h_out) numbers for keys and for values, won back by what each token saves, less 4 bytes a layer
    rank = kv_heads * int(keep * 128)
    assert promised.extra == 32 * 2 * rank * (4096 + kv_heads * 128) * 2
    assert promised.break_even() == break_even == (promised.extra + 32 * 4) // (whole - per_token) + 1
    packed = plan(model, CSKV(model, outlined(model, keep=keep), window=32, bits=4))
    if (kv_heads, keep) == (32, 0.2):
        # 4 bits with float16 scales: keys 4 + 32 / 32 bits, values (26 * 4 + 32) / 25, since one code is filling
        assert packed.per_token()[1] == pytest.approx(32 * 800 * (5 + (26 * 4 + 32) / 25) / 8)


def test_a_crop_beyond_the_window_goes_on_where_it_ended() -> None:
    """The window's tokens are masked by their places: with an old start the new ones would see what is hidden."""
    model, ids, more = kv_zoo.llama(), kv_zoo.prompt(30), kv_zoo.prompt(6, seed=5)
    exact = through_factors(model)
    cache = CSKVCache(model, exact, window=8)
    logits(model, cache, ids)
    cache.crop(-14)  # 22 projected and 8 whole ones: 16 projected stay
    ours = layers(cache)[0]
    assert ours.window is not None and (ours.window.whole.start, ours.window.tokens) == (16, 0)
    mask = torch.ones(1, 22, dtype=torch.long)
    with torch.no_grad():
        found = model(more, attention_mask=mask, past_key_values=cache).logits
        wanted = model(torch.cat([ids[:, :16], more], 1)).logits[:, 16:]
    torch.testing.assert_close(found, wanted, atol=2e-3, rtol=2e-3)
    cache.crop(-6 + 2)
    assert cache.get_seq_length() == 18


def test_a_window_of_many_tokens_has_a_late_break_even() -> None:
    """A tumbling window of 256 empties at once: what it saves goes up and down, and the last time counts."""
    with torch.device("meta"):
        model = kv_zoo.llama(head_dim=16)
    promised = plan(model, CSKV(model, outlined(model, keep=0.5), window=256, tumbling=True))
    found = promised.break_even()
    saves = [promised.bytes(Load(n)) + promised.extra < promised.full_bytes(Load(n)) for n in range(1, 3000)]
    last = max(n for n, saved in enumerate(saves, 1) if not saved)
    assert any(saves[:last]), "it saved at some shorter length"
    assert found == last + 1


def test_shapes_of_other_settings_differ() -> None:
    shape = projections(kv_zoo.llama()).shape
    assert shape.quantiser == "bits=None, window=None"
    assert replace(shape, bits=4, window=32, as_published=True).quantiser == "bits=4, window=32, as_published=True"
