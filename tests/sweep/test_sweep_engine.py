"""The sweep's loop with workers that do as they are told: nothing lost, nothing done twice, every end on the disk."""

import json
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from niwaki.errors import FileDamagedError, InputError, RunExistsError
from niwaki.sweep import Workers, grid, read_rows, sweep
from niwaki.sweep.attempt import MARK, Attempt, finished
from niwaki.sweep.engine import LOST, _opened, run
from niwaki.sweep.results import ATTEMPTS, RESULTS, TIMING, append, read_lines, rows_of, uncut
from niwaki.sweep.trials import Trial

TRIALS = grid({"model": "m", "method": ["taylor", "random"], "seed": [0, 1]})
Script = Callable[[Trial, int], Attempt]


def report(accuracy: float = 90.0) -> dict:
    def side(macs: float, accuracy: float) -> dict:
        return {"macs": {"value": macs, "unit": "MACs"}, "accuracy": {"value": accuracy, "unit": "%"}}

    return {
        "model": {"source": "m"}, "method": {"name": "Taylor"},
        "before": side(100.0, 95.0), "after": side(50.0, accuracy), "receipt": {"passed": True, "exact": True},
    }  # fmt: skip


class Scripted:
    """Workers that end attempts as a script says; what is done leaves a folder."""

    def __init__(self, folder: Path, script: Script) -> None:
        self.folder, self.script = folder, script
        self.queue: deque[Trial] = deque()
        self.begun: Counter[str] = Counter()

    def begin(self, trial: Trial) -> None:
        self.begun[trial.name] += 1
        self.queue.append(trial)

    def ended(self) -> tuple[Trial, Attempt]:
        trial = self.queue.popleft()
        attempt = self.script(trial, self.begun[trial.name])
        if attempt.done:
            leave(self.folder, trial)
        return trial, attempt

    @contextmanager
    def opened(self) -> Iterator["Scripted"]:
        yield self


def leave(folder: Path, trial: Trial) -> Path:
    place = folder / "trials" / trial.name
    place.mkdir(parents=True, exist_ok=True)
    (place / "report.json").write_text(json.dumps(report()))
    (place / MARK).write_text(json.dumps({"digest": trial.digest, "node": "here", "seconds": 1.5}))
    return place


def swept(folder: Path, script: Script, *, tries: int = 3) -> tuple[Scripted, dict[str, dict]]:
    workers = Scripted(folder, script)
    with _opened(folder, TRIALS, "niwaki sweep x.toml"):
        rows = rows_of(folder, TRIALS)
        run(TRIALS, folder, rows, workers.opened, tries=tries)
    return workers, {row["trial"]: row for row in read_rows(folder)}


def done(trial: Trial, number: int) -> Attempt:
    return Attempt(True, node="here", seconds=1.0)


