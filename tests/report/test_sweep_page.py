"""A sweep of six trials known by heart, as tables and as a page."""

import io
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

import niwaki.report
from niwaki.report.sweeps import all_candidates, earlier_trials, front_table, headline, plot, read_sweep, troubles

#             method       keep  seed  MACs  accuracy  ms    how it ended
TOLD = (
    ("taylor", 0.5, 0, 50.0, 91.0, 2.0, "done"),
    ("taylor", 0.5, 1, 50.0, 93.0, 2.2, "done"),
    ("taylor", 0.3, 0, 30.0, 85.0, 1.5, "done"),
    ("random", 0.5, 0, 51.0, 90.0, 1.9, "done"),
    ("random", 0.3, 0, 31.0, 80.0, 1.6, "done"),
    ("<script>x", 0.3, 1, 0.0, 0.0, 0.0, "failed"),
)


def row(method: str, keep: float, seed: int, macs: float, accuracy: float, latency: float, status: str) -> dict:
    values = {
        "macs": macs, "macs_before": 100.0, "params": 10 * macs, "params_before": 1000.0, "accuracy": accuracy,
        "accuracy_before": 95.0, "latency": latency, "latency_spread": 0.1, "latency_before": 4.0,
    }  # fmt: skip
    done = status == "done"
    return {
        "trial": f"{method}-{keep}-{seed}", "digest": f"{method}{keep}{seed}", "status": status, "passed": done or None,
        "options": {"model": "m", "data": "digits", "method": method, "keep": keep, "seed": seed},
        "values": values if done else {}, "attempts": 1 if done else 3, "lost": 0, "seconds": 10.0, "node": "here",
        "error": "" if done else "killed by SIGKILL",
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "swept"
    place.mkdir()
    (place / "results.jsonl").write_text("".join(json.dumps(row(*one)) + "\n" for one in TOLD))
    (place / "sweep.json").write_text(json.dumps({"command": "niwaki sweep s.toml", "niwaki": "0.1.0"}))
    return place


def test_fronts_by_hand(folder: Path) -> None:
    """Means over seeds: taylor 0.5 is 50 MACs, 92 %, 2.1 ms; random 0.5 (1.9 ms, 90 %) is on the front by latency."""
    sweep = read_sweep(folder)
    assert headline(sweep) == (
        "5 of 6 trials are done, 1 failed; 4 candidates, 2 best in accuracy against MACs, 3 best in accuracy against "
        "latency."
    )
    assert front_table(sweep, "macs").rows == (
        ("1", "taylor", "0.3", "85.00 %", "30", "30.0 %", "1"),
        ("2", "taylor", "0.5", "92.00 % (91.0..93.0)", "50", "50.0 %", "2"),
    )
    assert [found[1:3] for found in front_table(sweep, "latency").rows] == [
        ("taylor", "0.3"), ("random", "0.5"), ("taylor", "0.5"),
    ]  # fmt: skip
    assert [found[-2] for found in all_candidates(sweep).rows] == ["MACs, latency", "MACs, latency", "latency", ""]
    assert troubles(sweep).rows == (("<script>x-0.3-1", "failed", "3", "killed by SIGKILL"),)
    assert troubles(sweep).note == ""


def test_plot_by_hand(folder: Path) -> None:
    drawing = re.findall(r"<svg class=\"plot\".*?</svg>", plot(read_sweep(folder), "macs"), re.DOTALL)[0]
    picture = ElementTree.fromstring(drawing)
    titles = [title.text for title in picture.iter("title")]
    assert titles == [
        "uncut: 100.0 % of MACs, accuracy 95.00 %",
        "method random, keep 0.3: 31.0 % of MACs, accuracy 80.00 %",
        "method random, keep 0.5: 51.0 % of MACs, accuracy 90.00 %",
        "method taylor, keep 0.3: 30.0 % of MACs, accuracy 85.00 %",
        "method taylor, keep 0.5: 50.0 % of MACs, accuracy 92.00 %",
    ]
    assert len([line for line in picture.iter("line") if line.get("class") == "span"]) == 1  # one has two seeds
    assert "latency, ms" in plot(read_sweep(folder), "latency")


def test_report_knows_a_sweep(folder: Path) -> None:
    assert niwaki.report.write(folder) == folder / "sweep.html"
    text = (folder / "sweep.html").read_text()
    assert text.count("<script") == 1 and "&lt;script&gt;x-0.3-1" in text
    assert not re.search(r"(https?:)?//[a-z]", text)
    console = Console(width=160, file=io.StringIO())
    console.print(niwaki.report.terminal(folder))
    assert "92.00 % (91.0..93.0)" in console.file.getvalue() and "killed by SIGKILL" in console.file.getvalue()
    data = niwaki.report.data(folder)
    assert [found["options"]["keep"] for found in data["fronts"]["macs"]] == [0.3, 0.5]
    assert len(data["trials"]) == 6


def test_without_accuracy_or_latency_the_reason_is_said(folder: Path) -> None:
    rows = [row(*one) for one in TOLD[:4]]
    for one in rows:
        one["values"] = {"macs": one["values"]["macs"], "macs_before": 100.0}
    (folder / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    text = niwaki.report.html(folder)
    assert "No front: no trial measured accuracy" in text and "No front: no latency was measured." in text


def test_fronts_stand_on_the_figure_of_the_task(folder: Path) -> None:
    rows = [row(*one) for one in TOLD]
    for one in rows:
        if one["values"]:
            one["metric"] = "AP50"
            for ending in ("", "_before"):
                one["values"][f"AP50{ending}"] = one["values"].pop(f"accuracy{ending}") / 2
    (folder / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    sweep = read_sweep(folder)
    assert "2 best in AP50 against MACs" in headline(sweep)
    assert front_table(sweep, "macs").rows[0] == ("1", "taylor", "0.3", "42.50 %", "30", "30.0 %", "1")
    assert "method taylor, keep 0.5: 50.0 % of MACs, AP50 46.00 %" in niwaki.report.html(folder)


def test_a_candidate_links_to_its_run(folder: Path) -> None:
    place = folder / "trials" / "taylor-0.3-0"
    place.mkdir(parents=True)
    (place / "report.html").write_text("x")
    assert front_table(read_sweep(folder), "macs").links == ("trials/taylor-0.3-0/report.html", None)
    assert 'href="trials/taylor-0.3-0/report.html"' in niwaki.report.html(folder)


def test_trials_of_an_earlier_file_stand_apart(folder: Path) -> None:
    better = row("taylor", 0.1, 5, 1.0, 99.0, 0.1, "done") | {"earlier": True}
    before = read_sweep(folder)
    with (folder / "results.jsonl").open("a") as file:
        file.write(json.dumps(better) + "\n")
    found = read_sweep(folder)
    assert found.rows == before.rows and found.candidates == before.candidates  # it would be on every front
    (listed,) = earlier_trials(found).rows
    assert listed[:3] == ("taylor-0.1-5", "99.00 %", "1") and "keep 0.1" in listed[3]
    text = niwaki.report.html(folder)
    assert "<h2>Asked for earlier</h2>" in text and headline(found) == headline(before)
    assert niwaki.report.data(folder)["earlier"] == [better]
    assert earlier_trials(before).rows == ()
