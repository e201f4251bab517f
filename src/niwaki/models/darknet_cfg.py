"""The cfg files of darknet: sections with options, one for each layer."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import final

from niwaki.errors import FileDamagedError, InputError

NAMES = {
    "network": "net",
    "conv": "convolutional",
    "max": "maxpool",
    "avg": "avgpool",
}
"""Other names of layers."""


@final
@dataclass(frozen=True)
class Section:
    """One layer of a cfg."""

    kind: str
    options: dict[str, str]
    line: int
    """Where it begins in the file."""
    where: str = field(default="", compare=False)

    def refused(self, found: str, do: str) -> InputError:
        return InputError(f"build [{self.kind}]", found=found, where=f"{self.where}:{self.line}", do=do)

    def number(self, name: str, default: int) -> int:
        return int(self._of(name, default, int))

    def real(self, name: str, default: float) -> float:
        return float(self._of(name, default, float))

    def numbers(self, name: str) -> tuple[int, ...]:
        """A list of whole numbers, separated by commas; empty where there is none."""
        try:
            return tuple(int(float(item)) for item in self.options.get(name, "").split(",") if item.strip())
        except ValueError as cause:
            raise self._no_number(name) from cause

    def _of(self, name: str, default: float, kind: Callable[[str], float]) -> float:
        try:
            return kind(self.options[name]) if name in self.options else default
        except ValueError as cause:
            raise self._no_number(name) from cause

    def _no_number(self, name: str) -> InputError:
        return self.refused(f"{name}={self.options[name]}", "write a number")


def parse(text: str, where: str) -> tuple[Section, ...]:
    """The sections of a cfg; the first is [net].

    Raises:
        FileDamagedError: a line that is neither a section, nor name=value, nor a comment, or no [net] at the start.
    """

    def damaged(line: int, found: str) -> FileDamagedError:
        do = "give a cfg as darknet reads it: [net] first, then a section a layer with name=value lines"
        return FileDamagedError("read a darknet cfg", found=found, where=f"{where}:{line}", do=do)

    sections: list[Section] = []
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.partition("#")[0].partition(";")[0].strip()
        if not line:
            continue
        if line.startswith("["):
            if not line.endswith("]") or len(line) < 3:
                raise damaged(number, f"{raw.strip()[:60]!r}")
            kind = line[1:-1].strip().lower()
            sections.append(Section(NAMES.get(kind, kind), {}, number, where))
            continue
        name, equals, value = line.partition("=")
        if not equals or not sections:
            raise damaged(number, f"{raw.strip()[:60]!r}")
        sections[-1].options[name.strip()] = value.strip()
    if not sections or sections[0].kind != "net":
        raise damaged(1, f"[{sections[0].kind}] first" if sections else "no section")
    if len(sections) == 1:
        raise damaged(sections[0].line, "a [net] without layers")
    return tuple(sections)
