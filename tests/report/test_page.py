"""The page's parts: curves, runtimes, what was left out, colours that can be read, several folders."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import niwaki.report
from niwaki.errors import FileDamagedError, InputError
from niwaki.report.curves import curves_of
from niwaki.report.points import Point, runtimes
from niwaki.report.reading import read
from niwaki.report.scatter import scatter
from niwaki.report.style import DARK, LIGHT
from niwaki.report.tables import headline, promises, uncounted, widths_beside

Save = Callable[..., Path]
Made = Callable[..., dict[str, Any]]
MS = {"unit": "ms", "value": 2.0, "spread": 0.1, "definition": "median"}


@pytest.mark.parametrize(
    ("after", "said"),
    [(50.0, "smaller: 50.0 % of the MACs stay"), (134.0, "made some of Net wider: 134.0 % of the MACs; ")],
)
def test_headline_says_what_grew(save: Save, made: Made, after: float, said: str) -> None:
    data = made()
    data["model"]["class"] = "Net"
    data["before"]["macs"]["value"], data["after"]["macs"]["value"] = 100.0, after
    assert said in headline(read(save("one", data=data))[0])


def test_headline_word_by_word(save: Save, made: Made) -> None:
    def of(name: str, **changed: Any) -> str:
        return headline(read(save(name, data=made() | changed))[0])

    assert of("cut") == (
        "Magnitude made Small smaller: 50.0 % of the MACs stay; 50.0 % of the parameters stay; accuracy 93.50 → "
        "90.00 %; the judge passed the cut."
    )
    data = made(keep=1.0)
    data["receipt"]["passed"], data["after"]["macs"]["value"] = False, 1.5 * data["before"]["macs"]["value"]
    assert of("wider", **{name: data[name] for name in ("before", "after", "receipt")}) == (
        "Magnitude made some of Small wider: 150.0 % of the MACs; 100.0 % of the parameters; accuracy 93.50 → 90.00 %; "
        "the judge did NOT pass the cut."
    )
    whole = made(keep=1.0)
    assert "made Small smaller: 100.0 % of the MACs stay;" in of("whole", before=whole["before"], after=whole["after"])
    assert of("trained", method={"name": "train"}, receipt={}) == "Trained Small: accuracy 93.50 → 90.00 %."
    bare = {"before": {}, "after": {}, "receipt": {}, "stages": [], "candidates": []}
    assert of("untold", **bare, model={"source": "python:nets:small"}) == (
        "Magnitude made python:nets:small smaller: no cost was measured before and after."
    )
    assert of("nothing", **bare, method={"name": "train"}) == "Trained Small: no accuracy was measured."
    groups = made()["groups"]
    groups[0] |= {"kept": 20, "new": 4}
    assert "% of the parameters stay; 1 group grew; accuracy" in of("grown", groups=groups)
    timed = {"of": "energy", "unit": "J", "uncut": 4.0, "measured": 2.5, "rounds": []}
    assert "50.0 % of the parameters stay; 62.5 % of the energy; accuracy" in of("timed", measured=timed)


def test_training_curves(save: Save, made: Made) -> None:
    epochs = [
        {"epoch": 1, "loss": 0.5, "lr": 0.1, "steps": 9, "seconds": 2.0, "note": "x"},
        {"epoch": 2, "loss": 0.25, "lr": 0.0, "steps": 9, "seconds": 2.5, "val_accuracy": 80},
    ]
    assert curves_of(epochs) == {"loss": [(1, 0.5), (2, 0.25)], "lr": [(1, 0.1), (2, 0.0)], "val_accuracy": [(2, 80)]}
    text = niwaki.report.html(save(data=made() | {"history": {"epochs": epochs}}))
    assert "2 epochs in 4.5 s." in text
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    assert titles == ["training loss", "learning rate", "val accuracy"]
    once = niwaki.report.html(save("once", made() | {"history": {"epochs": epochs[:1]}}))
    assert "1 epoch in 2 s: training loss 0.5, learning rate 0.1." in once
    none = niwaki.report.html(save("none", made() | {"history": None}))
    assert "<h2>Training</h2>" not in none


def test_latency_by_runtime(save: Save, made: Made) -> None:
    exports = {"onnx": {"latency": MS, "pytorch_latency": MS | {"value": 3.0}, "difference": {"value": 1e-7}}}
    (run,) = read(save(data=made() | {"exports": {**exports, "openvino": {"latency": MS | {"value": 1.0}}}}))
    assert [(label, record["value"]) for label, record in runtimes(run)] == [
        ("PyTorch", 1.0), ("onnx", 2.0), ("PyTorch beside onnx", 3.0), ("openvino", 1.0),
    ]  # fmt: skip
    text = niwaki.report.html(run.folder)
    assert "<h2>Latency by runtime</h2>" in text
    assert '<rect class="after" width="66.67%"' in text  # 2 of 3 ms
    assert "<h2>Latency by runtime</h2>" not in niwaki.report.html(save("bare"))


def test_the_time_on_the_budget_s_target_stands_among_the_runtimes(save: Save, made: Made) -> None:
    data = made()
    data["after"]["runtime_latency"] = MS | {"value": 0.5, "definition": "shortest time in onnxruntime"}
    folder = save(data=data)
    settings = {"target": {"class": "Target", "runtime": "onnxruntime"}}
    (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    (run,) = read(folder)
    assert [label for label, _ in runtimes(run)] == ["PyTorch", "onnxruntime, the budget's target"]
    assert "onnxruntime, the budget&#x27;s target: 0.5" in niwaki.report.html(folder)


def test_a_training_has_its_curves_and_its_validation_figures(save: Save, made: Made) -> None:
    record = made()["after"]["accuracy"] | {"value": 87.5, "definition": "top-1 of the validation split"}
    epochs = [{"epoch": n, "loss": 2.0 / n, "lr": 0.1, "validation": 70.0 + n} for n in (1, 2, 3)]
    keys = ("model", "before", "after", "versions", "command")
    data = {key: made()[key] for key in keys} | {"method": {"name": "train"}, "history": {"epochs": epochs}}
    text = niwaki.report.html(save(data=data | {"validation": {"accuracy": record}}, plan={"cuts": []}))
    for said in ("<h2>On the validation split</h2>", "87.50\u00a0%", "top-1 of the validation split",
                 "<h2>Training</h2>", "validation accuracy over the epochs",
                 "training loss over the epochs"):  # fmt: skip
        assert said in text, said
    for gone in ("<h2>Judge</h2>", "<h2>Plan</h2>", "<h2>Accuracy and cost</h2>"):
        assert gone not in text, gone
    with pytest.raises(FileDamagedError, match="validation is a int"):
        niwaki.report.html(save("bad", data | {"validation": 3}))


def test_what_was_not_seen_or_counted_is_said(save: Save, made: Made) -> None:
    more = {
        "unknown": [{"operation": "aten.odd", "module": "body", "where": "net.py:3"}],
        "unfolded": ["stem"],
        "data_reads": [{"where": "net.py:9"}],
    }
    (run,) = read(save(data=made() | more))
    assert [row[:2] for row in uncounted(run).rows] == [
        ("unknown operation", "aten.odd (body, net.py:3)"),
        ("read out of data", "where net.py:9"),
        ("constants not folded", "stem"),
        ("not counted", "aten._trilinear"),
    ]
    clean = made()
    for side in ("before", "after"):
        clean[side]["macs"]["uncounted"] = []
    assert "Nothing: every operation has a rule" in uncounted(read(save("clean", clean))[0]).note


def test_promised_beside_measured(save: Save, made: Made) -> None:
    (run,) = read(save(data=made() | {"promised": {"macs": 1000000, "params": 1600, "latency": 0.8, "odd": 1}}))
    assert promises(run).rows == (
        ("MACs", "1,000,000", "1,000,000", "equal"),
        ("parameters", "1,600", "2,000", "+25.00 %"),
        ("latency", "0.8 ms", "1 ± 0.12 ms", "+25.00 %"),
    )


def test_rounds_of_a_budget_of_latency(save: Save, made: Made) -> None:
    rounds = [{"promised": 2.0, "measured": 2.4}, {"promised": 2.0, "measured": 2.05}, {"promised": None}]
    latency = {"limit": 2.0, "off": 0.025, "tolerance": 0.05, "met": True, "rounds": rounds}
    found = promises(read(save(data=made() | {"measured": latency}))[0])
    assert found.rows[-2:] == (
        ("latency in turns with the uncut, plan 1", "2 ms", "2.4 ms", "+20.00 %"),
        ("latency in turns with the uncut, plan 2", "2 ms", "2.05 ms", "+2.50 %"),
    )
    assert "Asked for: 2 ms of latency" in found.note and "off by +2.5 %" in found.note
    assert not promises(read(save("without", made()))[0]).note


def test_the_command_can_be_copied_and_the_groups_searched(save: Save) -> None:
    text = niwaki.report.html(save())
    code = re.findall(r'<div class="command"><code>(.*?)</code>', text)
    assert [re.sub("<.*?>", "", one) for one in code] == ["niwaki compress python:nets:small --keep 0.5"]
    assert 'data-search="groups"' in text


def test_a_path_with_a_script_in_it_does_not_run(save: Save, made: Made) -> None:
    """Escaped where it stands, and refused by the page's policy if it were not."""
    evil = "python:<script>document.title='owned'</script>.py:net"
    data = made() | {"command": f'niwaki compress {evil} --out "><img src=x onerror=alert(1)>'}
    data["model"] = {
        "source": evil,
        "class": "</title><script>alert(2)</script>",
        "fingerprint": "<svg onload=alert(3)>",
    }
    data["history"] = {"epochs": [{"epoch": 1, "</svg><script>x": 1}, {"epoch": 2, "</svg><script>x": 2}]}
    data["exports"] = {"<script>": {"latency": MS}}
    text = niwaki.report.html([save("a", data), save("b", data)]) + niwaki.report.html(save("<script>c", data))
    assert text.count("<script") == 2  # the page's own, once on each
    assert "<img" not in text and "<svg onload" not in text
    assert "unsafe-inline" not in text.split("script-src")[1].split('"')[0]


