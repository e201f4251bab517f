"""`niwaki sweep`: what the file may say, and one small sweep on Ray, twice."""

import importlib.util
import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

import niwaki
from niwaki.cli.sweep_file import ELSEWHERE, command, known_options, read
from niwaki.sweep import Timing, Trial, Workers
from niwaki.sweep.attempt import Attempt, attempt
from niwaki.sweep.trials import REPEATED

Run = Callable[..., Any]
GOOD = 'model = "python:nets.py:small"\n'


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (GOOD + "kep = 0.5", ["s.toml: unknown key kep", "known: model, checkpoint", "keep"]),
        (GOOD + "[sweep]\ncpu = 1", ["s.toml: unknown key [sweep] cpu", "known: cpus, gpus, tries"]),
        (GOOD + "[settings.magnitude]\nq = 1", ["unknown key [settings.magnitude] q", "known: rule"]),
        (GOOD + "[settings.nothing]\nq = 1", ["unknown method 'nothing'"]),
        (GOOD + "[settings]\np = 1", ["settings.p", "[settings.taylor]"]),
        (GOOD + 'out = "x"', ["s.toml: out", "say --out to `niwaki sweep`"]),
        (GOOD + "threads = 2", ["s.toml: threads", "say cpus under [sweep]"]),
        (GOOD + "[keep]\na = 1", ["s.toml: keep", "a table"]),
        (GOOD + "keep = ", ["sweep s.toml", "no TOML"]),
        ("keep = 0.5", ["no model", "s.toml"]),
        (GOOD + 'recover = "some"', ["Invalid value for '--recover'", "s.toml"]),
        (GOOD + 'method = ["magnitude", "tailor"]', ["unknown method 'tailor'", "s.toml"]),
        (GOOD + 'keep = ["half"]', ["--keep half", "s.toml"]),
        (GOOD + "keep = 1.5", ["1.5", "s.toml"]),
        (GOOD + '[settings.magnitude]\np = "x"', ["p='x'", "s.toml"]),
        (GOOD + "[sweep]\ncpus = 0", ["cpus=0", "s.toml"]),
        (GOOD + '[sweep]\ntries = "3"', ["[sweep] tries = '3'", "not a number"]),
        (GOOD + 'checkpoint = "w.pt"', ["checkpoint w.pt", "no such file", "s.toml"]),
    ],
)
def test_a_wrong_file_is_refused_by_name_and_key(run: Run, here: Path, text: str, found: list[str]) -> None:
    (here / "s.toml").write_text(text)
    said = run("sweep", "s.toml", "--out", "runs/s")
    assert said.code == 2 and said.out == ""
    for words in found:
        assert words in said.err
    assert not (here / "runs").exists()


def test_the_example_is_a_sweep() -> None:
    path = Path(__file__).parents[2] / "examples" / "sweep.toml"
    asked = read(path, address="local")
    assert len(asked.trials) == (2 + 1 + 1) * 3 * 2 and asked.workers.cpus == 1 and asked.timing == Timing(30)


def test_no_file_is_refused(run: Run) -> None:
    said = run("sweep", "nowhere.toml", "--json")
    assert said.code == 2 and said.data["error"]["found"] == "No such file or directory"


def test_the_options_are_those_of_compress() -> None:
    """No second list: what compress has, a sweep may set, or says itself."""
    flags = {max(parameter.opts, key=len).lstrip("-").replace("-", "_"): parameter for parameter in command().params}
    assert {"model", "keep", "exact_only", "input", "recover"} <= set(known_options())
    assert set(ELSEWHERE) <= set(flags)
    several = {name for name, parameter in flags.items() if getattr(parameter, "multiple", False)}
    assert several == {*REPEATED, "set"}


