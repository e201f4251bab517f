"""The picture of a graph: who writes a group, who reads it, and which group the reader writes itself."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from niwaki.errors import InputError
from niwaki.report.picture import MOST, kind_of, picture, sides_of, write_picture


def group(name: str, *members: tuple[str, int, str], **more: Any) -> dict[str, Any]:
    listed = [{"tensor": tensor, "axis": axis, "role": role} for tensor, axis, role in members]
    return {"name": name, "units": 8, "kind": "channels", "rows": 1, "fixed": None, "exact": True, "inexact": None,
            "members": listed, **more}  # fmt: skip


WRITES_A = (("a.weight", 0, "out"), ("a.bias", 0, "out"))
NORM = (("n.weight", 0, "scale"), ("n.bias", 0, "shift"))
GRAPH = {
    "groups": [
        group("a", *WRITES_A, *NORM, ("b.weight", 1, "in")),
        group("b", ("b.weight", 0, "out"), ("c.weight", 1, "in"), kind="grid", rows=2),
        group("c", ("c.weight", 0, "out"), fixed="output of <the> model"),
    ]
}


def words(svg: str) -> list[str]:
    root = ElementTree.fromstring(svg)
    return ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]


def test_sides() -> None:
    side = sides_of(GRAPH["groups"][0])
    assert (side.producers, side.consumers, side.others) == (("a",), ("b",), ("n",))


def test_kinds() -> None:
    assert [kind_of(g) for g in GRAPH["groups"]] == ["free", "grid", "fixed"]
    assert kind_of(group("x", exact=False, inexact="mean")) == "inexact"


def test_says_who_couples_whom() -> None:
    found = words(picture(GRAPH, title="a & b"))
    assert {"a & b", "1. a", "b → 2", "c → 3", "with n", "8 units in 2 rows", "fixed: output of <the> model"} <= set(
        found
    )
    assert found.count("c → 3") == 1


def test_many_readers_are_counted_and_long_names_shortened() -> None:
    members = [(f"block.number.{'long.' * 10}{number}.weight", 1, "in") for number in range(30)]
    svg = picture({"groups": [group("stream", *members)]})
    found = words(svg)
    assert f"and {30 - MOST + 1} more" in found
    assert sum("…" in word for word in found) == MOST - 1
    assert "block.number.long.long" in re.findall(r"<title>(.*?)</title>", svg)[0]


def test_boxes_do_not_overlap() -> None:
    root = ElementTree.fromstring(picture(GRAPH))
    boxes = [
        node
        for node in root.iter()
        if "box" in node.get("class", "") and node.get("x") != "16" and node.get("rx") == "7"
    ]
    ends = [(int(box.get("y")), int(box.get("y")) + float(box.get("height"))) for box in boxes]
    assert len(ends) == 3
    assert all(end < start for (_, end), (start, _) in pairwise(ends))


def test_write(tmp_path: Path) -> None:
    assert write_picture(GRAPH, tmp_path / "g.svg").read_text().startswith("<svg")
    assert [path.name for path in tmp_path.iterdir()] == ["g.svg"]
    with pytest.raises(InputError, match="write"):
        write_picture(GRAPH, tmp_path / "no" / "g.svg")
    with pytest.raises(InputError, match="no groups"):
        picture({"groups": []})