def test_several_folders_side_by_side(save: Save, made: Made, tmp_path: Path) -> None:
    first, second = save("x/one", made(keep=0.5)), save("y/two", made(method="Random", keep=0.3, accuracy=70.0))
    runs = read([first, second, first])
    assert [run.name for run in runs] == ["one", "two"]
    third = save("z/one", made(keep=0.5))
    assert [run.name for run in read([first, third])] == [str(first), str(third)]
    text = niwaki.report.html([first, second])
    assert "2 runs side by side" in text and "Random" in text
    assert widths_beside(runs).rows[0] == ("stem", "16", "8", "8")
    other = made()
    other["model"]["fingerprint"] = "beef"
    assert widths_beside(read([first, save("other", other)])).rows == ()  # layers of another model are others
    with pytest.raises(InputError, match="several folders"):
        niwaki.report.write([first, second])
    assert niwaki.report.write([first, second], tmp_path / "both.html").read_text() == text
    with pytest.raises(InputError, match="no folder"):
        read([])


def test_the_front_is_joined_and_numbered_where_there_is_room() -> None:
    points = [Point("a", "a", 50.0, 80.0), Point("a", "b", 70.0, 90.0, (85.0, 95.0)), Point("a", "c", 70.2, 90.2)]
    plot = ElementTree.fromstring(scatter(points, cost="MACs", joined=False, front=points))
    (line,) = plot.findall("polyline")
    assert line.get("class") == "front" and len(line.get("points", "").split()) == 3
    ranks = [text for text in plot.findall("text") if text.get("class") == "rank"]
    places = [(float(text.get("x", 0)), float(text.get("y", 0))) for text in ranks]
    for number, (x, y) in enumerate(places):
        assert all(abs(x - a) >= 13 or abs(y - b) >= 13 for a, b in places[:number])
    spans = [line for line in plot.iter("line") if line.get("class") == "span"]
    assert len(spans) == 1 and float(spans[0].get("y1", 0)) > float(spans[0].get("y2", 0))


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_can_be_read(theme: str) -> None:
    """WCAG 2.2, contrast: 4.5 for text, 3 for drawings."""
    colours = dict(re.findall(r"--(\w+):(#\w+)", theme))

    def luminance(code: str) -> float:
        digits = code[1:] if len(code) == 7 else "".join(2 * digit for digit in code[1:])
        parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    def contrast(one: str, other: str) -> float:
        low, high = sorted((luminance(colours[one]), luminance(colours[other])))
        return (high + 0.05) / (low + 0.05)

    for ground in ("back", "sheet"):
        assert all(contrast(name, ground) >= 4.5 for name in ("ink", "soft", "s1")), ground
        assert all(contrast(name, ground) >= 3 for name in ("leaf", *(f"s{number}" for number in range(8)))), ground
    assert contrast("leaf", "pale") >= 3  # the filled part of a bar


def test_reports_of_a_sweep_and_of_runs_as_data(save: Save) -> None:
    folder = save()
    assert (
        niwaki.report.data(folder)["runs"][0]["command"] == json.loads((folder / "report.json").read_text())["command"]
    )


def test_numbers_are_not_broken(save: Save, made: Made) -> None:
    """A hyphen of an exponent and the space of a percentage are no ends of lines."""
    page = niwaki.report.html(save("one", made()))
    assert "<p>Magnitude made Small smaller: 50.0\u00a0% of the MACs stay;" in page
    exports = {"onnx": {"file": "model.onnx", "difference": {"value": 2.1e-7}, "latency": MS, "pytorch_latency": MS}}
    page = niwaki.report.html(save("two", made() | {"exports": exports}))
    assert '<td class="number"><span class="whole">2.1e-07</span></td>' in page and ".whole{white-space:nowrap}" in page
    assert '<td class="number">2\u00a0±\u00a00.1\u00a0ms</td>' not in page  # it may break before its spread
