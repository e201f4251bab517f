"""One tree of errors. Every message says what was asked, what was found, where, and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class NiwakiError(Exception):
    """Root of all errors that niwaki raises itself.

    The four parts are kept as attributes, so that the command line and `--json` can print them apart.
    `exit_code` is what the command line returns: 2 for the user's mistakes, 1 for everything else.
    """

    exit_code = 1

    def __init__(self, asked: str, *, found: str = "", where: str = "", do: str = "") -> None:
        self.asked, self.found, self.where, self.do = asked, found, where, do
        parts = [asked, found and f"found: {found}", where and f"where: {where}", do and f"do: {do}"]
        super().__init__("; ".join(part for part in parts if part))


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
