"""What a report refuses to read: every damage, what is said, and that the files stay."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import niwaki.report
from niwaki.errors import FileDamagedError, InputError
from niwaki.report.reading import read, read_all

Change = Callable[[dict[str, Any]], Any]


def test_reads_one_run_and_several(save: Callable[..., Path], made: Callable[..., dict[str, Any]]) -> None:
    folder = save("many/a/0.5")
    save("many/b", data={**made(), "exports": {"onnx": {"failed": "no package"}}})
    assert [run.name for run in read(folder)] == ["0.5"]
    several = read(folder.parent.parent)
    assert [run.name for run in several] == ["a/0.5", "b"]
    assert several[0].share("macs") == 0.5
    assert several[0].share("bytes") is None
    assert several[0].settings == {"seed": 0, "method": {"p": 2}}


def test_two_runs_of_one_short_name_keep_their_paths(save: Callable[..., Path]) -> None:
    first, second, other = save("one/0.5"), save("two/0.5"), save("two/0.7")
    assert [run.name for run in read((first, other))] == ["0.5", "0.7"]
    assert [run.name for run in read((first, second))] == [str(first), str(second)]


def test_missing_optional_parts_are_empty(save: Callable[..., Path], made: Callable[..., dict[str, Any]]) -> None:
    data = made()
    run = read(save(data={key: data[key] for key in ("model", "method", "before", "after")}))[0]
    assert (run.get("stages"), run.get("receipt"), run.get("widths")) == ([], {}, [])


@pytest.mark.parametrize("cut", [0, 1, 100, -1, -2])
def test_truncated(save: Callable[..., Path], cut: int) -> None:
    folder = save()
    path = folder / "report.json"
    text = path.read_text()[:cut]
    path.write_text(text)
    with pytest.raises(FileDamagedError, match=r"read report\.json; found: no readable JSON") as caught:
        read(folder)
    assert caught.value.exit_code == 2
    assert caught.value.where == str(path)
    assert path.read_text() == text


@pytest.mark.parametrize("name", ["plan.json", "settings.json"])
def test_truncated_files_beside_it(save: Callable[..., Path], name: str) -> None:
    folder = save()
    (folder / name).write_text((folder / name).read_text()[:-2])
    with pytest.raises(FileDamagedError, match=re.escape(name)):
        read(folder)


@pytest.mark.parametrize(
    "raw",
    [b"\xff\xfe\x00", b"[]", b"3", b'{"before": NaN}', b'{"a": 1e999}', b"[" * 100_000],
    ids=["bytes", "list", "number", "nan", "overflow", "deep"],
)
def test_not_an_object(save: Callable[..., Path], raw: bytes) -> None:
    folder = save()
    (folder / "report.json").write_bytes(raw)
    with pytest.raises(FileDamagedError):
        read(folder)


def _set(*path: Any) -> Change:
    *keys, last, value = path

    def change(data: Any) -> None:
        for key in keys:
            data = data[key]
        data[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_set("before", None), "before is a NoneType"),
        (_set("before", "macs", "value", "few"), "before.macs.value is a str, not a float"),
        (_set("before", "macs", "value", True), "before.macs.value is a bool"),
        (_set("before", "macs", {}), "before.macs has no value"),
        (_set("after", "macs", "uncounted", [3]), r"uncounted\[0\] is a int"),
        (_set("stages", 0, "measurements", {"x": 3}), "stages.x is a int"),
        (_set("stages", [None]), r"stages\[0\] is empty"),
        (_set("groups", 0, "kept", 17), "groups: stem keeps 17 of 16"),
        (_set("widths", 0, "after", -1), r"widths: stem.weight keeps -1 of 16"),
        (_set("widths", 0, "after", 9), r"plan.json.*stem.weight axis 0 keeps 8 here and 9 in report.json"),
        (_set("receipt", "passed", "yes"), "receipt.passed is a str"),
        (_set("model", []), "model is a list"),
        (_set("digest", [1]), "digest is a list"),
        (_set("splits", {"normalisation": {"mean": 0.5}}), "splits.normalisation.mean is a float, not a list"),
        (_set("exports", {"onnx": 3}), "exports.onnx is a int, not a dict"),
        (_set("exports", {"onnx": {"latency": {"value": "fast"}}}), "exports.onnx.latency.value is a str"),
        (_set("exports", {"onnx": {"tensorrt_refuses": ["Det"]}}), "exports.onnx.tensorrt_refuses is a list"),
        (_set("candidates", 0, "accuracy", "good"), r"candidates\[0\].accuracy"),
    ],
)
def test_tampered(save: Callable[..., Path], made: Callable[..., dict[str, Any]], change: Change, said: str) -> None:
    data = made()
    change(data)
    with pytest.raises(FileDamagedError, match=said):
        read(save(data=data))


def test_incomplete(save: Callable[..., Path], made: Callable[..., dict[str, Any]]) -> None:
    data = made()
    del data["after"], data["method"]
    with pytest.raises(FileDamagedError, match="no method, after"):
        read(save(data=data))


@pytest.mark.parametrize("plan", [{"cuts": 3}, {"cuts": ["a"]}, {"cuts": [{"keep": 3}]}, {"a": 1}])
def test_a_plan_that_is_none(save: Callable[..., Path], plan: dict[str, Any]) -> None:
    with pytest.raises(FileDamagedError, match=r"plan\.json"):
        read(save(plan=plan))


def test_no_folder_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place, said in (("nowhere", "no such folder"), ("file", "a file"), ("", "no report.json in it or below")):
        with pytest.raises(InputError, match=said):
            read(tmp_path / place)


def test_damage_in_one_of_several_leaves_that_one_out(save: Callable[..., Path]) -> None:
    save("many/a")
    bad = save("many/b")
    (bad / "report.json").write_text("{")
    killed = save("many/c")
    (killed / "report.json").unlink()
    (killed / "settings.json").write_text('{"arguments": ["train"]}')
    (save("many/d") / "report.json").unlink()  # settings of something else
    found = read_all(bad.parent)
    assert [run.name for run in found.runs] == ["a"]
    assert list(found.left_out) == [str(killed), str(bad)]
    assert found.left_out[str(killed)].endswith(f"niwaki resume {killed} goes on with it")
    assert "damaged: read report.json: no readable JSON" in found.left_out[str(bad)]
    page = niwaki.report.html(bad.parent)
    assert "<h2>Left out</h2>" in page and str(bad) in page and "1 run side by side" in page
    assert niwaki.report.data(bad.parent)["left_out"] == found.left_out
    for asked in (bad, [bad, bad.parent / "a"]):  # named themselves, they are asked for
        with pytest.raises(FileDamagedError):
            read(asked)
    (bad.parent / "a/report.json").write_text("{")
    with pytest.raises(FileDamagedError) as caught:  # none is left
        read(bad.parent)
    assert caught.value.where == str(bad.parent / "a/report.json")
