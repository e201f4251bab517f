"""What a page shows of a search by losses."""

import io
from typing import Any

import pytest
from rich.console import Console
from test_page import Made, Save

import niwaki.report
from niwaki.errors import FileDamagedError
from niwaki.report.reading import read
from niwaki.report.searches import searched, table_of


def step(group: str, accepted: int | None, *trials: tuple[int, str, float | None]) -> dict[str, Any]:
    told = [{"count": n, "losses": {"a": 1.5, "b": 2.0}, "task": task, "rise": rise} for n, task, rise in trials]
    return {"group": group, "size": 20, "allowance": 0.1, "accepted": accepted, "trials": told}


SEARCH = {
    "rounds": [
        {
            "base": {"a": 1.0, "b": 2.0},
            "reached": True,
            "selected": None,
            "steps": [
                step("layer.one", 1, (1, "a", 0.02), (2, "a", 0.05), (3, "b", 0.2)),
                step("<two>", None, (2, "b", 0.5)),
                step("three", None, (1, "b", None)),
                {"group": "four", "size": 1, "allowance": 0.1, "accepted": None, "trials": []},
            ],
        }
    ]
}


def test_every_group_that_was_tried(save: Save, made: Made) -> None:
    (run,) = read(save(data=made() | {"search": SEARCH}))
    one, two, three = searched(run)
    assert (one.gone, one.task, one.stopped, one.tried, one.rise) == (2, "a", "b", 3, 0.05)
    assert one.first == pytest.approx(0.02 * 20) and two.first == pytest.approx(0.5 * 10)  # per share of the group
    assert (two.gone, three.first) == (0, float("inf"))
    assert table_of([one]).rows[0][2:4] == ("2 of 20", "10 %")
    text = niwaki.report.html(run.folder)
    assert "Shares by sensitivity" in text and "layer.one, round 1: 2 of 20 gone; a 0.4" in text
    assert "&lt;two&gt;" in text and "<two>" not in text
    kept = {"rounds": [SEARCH["rounds"][0] | {"selected": {"<two>": 4}}]}
    (run,) = read(save("kept", made() | {"search": kept}))
    assert [one.gone for one in searched(run)] == [0, 4, 0]


def test_what_the_search_has_to_say(save: Save, made: Made) -> None:
    """On the page and in the terminal; and by what share each group's cuts grew."""
    groups = [{"name": "layer.one", "grain": 0.125}, {"name": "three", "grain": 0.05}]
    told = {"notes": ["one loss is judged (<a>)", "one of 8"], "rounds": [SEARCH["rounds"][0] | {"groups": groups}]}
    folder = save(data=made() | {"search": told})
    (run,) = read(folder)
    assert [row[4] for row in table_of(searched(run)).rows] == ["12.5 %", "", "5 %"]
    text = niwaki.report.html(folder)
    assert "one loss is judged (&lt;a&gt;)" in text and "one of 8" in text and "12.5\u00a0%" in text
    lines = Console(file=io.StringIO(), width=160)
    lines.print(niwaki.report.terminal(folder))
    assert "one loss is judged (<a>)" in lines.file.getvalue()  # type: ignore[attr-defined]
    quiet = save("quiet", made() | {"search": SEARCH})
    assert "To be known" in text and "To be known" not in niwaki.report.html(quiet)


def test_runs_without_a_search(save: Save, made: Made) -> None:
    assert "Shares by sensitivity" not in niwaki.report.html(save(data=made()))


@pytest.mark.parametrize("spoilt", [{"rounds": [{"steps": [{"trials": [3]}]}]}, {"rounds": {}}, [], {"rounds": [None]}])
def test_a_damaged_search(save: Save, made: Made, spoilt: Any) -> None:
    with pytest.raises(FileDamagedError, match="search"):
        read(save(data=made() | {"search": spoilt}))


def test_an_accepted_trial_that_is_none(save: Save, made: Made) -> None:
    odd = {"rounds": [{"steps": [step("one", 7, (1, "a", 0.1))]}]}
    (run,) = read(save("odd", made() | {"search": odd}))
    assert [one.gone for one in searched(run)] == [0]
