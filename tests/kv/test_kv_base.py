"""The base of compressed caches: same tokens where nothing is left out, nothing left behind, nothing silently wrong."""

import copy
import gc
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import kv_zoo
from niwaki.errors import InputError
from niwaki.kv import Call, How, KVCache, KVLayer, Segment, Site, UnsupportedModelError, attend, compressed, sites


class InTwo(KVLayer):
    """Everything whole, but in two parts, so that attention is ours from the second call on."""

    def take(self, call: Call) -> Tensor:
        if not self.parts:
            self.parts = (
                Segment.whole(call.keys[:, :, :5], call.values[:, :, :5], start=0),
                Segment.whole(call.keys[:, :, 5:], call.values[:, :, 5:], start=5),
            )
            return call.own(call.keys, call.values)
        first, last = self.parts
        assert isinstance(last, Segment)
        self.parts = (first, last.append(call.keys, call.values))
        return attend(call, self.parts)[0]


class Whole(How):
    def layer(self, site: Site) -> KVLayer:
        return InTwo()


def left_behind(model: Any) -> list[str]:
    """What is still on the model or in the registry."""
    hooks = [name for name, module in model.named_modules() if module._forward_pre_hooks or module._forward_hooks]
    return hooks + [name for name in ALL_ATTENTION_FUNCTIONS if "niwaki" in name]


@pytest.mark.parametrize("name", kv_zoo.ZOO)
def test_a_whole_cache_generates_the_same_tokens_and_leaves_nothing(name: str) -> None:
    model = kv_zoo.ZOO[name]()
    ids, before = kv_zoo.prompt(20), model.config._attn_implementation
    expected = kv_zoo.generate(model, ids)
    assert len(set(expected[0].tolist())) > 2
    cache = KVCache(model, Whole())
    assert torch.equal(kv_zoo.generate(model, ids, past_key_values=cache), expected)
    assert cache.get_seq_length() == 20 + 12 - 1
    assert model.config._attn_implementation == before
    del cache
    gc.collect()
    assert not left_behind(model)
    with compressed(model, Whole()) as session:
        assert torch.equal(kv_zoo.generate(model, ids), expected)
        assert session.nbytes() > 0
    assert not left_behind(model)
    assert model.config._attn_implementation == before
    assert torch.equal(kv_zoo.generate(model, ids), expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_padded_batch_is_as_alone(attention: str) -> None:
    model = kv_zoo.llama(attention=attention)
    prompts = [kv_zoo.prompt(length, seed=length) for length in (9, 21, 16)]
    with compressed(model, Whole()):
        together = kv_zoo.generate(model, kv_zoo.padded(prompts))
        for row, one in enumerate(prompts):
            assert torch.equal(kv_zoo.generate(model, one)[0], together[row])


def test_prefill_is_bit_identical_and_later_logits_agree() -> None:
    model, ids = kv_zoo.llama(), kv_zoo.prompt(30)
    with torch.no_grad():
        plain, ours = DynamicCache(), KVCache(model, Whole())
        assert torch.equal(model(ids, past_key_values=ours).logits, model(ids, past_key_values=plain).logits)
        more = kv_zoo.prompt(7, seed=5)  # a second turn: several tokens see the cache and each other
        found, expected = (model(more, past_key_values=cache).logits for cache in (ours, plain))
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_many_queries_attend_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, more = kv_zoo.llama(), kv_zoo.prompt(30), kv_zoo.prompt(7, seed=5)
    with torch.no_grad():
        caches = [KVCache(model, Whole()) for _ in range(2)]
        for cache in caches:
            model(ids, past_key_values=cache)
        whole = model(more, past_key_values=caches[0]).logits
        monkeypatch.setattr("niwaki.kv.attention.MOST_LOGITS", 2 * 4 * 37)
        pieces = model(more, past_key_values=caches[1]).logits
    assert torch.allclose(whole, pieces, rtol=1e-5, atol=1e-5)


def test_half_precision_logits_beyond_float16_are_those_of_the_model() -> None:
    """Qwen2's key biases: products of 192 000 before scaling, 67 882 after it; float16 ends at 65 504."""
    model = kv_zoo.model("Qwen2", dtype=torch.float16)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias.fill_(200.0)
            layer.self_attn.q_proj.bias.fill_(120.0)
        answers = []
        for cache in (DynamicCache(), KVCache(model, Whole())):
            model(kv_zoo.prompt(60), past_key_values=cache)
            answers.append(model(kv_zoo.prompt(3, seed=5), past_key_values=cache).logits.float())
    assert torch.isfinite(answers[1]).all()
    assert (answers[0] - answers[1]).abs().max() < 0.02 * answers[0].abs().max()


def test_half_precision_attention_of_small_and_of_no_queries() -> None:
    torch.manual_seed(0)
    keys, values = torch.randn(1, 1, 40, 64).half(), torch.randn(1, 1, 40, 64).half()
    for size in (0.0, 1e-4, 1.0):
        found = []
        for dtype in (torch.float16, torch.float32):
            query = (torch.full((1, 2, 1, 64), size) * keys[:, :, 7:8]).half().to(dtype)
            known, mixed = keys.to(dtype), values.to(dtype)
            call = Call(query, known[:, :, -1:], mixed[:, :, -1:], None, 0.125, None, own=lambda k, v: k)
            found.append(attend(call, [Segment.whole(known, mixed, start=0)])[0].float())
        assert (found[0] - found[1]).abs().max() < 5e-3


def test_beams_and_crops() -> None:
    model, ids = kv_zoo.llama(), kv_zoo.prompt(14, batch=2)
    expected = kv_zoo.generate(model, ids, num_beams=3)
    with compressed(model, Whole()):
        assert torch.equal(kv_zoo.generate(model, ids, num_beams=3), expected)
    cache = KVCache(model, Whole())
    with torch.no_grad():
        model(ids, past_key_values=cache)
        first = model(kv_zoo.prompt(4, batch=2), past_key_values=cache).logits
        held = cache.nbytes()
        cache.crop(-4)
        assert cache.get_seq_length() == 14
        assert torch.equal(model(kv_zoo.prompt(4, batch=2), past_key_values=cache).logits, first)
        assert cache.nbytes() == held
        cache.batch_select_indices(torch.tensor([1]))
        assert 2 * cache.nbytes() == held
    with pytest.raises(InputError, match="crop"):
        cache.crop(3)


def test_an_exception_inside_leaves_nothing_behind() -> None:
    model = kv_zoo.llama()
    with pytest.raises(IndexError), compressed(model, Whole()):
        model(torch.tensor([[1000]]))
    assert not left_behind(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_broken_forward_leaves_the_configuration() -> None:
    model = kv_zoo.llama()
    cache = KVCache(model, Whole())
    with pytest.raises(IndexError):
        model(torch.tensor([[1000]]), past_key_values=cache)
    assert model.config._attn_implementation == "sdpa"
    cache.close()
    assert not left_behind(model)


def test_nested_blocks_and_foreign_caches_are_refused() -> None:
    model, other, ids = kv_zoo.llama(), kv_zoo.llama(kv_heads=4), kv_zoo.prompt(6)
    with compressed(model, Whole()):
        with pytest.raises(InputError, match="already"), compressed(model, Whole()):
            pass
        with pytest.raises(InputError, match="StaticCache"):
            model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=64))
        filled = DynamicCache()
        other(ids, past_key_values=filled)
        with pytest.raises(InputError, match="already holds 6 tokens"):
            model(ids, past_key_values=filled)
    cache = KVCache(model, Whole())
    with pytest.raises(InputError, match="another model"), compressed(other, Whole()):
        other(ids, past_key_values=cache)
    cache.close()
    with pytest.raises(InputError, match=r"closed|without asking"):
        for _ in range(2):
            model(ids, past_key_values=cache)


