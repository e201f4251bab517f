"""A run's folder, of `niwaki train` or `niwaki compress`, wherever a model is named; and folders that are no runs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import niwaki
import niwaki.sweep
from niwaki.cli import main

pytest.importorskip("sklearn")
Run = Callable[..., Any]
MODEL = "python:nets.py:small?width=4"
WORDS = ("--data", "digits", "--batch", "64")
TRAIN = ("train", MODEL, *WORDS, "--epochs", "1", "--set", "limit=3", "--split-seed", "7")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, networks: str) -> Path:
    """A folder with a trained run t, one c that was cut from it, and one d that was cut from c."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "nets.py").write_text(networks)
        assert main([*TRAIN, "--out", "t"]) == 0
        cut = ("--runs", "0", "--calibrate", "0", "--data", "digits")
        assert main(["compress", "t", "--keep", "0.5", *cut, "--out", "c"]) == 0
        assert main(["compress", "c", "--keep", "0.5", *cut, "--out", "d"]) == 0
    return folder


@pytest.fixture
def at(home: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it as the current folder."""
    shutil.copytree(home, here / "home")
    monkeypatch.chdir(here / "home")
    return here / "home"


def report(folder: Path) -> Any:
    return json.loads((folder / "report.json").read_text())


def test_a_cut_run_says_what_it_was_made_from(home: Path) -> None:
    assert report(home / "c")["model"]["source"] == MODEL  # the trained folder's own, so that it can be opened alone
    assert json.loads((home / "c/settings.json").read_text())["weights"] == "t"
    assert report(home / "d")["model"]["source"] == "c"
    assert report(home / "c")["before"]["accuracy"] == report(home / "t")["after"]["accuracy"]
    assert report(home / "d")["before"]["accuracy"] == report(home / "c")["after"]["accuracy"]


@pytest.mark.parametrize("name", ["t", "c", "d"])
def test_every_command_takes_it(at: Path, run: Run, name: str) -> None:
    after = report(at / name)["after"]
    told = run("measure", name, "--data", "digits", "--runs", "0", "--json")
    assert told.code == 0, told.err
    assert {key: told.data[key]["value"] for key in ("macs", "params", "accuracy")} == {
        key: after[key]["value"] for key in ("macs", "params", "accuracy")
    }  # the accuracy of the very same test pictures: the split's seed is the run's, too
    assert run("load-check", name, "--json").data["equal"] is True
    traced = run("trace", name, "--json")
    assert traced.data["macs"] == after["macs"]["value"]
    assert "weights are random" not in traced.err + told.err
    timed = run("bench", name, MODEL, "--runs", "1", "--warm-up", "0", "--input", "1x1x8x8", "--json")
    assert timed.data["items"][0]["kind"] == "run" and timed.data["items"][0]["macs"] == after["macs"]["value"]
    made = run("export", name, "--to", "pt2", "--runs", "0", "--json")
    assert made.code == 0, made.err
    assert (at / name / "model.pt2").is_file() and "pt2" in report(at / name)["exports"]
    assert run("sensitivity", name, "--shares", "0.5", "--json").code == 0
    assert run("report", name).code == 0


def test_a_sweep_knows_the_weights_of_a_run(at: Path) -> None:
    (before,) = niwaki.sweep.grid({"model": "t"})
    shutil.copy(at / "c/model.safetensors", at / "t/model.safetensors")
    (after,) = niwaki.sweep.grid({"model": "t"})
    assert before.digest != after.digest


def test_a_training_goes_on_from_a_run(at: Path, run: Run) -> None:
    said = run("train", "c", *WORDS, "--epochs", "1", "--set", "limit=2", "--out", "again")
    assert said.code == 0, said.err
    assert report(at / "again")["model"]["source"] == "c"
    assert report(at / "again")["before"]["accuracy"] == report(at / "c")["after"]["accuracy"]
    assert run("load-check", "again", "--json").data["equal"] is True


def test_the_library_loads_it(at: Path, run: Run) -> None:
    made = niwaki.load("t", niwaki.models.load(MODEL, shape=(1, 8, 8)).factory)
    state = niwaki.models.read_checkpoint("t/model.safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in made.state_dict().items() if name in state)


def test_verify_by_what_the_run_says(at: Path, run: Run) -> None:
    said = run("verify", "c", "--json")
    assert said.code == 0 and said.data["passed"] and said.data["run"]["rewritten"] == 0, said.err
    assert run("verify", "t", "c", "--json").data["run"]["rewritten"] == 0  # the trained run as MODEL
    assert run("verify", "d").code == 0
    told = run("verify", "t")
    assert told.code == 2 and "a training, which cuts nothing" in told.err


GUESS = "input 1x3x224x224: a guess, since the factory gives no example (no --input)"
FLAT = """
import torch
def flat():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 1))
"""


def test_a_guessed_input_is_said_once(at: Path, run: Run) -> None:
    (at / "flat.py").write_text(FLAT)
    flat = "python:flat.py:flat"
    for words in (("trace", flat), ("measure", flat, "--runs", "0"), ("sensitivity", flat, "--shares", "0.5"),
                  ("export", flat, "--to", "pt2", "--runs", "0", "--out", "o"),
                  ("compress", flat, "--runs", "0", "--out", "f")):  # fmt: skip
        assert run(*words).err.count(GUESS) == 1, words
    timed = run("bench", flat, flat, "--runs", "1")
    assert timed.err.count("input 3x224x224 float32: a guess") == 1
    for words in (("trace", flat, "--input", "1x3x8x8"), ("measure", "f", "--runs", "0"), ("measure", "t"),
                  ("measure", MODEL, "--data", "digits", "--runs", "0"), ("verify", "f")):  # fmt: skip
        said = run(*words)
        assert said.code == 0 and "(no --input)" not in said.err, said.err
    assert "1x3x224x224: the usual one (no --input)" in run("trace", "torchvision:squeezenet1_1").err


def test_another_split_is_said(at: Path, run: Run) -> None:
    said = run("measure", "t", "--data", "digits", "--split-seed", "0", "--runs", "0", "--limit-test", "9")
    assert said.code == 0 and "--split-seed 0, the run's was 7" in said.err


def unended(folder: Path) -> None:
    """Leave what a kill leaves."""
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text(json.dumps({"arguments": ["train"], "cwd": str(folder), "threads": 1}))
    (folder / "checkpoints").mkdir()


@pytest.mark.parametrize("place", ["k", "k.partial"])
@pytest.mark.parametrize(
    "words",
    [("measure", "k"), ("export", "k", "--to", "pt2"), ("bench", "k"), ("trace", "k"), ("load-check", "k"),
     ("report", "k"), ("verify", "k"), ("verify", MODEL, "k"), ("compress", "k", "--out", "o")],
    ids=" ".join,
)  # fmt: skip
def test_a_run_that_did_not_end_is_no_model(run: Run, here: Path, place: str, words: tuple[str, ...]) -> None:
    unended(here / place)
    said = run(*words)
    assert said.code == 2 and "a run that did not end" in said.err and "niwaki resume k " in said.err, said.err


def test_an_ended_run_with_another_one_under_way(at: Path, run: Run) -> None:
    unended(at / "t.partial")
    said = run("measure", "t", "--runs", "0")
    assert said.code == 0 and "niwaki resume t" in said.err
    assert "did not end" in run("measure", "t.partial").err


WRONG = {
    "a bare name": ("resnet18", "torchvision:resnet18, timm:resnet18"),
    "misspelt": ("runs/tt", "); near: runs/t"),
    "several runs": ("runs", "runs below it: runs/t"),
    "a file": ("nets.py", "a file, neither a run's folder nor a source of models"),
    "another kind": ("nope:x", "unknown source of models 'nope:x'"),
    "nothing in it": ("empty", "a folder without a run"),
    "of transformers": ("bert", "write hf:bert"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("command", [("measure",), ("export", "--to", "pt2", "--out", "o"), ("bench",)], ids=str)
def test_wrong_places(run: Run, here: Path, command: tuple[str, ...], case: str) -> None:
    (here / "runs/t").mkdir(parents=True)
    (here / "runs/t/report.json").write_text("{}")
    (here / "empty").mkdir()
    (here / "bert").mkdir()
    (here / "bert/config.json").write_text("{}")
    name, told = WRONG[case]
    said = run(command[0], name, *command[1:])
    assert said.code == 2 and told in said.err, said.err
    assert not (here / "o").exists()


def test_wrong_combinations(at: Path, run: Run) -> None:
    assert "name the file: t/model.safetensors" in run("measure", MODEL, "--checkpoint", "t").err
    assert "the run brings its own weights" in run("measure", "t", "--checkpoint", "t/model.safetensors").err
    assert "no run's folder" in run("measure", MODEL, "--model", MODEL).err
    for words in (("compress", "c", "--out", "c", "--force"), ("train", "t", *WORDS, "--out", "t/", "--force")):
        said = run(*words)
        assert said.code == 2 and "has to stay" in said.err, said.err
    data = report(at / "c")
    (at / "c/report.json").write_text(json.dumps(data | {"model": {**data["model"], "source": "c"}}))
    said = run("measure", "c")
    assert said.code == 2 and "made from itself" in said.err
