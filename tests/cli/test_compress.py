"""`niwaki compress` and the commands on what it leaves: end to end on the bundled digits."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from niwaki.cli import main

pytest.importorskip("sklearn")
Run = Callable[..., Any]
MODEL = "python:nets.py:small"
QUICK = ("--runs", "0", "--limit-test", "40", "--calibrate", "2")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, networks: str) -> Iterator[Path]:
    """A run with every stage, made once."""
    folder = tmp_path_factory.mktemp("compress")
    with pytest.MonkeyPatch.context() as patch:
        (folder / "nets.py").write_text(networks)
        patch.chdir(folder)
        arguments = [
            "--data",
            "digits",
            "--recover",
            "1",
            "--lr",
            "0.02",
            "--label-smoothing",
            "0.1",
            "--keep",
            "0.5",
            "--out",
            "runs/a",
            *QUICK[:4],
        ]
        assert main(["--quiet", "compress", MODEL, *arguments]) == 0
        yield folder


@pytest.fixture
def there(saved: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run`, in the folder of the saved run."""
    monkeypatch.chdir(saved)
    return run


def test_what_is_left(saved: Path) -> None:
    folder = saved / "runs" / "a"
    report = json.loads((folder / "report.json").read_text())
    names = {path.name for path in folder.iterdir()}
    assert {"plan.json", "model.safetensors", "report.json", "settings.json", "report.html"} <= names
    assert report["after"]["macs"]["value"] == report["promised"]["macs"] <= 0.5 * report["before"]["macs"]["value"]
    assert [stage["stage"] for stage in report["stages"]] == ["cut", "batch-norm", "recovery"]
    assert report["receipt"]["passed"]
    assert report["command"].startswith("niwaki --quiet compress python:nets.py:small --data digits --recover 1")
    assert [path.name for path in folder.parent.iterdir()] == ["a"]


def test_settings_say_what_was_asked(saved: Path) -> None:
    settings = json.loads((saved / "runs" / "a" / "settings.json").read_text())
    task = settings["task"]
    assert (task["splits"]["source"], task["batch"], task["augment"]) == ("digits", 128, "none")
    assert task["label_smoothing"] == 0.1 and settings["calibration"] == 16
    assert (settings["limit"], settings["source"], settings["weights"]) == (40, MODEL, "random")
    assert settings["recovery"]["lr"] == 0.02 and settings["meters"] == []


def test_load_check(there: Run) -> None:
    found = there("load-check", "runs/a", MODEL, "--json")
    assert found.code == 0
    assert (found.data["equal"], found.data["finite"]) == (True, True)


@pytest.mark.parametrize("option", [(), ("--device", "cpu")])
def test_load_check_on_another_device_compares_nothing(
    there: Run, saved: Path, tmp_path: Path, option: tuple[str, ...]
) -> None:
    import shutil

    copy = tmp_path / "elsewhere"
    shutil.copytree(saved / "runs" / "a", copy)
    report = json.loads((copy / "report.json").read_text())
    report["digest"] |= {"device": "cuda:99", "sha256": "0"}  # a device that is not here computes other bits
    (copy / "report.json").write_text(json.dumps(report))
    found = there("load-check", str(copy), MODEL, *option, "--json")
    assert (found.code, found.data["equal"], found.data["finite"]) == (0, None, True)
    assert found.data["device"] == {"saved": "cuda:99", "here": "cpu"}
    assert "not compared: saved on cuda:99, loaded on cpu" in there("load-check", str(copy), MODEL, *option).out


def test_load_check_on_the_device_asked_for(there: Run) -> None:
    found = there("load-check", "runs/a", MODEL, "--device", "cpu", "--json")
    assert (found.code, found.data["equal"]) == (0, True)
    assert found.data["device"] == {"saved": "cpu", "here": "cpu"}
    found = there("load-check", "runs/a", MODEL, "--device", "cuda:99")
    assert found.code == 2 and "--device cuda:99" in found.err


