"""Options that take several words: `--to onnx pt2` is `--to onnx --to pt2`."""

from collections.abc import Callable
from typing import Any, ClassVar

import typer.core

from niwaki.cli.options import EXPORTS, RUNTIMES


def _listed(known: tuple[str, ...]) -> Callable[[str], bool]:
    return lambda word: all(part in known for part in word.split(","))


def _number(word: str) -> bool:
    return word.replace(",", "").isdigit()


class Listing(typer.core.TyperCommand):
    """A command some of whose options go on for as long as the next word can be one more value."""

    goes_on: ClassVar[dict[str, Callable[[str], bool]]] = {
        "--to": _listed(EXPORTS),
        "--export": _listed(EXPORTS),
        "--runtime": _listed(RUNTIMES),
        "--batch": _number,
    }
    """Option -> whether a word is a value of it. A word that is none is what it would have been without."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        several = {name for option in self.params if getattr(option, "multiple", False) for name in option.opts}
        spread: list[str] = []
        words = iter(args)
        option, taken = "", 0  # the option we are in, and how many values it has had
        for word in words:
            if word in several & set(self.goes_on):
                option, taken = word, 0
                spread.append(word)
            elif option and taken == 0:
                spread.append(word)
                taken = 1
            elif option and self.goes_on[option](word):
                spread += [option, word]
            else:
                option = ""
                spread.append(word)
        return super().parse_args(ctx, spread)


def split(items: list[str] | None) -> list[str]:
    """The words of a listing option, those joined by commas apart, each once, in order."""
    words = [word.strip() for item in items or [] for word in item.split(",")]
    return list(dict.fromkeys(filter(None, words)))