def test_attention_that_does_not_ask_the_layer_is_noticed() -> None:
    model, other, ids = kv_zoo.llama(), kv_zoo.llama(), kv_zoo.prompt(6)
    cache = KVCache(model, Whole())
    other(ids, past_key_values=cache)  # an empty cache: the output is right, but nothing can be stored
    with pytest.raises(InputError, match="without asking"):
        other(ids[:, -1:], past_key_values=cache)


def test_two_caches_of_one_model_and_copies_are_independent() -> None:
    model, ids = kv_zoo.llama(), kv_zoo.prompt(10)
    one, two = KVCache(model, Whole()), KVCache(model, Whole())
    with torch.no_grad():
        model(ids, past_key_values=one)
        model(kv_zoo.prompt(10, seed=9), past_key_values=two)
        twin = copy.deepcopy(one)
        step = kv_zoo.prompt(1, seed=3)
        expected = model(torch.cat((ids, step), dim=1)).logits[:, -1]
        for cache in (one, twin):
            found = model(step, past_key_values=cache).logits[:, -1]
            assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
        assert two.get_seq_length() == 10


REFUSED = {
    "GPT2LMHeadModel": ("GPT2Config", "not rotary"),
    "BloomForCausalLM": ("BloomConfig", "ALiBi"),
    "DeepseekV3ForCausalLM": ("DeepseekV3Config", "latent attention"),
    "GptOssForCausalLM": ("GptOssConfig", "attention sinks"),
    "MambaForCausalLM": ("MambaConfig", "linear_attention"),
    "T5ForConditionalGeneration": ("T5Config", "encoder-decoder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_are_refused_by_name(name: str) -> None:
    config, why = REFUSED[name]
    with torch.device("meta"):
        model = getattr(transformers, name)(getattr(transformers, config)())
    with pytest.raises(UnsupportedModelError, match=f"{name}.*{why}"):
        sites(model)


def test_other_implementations_and_all_sliding_models_are_refused() -> None:
    flex = kv_zoo.llama(attention="flex_attention")
    with pytest.raises(UnsupportedModelError, match="flex_attention"):
        KVCache(flex, Whole())
    with pytest.raises(InputError, match="every layer looks back 8 tokens"):
        KVCache(kv_zoo.model("Mistral", sliding_window=8), Whole())
    with pytest.raises(UnsupportedModelError, match="not a model of transformers"):
        sites(torch.nn.Linear(2, 2))


def test_dropout_in_training_is_refused() -> None:
    model = kv_zoo.llama(attention_dropout=0.5).train()
    with pytest.raises(InputError, match="dropout"), compressed(model, Whole()):
        model(kv_zoo.prompt(6))


@pytest.mark.parametrize(
    ("given", "said"),
    [({"position_bias": 1}, "position_bias"), ({"slopes": torch.ones(1)}, "slopes"), ({"is_causal": False}, "causal")],
)
def test_arguments_of_attention_that_are_not_known_are_refused(given: dict[str, Any], said: str) -> None:
    """Handed on by the models to their attention: whatever they mean, the compressed cache would not do it."""
    model, ids = kv_zoo.llama(), kv_zoo.prompt(6)
    with pytest.raises(InputError, match=f"{said}.*layer 0"), compressed(model, Whole()):
        model(ids, **given)
    with compressed(model, Whole()), torch.no_grad():
        model(ids, slopes=None, output_hidden_states=True, num_items_in_batch=3)  # these change no score
