"""Law: what is saved loads to the same bits, in this process and in a fresh one, without pickle."""

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import niwaki
from laws.common import method_blocks, outputs, same_bits, tensors_of, trace
from zoo import ZOO, Case, named

TESTS = Path(__file__).parents[1]


def compressed(case: Case) -> Any:
    """An outcome of the first method that runs on weights alone, at the smallest share this network allows."""
    model, example, _ = trace(case)
    for method in method_blocks():
        for keep in (0.6, 0.8, 0.95, 1.0):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter(
                        "ignore", niwaki.errors.NothingChangedWarning
                    )  # what can't shrink is saved too
                    return niwaki.compress(
                        model, example, method=method, budget=niwaki.Budget(keep=keep, of="params"), seed=0
                    )
            except niwaki.errors.BudgetError:
                continue
    raise AssertionError("no method could compress this network")


def law(case: Case, folder: Path) -> Any:
    return saved_and_loaded(case, compressed(case), folder)


def saved_and_loaded(case: Case, outcome: Any, folder: Path) -> Any:
    outcome.save(folder)
    assert {"plan.json", "model.safetensors", "report.json", "settings.json"} <= {p.name for p in folder.iterdir()}
    for path in folder.glob("*.json"):
        json.loads(path.read_text())
    loaded = niwaki.load(folder, case.make)
    example = case.example()
    pairs = zip(outputs(outcome.model, example), outputs(loaded, example), strict=True)
    assert all(same_bits(a, b) for a, b in pairs), "outputs differ after loading"
    live = tensors_of(outcome.model)
    again = tensors_of(loaded)
    assert set(live) == set(again)
    saved = set(outcome.model.state_dict())
    assert all(same_bits(live[name], again[name]) for name in live if name in saved)
    ties = {(a, b) for a in live for b in live if a < b and live[a] is live[b]}
    assert ties == {(a, b) for a in again for b in again if a < b and again[a] is again[b]}, "shared tensors came apart"
    return outcome


@pytest.mark.parametrize("case", [case for case in ZOO if "rigid" not in case.facts], ids=str)
def test_save_load(case: Case, tmp_path: Path) -> None:
    law(case, tmp_path / "run")


def test_what_is_rounded_is_saved_and_loaded(tmp_path: Path) -> None:
    """Packed codes, over every network that has channels others can stand in for."""
    rounded = 0
    for number, case in enumerate(case for case in ZOO if "rigid" not in case.facts):
        model, example, _ = trace(case)
        for bits in (3, 8):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", niwaki.errors.NothingChangedWarning)
                    outcome = niwaki.compress(
                        model,
                        example,
                        method=niwaki.methods.UDFC(bits=bits, symmetric=bits == 8),
                        budget=niwaki.Budget(keep=0.8, of="units"),
                    )
            except (niwaki.errors.InputError, niwaki.errors.BudgetError):
                continue
            saved_and_loaded(case, outcome, tmp_path / f"{number}-{bits}")
            rounded += bool(outcome.quantised)
    assert rounded >= 40


FRESH = """
import sys
sys.path.insert(0, {tests!r})
import torch
from laws.common import outputs
from safetensors.torch import save_file
from zoo import named
import niwaki
torch.set_num_threads(1)
case = named({name!r})
model = niwaki.load({folder!r}, case.make)
save_file({{str(i): t.contiguous() for i, t in enumerate(outputs(model, case.example()))}}, {result!r})
"""


@pytest.mark.parametrize("name", ["residual_add", "gpt", "option_a"])
def test_a_fresh_process_agrees(name: str, tmp_path: Path) -> None:
    case = named(name)
    outcome = law(case, tmp_path / "run")
    result = tmp_path / "outputs.safetensors"
    code = FRESH.format(tests=str(TESTS), name=name, folder=str(tmp_path / "run"), result=str(result))
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)
    found = load_file(result)
    for i, tensor in enumerate(outputs(outcome.model, case.example())):
        assert same_bits(found[str(i)], tensor), "another process computes something else"


def test_another_factory_is_refused(tmp_path: Path) -> None:
    law(named("chain"), tmp_path / "run")
    with pytest.raises(niwaki.errors.PlanMismatchError):
        niwaki.load(tmp_path / "run", named("residual_add").make)


@pytest.mark.parametrize("name", ["plan.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "changed"])
def test_damaged_folders_are_refused(name: str, damage: str, tmp_path: Path) -> None:
    law(named("chain"), tmp_path / "run")
    path = tmp_path / "run" / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif name.endswith("json"):
        data = json.loads(content)
        data["cuts"] = data["cuts"][1:]
        path.write_text(json.dumps(data))
    else:
        tensors = load_file(path)
        first = next(name for name, tensor in tensors.items() if tensor.dim())
        tensors[first] = torch.cat([tensors[first], tensors[first]])
        save_file(tensors, path)
    with pytest.raises(niwaki.errors.InputError):
        niwaki.load(tmp_path / "run", named("chain").make)


def test_an_existing_run_is_never_overwritten(tmp_path: Path) -> None:
    outcome = law(named("chain"), tmp_path / "run")
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    with pytest.raises(niwaki.errors.RunExistsError):
        outcome.save(tmp_path / "run")
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    outcome.save(tmp_path / "run", force=True)
