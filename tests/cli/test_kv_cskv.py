"""`niwaki kv --method cskv`: projections made from the text, or read from a file."""

import pytest
from test_kv_command import folder  # noqa: F401 (a fixture)

import niwaki

pytestmark = pytest.mark.filterwarnings("ignore:a CSKV cache of:UserWarning")  # prompts are short here
RUN = ("--text", "a.txt", "--length", "80", "--score", "20", "--limit", "3", "--steps", "2")


def test_plan_needs_no_weights(run, folder):  # noqa: F811
    found = run("kv", "plan", "hf:llama.json", "--method", "cskv", "--keep", "0.5", "--recent", "0", "--json")
    assert found.code == 0, found.err
    # 2 layers, 2 heads of 16: 512 bytes a token whole, half of it as projections; factors 2 x 2 x 16 x (64 + 32) x 4
    assert (found.data["bytes_per_token"], found.data["compressed_bytes_per_token"]) == (512, 256)
    assert found.data["extra_weights_bytes"] == 2 * 2 * 16 * (64 + 32) * 4
    assert found.data["break_even_tokens"] == 97  # 96 and the 4 bytes a layer for the padding
    assert "CSKV(Shape(keep=0.5" in found.data["how"]


def test_before_and_after_with_and_without_a_file(run, folder):  # noqa: F811
    words = ("kv", "hf:llama.json", "--method", "cskv", "--keep", "0.5", "--recent", "16", *RUN, "--json")
    found = run(*words)
    assert found.code == 0, found.err
    planned = found.data["plan"]["lengths"][0]
    assert found.data["after"]["cache_bytes"]["value"] == planned["compressed_bytes"] < planned["bytes"]
    model = niwaki.models.load("hf:llama.json").model
    made = niwaki.kv.project(model, None, keep=0.5, init="svd")
    made.save("p.safetensors")
    other = run(*(word for word in words if word not in ("--keep", "0.5")), "--projections", "p.safetensors")
    assert other.code == 0, other.err
    assert other.data["after"]["perplexity"]["value"] != found.data["after"]["perplexity"]["value"]
    assert other.data["before"]["perplexity"]["value"] == found.data["before"]["perplexity"]["value"]
    packed = run(*words, "--bits", "4")
    assert packed.code == 0, packed.err
    assert packed.data["after"]["cache_bytes"]["value"] < found.data["after"]["cache_bytes"]["value"]


def test_mistakes_are_refused(run, folder):  # noqa: F811
    for words, told in (
        (("--init", "random"), "initialisation"),
        (("--tokens", "h2o:8"), "--tokens h2o:8"),
        (("--keep", "0.01"), "floor"),
        (("--keep", "2"), "(0, 1]"),
        (("--bits", "3"), "not 2, 4 or 8"),
        (("--projections", "no.safetensors"), "no such file"),
        (("--projections", "a.txt"), "Projections.save"),
        (("--projections", "a.txt", "--keep", "0.5"), "--keep 0.5"),
        (("--projections", "a.txt", "--values", "0.5", "--init", "svd"), "--values 0.5, --init svd"),
    ):
        found = run("kv", "hf:llama.json", "--method", "cskv", *RUN, *words)
        assert found.code == 2 and told in found.err, words
