"""One tree of errors. Every message says what was asked, what was found, where, and what to do."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final


@final
@dataclass(frozen=True)
class Setting:
    """A setting that a message speaks of: in Python an argument, on the command line an option.

    Examples:
        >>> str(Setting("exact_only", True)), str(Setting("data", written="a task"))
        ('exact_only=True', 'a task')
    """

    name: str
    """Of the option: "exact_only" for --exact-only; or of a method's field."""
    value: Any = None
    """What it is, or should be, set to; None where only the setting is meant."""
    written: str = ""
    """How Python writes it, where that is not name=value."""

    def __str__(self) -> str:
        return self.written or (self.name if self.value is None else f"{self.name}={self.value!r}")


Words = str | tuple[str | Setting, ...]
"""A part of a message: text, or text with settings between."""


class NiwakiError(Exception):
    """Root of all errors that niwaki raises itself.

    The four parts are kept as attributes, so that the command line and `--json` can print them apart; `told` writes
    the settings in them as somebody else writes them.
    `exit_code` is what the command line returns: 2 for the user's mistakes, 1 for everything else.
    """

    exit_code = 1

    def __init__(self, asked: Words, *, found: Words = "", where: Words = "", do: Words = "") -> None:
        self.parts: dict[str, Words] = {"asked": asked, "found": found, "where": where, "do": do}
        told = self.told(str)
        self.asked, self.found, self.where, self.do = told.values()
        super().__init__(joined(told))

    def told(self, write: Callable[[Setting], str]) -> dict[str, str]:
        """The four parts, each setting written by `write`."""
        return {
            name: words if isinstance(words, str) else "".join(w if isinstance(w, str) else write(w) for w in words)
            for name, words in self.parts.items()
        }


def joined(told: dict[str, str]) -> str:
    """The parts of an error on one line."""
    parts = [words if name == "asked" else f"{name}: {words}" for name, words in told.items() if words]
    return "; ".join(parts)


class InputError(NiwakiError, ValueError):
    """Something the user gave cannot be used: a wrong name, value, shape or combination."""

    exit_code = 2


class UnknownNameError(InputError, LookupError):
    """A name that is not in a list; the message lists the known ones."""

    @classmethod
    def of(cls, kind: str, name: str, known: "list[str] | tuple[str, ...]") -> "UnknownNameError":
        return cls(f"unknown {kind} {name!r}", found=f"known: {', '.join(known)}", do="use one of the known names")


class BudgetError(InputError):
    """A budget that cannot be met, with what can be."""


class PlanMismatchError(InputError):
    """A plan, or a saved folder, that was made for another model."""


class FileDamagedError(InputError):
    """A file that is truncated, tampered with or not what its name says."""


class RunExistsError(InputError, FileExistsError):
    """An output folder that already holds a run and may not be overwritten without `--force`."""


class NotFiniteError(InputError, ArithmeticError):
    """A NaN or an infinity where numbers were expected."""


class MissingExtraError(NiwakiError, ImportError):
    """An optional dependency that is not installed; names the extra that brings it."""

    exit_code = 2


class CannotCutError(NiwakiError, RuntimeError):
    """A model that neither door can cut: names the module, the operation and the source line."""


class OutOfMemoryError(NiwakiError, MemoryError):
    """The device ran out of memory; nothing was written."""


class ProcessLostError(NiwakiError, RuntimeError):
    """One of several processes that train together is gone; checkpoints stay."""


class NothingChangedWarning(UserWarning):
    """A call that was valid but changed nothing."""


class BudgetMissedWarning(UserWarning):
    """A budget that was not met: the result is what was reached."""


@contextmanager
def making(folder: Path) -> Iterator[None]:
    """Inside, a folder is made; where the system refuses, the place is wrong.

    Raises:
        InputError: in place of an OSError that is not niwaki's own.
    """
    try:
        yield
    except NiwakiError:
        raise
    except OSError as cause:
        raise InputError(
            f"write a run to {folder}",
            found=cause.strerror or type(cause).__name__,
            where=str(cause.filename or folder),
            do="choose a place where folders can be made",
        ) from cause
