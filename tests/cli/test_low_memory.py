"""`niwaki compress --low-memory`: a checkpoint on disk becomes a smaller one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import niwaki
from niwaki.stored import INDEX, SINGLE, Stored, write_index

Run = Callable[..., Any]
MODEL = "python:nets.py:with_example"


@pytest.fixture
def shards(here: Path) -> Path:
    """The state of nets.with_example in two shards."""
    state = niwaki.models.load(MODEL).model.state_dict()
    files = {"a.safetensors": list(state)[:5], "b.safetensors": list(state)[5:]}
    (here / "whole").mkdir()
    for file, names in files.items():
        save_file({name: state[name].contiguous() for name in names}, here / "whole" / file)
    write_index(here / "whole" / INDEX, files, {})
    return here / "whole"


def test_a_checkpoint_becomes_a_smaller_one(shards: Path, run: Run) -> None:
    said = run("compress", MODEL, "--low-memory", "--checkpoint", "whole", "--out", "cut", "--json")
    assert said.code == 0 and "b.safetensors (2 of 2)" in said.err and "not judged" in said.err
    assert said.data["after"]["macs"] <= 0.5 * said.data["before"]["macs"]
    assert said.data["after"]["bytes"] == Stored("cut").bytes and said.data["files"] == [
        "a.safetensors",
        "b.safetensors",
    ]
    factory = niwaki.models.load(MODEL).factory
    small = niwaki.load("cut", factory)
    loaded = niwaki.models.load(MODEL)
    known = niwaki.compress(
        loaded.model, loaded.example, method=niwaki.methods.Magnitude(), budget=niwaki.Budget(keep=0.5)
    )
    want = known.model.state_dict()
    assert all(torch.equal(tensor, want[name]) for name, tensor in small.state_dict().items())
    assert run("compress", MODEL, "--low-memory", "--checkpoint", "whole", "--out", "cut").code == 2
    again = run("compress", MODEL, "--low-memory", "--checkpoint", "whole", "--out", "cut", "--force")
    assert again.code == 0 and "%" in again.out and run("verify", MODEL, "cut").code == 0


def test_a_missing_shard_is_an_error_in_four_parts(shards: Path, run: Run) -> None:
    (shards / "b.safetensors").unlink()
    said = run("compress", MODEL, "--low-memory", "--checkpoint", "whole", "--out", "cut", "--json")
    assert said.code == 2 and "shard b.safetensors is missing" in json.loads(said.out)["error"]["found"]
    assert not Path("cut").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "no weights on disk"),
        (("--checkpoint", "whole", "--data", "digits"), "--data with --low-memory"),
        (("--checkpoint", "whole", "--export", "onnx"), "--export with --low-memory"),
        (("--checkpoint", "whole", "--target", "pytorch"), "--target with --low-memory"),
        (("--checkpoint", "whole", "--method", "taylor"), "weights that stay on disk"),
        (("--checkpoint", "whole", "--set", "fold=true"), "--set fold=true"),
        (("--checkpoint", "nowhere"), "no such place"),
    ],
)
def test_what_needs_the_network_is_refused(shards: Path, run: Run, arguments: tuple[str, ...], named: str) -> None:
    said = run("compress", MODEL, "--low-memory", "--out", "cut", *arguments)
    assert said.code == 2 and named in said.err and not Path("cut").exists()


def test_one_file_will_do(here: Path, run: Run) -> None:
    save_file(niwaki.models.load(MODEL).model.state_dict(), here / "w.safetensors")
    assert run("compress", MODEL, "--low-memory", "--checkpoint", "w.safetensors", "--out", "cut").code == 0
    assert {path.name for path in (here / "cut").iterdir()} == {SINGLE, "plan.json", "surgery.json"}
