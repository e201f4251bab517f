"""`--data text:FILE`: language models measured, compressed and taught from the command line."""

import json

import pytest

WORDS = "the rain in spain stays mainly in the plain "


@pytest.fixture
def folder(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(WORDS * 60)
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 256, "hidden_size": 16,
        "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 32, "tie_word_embeddings": True, "use_cache": False,
    }  # fmt: skip
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_compress_and_measure(run, folder):
    found = run(
        "compress", "hf:llama", "--data", "text:a.txt?length=16", "--keep", "0.7", "--recover", "2", "--optimizer",
        "adamw", "--lr", "0.003", "--batch", "8", "--distill", "logits", "--runs", "0", "--out", "r", "--json",
    )  # fmt: skip
    assert found.code == 0, found.err
    report = found.data["report"]
    assert {"perplexity", "accuracy"} <= set(report["after"]) and report["receipt"]["passed"]
    assert report["stages"][-1]["stage"] == "recovery"
    assert report["splits"]["source"] == "text:a.txt" and report["splits"]["split_by"] == "position"
    perplexity = [stage["measurements"]["perplexity"]["value"] for stage in report["stages"]]
    assert perplexity[-1] < perplexity[0]
    assert (folder / "r" / "report.html").exists()
    taken = run("measure", "r", "--data", "text:a.txt?length=16", "--runs", "0", "--json")
    assert taken.code == 0, taken.err
    assert taken.data["perplexity"]["value"] == pytest.approx(report["after"]["perplexity"]["value"])
    # 32 tokens of context, unless said otherwise
    taken = run("measure", "hf:llama", "--data", "text:a.txt?mask=255", "--runs", "0", "--limit-test", "2", "--json")
    assert (
        taken.code == 0
        and "2 of 8 sequences of the test split, what was hidden" in taken.data["accuracy"]["definition"]
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("text:b.txt",), "no such file"),
        (("text:",), "nothing after the colon"),
        (("text:a.txt?size=3",), "known: length, tokenizer, mask, val, test"),
        (("text:a.txt", "--input", "1x16"), "a text as data"),
        (("text:a.txt", "--normalisation", "half"), "a text as data"),
    ],
)
def test_refusals(run, folder, options, says):
    found = run("measure", "hf:llama", "--runs", "0", "--data", *options)
    assert found.code == 2 and says in found.err