def test_load_check_sees_another_weight(there: Run, saved: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors import safe_open
    from safetensors.torch import save_file

    copy = tmp_path / "changed"
    shutil.copytree(saved / "runs" / "a", copy)
    file = copy / "model.safetensors"
    with safe_open(str(file), framework="pt") as opened:
        tensors, metadata = {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata()  # noqa: SIM118
    tensors["8.bias"][0] += 1e-3
    save_file(tensors, str(file), metadata=metadata)
    found = there("load-check", str(copy), MODEL, "--json")
    assert (found.code, found.data["equal"]) == (1, False)
    tensors["8.bias"][0] = float("nan")
    save_file(tensors, str(file), metadata=metadata)
    assert there("load-check", str(copy), MODEL).code != 0
    file.write_bytes(file.read_bytes()[:-8])
    assert there("load-check", str(copy), MODEL).code == 2


def test_load_check_refuses_another_model(there: Run) -> None:
    found = there("load-check", "runs/a", f"{MODEL}?width=12")
    assert found.code == 2
    assert "apply a plan made for Sequential" in found.err


def test_verify(there: Run) -> None:
    for place in ("runs/a", "runs/a/plan.json"):
        found = there("verify", MODEL, place, "--json")
        assert found.code == 0
        assert found.data["passed"]
        assert found.data["difference"] < 1e-9
    assert there("verify", f"{MODEL}?width=12", "runs/a").code == 2


def test_verify_says_whose_weights_it_judged(there: Run) -> None:
    trained = there("verify", MODEL, "runs/a", "--json").data["run"]
    assert 0 < trained["rewritten"] <= trained["tensors"]
    assert "not those of the run's file" in there("verify", MODEL, "runs/a").out
    assert "run" not in there("verify", MODEL, "runs/a/plan.json", "--json").data
    arguments = ("--data", "digits", *QUICK[:4], "--calibrate", "0")
    assert there("compress", MODEL, *arguments, "--out", "plain").code == 0
    plain = there("verify", MODEL, "plain", "--json").data["run"]
    assert plain == {"tensors": trained["tensors"], "rewritten": 0}


def test_measure_of_a_run(there: Run, saved: Path) -> None:
    report = json.loads((saved / "runs" / "a" / "report.json").read_text())
    data = there("measure", "runs/a", "--runs", "0", "--data", "digits", "--limit-test", "40", "--json").data
    for name in ("macs", "params", "bytes", "accuracy"):
        assert data[name]["value"] == report["after"][name]["value"]
    assert there("measure", "runs/a", "--checkpoint", "x.pt").code == 2


def test_report_of_runs(there: Run) -> None:
    found = there("report", "runs/a", "--json")
    assert found.data["runs"][0]["method"]["name"]
    assert "recovery" in there("report", "runs/a").out


def test_json_is_pure_and_complete(run: Run, here: Path) -> None:
    found = run("compress", MODEL, "--input", "1x1x8x8", "--out", "r", "--runs", "2", "--json")
    assert found.code == 0
    assert found.data["folder"] == "r"
    assert "accuracy" not in found.data["report"]["after"]
    assert "latency" in found.data["report"]["after"]
    assert "cut: " in found.err
    assert "saved: r" in found.err


def test_settings_budgets_and_shortcuts(run: Run) -> None:
    found = run(
        "compress", MODEL, "--input", "1x1x8x8", "--out", "r", "--runs", "0", "--json", "--method", "Magnitude",
        "--set", "p=1", "--rule", "uniform", "--exact-only", "--budget", "keep=0.6,of=macs",
        "--budget", "keep=0.5,of=params,multiple=2",
        "--protect", "0", "--seed", "3",
    )  # fmt: skip
    assert found.code == 0, found.err
    report = found.data["report"]
    assert (report["method"]["p"], report["method"]["rule"], report["method"]["exact_only"]) == (1, "uniform", True)
    assert [(budget["keep"], budget["of"]) for budget in report["budget"]] == [(0.6, "macs"), (0.5, "params")]
    assert report["after"]["params"]["value"] <= 0.5 * report["before"]["params"]["value"]
    kept = {group["name"]: group["kept"] for group in report["groups"]}
    assert kept["0"] == 8
    assert kept["3"] % 2 == 0


def test_a_budget_that_everything_fits_is_talk(run: Run) -> None:
    """stdout stays pure; the warning is one plain line on stderr, also when little is said."""
    said = run("--quiet", "compress", MODEL, "--input", "1x1x8x8", "--keep", "1.0", "--out", "r", "--json", *QUICK[:2])
    assert said.code == 0 and said.data["report"]["promised"]["macs"] == said.data["report"]["promised"]["macs_before"]
    (line,) = said.err.splitlines()
    assert line.startswith("warning: choose removed nothing; found: the whole model fits, macs ")


def test_folded_constants_and_weighted_ranks_from_the_command_line(run: Run, here: Path) -> None:
    found = run(
        "compress", MODEL, "--data", "digits", "--out", "r", "--json", *QUICK,
        "--set", "fold=true", "--set", "per=macs", "--set", "merge=mean", "--set", "normalise=sum",
    )  # fmt: skip
    assert found.code == 0, found.err
    report = found.data["report"]
    assert [stage["stage"] for stage in report["stages"]] == ["cut", "folded constants", "batch-norm"]
    assert [report["method"][name] for name in ("fold", "per", "merge", "normalise")] == [True, "macs", "mean", "sum"]
    assert run("load-check", "r", MODEL).code == 0
    refused = run("compress", MODEL, "--input", "1x1x8x8", "--out", "s", "--set", "fold=true")
    assert refused.code == 2 and "--set fold=true without data" in refused.err and not (here / "s").exists()


def test_same_seed_same_plan(run: Run, here: Path) -> None:
    for name in ("a", "b"):
        arguments = ("--method", "random", "--seed", "5", "--input", "1x1x8x8", "--runs", "0")
        assert run("compress", MODEL, *arguments, "--out", name).code == 0
    assert (here / "a" / "plan.json").read_text() == (here / "b" / "plan.json").read_text()


def test_export(run: Run, here: Path) -> None:
    pytest.importorskip("onnxruntime")
    found = run("compress", MODEL, "--input", "1x1x8x8", "--out", "r", "--runs", "0", "--export", "onnx", "--json")
    assert found.code == 0
    assert found.data["onnx"]["difference"]["value"] < 1e-4
    saved = json.loads((here / "r" / "report.json").read_text())
    assert saved["exports"]["onnx"] == found.data["onnx"] == found.data["report"]["exports"]["onnx"]
    assert (here / "r" / "model.onnx").is_file()


def test_export_on_whole_numbers(run: Run, here: Path) -> None:
    """Weights of 6 bits that were mixed and rounded without data go out as they are, at 8 bits and with ranges."""
    pytest.importorskip("onnxruntime")
    words = ("--data", "digits", "--out", "r", "--runs", "0", "--export", "int8", "--json", "--of", "units")
    found = run("compress", MODEL, *words, "--method", "udfc", "--keep", "0.7", "--bits", "6")
    assert found.code == 0, found
    assert (here / "r" / "model.int8.onnx").is_file()
    taken = found.data["int8"]
    assert taken["agreement"]["value"] >= 0.9 and taken["integer_layers"]["value"] >= 1
    assert taken["bytes"]["value"] < taken["float_bytes"]["value"]
    onnx = pytest.importorskip("onnx")
    arrays = map(onnx.numpy_helper.to_array, onnx.load(here / "r" / "model.int8.onnx").graph.initializer)
    codes = [array for array in arrays if array.dtype == np.int8 and array.ndim > 1]
    assert codes and max(abs(array.astype(int)).max() for array in codes) == 31  # of 6 bits
    saved = json.loads((here / "r" / "report.json").read_text())
    assert saved["exports"]["int8"] == taken


WRONG = {
    "no out": ((), "Missing option"),
    "keep": (("--out", "r", "--keep", "half"), "--keep half; found: 'half' is not a number"),
    "keep above one": (("--out", "r", "--keep", "1.5"), "keep is what stays"),
    "of": (("--out", "r", "--of", "joules"), "known: macs, params, units"),
    "budget that cannot be met": (("--out", "r", "--keep", "0.0001"), "the least that floors, multiples"),
    "both ways": (("--out", "r", "--budget", "keep=0.5", "--keep", "0.3"), "say all of it in --budget"),
    "method": (("--out", "r", "--method", "magic"), "unknown method 'magic'; found: known: group_channel_pruning,"),
    "setting": (("--out", "r", "--set", "q=1"), "unknown setting of magnitude 'q'; found: known: rule, normalise,"),
    "setting's value": (("--out", "r", "--set", "p=3"), "use p=1 or p=2"),
    "setting's type": (("--out", "r", "--set", "p=two"), "p='two'; found: known: float"),
    "setting twice": (("--out", "r", "--set", "rule=uniform", "--rule", "uniform"), "give one of them"),
    "rule": (("--out", "r", "--rule", "best"), "rule='best'; found: known: global_rank, uniform"),
    "grids": (("--out", "r", "--grids", "cells"), "known: rows, columns"),
    "protect": (("--out", "r", "--protect", "head"), "head"),
    "export": (("--out", "r", "--export", "coreml"), "unknown export target 'coreml'; found: known: onnx, openvino"),
    "recovery without data": (("--out", "r", "--recover", "1"), "--recover 1; found: no data"),
    "rate without recovery": (("--out", "r", "--lr", "1"), "give --recover EPOCHS"),
    "taylor without data": (("--out", "r", "--method", "taylor"), "its score needs gradients"),
    "limit without data": (("--out", "r", "--limit-test", "3"), "--limit-test 3; found: no data"),
    "normalisation without data": (("--out", "r", "--normalisation", "none"), "no data to normalise"),
    "augment": (
        ("--out", "r", "--data", "digits", "--recover", "1", "--augment", "swirl"), "unknown augmentation 'swirl'"
    ),
    "augment without data": (("--out", "r", "--augment", "flip_crop"), "--augment flip_crop; found: no data"),
    "augment without recovery": (
        ("--out", "r", "--data", "digits", "--augment", "flip_crop"), "--augment flip_crop; found: no recovery"
    ),
    "batch without data": (("--out", "r", "--batch", "64"), "--batch 64; found: no data"),
    "calibrate without data": (("--out", "r", "--calibrate", "4"), "--calibrate 4; found: no data"),
    "smoothing without data": (("--out", "r", "--label-smoothing", "0.1"), "--label-smoothing 0.1; found: no data"),
    "smoothing without recovery": (
        ("--out", "r", "--data", "digits", "--label-smoothing", "0.1"), "found: no recovery to set it for"
    ),
    "smoothing": (
        ("--out", "r", "--data", "digits", "--recover", "1", "--label-smoothing", "1"), "give a share in [0, 1)"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "said"), WRONG.values(), ids=WRONG)
def test_wrong_input_writes_nothing(here: Path, run: Run, arguments: tuple[str, ...], said: str) -> None:
    shape = () if "--data" in arguments else ("--input", "1x1x8x8")
    found = run("compress", MODEL, *shape, "--runs", "0", *arguments)
    assert (found.code, found.out) == (2, "")
    assert said in found.err
    assert sorted(path.name for path in here.iterdir() if path.name != "__pycache__") == ["nets.py"]


def test_an_existing_run_is_kept(run: Run, here: Path) -> None:
    """Refused before any work; with --force replaced, but only by a run that succeeded, and only if it is a run."""
    arguments = ("compress", MODEL, "--input", "1x1x8x8", "--runs", "0", "--out", "r")
    (here / "r").mkdir()
    (here / "r" / "thesis.txt").write_text("years of work")
    assert "it exists" in run(*arguments).err
    found = run(*arguments, "--force")
    assert (found.code, (here / "r" / "thesis.txt").read_text()) == (2, "years of work")
    assert "it holds no run" in found.err
    (here / "r" / "thesis.txt").unlink()
    assert run(*arguments, "--force").code == 0
    first = (here / "r" / "report.json").read_text()
    found = run("compress", "python:no.py:such", "--out", "r")  # the model is not even looked at
    assert (found.code, "write a run to r; found: it exists" in found.err) == (2, True)
    assert run(*arguments, "--force", "--keep", "0.00001").code == 2
    assert (here / "r" / "report.json").read_text() == first
    assert run(*arguments, "--force", "--keep", "0.7").code == 0
    assert (here / "r" / "report.json").read_text() != first
    assert sorted(path.name for path in here.iterdir() if path.name != "__pycache__") == ["nets.py", "r"]


def test_weights_with_nan_are_refused(run: Run, here: Path) -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("nets", here / "nets.py")
    assert spec is not None and spec.loader is not None
    nets = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nets)
    state = nets.small().state_dict()
    state["3.weight"][0, 0, 0, 0] = float("nan")
    torch.save(state, here / "bad.pt")
    found = run("compress", MODEL, "--checkpoint", "bad.pt", "--input", "1x1x8x8", "--out", "r")
    assert found.code == 2
    assert "3.weight" in found.err
    assert not (here / "r").exists()


@pytest.mark.parametrize(
    "place", ["nets.py/run", "nets.py/deeper/run", "/proc/niwaki/run", "x" * 300, "new/" + "x" * 300]
)
@pytest.mark.parametrize("force", [(), ("--force",)])
def test_a_place_where_no_folder_can_be_made(run: Run, here: Path, place: str, force: tuple[str, ...]) -> None:
    """Said at once: the model, which does not exist, is not even looked at."""
    if place.startswith("/proc") and not Path("/proc").is_dir():
        pytest.skip("no /proc here")
    before = sorted(here.iterdir())
    found = run("compress", "python:no.py:such", "--out", place, *force)
    assert found.code == 2 and f"error: write a run to {place}; found: " in found.err.replace("\n", "")
    assert "do: choose a place where folders can be made" in found.err.replace("\n", " ")
    assert sorted(here.iterdir()) == before


def test_a_place_without_permission(run: Run, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, dir: Path, **__: object) -> str:
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    found = run("compress", "python:no.py:such", "--out", "a/b/run")
    assert found.code == 2 and f"found: Permission denied; where: {here}" in found.err


def test_a_good_place_is_left_as_it_was(run: Run, here: Path) -> None:
    before = sorted(here.iterdir())
    assert "no such file" in run("compress", "python:no.py:such", "--out", "a/b/run").err
    assert sorted(here.iterdir()) == before


def test_a_run_is_measured_on_pictures_as_it_saw_them(run: Run, here: Path) -> None:
    """Not the source's own normalisation but the run's, unless another is asked for."""
    data = ("--data", "digits", "--limit-test", "200")
    made = run("compress", MODEL, *data, "--normalisation", "none", "--runs", "0", "--out", "r", "--json")
    again = run("measure", "r", *data, "--runs", "0", "--json").data
    assert again["accuracy"]["value"] == made.data["report"]["after"]["accuracy"]["value"]
    seen = made.data["report"]["splits"]["normalisation"]
    assert seen == {"mean": [0.0], "std": [1.0]}


def test_a_model_that_the_input_does_not_fit_is_the_users_mistake(run: Run) -> None:
    said = run("measure", MODEL, "--input", "1x3x8x8", "--runs", "0")
    assert said.code == 2 and "its forward failed" in said.err
