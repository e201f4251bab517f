"""Networks of transformers, from configurations and folders made here."""

import json
import sys

import pytest
import torch

import niwaki.models
from niwaki.errors import FileDamagedError, InputError, MissingExtraError, NotFiniteError, UnknownNameError
from niwaki.units import run, tensors_in

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

TEXT = {"vocab_size": 20, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
GPT2 = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 20, "n_positions": 12}
LLAMA = {**TEXT, "model_type": "llama", "num_key_value_heads": 1}
VIT = {**TEXT, "model_type": "vit", "image_size": 16, "patch_size": 8, "num_channels": 3}
T5 = {"model_type": "t5", "vocab_size": 20, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}

TOWER = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
CLIP = {"model_type": "clip", "text_config": {**TEXT, "max_position_embeddings": 16}, "vision_config": TOWER}
LLAVA = {
    "model_type": "llava",
    "architectures": ["LlavaForConditionalGeneration"],
    "text_config": LLAMA,
    "vision_config": {"model_type": "clip_vision_model", **TOWER},
    "image_token_index": 3,
    "image_seq_length": 4,
    "vision_feature_layer": -1,
}
PAIR = {"d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 20, "pad_token_id": 0}
PAIR |= {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "eos_token_id": 1}
PAIR |= {"bos_token_id": 1, "decoder_start_token_id": 1}
WHISPER = {**PAIR, "model_type": "whisper", "num_mel_bins": 8, "max_source_positions": 10}
SPEECH = {**PAIR, "model_type": "speech_to_text", "input_feat_per_channel": 8, "max_source_positions": 20}
SPECTROGRAM = {**TEXT, "model_type": "audio-spectrogram-transformer", "num_mel_bins": 16, "max_length": 32}
SPECTROGRAM |= {"patch_size": 8}
WAVE = {**TEXT, "conv_dim": [8], "conv_kernel": [10], "conv_stride": [5], "num_feat_extract_layers": 1}
WAVE |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
ENCODEC = {"model_type": "encodec", "num_filters": 4, "hidden_size": 16, "codebook_size": 8, "codebook_dim": 16}
ENCODEC |= {"upsampling_ratios": [4, 2], "sampling_rate": 2400, "num_lstm_layers": 1, "target_bandwidths": [24.0]}


def config(folder, **values):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.fixture
def trained(tmp_path):
    """A folder as `save_pretrained` leaves it."""
    torch.manual_seed(7)
    kept = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))
    kept.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2", kept.eval()


def shapes(example):
    """Shapes of the tensors in an example; the one thing besides is that no cache is asked for."""
    assert {name: value for name, value in example.items() if not torch.is_tensor(value)} in ({}, {"use_cache": False})
    return {name: tuple(value.shape) for name, value in example.items() if torch.is_tensor(value)}


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({**GPT2, "architectures": ["GPT2LMHeadModel"]}, {"input_ids": (1, 12)}),
        ({**LLAMA, "architectures": ["LlamaForCausalLM"]}, {"input_ids": (1, 16)}),
        ({**TEXT, "model_type": "bert", "architectures": ["BertForSequenceClassification"]}, {"input_ids": (1, 16)}),
        ({**VIT, "architectures": ["ViTForImageClassification"]}, {"pixel_values": (1, 3, 16, 16)}),
        (T5, {"input_ids": (1, 16), "decoder_input_ids": (1, 4)}),
        (CLIP, {"input_ids": (1, 16), "pixel_values": (1, 3, 16, 16)}),
        (LLAVA, {"input_ids": (1, 4), "pixel_values": (1, 3, 16, 16)}),
        (WHISPER, {"input_features": (1, 8, 20), "decoder_input_ids": (1, 4)}),
        (SPEECH, {"input_features": (1, 40, 8), "decoder_input_ids": (1, 4)}),
        (SPECTROGRAM, {"input_values": (1, 32, 16)}),
        ({"model_type": "wav2vec2", **WAVE}, {"input_values": (1, 16000)}),
        (ENCODEC, {"input_values": (1, 1, 2400)}),
    ],
)
def test_a_configuration_becomes_an_untrained_network_with_an_example(values, names, tmp_path):
    loaded = niwaki.models.load(f"hf:{config(tmp_path / 'm', **values)}")
    assert shapes(loaded.example) == names
    if "architectures" in values:
        assert type(loaded.model).__name__ == values["architectures"][0]
    assert loaded.weights == "random" and not loaded.model.training
    with torch.no_grad():
        assert tensors_in(run(loaded.model, loaded.example))[0].shape[0] == 1


