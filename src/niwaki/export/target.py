"""What every target of an export is: a format, and the runtime that reads it."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from niwaki.errors import MissingExtraError
from niwaki.measure.turns import Times, in_turns

Opened = Callable[[Any], list[Tensor]]
"""From inputs to outputs."""


class Target(ABC):
    """A format that a network leaves PyTorch in. Settings are fields; facts about the format are class variables."""

    name: ClassVar[str]
    """As it is asked for."""
    extension: ClassVar[str]
    """Of the file, with the dot."""
    needs: ClassVar[tuple[str, ...]]
    """Packages without which it is neither written nor run."""
    extra: ClassVar[str]
    """What installs them."""
    runtime: ClassVar[str]
    """What runs the file, in words."""
    dynamic: ClassVar[bool] = True
    """Whether one file can take batches of any length."""
    advice: ClassVar[str] = ""
    """What else to do where a package is missing."""

    @abstractmethod
    def write(self, model: nn.Module, example: Any, file: Path, *, dynamic_batch: bool) -> None:
        """Write `file` (and, where the format has several, others beside it); nobody has run it yet.

        Raises:
            NiwakiError: the exporter refuses the model.
        """

    @abstractmethod
    def open(self, file: Path, *, threads: int | None = None) -> Opened:
        """A function from inputs to what the format's own runtime computes from them, on so many CPU threads.

        Raises:
            FileDamagedError: the runtime can't read the file.
        """

    def need(self) -> None:
        """Refuse early where a package is missing.

        Raises:
            MissingExtraError: names what is not installed, and what installs it.
        """
        missing = [package for package in self.needs if find_spec(package) is None]
        if missing:
            raise MissingExtraError(
                f"export to {self.name}",
                found=f"not installed: {', '.join(missing)}",
                do=f"pip install '{self.extra}'" + (f"; {self.advice}" if self.advice else ""),
            )

    def run(self, file: Path, inputs: Any) -> list[Tensor]:
        """What the format's own runtime computes from `inputs`."""
        return self.open(file)(inputs)

    def time(
        self,
        file: Path,
        inputs: Any,
        *,
        beside: dict[str, Callable[[], Any]] | None = None,
        threads: int | None = None,
        runs: int = 30,
        warm_up: int = 3,
    ) -> dict[str, Times]:
        """How long the file takes on `inputs`, under the target's name, in turns with other calls."""
        opened = self.open(file, threads=threads)
        return in_turns({self.name: lambda: opened(inputs), **(beside or {})}, runs=runs, warm_up=warm_up)
