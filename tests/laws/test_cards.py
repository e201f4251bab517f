"""Law: every block and method has a card, and every card a block."""

import dataclasses
import re
from pathlib import Path

import pytest

from laws.common import block_classes

CARDS = Path(__file__).parents[2] / "docs" / "cards"
FIELDS = {"title", "source", "needs", "passes over data", "exact", "status"}
ROLES = ("scores", "budgets", "methods", "measure", "repair")


def front_matter(path: Path) -> dict[str, str]:
    text = path.read_text()
    assert text.startswith("---\n"), f"{path.name} has no front matter"
    head = text.split("---\n", 2)[1]
    return {
        key.strip(): value.strip()
        for key, _, value in (line.partition(":") for line in head.splitlines() if line.strip())
    }


def law(role: str) -> None:
    blocks = block_classes(role)
    assert blocks, f"niwaki.{role} lists nothing"
    stems = {block.__module__.rsplit(".", 1)[-1] for block in blocks}
    cards = {path.stem for path in (CARDS / role).glob("*.md")}
    assert stems == cards, f"blocks without a card: {stems - cards}; cards without a block: {cards - stems}"
    for block in blocks:
        path = CARDS / role / f"{block.__module__.rsplit('.', 1)[-1]}.md"
        matter = front_matter(path)
        assert set(matter) >= FIELDS, f"{path.name} lacks {FIELDS - set(matter)}"
        assert all(matter[field] for field in FIELDS), f"{path.name} leaves a field empty"
        assert matter["status"] in ("trial", "stable")
        text = path.read_text()
        assert len(text.splitlines()) <= 120, f"{path.name} is longer than a page or two"
        missing = [field.name for field in dataclasses.fields(block) if not re.search(rf"\b{field.name}\b", text)]
        assert not missing, f"{path.name} does not mention the settings {missing}"
        assert block.__doc__ and block.__doc__.strip(), f"{block.__name__} has no docstring"


def test_every_folder_of_cards_is_checked() -> None:
    assert {path.name for path in CARDS.iterdir()} <= set(ROLES)


@pytest.mark.parametrize("role", ROLES)
def test_cards(role: str) -> None:
    law(role)
