"""What can't be whatever the model is, is refused before one is built or data are read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import niwaki.data
import niwaki.models

Run = Callable[..., Any]
LEARN = ("--data", "digits", "--recover", "1")
PRECROP = ("--method", "precropping")
COMPRESS = {
    "no target": (("--of", "latency"), "no target to measure on"),
    "runtime": (("--target", "abacus"), "unknown runtime 'abacus'"),
    "a table without a target": (("--table", "t.json"), "no target to set it for"),
    "a table that is none": (("--target", "pytorch", "--table", "nets.py"), "read a latency table"),
    "a table nowhere": (("--target", "pytorch", "--table", "nets.py/t.json"), "write nets.py/t.json"),
    "gradients": (("--method", "taylor"), "Taylor without data"),
    "constants": (("--set", "fold=true"), "--set fold=true without data"),
    "a score's setting": (("--set", "p=-1"), "Magnitude(p=-1)"),
    "udfc trained": (("--method", "udfc", *LEARN), "UDFC with a recovery"),
    "udfc calibrated": (("--method", "udfc", "--data", "digits", "--calibrate", "4"), "UDFC with --calibrate 4"),
    "cropped, calibrated": ((*PRECROP, "--data", "digits", "--calibrate", "4"), "PreCropping with --calibrate 4"),
    "cropped, of memory": ((*PRECROP, "--of", "memory"), "PreCropping by memory"),
    "cropped by data": ((*PRECROP, "--set", "densities=snip"), "PreCropping(densities='snip') without data"),
    "cropped, taught": ((*PRECROP, *LEARN, "--distill", "logits"), "PreCropping with a teacher"),
    "growth by time": ((*PRECROP, "--set", "cap=4", "--of", "latency", "--target", "pytorch"), "growth by latency"),
    "augmentation": ((*LEARN, "--augment", "nope"), "unknown augmentation 'nope'"),
    "smoothing": ((*LEARN, "--label-smoothing", "2"), "--label-smoothing 2.0; do: give a share in [0, 1)"),
    "smoothed text": (("--data", "text:nets.py", "--recover", "1", "--label-smoothing", "0.1"), "a text as data"),
    "normalisation": (("--data", "digits", "--normalisation", "nope"), "unknown normalisation 'nope'"),
    "kind of data": (("--data", "nope:x"), "unknown kind of data 'nope'"),
    "place of data": (("--data", "imagefolder:nothere"), "no such file or folder"),
    "a text nowhere": (("--data", "text:nothere"), "text nothere; found: no such file"),
    "oblong": (("--data", "digits", "--input", "1x1x8x4"), "an input of 1x1x8x4"),
    "backend": ((*LEARN, "--recovery-set", "speed.compile=nope"), "unknown backend of torch.compile 'nope'"),
    "a seed": (("--seed", "99999999999999999999"), "'--seed': Input should be less than or equal to"),
    "threads": (("--threads", "100000"), "'--threads': Input should be less than or equal to"),
}  # fmt: skip
OTHERS = {
    "train, augmentation": ("train {} --data digits --augment nope --out r", "unknown augmentation 'nope'"),
    "train, data": ("train {} --data nope --out r", "unknown kind of data"),
    "train, backend": ("train {} --data digits --set speed.compile=nope --out r", "unknown backend"),
    "train, no best": (
        "train {} --data digits --set validation=null --keep-best 3 --out r", "--keep-best 3; found: no validation"
    ),
    "bench, a file": ("bench {} nothere.onnx", "bench nothere.onnx; found: no such file"),
    "bench, a source": ("bench {} nope:x", "unknown source of models 'nope:x'"),
    "bench, threads": ("bench {} --threads 100000", "'--threads': Input should be less than or equal to"),
    "export, batch": ("export {} --to onnx int8 --batch 3 --out r", "--batch 3 for int8; found: its batch is dynamic"),
    "export, nowhere": ("export {} --to onnx --out nets.py/r", "write nets.py/r"),
    "sensitivity, shares": ("sensitivity {} --shares 2.5", "--shares 2.5; found: not between 0 and 1"),
    "sensitivity, score": ("sensitivity {} --score taylor", "--score taylor; found: its score needs gradients"),
    "sensitivity, plot": ("sensitivity {} --plot nets.py/x.svg", "write nets.py/x.svg"),
    "sensitivity, file": ("sensitivity {} --file nets.py/x.jsonl", "write nets.py/x.jsonl"),
    "sensitivity, batch": ("sensitivity {} --batch 4", "--batch 4; found: no data to judge on"),
    "trace, picture": ("trace {} --picture nets.py/x.svg", "write nets.py/x.svg"),
    "measure, data": ("measure {} --input 1x1x8x8 --data nope", "unknown kind of data"),
}  # fmt: skip


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is built, and no data are read."""

    def read(*arguments: Any, **settings: Any) -> Any:
        pytest.fail("something was read first")

    monkeypatch.setattr(niwaki.models, "_seeded", read)
    for reader in niwaki.data.READERS.values():
        monkeypatch.setattr(reader, "read", read)
    monkeypatch.setattr(niwaki.data.Text, "read", read)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("case", COMPRESS)
def test_by_compress(run: Run, here: Path, case: str) -> None:
    words, said = COMPRESS[case]
    shape = () if "--input" in words or "text" in case else ("--input", "1x1x8x8")
    found = run("compress", "python:nets.py:small", *shape, "--out", "r", *words)
    assert found.code == 2 and said in found.err, found.err
    assert [path.name for path in here.iterdir()] == ["nets.py"]


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("case", OTHERS)
def test_by_others(run: Run, here: Path, case: str) -> None:
    line, said = OTHERS[case]
    found = run(*line.format("python:nets.py:small").split())
    assert found.code == 2 and said in found.err, found.err
    assert [path.name for path in here.iterdir()] == ["nets.py"]


@pytest.mark.usefixtures("unread")
def test_a_checkpoint_that_is_not_there(run: Run) -> None:
    found = run("compress", "python:nets.py:small", "--checkpoint", "nothere.pt", "--out", "r")
    assert found.code == 2 and "read a checkpoint; found: no such file; where: nothere.pt" in found.err


def test_calibration_for_the_ranges_of_int8_alone(run: Run) -> None:
    """UDFC does nothing with these batches, the export does."""
    words = ("--method", "udfc", "--data", "digits", "--calibrate", "1", "--export", "int8", "--runs", "0")
    found = run("compress", "python:nets.py:small", "--out", "r", "--limit-test", "8", *words)
    assert found.code == 0 and "UDFC with --calibrate" not in found.err, found.err


@pytest.mark.parametrize(("keep", "says"), [("0.001", True), ("0.02", False)])
def test_a_thousandth_is_asked_about(run: Run, keep: str, says: bool) -> None:
    found = run("compress", "python:nets.py:small", "--input", "1x1x8x8", "--out", "r", "--keep", keep, "--runs", "0")
    assert ("keep 0.001 is what stays: 0.1 % of the macs" in found.err) == says
    assert found.code == (2 if says else 0)


def test_a_tap_that_is_not_there_is_refused_before_anything_is_measured(run: Run) -> None:
    words = (*LEARN, "--distill", "channel_wise?taps=nope", "--limit-test", "8")
    found = run("compress", "python:nets.py:small", "--out", "r", *words)
    assert found.code == 2 and "unknown module to tap 'nope'" in found.err and "measure" not in found.err, found.err
