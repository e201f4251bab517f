"""One attempt: a process that says why it failed, and that nobody outlives."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from niwaki.sweep import attempt as module
from niwaki.sweep.attempt import MARK, attempt
from niwaki.sweep.pool import LOCAL, RayPool, Workers


@pytest.fixture
def place(tmp_path: Path) -> dict:
    (tmp_path / "sweep.json").write_text("{}")
    return {
        "folder": str(tmp_path / "trials" / "a"), "digest": "d", "threads": 1, "working": str(tmp_path),
        "log": str(tmp_path / "a.log"), "sign": str(tmp_path / "sweep.json"),
    }  # fmt: skip


def test_wrong_input_is_final_and_in_the_runs_own_words(place: dict, tmp_path: Path) -> None:
    ended = attempt(("compress", "torchvision:resnet18", "--method=nothing"), **place)
    assert not ended["done"] and ended["final"] and not ended["lost"]
    assert ended["error"].startswith("unknown method 'nothing'; found: known: group_channel_pruning, magnitude")
    assert not (tmp_path / "trials").exists()


@pytest.mark.parametrize(
    ("code", "out", "talk", "said", "final"),
    [
        (-9, "", "", "killed by SIGKILL: the machine may have run out of memory", False),
        (-11, "", "", "killed by SIGSEGV", False),
        (1, '{"error": {"asked": "a", "found": "b", "where": "", "do": "c"}}', "", "a; found: b; do: c", False),
        (2, '{"error": {"asked": "a", "found": "", "where": "", "do": ""}}', "", "a", True),
        (3, "no json", "one\ntwo\n", "exit code 3: one / two", False),
    ],
)
def test_ends(
    place: dict, monkeypatch: pytest.MonkeyPatch, code: int, out: str, talk: str, said: str, final: bool
) -> None:
    monkeypatch.setattr(module, "call", lambda words, **how: (code, out, talk))
    ended = attempt(("compress", "m"), **place)
    assert (ended["done"], ended["error"], ended["final"]) == (False, said, final)


def test_a_done_trial_is_marked_and_an_unmarked_folder_is_made_anew(
    place: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = []

    def call(words: list[str], **how: object) -> tuple[int, str, str]:
        heard.append(words)
        folder = Path(place["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text("{}")
        return 0, "", ""

    monkeypatch.setattr(module, "call", call)
    Path(place["folder"]).mkdir(parents=True)  # cut short before its mark
    assert attempt(("compress", "m"), **place)["done"]
    assert heard == [["compress", "m", "--threads=1", "--runs=0", f"--out={place['folder']}", "--json", "--force"]]
    assert (Path(place["folder"]) / MARK).is_file()
    assert attempt(("compress", "m"), **place)["done"]
    assert len(heard) == 1  # found done


def test_an_attempt_cut_short_in_its_recovery_goes_on_if_it_was_the_same(
    place: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = []

    def call(words: list[str], **how: object) -> tuple[int, str, str]:
        heard.append(words)
        return 1, "", "no"

    monkeypatch.setattr(module, "call", call)
    attempt(("compress", "m"), **place)
    partial = Path(place["folder"] + ".partial")
    partial.mkdir(parents=True)
    (partial / "settings.json").write_text(json.dumps({"arguments": [*heard[0], "--force"]}))
    attempt(("compress", "m"), **place)
    attempt(("compress", "other"), **place)
    (partial / "settings.json").write_text("{")
    attempt(("compress", "m"), **place)
    assert [words[0] for words in heard] == ["compress", "resume", "compress", "compress"]
    assert heard[1] == ["resume", place["folder"], "--json"] and heard[2][-1] == heard[3][-1] == "--force"


def test_a_machine_that_does_not_see_the_folder_says_so(place: dict) -> None:
    ended = attempt(("compress", "m"), **{**place, "sign": "/nowhere/sweep.json"})
    assert not ended["done"] and ended["final"] and "a folder that all machines share" in ended["error"]


def test_a_run_ends_with_the_process_that_started_it() -> None:
    """The middle one is killed; the watched one must notice."""
    watched = (
        "import os, sys, threading, time; from niwaki.sweep.watched import watch;"
        "threading.Thread(target=watch, args=(int(sys.argv[1]), 0.05), daemon=True).start(); time.sleep(60)"
    )
    middle = (
        "import os, subprocess, sys, time;"
        f"p = subprocess.Popen([sys.executable, '-c', {watched!r}, str(os.getpid())]); print(p.pid, flush=True);"
        "time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", middle], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    assert alive(child)
    process.kill()
    process.wait()
    process.stdout.close()
    until = time.monotonic() + 30
    while alive(child) and time.monotonic() < until:
        time.sleep(0.05)
    gone = not alive(child)
    if not gone:
        os.kill(child, signal.SIGKILL)
    assert gone


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # nobody may be there to reap it


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from niwaki.errors import MissingExtraError

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"niwaki\[sweep\]"), RayPool(Workers(LOCAL), {}, {}):
        pass
