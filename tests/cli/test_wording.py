"""Errors name settings: Python writes its own, the command line the option of the command at hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import niwaki
from niwaki.cli import app
from niwaki.cli.wording import writer
from niwaki.errors import InputError, Setting

Run = Callable[..., Any]
MODEL = "python:nets.py:small"
SHAPE = ("--input", "1x1x8x8")
SAID = {
    "a share above 1": (("--keep", "1.5"), "--keep 1.5; ", "write --keep 0.7; ", "write --budget at_most=12.5"),
    "all at once": (("--budget", "keep=1.5"), "keep=1.5; ", "write keep=0.7; for an amount"),
    "of what": (("--of", "joules"), "--of joules; ", "use one of them"),
    "nothing below": (("--budget", "at_most=0,of=macs"), "--budget at_most=0,of=macs", "no amount above 0"),
    "too little": (("--keep", "0.001", "--floor", "0.9"), "lower --floor", "--protect fewer, no --exact-only"),
    "one unit": (("--keep", "1"), "keep", "write --keep 1.0 for all of it"),
    "no data": (("--method", "taylor"), "Taylor without data", "do: give --data"),
    "a field": (("--set", "fold=true"), "Magnitude with --set fold=true without data", "do: give --data"),
    "another method's flag": (("--method", "pagcp", "--rule", "uniform"), "--rule uniform with --method pagcp; ",
                              "no setting rule", "leave --rule out"),
    "its bits": (("--method", "pagcp", "--bits", "4"), "--bits 4 with --method pagcp; ", "leave --bits out"),
    "no target": (("--of", "latency"), "--of latency; ", "do: give --target onnxruntime"),
}  # fmt: skip


@pytest.mark.parametrize("case", SAID)
def test_compress_speaks_of_its_options(run: Run, case: str) -> None:
    words, *said = SAID[case]
    found = run("compress", MODEL, *SHAPE, "--out", "r", *words)
    assert found.code == 2
    assert all(part in found.err for part in said), found.err
    for python in ("Budget", "exact_only", "keep=1.0", "a task"):
        assert python not in found.err


def test_json_says_the_same(run: Run) -> None:
    found = run("compress", MODEL, *SHAPE, "--out", "r", "--keep", "1.5", "--json")
    assert found.data["error"]["asked"] == "--keep 1.5" and "--keep 0.7" in found.data["error"]["do"]


def test_python_keeps_its_own_words() -> None:
    with pytest.raises(InputError) as caught:
        niwaki.Budget(keep=1.5)
    assert caught.value.asked == "Budget(keep=1.5)"
    assert caught.value.do == "to remove 30 % write keep=0.7; for an amount such as 12.5 ms write " \
                              "Budget.at_most(12.5, 'latency')"  # fmt: skip
    assert str(caught.value) == f"Budget(keep=1.5); found: {caught.value.found}; do: {caught.value.do}"


def test_a_setting_is_written_by_the_command_at_hand() -> None:
    command = typer.main.get_command(app)
    compress, trace = (writer(command, words) for words in (["--quiet", "compress", "trace"], ["trace"]))
    others = [writer(command, words) for words in ([], ["comress", "compress"], ["nothing", "trace"])]
    for setting, option, other in (
        (Setting("exact_only", True), "--exact-only", "exact_only=True"),
        (Setting("exact_only", False), "no --exact-only", "exact_only=False"),
        (Setting("protect", written="protect=[...]"), "--protect", "--protect"),
        (Setting("bits", 7), "--bits 7", "bits=7"),
        (Setting("fold", True), "--set fold=true", "fold=True"),
        (Setting("per", "macs"), "--set per=macs", "per='macs'"),
        (Setting("insist", True, "insist=True"), "insist=True", "insist=True"),
    ):
        assert (compress(setting), trace(setting)) == (option, other)
        assert all(none(setting) == str(setting) for none in others)  # what follows may be a value


def test_other_commands_speak_of_theirs(run: Run) -> None:
    said = run("sensitivity", MODEL, *SHAPE, "--shares", "1.5")
    assert said.code == 2 and "error: --shares 1.5; found: not between 0 and 1; do: give e.g. --shares 0.75" in said.err
    with pytest.raises(InputError, match=r"sensitivity\(shares=\[1.5\]\).*give e.g. \(0.75, 0.5\)"):
        niwaki.sensitivity.sensitivity(torch.nn.Linear(1, 1), torch.zeros(1, 1), shares=(1.5,))


def test_grey_pictures_for_a_model_of_coloured_ones(run: Run) -> None:
    """What is missing is channels, not a normalisation: 1x3x8x8 is taken."""
    words = (
        "measure",
        "torchvision:shufflenet_v2_x0_5?num_classes=10",
        "--data",
        "digits",
        "--runs",
        "0",
        "--limit-test",
        "2",
    )
    said = run(*words)
    assert said.code == 2 and "found: pictures of 1 channel, the model's have 3; do: give --input 1x3x8x8" in said.err
    assert run(*words, "--input", "1x3x8x8").code == 0


def test_shared_options_are_those_of_ask() -> None:
    """`ask_as_typed` hands on by name what commands declare."""
    import inspect

    from niwaki.cli.sources import SHARED, ask

    assert set(SHARED) < set(inspect.signature(ask).parameters)
    for name in ("compress", "train", "sensitivity", "measure"):
        known = {one.name for one in typer.main.get_command(app).commands[name].params}  # type: ignore[attr-defined]
        assert set(SHARED) - {"factory"} | {"model", "data"} <= known, name


@pytest.mark.parametrize(
    ("data", "found"),
    [
        ("digits", "found: pictures, as an input of 1x1x8x8 (float32), on which its forward failed: RuntimeError: "),
        ("text:words.txt?length=8", "found: a text: token numbers, as an input of 1x8 (int64), on which its forward"),
    ],
)
def test_a_model_that_does_not_take_the_data(here: Path, run: Run, data: str, found: str) -> None:
    """Both are named, before anything is begun: whatever the forward trips over."""
    (here / "coloured.py").write_text("import torch\n\ndef made():\n    return torch.nn.Conv2d(3, 4, 3)\n")
    (here / "words.txt").write_text("some words to read, " * 20)
    said = run("train", "python:coloured.py:made", "--data", data, "--out", "trained")
    assert said.code == 2 and not (here / "trained").exists()
    assert f"python:coloured.py:made on {data}" in said.err and found in said.err and "do: give" in said.err


def test_a_setting_with_an_option_of_its_own(run: Run) -> None:
    said = run("train", MODEL, "--data", "digits", "--set", "seed=3", "--out", "trained")
    assert said.code == 2 and "found: --seed as well, given or by its default; do: give --seed 3" in said.err
