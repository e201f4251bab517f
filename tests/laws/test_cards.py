"""Law: every block and method has a card, and every card a block."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest

import niwaki
from laws.common import block_classes

CARDS = Path(__file__).parents[2] / "docs" / "cards"
FIELDS = {"title", "source", "needs", "passes over data", "exact", "status"}
PACKAGE = Path(niwaki.__file__).parent
ROLES = ("scores", "budgets", "methods", "measure", "repair", "quantize", "distill", "kv", "pressure", "search")
"""Folders whose blocks are dataclasses that are called; other folders' cards are checked against files."""
WITH_FUNCTIONS = ("quantize",)
"""Those of them that have blocks without settings of their own: functions."""


def front_matter(path: Path) -> dict[str, str]:
    text = path.read_text()
    assert text.startswith("---\n"), f"{path.name} has no front matter"
    head = text.split("---\n", 2)[1]
    return {
        key.strip(): value.strip()
        for key, _, value in (line.partition(":") for line in head.splitlines() if line.strip())
    }


def functions(role: str) -> set[str]:
    """Stems of the files whose public face is functions, where a role has such blocks."""
    folder = getattr(niwaki, role)
    public = [getattr(folder, name) for name in folder.__all__] if role in WITH_FUNCTIONS else []
    return {thing.__module__.rsplit(".", 1)[-1] for thing in public if inspect.isfunction(thing)}


def law(role: str) -> None:
    blocks = block_classes(role)
    assert blocks, f"niwaki.{role} lists nothing"
    stems = {block.__module__.rsplit(".", 1)[-1] for block in blocks} | functions(role)
    cards = {path.stem for path in (CARDS / role).glob("*.md")}
    assert stems == cards, f"blocks without a card: {stems - cards}; cards without a block: {cards - stems}"
    for block in blocks:
        path = CARDS / role / f"{block.__module__.rsplit('.', 1)[-1]}.md"
        text = path.read_text()
        missing = [field.name for field in dataclasses.fields(block) if not re.search(rf"\b{field.name}\b", text)]
        assert not missing, f"{path.name} does not mention the settings {missing}"
        assert block.__doc__ and block.__doc__.strip(), f"{block.__name__} has no docstring"


@pytest.mark.parametrize("card", sorted(CARDS.glob("*/*.md")), ids=lambda card: f"{card.parent.name}/{card.stem}")
def test_every_card_has_a_file_and_its_facts(card: Path) -> None:
    assert (PACKAGE / card.parent.name / f"{card.stem}.py").exists(), "a card of nothing"
    matter = front_matter(card)
    assert set(matter) >= FIELDS, f"{card.name} lacks {FIELDS - set(matter)}"
    assert all(matter[field] for field in FIELDS), f"{card.name} leaves a field empty"
    assert matter["status"] in ("trial", "stable")
    assert len(card.read_text().splitlines()) <= 120, f"{card.name} is longer than a page or two"


@pytest.mark.parametrize("role", ROLES)
def test_cards(role: str) -> None:
    law(role)