def test_what_a_model_keeps_for_its_next_call_holds_no_heads(tmp_path):
    """A key/value cache is state: its heads may go, though the forward hands it out."""
    loaded = niwaki.models.load(f"hf:{config(tmp_path / 'm', **LLAMA, architectures=['LlamaForCausalLM'])}")
    graph = niwaki.trace(loaded.model, {"input_ids": loaded.example["input_ids"]})
    values = [group for group in graph.groups if any("v_proj" in member.tensor for member in group.members)]
    assert values and all(group.fixed is None for group in values)


def test_a_file_will_do_and_arguments_change_the_configuration(tmp_path):
    file = config(tmp_path, **GPT2) / "config.json"
    assert len(niwaki.models.load(f"hf:{file}?n_layer=3").model.h) == 3


def test_the_weights_of_the_folder_are_used_and_the_factory_is_untrained(trained):
    folder, kept = trained
    loaded = niwaki.models.load(f"hf:{folder}")
    assert loaded.weights == "stored with the model"
    with torch.no_grad():
        assert run(loaded.model, loaded.example).logits.equal(run(kept, loaded.example).logits)
    assert not loaded.factory().transformer.wpe.weight.equal(kept.transformer.wpe.weight)


def test_a_checkpoint_goes_before_the_weights_of_the_folder(trained):
    folder, kept = trained
    with torch.no_grad():
        kept.transformer.wpe.weight += 1
    kept.save_pretrained(folder.parent / "later")
    later = folder.parent / "later" / "model.safetensors"
    loaded = niwaki.models.load(f"hf:{folder}", checkpoint=str(later))
    assert loaded.model.transformer.wpe.weight.equal(kept.transformer.wpe.weight)
    assert loaded.model.lm_head.weight is loaded.model.transformer.wte.weight  # the file holds this one once


def test_the_progress_bars_of_transformers_stay_as_they_were(trained, capfd):
    shown = transformers.utils.logging.is_progress_bar_enabled()
    niwaki.models.load(f"hf:{trained[0]}")
    assert transformers.utils.logging.is_progress_bar_enabled() == shown
    assert capfd.readouterr().out == ""


def test_the_normalisation_of_a_stored_picture_processor_is_known(tmp_path):
    folder = config(tmp_path / "vit", **VIT)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}')
    assert niwaki.models.load(f"hf:{folder}").normalisation == ((0.5,) * 3, (0.25,) * 3)


def test_nothing_is_looked_up_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("gpt2", "openai-community/gpt2"):
        with pytest.raises(InputError, match="never downloads") as caught:
            niwaki.models.load(f"hf:{name}")
        assert caught.value.exit_code == 2


def test_code_that_comes_with_a_model_is_never_run(tmp_path):
    own = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    folder = config(tmp_path / "m", model_type="mine", auto_map=own)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')")
    with pytest.raises(InputError, match="its code is elsewhere and is never run"):
        niwaki.models.load(f"hf:{folder}")
    assert not (tmp_path / "trace").exists()


def test_configurations_that_cannot_be_used_are_refused(tmp_path):
    with pytest.raises(InputError, match="transformers does not know it"):
        niwaki.models.load(f"hf:{config(tmp_path / 'a', hidden_size=3)}")
    with pytest.raises(InputError, match="part of the installed transformers"):
        niwaki.models.load(f"hf:{config(tmp_path / 'b', **{**GPT2, 'n_embd': 15})}")
    with pytest.raises(UnknownNameError, match="setting of gpt2 'layers'"):
        niwaki.models.load(f"hf:{config(tmp_path / 'c', **GPT2)}?layers=3")
    (tmp_path / "c" / "config.json").write_text('{"model_type": "gp')
    with pytest.raises(FileDamagedError, match="read a configuration"):
        niwaki.models.load(f"hf:{tmp_path / 'c'}")
    (tmp_path / "c" / "config.json").write_text("[1]")
    with pytest.raises(FileDamagedError, match="read a configuration"):
        niwaki.models.load(f"hf:{tmp_path / 'c'}")


def test_truncated_incomplete_and_diverged_weights_are_refused(trained):
    folder, _ = trained
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(FileDamagedError, match="get the files again"):
        niwaki.models.load(f"hf:{folder}")
    from safetensors.torch import load, save_file

    state = load(whole)
    save_file({k: v for k, v in state.items() if "wpe" not in k}, file, metadata={"format": "pt"})
    with pytest.raises(FileDamagedError, match=r"1 tensors missing, such as transformer\.wpe\.weight"):
        niwaki.models.load(f"hf:{folder}")
    state["transformer.wpe.weight"][0, 0] = float("nan")
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(NotFiniteError, match=r"transformer.wpe.weight \(1 of 192\)"):
        niwaki.models.load(f"hf:{folder}")


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"niwaki\[llm\]"):
        niwaki.models.load("hf:anything")
