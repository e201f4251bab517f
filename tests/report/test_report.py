"""The report says what the run's files say, once, readably, and loads nothing from anywhere."""

import base64
import hashlib
import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

import niwaki.report
from niwaki.errors import FileDamagedError, InputError
from niwaki.report.numbers import budget, change, short
from niwaki.report.points import Point, layer_widths, points
from niwaki.report.reading import read
from niwaki.report.scatter import scatter, ticks
from niwaki.report.tables import exports_table

Save = Callable[..., Path]
Made = Callable[..., dict[str, Any]]
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Checker(HTMLParser):
    """Every tag is closed in order; collects tags, attributes and visible text."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.values: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.values += [value or "" for _, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data.replace("\u00a0", " ") if not {"style", "script"} & set(self.open) else ""


def parsed(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.open == []
    return checker


def printed(folder: Path) -> str:
    console = Console(width=140, file=io.StringIO())
    console.print(niwaki.report.terminal(folder))
    return console.file.getvalue()


@pytest.mark.parametrize("draw", [lambda f: parsed(niwaki.report.html(f)).text, printed], ids=["html", "terminal"])
def test_says_what_the_files_say(save: Save, draw: Callable[[Path], str]) -> None:
    text = draw(save())
    for said in (
        "50.0 % of the MACs stay", "accuracy 93.50 → 90.00 %", "2 M", "1 M", "× 0.500", "-3.50 points",
        "1 ± 0.12 ms", "batch-norm", "41.25 %", "keep 0.7", "fixed: output of the model", "inexact: layer norm",
        "3.5e-15", "stem: layer norm over the channels", "physical", "aten._trilinear", "definition of macs",
        "50 % of MACs", "python:nets:small", "p=2", "niwaki compress python:nets:small --keep 0.5", "torch 2.15.0",
        "trace 0.51", "source digits",
    ):  # fmt: skip
        assert said in text, said


def test_the_page_loads_nothing(save: Save) -> None:
    text = niwaki.report.html(save())
    page = parsed(text)
    assert not page.tags & {"link", "img", "iframe", "object", "form", "image", "use"}
    assert not re.search(r"(https?:)?//[a-z]|url\(|@import", text)
    assert "default-src 'none'" in text
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text  # no other script runs, whatever the files say
    assert "prefers-color-scheme:dark" in text
    assert "@media print" in text
    assert 'name="viewport"' in text


@pytest.mark.parametrize("draw", [lambda f: parsed(niwaki.report.html(f)).text, printed], ids=["html", "terminal"])
def test_exports(save: Save, made: Made, draw: Callable[[Path], str]) -> None:
    def entry(value: float, unit: str = "ms", spread: float | None = 0.1) -> dict[str, Any]:
        return {"value": value, "unit": unit, "spread": spread}

    onnx = {
        "file": "model.onnx", "batch": "dynamic", "note": "", "difference": entry(3.1e-7, "relative", None),
        "bytes": entry(12e6, "bytes", None), "latency": entry(2.0), "pytorch_latency": entry(5.0),
        "tensorrt_refuses": {"Det": 2},
    }  # fmt: skip
    pt2 = {"file": "model.pt2", "batch": 4, "note": "no dynamic batch: baked in", "latency": entry(2.0, spread=1.0)}
    exports = {"onnx": onnx, "pt2": pt2 | {"pytorch_latency": entry(5.0)}, "int8": {"failed": "no ranges"}, "x": {}}
    text = draw(save(data={**made(), "exports": exports}))
    for said in (
        "model.onnx", "dynamic", "3.1e-07", "12 MB", "2 ± 0.1 ms", "5 ± 0.1 ms", "2.50", "TensorRT would refuse Det",
        "model.pt2", "no dynamic batch: baked in", "too noisy to compare", "FAILED: no ranges",
    ):  # fmt: skip
        assert " ".join(said.split()) in " ".join(text.split()), said


def test_what_an_int8_file_is_compared_with() -> None:
    def entry(value: float, unit: str) -> dict[str, Any]:
        return {"value": value, "unit": unit}

    onnx = {"file": "a.onnx", "difference": entry(3.1e-7, "relative")}
    int8 = {
        "file": "b.onnx", "difference": entry(0.05, "relative"), "agreement": entry(0.985, "share"),
        "float_difference": entry(0.17, "relative"),
        "integer_layers": entry(14.0, "products") | {"uncounted": ["head is left in floating point: no range"]},
    }  # fmt: skip
    table = exports_table({"onnx": onnx, "int8": int8, "pt2": {"failed": "no"}})
    assert [row[4] for row in table.rows] == ["3.1e-07", "5.0e-02 from simulated INT8", "-"]
    assert table.rows[1][-1] == (
        "largest output agrees in 98.5 %; 1.7e-01 from PyTorch in floats; 14 products on integers; "
        "head is left in floating point: no range"
    )
    assert "not held to the 1e-4 of the others" in table.note
    assert "INT8" not in exports_table({"onnx": onnx}).note


def test_every_picture_is_well_formed(save: Save) -> None:
    pictures = re.findall(r"<svg.*?</svg>", niwaki.report.html(save()), re.DOTALL)
    assert len(pictures) == 1 + 5 + 2  # the plot, a legend mark per series, a bar per layer
    for picture in pictures:
        ElementTree.fromstring(picture)


def test_text_from_the_files_is_text(save: Save, made: Made) -> None:
    data = made()
    data["model"]["source"] = "<script>alert(1)</script>"
    data["groups"][0]["name"] = '"><b>x'
    data["candidates"][0]["label"] = "</svg><i>"
    data["method"]["name"] = "[bold]a[/wrong]"
    folder = save(data=data)
    text = niwaki.report.html(folder)
    assert not parsed(text).tags & {"b", "i"}
    assert text.count("<script") == 1 and "&lt;script&gt;alert(1)" in text
    assert "[bold]a[/wrong]" in printed(folder)


def test_without_accuracy_there_is_a_sentence_instead_of_a_plot(save: Save, made: Made) -> None:
    text = niwaki.report.html(save(data=made(accuracy=None)))
    assert "accuracy was not measured" in text
    assert 'class="plot"' not in text
    assert "stem" in text


def test_several_runs_are_compared(save: Save, made: Made) -> None:
    for method in ("Magnitude", "Random"):
        for keep in (0.3, 0.5, 0.7):
            save(f"many/{method}-{keep}", made(method=method, keep=keep, accuracy=60 + 40 * keep))
    folder = save("many/without", made(accuracy=None)).parent
    text = niwaki.report.html(folder)
    assert "7 runs" in text
    plot = ElementTree.fromstring(re.findall(r'<svg class="plot".*?</svg>', text, re.DOTALL)[0])
    assert len(plot.findall(".//polyline")) == 2
    assert len(plot.findall(".//title")) == 1 + 6
    shown = printed(folder)
    assert shown.count("passed") == 7
    assert "Random-0.3" in shown
    assert "600 k (30 %)" in shown


def test_points_of_one_run(save: Save) -> None:
    assert points(read(save())) == (
        Point("uncut", "uncut", 100.0, 93.5),
        Point("cut", "cut", 50.0, 41.25),
        Point("batch-norm", "batch-norm", 50.0, 80.0),
        Point("recovery", "recovery", 50.0, 90.0),
        Point("candidates", "keep 0.7", 70.0, 91.5),
    )


def test_widths_of_layers_are_those_of_axis_0(save: Save) -> None:
    assert layer_widths(read(save())[0]) == [("stem", 16, 8), ("body", 32, 20)]


def test_a_plot_of_equal_points_and_of_many_series() -> None:
    same = [Point(str(number), "x", 50.0, 100.0) for number in range(20)]
    assert ElementTree.fromstring(scatter(same, cost="MACs", joined=True)).tag == "svg"


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (41, 44, [41, 41.5, 42, 42.5, 43, 43.5, 44]),
        (5, 5, [5]),
        (93, 2000, [500, 1000, 1500, 2000]),
    ],
)
def test_ticks(low: float, high: float, said: list[float]) -> None:
    assert ticks(low, high) == said


def test_numbers_in_words() -> None:
    assert [short(value, "MACs") for value in (0, 999, 1000, 12345678, 2e13)] == ["0", "999", "1 k", "12.35 M", "20 T"]
    assert short(46796608, "bytes") == "46.8 MB"
    assert short(1e9, "ms") == "1e+09 ms"
    assert change({"value": 0, "unit": "x"}, {"value": 1}) == ""
    idle, busy = {"value": 2, "unit": "ms", "spread": 0.1}, {"value": 90, "unit": "ms", "spread": 60}
    assert (change(idle, idle), change(idle, busy)) == ("× 1.000", "too noisy to compare")
    assert (
        budget({"keep": 0.25, "of": "params", "floor": 4, "multiple": 8})
        == "25 % of parameters (floor 4, multiple of 8)"
    )
    assert budget({"keep": 100, "of": "units"}) == "100 of units"
    amounts = [{"keep": 12.5, "of": "latency"}, {"keep": 6e7, "of": "memory"}, {"keep": 3000, "of": "units"}]
    assert [budget(one | {"absolute": True}) for one in amounts] == [
        "at most 12.5 ms of latency",
        "at most 60 MB of peak memory",
        "at most 3000 of units",
    ]


def test_write_is_one_step_and_keeps_what_was_there(save: Save, tmp_path: Path) -> None:
    folder = save()
    assert niwaki.report.write(folder) == folder / "report.html"
    first = (folder / "report.html").read_text()
    assert first == niwaki.report.html(folder)
    (folder / "report.json").write_text("{")
    with pytest.raises(FileDamagedError):
        niwaki.report.write(folder)
    assert (folder / "report.html").read_text() == first
    assert sorted(path.name for path in folder.iterdir()) == [
        "plan.json",
        "report.html",
        "report.json",
        "settings.json",
    ]


def test_write_refuses_a_place_that_is_none(save: Save, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="write"):
        niwaki.report.write(save(), tmp_path / "nowhere" / "a.html")
    (tmp_path / "taken").mkdir()
    with pytest.raises(InputError, match="write"):
        niwaki.report.write(tmp_path / "run", tmp_path / "taken")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
