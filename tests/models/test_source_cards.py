"""Every reader, source of models, task and training has a card that names its settings."""

import dataclasses
import re
from pathlib import Path

import pytest

import niwaki.data
import niwaki.models
import niwaki.tasks
import niwaki.train

CARDS = Path(__file__).parents[2] / "docs" / "cards"
FIELDS = ("title", "source", "needs", "passes over data", "exact", "status")
BLOCKS = {
    "data": list(niwaki.data.READERS.values()),
    "models": list(niwaki.models.SOURCES.values()),
    "tasks": [niwaki.tasks.Classification],
    "train": [niwaki.train.Recovery],
}


@pytest.mark.parametrize("block", [block for blocks in BLOCKS.values() for block in blocks])
def test_the_card_is_there_and_complete(block):
    *_, role, stem = block.__module__.split(".")
    text = (CARDS / role / f"{stem}.md").read_text()
    _, head, body = text.split("---\n", 2)
    matter = dict(line.split(": ", 1) for line in head.splitlines())
    assert tuple(matter) == FIELDS and all(matter.values())
    assert matter["title"] == block.__name__ and matter["status"] in ("trial", "stable")
    assert len(body.splitlines()) <= 60
    missing = [field.name for field in dataclasses.fields(block) if not re.search(rf"^\| {field.name} ", body, re.M)]
    assert not missing, f"no row for {missing}"


@pytest.mark.parametrize("role", BLOCKS)
def test_no_card_is_left_over(role):
    assert {path.stem for path in (CARDS / role).glob("*.md")} == {b.__module__.split(".")[-1] for b in BLOCKS[role]}