def test_trials_of_an_earlier_file_keep_their_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two of four trials go, one is new; then all four are back."""
    _, before = swept(tmp_path, done)
    asked = (*TRIALS[:2], *grid({"model": "m", "method": "magnitude"}))

    def again(trials: Sequence[Trial]) -> list[dict]:
        with _opened(tmp_path, trials, "niwaki sweep x.toml"):
            run(trials, tmp_path, rows_of(tmp_path, trials), Scripted(tmp_path, done).opened, tries=1)
        return list(read_rows(tmp_path))

    gone = [trial.name for trial in TRIALS[2:]]
    for _ in range(2):
        rows = again(asked)
        assert [row["trial"] for row in rows] == [*(trial.name for trial in asked), *gone]
        assert [row["trial"] for row in rows if row.get("earlier")] == gone
        assert all(row["values"] == before[row["trial"]]["values"] for row in rows[3:])
    caplog.clear()
    rows = again(TRIALS)
    assert [row["trial"] for row in rows if not row.get("earlier")] == [trial.name for trial in TRIALS]
    assert [row["trial"] for row in rows if row.get("earlier")] == [asked[2].name]


def test_the_sweep_names_earlier_trials(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    swept(tmp_path, done)
    sweep(TRIALS[:3], tmp_path, timing=None)
    assert "not asked for any more" in caplog.text and TRIALS[3].name in caplog.text
    assert TRIALS[0].name not in caplog.text
    assert [bool(row.get("earlier")) for row in read_rows(tmp_path)] == [False, False, False, True]


def test_every_trial_once(tmp_path: Path) -> None:
    workers, rows = swept(tmp_path, done)
    assert list(rows) == [trial.name for trial in TRIALS]
    assert set(workers.begun.values()) == {1}
    row = rows[TRIALS[0].name]
    assert (row["status"], row["attempts"], row["error"], row["node"], row["seconds"]) == ("done", 1, "", "here", 1.5)
    assert row["values"] == {"macs_before": 100.0, "accuracy_before": 95.0, "macs": 50.0, "accuracy": 90.0}


def test_what_fails_is_begun_again_and_reported(tmp_path: Path) -> None:
    def script(trial: Trial, number: int) -> Attempt:
        if trial is TRIALS[0]:
            return Attempt(number == 3, "" if number == 3 else "killed by SIGKILL")
        if trial is TRIALS[1]:
            return Attempt(False, "CUDA error")
        if trial is TRIALS[2]:
            return Attempt(False, "no such layer", final=True)
        return done(trial, number)

    workers, rows = swept(tmp_path, script)
    assert [workers.begun[t.name] for t in TRIALS] == [3, 3, 1, 1]
    assert [rows[t.name]["status"] for t in TRIALS] == ["done", "failed", "failed", "done"]
    assert [rows[t.name]["attempts"] for t in TRIALS] == [3, 3, 1, 1]
    assert [rows[t.name]["error"] for t in TRIALS] == ["", "CUDA error", "no such layer", ""]
    assert len(read_lines(tmp_path / ATTEMPTS)) == 8


def test_lost_workers_do_not_count_as_tries_but_not_for_ever(tmp_path: Path) -> None:
    def script(trial: Trial, number: int) -> Attempt:
        gone = trial is TRIALS[1] or (trial is TRIALS[0] and number <= 5)
        return Attempt(False, "its worker went away", lost=True) if gone else done(trial, number)

    workers, rows = swept(tmp_path, script, tries=1)
    assert [workers.begun[t.name] for t in TRIALS] == [6, LOST + 1, 1, 1]
    assert [rows[t.name]["status"] for t in TRIALS] == ["done", "failed", "done", "done"]
    assert rows[TRIALS[0].name]["lost"] == 5


def test_an_interrupted_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    def stopped(trial: Trial, number: int) -> Attempt:
        if trial is TRIALS[2]:
            raise KeyboardInterrupt
        return done(trial, number)

    with pytest.raises(KeyboardInterrupt):
        swept(tmp_path, stopped)
    half = tmp_path / "trials" / ".left.half"
    half.mkdir()
    with (tmp_path / ATTEMPTS).open("a") as log:
        log.write('{"trial": "torn')  # a kill in the middle of a line
    assert [row["status"] for row in read_rows(tmp_path)] == ["done", "done", "waiting", "waiting"]
    workers, rows = swept(tmp_path, done)
    assert dict(workers.begun) == {TRIALS[2].name: 1, TRIALS[3].name: 1}
    assert {row["status"] for row in rows.values()} == {"done"}
    assert len(read_lines(tmp_path / ATTEMPTS)) == 4 and not half.exists()
    again, _ = swept(tmp_path, done)
    assert not again.begun


def test_a_trial_is_done_only_with_its_own_mark_and_a_readable_report(tmp_path: Path) -> None:
    place = leave(tmp_path, TRIALS[0])
    assert finished(place, TRIALS[0].digest) == {"digest": TRIALS[0].digest, "node": "here", "seconds": 1.5}
    assert finished(place, TRIALS[1].digest) is None
    (place / "report.json").write_text("{")
    assert finished(place, TRIALS[0].digest) is None
    (place / MARK).unlink()
    assert finished(place, TRIALS[0].digest) is None


def test_latency_is_in_the_rows_once_it_was_measured(tmp_path: Path) -> None:
    swept(tmp_path, done)
    for name, value in ((TRIALS[0].digest, 2.0), (uncut(TRIALS[0]), 4.0), (TRIALS[0].digest, 1.0)):
        append(tmp_path / TIMING, {"of": name, "how": {}, "latency": {"value": value, "unit": "ms", "spread": 0.5}})
    append(tmp_path / TIMING, {"of": TRIALS[1].digest, "how": {}, "latency": None})
    rows = rows_of(tmp_path, TRIALS)
    assert rows[TRIALS[0].digest]["values"]["latency"] == 1.0  # the newest
    assert rows[TRIALS[1].digest]["values"]["latency_before"] == 4.0  # the same uncut model
    assert "latency" not in rows[TRIALS[1].digest]["values"]


def test_an_uncut_model_on_other_inputs_is_another_one_to_time() -> None:
    small, large = grid({"model": "m", "input": ["1x3x32x32", "1x3x64x64"]})
    assert uncut(small) != uncut(large)
    assert [uncut(trial) for trial in grid({"model": "m", "keep": [0.5, 0.7]})] == ["uncut m"] * 2


def test_two_sweeps_in_one_folder_and_folders_of_others_are_refused(tmp_path: Path) -> None:
    busy = pytest.raises(RunExistsError, match="another one is at work")
    with _opened(tmp_path / "a", TRIALS, None), busy, _opened(tmp_path / "a", TRIALS, None):
        pass
    with _opened(tmp_path / "a", TRIALS, None):  # the first one is through
        pass
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "letter.txt").write_text("dear")
    with pytest.raises(RunExistsError, match="it holds no sweep"), _opened(tmp_path / "b", TRIALS, None):
        pass
    with pytest.raises(InputError, match="no trials"), _opened(tmp_path / "c", (), None):
        pass
    assert (tmp_path / "b" / "letter.txt").read_text() == "dear" and not (tmp_path / "c").exists()


ROW = {"trial": "a", "digest": "b", "status": "done", "options": {}, "values": {}}


@pytest.mark.parametrize(
    "row", [[], {}, {**ROW, "status": "gone"}, {**ROW, "values": {"macs": "x"}}, {**ROW, "trial": 1}]
)
def test_damaged_results_are_refused_by_line(tmp_path: Path, row: object) -> None:
    (tmp_path / RESULTS).write_text(json.dumps(row) + "\n")
    with pytest.raises(FileDamagedError, match="line 1"):
        read_rows(tmp_path)
    (tmp_path / RESULTS).write_text("{\n")
    with pytest.raises(FileDamagedError, match="line 1"):
        read_rows(tmp_path)


def test_no_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no readable"):
        read_rows(tmp_path)


@pytest.mark.parametrize(
    "wrong", [{"cpus": 0}, {"cpus": 1.5}, {"tries": 0}, {"gpus": -1}, {"address": ""}, {"cpus": True}]
)
def test_workers_refuse(wrong: dict) -> None:
    with pytest.raises(InputError):
        Workers(**wrong)