class Here:
    """Attempts one after another in the order they were begun, without Ray."""

    def __init__(self, workers: Workers, common: dict[str, Any], places: dict[str, tuple[str, str]]) -> None:
        self.common, self.places, self.queue = common, places, deque[Trial]()

    def __enter__(self) -> "Here":
        return self

    def __exit__(self, *error: object) -> None:
        assert not self.queue or error[0] is not None

    def begin(self, trial: Trial) -> None:
        self.queue.append(trial)

    def ended(self) -> tuple[Trial, Attempt]:
        trial = self.queue.popleft()
        folder, log = self.places[trial.digest]
        return trial, Attempt(**attempt(trial.arguments, folder, trial.digest, log=log, **self.common))


def test_a_trial_that_fails_is_reported_and_stops_nothing(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("niwaki.sweep.engine.RayPool", Here)
    (here / "s.toml").write_text(
        'model = "python:nets.py:with_example"\nprotect = [["nothing"], ["3"]]\n[sweep]\nlatency_runs = 0\n'
    )
    said = run("sweep", "s.toml", "--json")
    assert said.code == 1
    assert [(row["status"], row["attempts"]) for row in said.data["trials"]] == [("failed", 1), ("done", 1)]
    assert "'nothing'" in said.data["trials"][0]["error"]
    assert "FAILED" in said.err and said.data["page"] == "runs/s/sweep.html"
    page = (here / "runs" / "s" / "sweep.html").read_text()
    assert "Failed, waiting, or begun more than once" in page and "No front: no latency was measured." in page
    shown = run("report", "runs/s", "--no-page")
    assert shown.code == 0 and "1 of 2 trials are done, 1 failed" in shown.out


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_a_sweep_on_ray_goes_on_and_does_nothing_twice(run: Run, here: Path) -> None:
    """Two trials are done, one is refused by its input; latency comes afterwards; the second call only reads."""
    (here / "s.toml").write_text(
        'model = "python:nets.py:with_example"\nkeep = [0.5, 0.7]\n[sweep]\nlatency_runs = 3\ntries = 2\n'
    )
    source = str(Path(niwaki.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}

    words = ["sweep", "s.toml", "--out", "runs/s", "--json"]
    python = [sys.executable, "-m", "niwaki"]  # Ray is left out of this process
    ended = subprocess.run([*python, *words], capture_output=True, text=True, env=environment, timeout=500, check=False)
    assert ended.returncode == 0, ended.stderr
    found, err = json.loads(ended.stdout), ended.stderr
    assert [row["status"] for row in found["trials"]] == ["done", "done"]
    assert [row["attempts"] for row in found["trials"]] == [1, 1]
    values = found["trials"][0]["values"]
    assert values["macs"] <= 0.5 * values["macs_before"] and values["latency"] > 0 and values["latency_before"] > 0
    assert "2 trials\n" in err and "[trials 2/2]" in err and "[latency 2/2]" in err
    names = sorted(path.name for path in (here / "runs" / "s").iterdir())
    assert names == [
        ".lock", "attempts.jsonl", "logs", "results.jsonl", "results.parquet", "sweep.html", "sweep.json",
        "timing.jsonl", "trials",
    ]  # fmt: skip
    rows = [json.loads(line) for line in (here / "runs" / "s" / "results.jsonl").read_text().splitlines()]
    columns = pyarrow.parquet.read_table(here / "runs" / "s" / "results.parquet").to_pydict()
    assert columns["trial"] == [row["trial"] for row in rows]
    assert columns["value_macs"] == [row["values"]["macs"] for row in rows]
    assert rows == found["trials"]
    for row in rows:
        report = json.loads((here / "runs" / "s" / "trials" / row["trial"] / "report.json").read_text())
        assert report["command"].startswith("niwaki compress python:nets.py:with_example --keep=")
        assert report["receipt"]["passed"]
    before = {path: path.stat().st_mtime_ns for path in (here / "runs" / "s" / "trials").rglob("*")}
    again = run(*words)
    assert "2 trials, 2 of them done already" in again.err
    assert again.code == 0 and again.data["trials"] == found["trials"]
    assert {path: path.stat().st_mtime_ns for path in (here / "runs" / "s" / "trials").rglob("*")} == before
