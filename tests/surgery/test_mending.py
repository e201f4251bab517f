"""Integers of modules: which are looked at, and that what nobody read is not set otherwise again."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import niwaki
from laws.common import closest, random_scores
from niwaki.surgery.check import Retrace
from niwaki.surgery.evidence import Sizes, stays_of
from niwaki.surgery.mending import agreement, search
from niwaki.surgery.modules import Mend, Option, options, reading


class Holds(nn.Module):
    """Numbers of which its forward reads one."""

    always = 5

    def __init__(self) -> None:
        super().__init__()
        self.read, self.unread = 3, 4

    def forward(self, x: Tensor) -> Tensor:
        return x * self.read


class Kin(Holds):
    """Reads the other one."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.unread


def test_what_is_read_is_noted_and_the_class_is_as_it_was() -> None:
    one, kin, before = Holds(), Kin(), dict(vars(Holds))
    asked = {(Holds, "read"), (Holds, "unread"), (Holds, "always"), (Kin, "read"), (Kin, "unread")}
    with reading(asked) as read:
        assert read == {(Holds, "always")}  # of the class: nobody can tell
        assert float(one(torch.ones(1))) == 3
        assert float(kin(torch.ones(1))) == 4
        one.unread = 7  # what is written is not read
        vars(one)["read"] = 8
    assert read == {(Holds, "always"), (Holds, "read"), (Kin, "unread")}
    assert (one.read, one.unread, dict(vars(Holds))) == (8, 7, before)


def test_attributes_come_and_go_while_they_are_watched() -> None:
    one = Holds()
    with reading({(Holds, "read"), (Holds, "unread")}) as read:
        del one.read
        assert not hasattr(one, "read")
        with pytest.raises(AttributeError, match="read"):
            del one.read
        one.read = 6
        assert one.read == 6
        with pytest.raises(AttributeError, match="unread"):
            _ = Holds.unread
    assert read == {(Holds, "read")}


def test_the_class_is_as_it_was_after_an_error() -> None:
    before = dict(vars(Holds))
    with pytest.raises(ZeroDivisionError), reading({(Holds, "read")}):
        _ = 1 // 0
    assert dict(vars(Holds)) == before


PLACES = [[("a", "x")], [("a", "y")], [("b", "x"), ("c", "x")]]


@pytest.mark.parametrize(
    ("read", "tried"),
    [
        ({("a", "x")}, [(1, 1, 1, 1), (2, 1, 1, 1)]),  # what the others are makes no difference
        ({("a", "x"), ("a", "y")}, [(1, 1, 1, 1), (2, 1, 1, 1), (1, 2, 1, 1), (2, 2, 1, 1)]),
        ({("b", "x")}, [(1, 1, 1, 1), (1, 1, 2, 2)]),
        (set(), [(1, 1, 1, 1)]),
        (None, [(1, 1, 1, 1), (2, 1, 1, 1), (1, 2, 1, 1), (2, 2, 1, 1), (1, 1, 2, 2)]),
    ],
)
def test_what_nobody_read_is_not_tried(read: Any, tried: list[tuple[int, ...]]) -> None:
    """Every choice fails alike; `read` are the places that the judge says were read."""
    found = [Option(places, [1, 2]) for places in PLACES]
    graph = niwaki.trace(nn.Linear(2, 2), torch.zeros(1, 2))
    seen: list[tuple[int, ...]] = []

    def judge(mends: list[Mend]) -> Retrace:
        seen.append(tuple(mend["value"] for mend in mends))
        known = None if read is None else frozenset(read)
        return Retrace([], {}, "fails", where="a", agreed=0, read=known)

    search(found, judge, graph, Sizes(stays_of(graph, np.ones(graph.units.count, bool))))
    assert seen == tried


class Pooled(nn.Module):
    """Windows of as many steps as there are channels."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.out = nn.Conv1d(2, 4, 1), nn.Linear(4, 2)
        self.pool = nn.AvgPool1d(4)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.pool(self.wide(x)).transpose(1, 2)))


def test_where_a_forward_strays_is_told_apart_from_where_it_fails() -> None:
    """What it strays by is looked for near the first call that is another one, then around both."""
    model = nn.Sequential(nn.Linear(2, 2))
    graph = niwaki.trace(model, torch.zeros(1, 2))
    sizes = Sizes(stays_of(graph, np.ones(graph.units.count, bool)))
    assert agreement(Retrace([], {}, "fails", where="a", agreed=3), graph, sizes) == (3, "a", frozenset("a"))
    seen = Retrace([], {}, "fails", where="a", agreed=3, wrong="")
    assert agreement(seen, graph, sizes) == (3, "", frozenset({"a", ""}))


def test_windows_are_no_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Option] = []

    def noted(*given: Any) -> list[Option]:
        found.extend(options(*given))
        return found

    import importlib

    monkeypatch.setattr(importlib.import_module("niwaki.surgery.cut"), "options", noted)
    model, example = Pooled(), torch.randn(1, 2, 8)
    graph = niwaki.trace(model, example)
    plan, _ = closest(graph, random_scores(model, graph, 0), 0.5, of="units")
    small = niwaki.cut(model, plan)
    assert [place for option in found for place in option.places] == []
    assert (small.pool.kernel_size, small.wide.out_channels) == ((4,), 2)
