"""Cut models of transformers as folders that transformers read without niwaki."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import niwaki
from niwaki.budgets import GlobalRank, Uniform
from niwaki.errors import CannotCutError, InputError, RunExistsError
from niwaki.export import export_pretrained, fitted_config
from niwaki.report import html

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

LAYERS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
TEXT = {**LAYERS, "vocab_size": 20, "max_position_embeddings": 12, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {"vocab_size": 20, "n_positions": 12, "n_embd": 16, "n_layer": 2, "n_head": 4, "bos_token_id": 1}
MODELS = {
    "llama": ("LlamaForCausalLM", {**TEXT, "num_key_value_heads": 2}),
    "gpt2": ("GPT2LMHeadModel", {**GPT2, "eos_token_id": 2}),
    "bert": ("BertForSequenceClassification", TEXT),
    "vit": ("ViTForImageClassification", {**LAYERS, "image_size": 16, "patch_size": 8}),
}
SIZES = {
    "llama": {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1},
    "gpt2": {"n_embd": 8, "n_head": 2},
    "bert": {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2},
    "vit": {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2},
}


def cut(kind, how=Uniform()):  # noqa: B008
    name, sizes = MODELS[kind]
    torch.manual_seed(0)
    model = getattr(transformers, name)(transformers.AutoConfig.for_model(kind, **sizes)).eval()
    numbers = torch.arange(6).unsqueeze(0)
    example = {"pixel_values": torch.randn(1, 3, 16, 16)} if kind == "vit" else {"input_ids": numbers}
    graph = niwaki.trace(model, example)
    random = niwaki.scores.Random()
    scores = niwaki.score(graph, niwaki.collect(model, graph, random.needs), how=random)
    plan = niwaki.choose(graph, scores, niwaki.Budget(keep=0.5, of="units"), how=how)
    return niwaki.cut(model, plan), example


@pytest.mark.parametrize("kind", MODELS)
def test_the_configuration_says_the_new_sizes_and_the_folder_is_whole(kind, tmp_path):
    small, example = cut(kind)
    before = small.config.to_dict()
    again = export_pretrained(small, tmp_path / "small", example)
    assert {name: getattr(again.config, name) for name in SIZES[kind]} == SIZES[kind]
    assert small.config.to_dict() == before
    assert type(again) is type(small) and isinstance(again, transformers.PreTrainedModel)
    with torch.no_grad():
        assert again(**example)["logits"].equal(small(**example)["logits"])
    if again.can_generate():
        words = {"max_new_tokens": 4, "do_sample": False}
        assert again.generate(example["input_ids"], **words).equal(small.generate(example["input_ids"], **words))


def test_a_process_without_niwaki_reads_the_same_bits(tmp_path):
    small, example = cut("llama")
    export_pretrained(small, tmp_path / "small", example)
    torch.save(small(**example)["logits"].detach(), tmp_path / "logits.pt")
    code = f"""
import sys, torch, transformers
torch.set_num_threads(1)  # as here: sums in another order have other bits
model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / "small")!r}).eval()
assert "niwaki" not in sys.modules
assert model(torch.arange(6).unsqueeze(0)).logits.equal(torch.load({str(tmp_path / "logits.pt")!r}))
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_layers_of_different_widths_have_no_configuration(tmp_path):
    small, example = cut("llama", how=GlobalRank())
    widths = {layer.mlp.gate_proj.out_features for layer in small.model.layers}
    assert len(widths) == 2
    with pytest.raises(CannotCutError, match=r"none says its sizes: \d+ tensors differ, such as model\.layers"):
        export_pretrained(small, tmp_path / "small", example)
    assert not (tmp_path / "small").exists()


def test_what_is_not_cut_keeps_its_configuration():
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, eos_token_id=2))
    assert fitted_config(model).to_dict() == model.config.to_dict()


def test_refusals(tmp_path):
    small, example = cut("bert")
    with pytest.raises(InputError, match="a Linear, not a PreTrainedModel"):
        export_pretrained(nn.Linear(2, 2), tmp_path / "a", torch.zeros(1, 2))
    (tmp_path / "there").mkdir()
    with pytest.raises(RunExistsError):
        export_pretrained(small, tmp_path / "there", example)
    small.classifier.weight.data += 1  # two names of one tensor would not come apart; another number is no other shape
    read = export_pretrained(small, tmp_path / "there", example, force=True)
    assert read.classifier.weight.equal(small.classifier.weight)


def test_something_that_kept_its_old_value_is_told(tmp_path):
    small, example = cut("bert")
    for layer in small.bert.encoder.layer:
        layer.attention.self.scaling = 3.0
    with pytest.raises(CannotCutError, match="puts out other numbers"):
        export_pretrained(small, tmp_path / "small", example)
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize(("rule", "written"), [("uniform", True), ("global_rank", False)])
def test_a_saved_run_has_the_folder_or_says_why_not(rule, written, tmp_path):
    name, sizes = MODELS["gpt2"]
    torch.manual_seed(0)
    model = getattr(transformers, name)(transformers.AutoConfig.for_model("gpt2", **sizes)).eval()
    example = {"input_ids": torch.arange(6).unsqueeze(0)}
    half = niwaki.Budget(keep=0.5, of="units")
    outcome = niwaki.compress(model, example, method=niwaki.methods.Random(rule=rule), budget=half)
    folder = outcome.save(tmp_path / "run")
    told = json.loads((folder / "report.json").read_text())["pretrained"]
    assert (folder / "hf").exists() is written
    if written:
        assert told == "hf"
        again = type(model).from_pretrained(folder / "hf", local_files_only=True).eval()
        with torch.no_grad():
            assert again(**example)["logits"].equal(outcome.model(**example)["logits"])
    else:
        assert told.startswith("none: ") and "none says its sizes" in told
    assert "for from_pretrained" in html(folder)
