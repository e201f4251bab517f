"""`niwaki kv` and `niwaki kv plan`."""

import json

import pytest

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 256, "hidden_size": 64,
    "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("the rain in spain stays mainly in the plain " * 80)
    (tmp_path / "llama.json").write_text(json.dumps(CONFIG))
    (tmp_path / "gpt2.json").write_text(
        json.dumps(
            {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 2, "n_embd": 24, "n_head": 2}
        )
    )
    return tmp_path


def test_plan_says_bytes_before_anything_runs(run, folder):
    found = run("kv", "plan", "hf:llama.json", "--keep", "0.5", "--json")
    assert found.code == 0, found.err
    # 2 layers, 2 heads, 16 channels, 4 bytes: 512 a token whole, 384 with half of the key channels
    assert (found.data["bytes_per_token"], found.data["compressed_bytes_per_token"]) == (512, 384)
    assert found.data["break_even_tokens"] == 33
    drawn = run("kv", "plan", "hf:llama.json", "--keep", "0.5", "--batch", "2")
    assert drawn.code == 0 and "75.0%" in drawn.out and "bytes at 2 x 1,024 tokens" in drawn.out
    assert found.data["context"] == 256 and "the model's context, tokens" in drawn.out
    assert drawn.out.count("beyond its context") == 4  # four lengths; what pays at 33 tokens is within
    late = run("kv", "plan", "hf:llama.json", "--keep", "0.8")
    assert late.out.count("beyond its context") == 5, late.out


def test_before_and_after(run, folder):
    words = (
        "kv",
        "hf:llama.json",
        "--text",
        "a.txt",
        "--length",
        "80",
        "--score",
        "20",
        "--limit",
        "3",
        "--steps",
        "2",
    )
    found = run(*words, "--keep", "0.5", "--lines", "2", "--json")
    assert found.code == 0, found.err
    before, after = found.data["before"], found.data["after"]
    assert set(before) == set(after) == {"perplexity", "accuracy", "retrieval", "cache_bytes", "decode_ms"}
    planned = found.data["plan"]["lengths"][0]
    assert planned["tokens"] == 76
    assert before["cache_bytes"]["value"] == planned["bytes"] == 76 * 512
    assert after["cache_bytes"]["value"] == planned["compressed_bytes"] < planned["bytes"]
    same = run(*words, "--keep", "1", "--tokens", "snapkv:1.0", "--json")
    assert same.data["before"]["perplexity"]["value"] == same.data["after"]["perplexity"]["value"]
    drawn = run(*words, "--tokens", "h2o:0.5")
    assert drawn.code == 0 and "cache bytes" in drawn.out


def test_that_nothing_is_left_out_is_said_but_not_for_every_window(run, folder):
    words = ("kv", "hf:llama.json", "--text", "a.txt", "--length", "80", "--limit", "3", "--steps", "1")
    found = run(*words, "--score", "20", "--keep", "0.97")
    assert found.code == 0
    assert 1 <= found.err.count("none of 16 channels") <= 2  # six caches of two layers, and a plan


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("kv", "hf:llama.json"), "no text to judge by"),
        (("kv", "plan"), "niwaki kv"),
        (("kv", "plan", "hf:gpt2.json"), "not rotary"),
        (("kv", "plan", "hf:llama.json", "--method", "zeros"), "think"),
        (("kv", "plan", "hf:llama.json", "--keep", "0"), "0 and at most 1"),
        (("kv", "plan", "hf:llama.json", "--bits", "3"), "2, 4 or 8"),
        (("kv", "plan", "hf:none.json", "--keep", "2"), "--keep 2; found: not in (0, 1]"),  # before the model is read
        (("kv", "plan", "hf:none.json", "--values", "nan"), "--values nan; found: not in (0, 1]"),
        (("kv", "plan", "hf:none.json", "--bits", "5"), "--bits 5; found: not 2, 4 or 8"),
        (("kv", "plan", "hf:llama.json", "--init", "svd"), "--init svd, which only cskv knows"),
        (("kv", "hf:llama.json", "--text", "a.txt", "--projections", "p.x"), "--projections p.x, which only cskv"),
        (("kv", "plan", "hf:llama.json", "--tokens", "best:3"), "snapkv"),
        (("kv", "plan", "hf:llama.json", "--tokens", "snapkv"), "snapkv:512"),
        (("kv", "plan", "hf:llama.json", "--keep", "1"), "nothing to leave out"),
        (("kv", "hf:llama.json", "--text", "a.txt", "--length", "300"), "a model for 256"),
        (("kv", "hf:llama.json", "--text", "a.txt", "--length", "80", "--score", "80"), "1 to length - 1"),
        (("kv", "hf:llama.json", "--text", "none.txt"), "none.txt"),
    ],
)
def test_bad_words(run, folder, words, said):
    found = run(*words)
    assert found.code == 2 and said in found.err
