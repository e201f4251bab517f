"""Every reader, source of models, task and training has a card that names its settings."""

import inspect
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
    "data": {
        **{
            reader.__module__.split(".")[-1]: reader
            for reader in (*niwaki.data.READERS.values(), *niwaki.data.BOX_READERS.values())
        },
        "text": niwaki.data.open_text,
        "samples": niwaki.data.open_samples,
    },
    "models": {source.__module__.split(".")[-1]: source for source in niwaki.models.SOURCES.values()},
    "tasks": {
        "classification": niwaki.tasks.Classification,
        "custom": niwaki.tasks.Custom,
        "detection": niwaki.tasks.Detection,
        "joined": niwaki.tasks.Joined,
        "language_modelling": niwaki.tasks.LanguageModelling,
        "long_text": niwaki.tasks.LongText,
        "multitask": niwaki.tasks.Multitask,
        "needle": niwaki.tasks.Needle,
        "retrieval": niwaki.tasks.Retrieval,
    },
    "train": {"recovery": niwaki.train.Recovery, "checkpoints": niwaki.train.Checkpoints},
}


@pytest.mark.parametrize(("role", "stem"), [(role, stem) for role, blocks in BLOCKS.items() for stem in blocks])
def test_the_card_is_there_and_complete(role, stem):
    block = BLOCKS[role][stem]
    text = (CARDS / role / f"{stem}.md").read_text()
    _, head, body = text.split("---\n", 2)
    matter = dict(line.split(": ", 1) for line in head.splitlines())
    assert tuple(matter) == FIELDS and all(matter.values())
    titles = (block.__name__, block.__name__.removeprefix("open_").capitalize())
    assert matter["title"] in titles and matter["status"] in ("trial", "stable")
    assert len(body.splitlines()) <= 60
    missing = [name for name in inspect.signature(block).parameters if not re.search(rf"^\| {name} ", body, re.M)]
    assert not missing, f"no row for {missing}"


@pytest.mark.parametrize("role", BLOCKS)
def test_no_card_is_left_over(role):
    assert {path.stem for path in (CARDS / role).glob("*.md")} == set(BLOCKS[role])
