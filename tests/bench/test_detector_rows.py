"""Rows of the benchmark of detectors: keys say what uniform L2 was cut to, and older rows without it still count."""

import importlib
from argparse import Namespace
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
END = {"AP50": 50.0, "AP": 30.0, "params": 1.0, "macs": 7.0}


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("detectors"), importlib.import_module("detectors_page")


class Made:
    """Rows that were made."""

    fresh = False

    def __init__(self, *rows):
        self.rows = list(rows)

    def get(self, key):
        return next((row for row in self.rows if row["key"] == key), None)

    def wanted(self, key):
        return self.fresh or self.get(key) is None

    def write(self, text):
        self.text = text


def row(arm, **more):
    stages = {"cut": END, "fine-tuning": END}
    sizes = {"dense": 1e6, "cut": 1e6}
    return {"key": f"net, seed 0, {arm}", "arm": arm, "seed": 0, "stages": stages, "dense": END,
            "file_bytes": sizes, "times": {}, **more}  # fmt: skip


ASKED = Namespace(arms=["CWD", "GCP", "L2", "L2, multiples"], keep=0.5, of="params", multiple=8)


def test_each_method_has_its_own_rows_of_l2(modules):
    detectors, _ = modules
    labels = detectors.labels_of(Made(), "net, seed 0", ASKED)
    assert labels == {
        "CWD": "CWD", "GCP": "GCP", "L2 at macs of CWD": "L2", "L2 at macs of GCP": "L2",
        "L2, multiples at macs of CWD": "L2, multiples", "L2, multiples at macs of GCP": "L2, multiples",
    }  # fmt: skip
    alone = Namespace(**{**vars(ASKED), "arms": ["L2"]})
    assert list(detectors.labels_of(Made(), "net, seed 0", alone)) == ["L2 at keep"]
    assert list(detectors.labels_of(Made(row("GCP")), "net, seed 0", alone)) == ["L2 at macs of GCP"]


def test_an_older_row_stands_for_what_it_was_cut_to_only(modules):
    detectors, _ = modules
    made = Made(row("CWD"), row("GCP"), row("L2", equal="macs of CWD"))
    wanted = [label for label in detectors.labels_of(made, "net, seed 0", ASKED)
              if detectors.wanted(made, "net, seed 0", label)]  # fmt: skip
    assert wanted == ["L2 at macs of GCP", "L2, multiples at macs of CWD", "L2, multiples at macs of GCP"]
    made.fresh = True
    assert detectors.wanted(made, "net, seed 0", "L2 at macs of CWD")


def test_the_budget_is_that_of_the_named_method(modules):
    detectors, _ = modules
    other = {"fine-tuning": {**END, "macs": 9.0}}
    made = Made(row("CWD"), row("GCP", stages=other))
    found = [detectors.budget_of(made, "net, seed 0", f"macs of {one}", ASKED, 8) for one in ("CWD", "GCP")]
    assert [(one.keep, one.of, one.multiple) for one in found] == [(7.0, "macs", 8), (9.0, "macs", 8)]
    bare = detectors.budget_of(made, "net, seed 0", "keep", ASKED, 1)
    assert (bare.keep, bare.of, bare.multiple) == (0.5, "params", 1)


def test_the_page_shows_older_and_newer_rows_alike(modules):
    _, pages = modules
    made = Made(row("GCP"), row("L2", equal="macs of GCP"), row("L2, multiples at macs of GCP", equal="macs of GCP"))
    pages.page(made, "About.")
    for name in ("net, seed 0, L2 at macs of GCP", "net, seed 0, L2, multiples at macs of GCP"):
        assert f"| {name} |" in made.text
    assert "AP50 of GCP and of L2 at macs of GCP: cut 50.0 and 50.0" in made.text
