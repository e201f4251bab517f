"""What the command line says: logs and progress on stderr, results and, with --json, failures on stdout."""

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from niwaki.errors import NiwakiError, OutOfMemoryError

if TYPE_CHECKING:
    from rich.console import RenderableType

Usage: Any = typer.BadParameter.__mro__[1].__mro__[
    1
]  # ClickException: typer brings its own click, and names it nowhere
EVERY = 5.0  # seconds between progress lines where stderr is no terminal


def start_log(*, quiet: bool) -> None:
    """niwaki's own log lines on stderr, once."""
    log = logging.getLogger("niwaki")
    log.setLevel(logging.WARNING if quiet else logging.INFO)
    for old in [handler for handler in log.handlers if getattr(handler, "niwaki", False)]:
        log.removeHandler(old)
    handler = logging.StreamHandler(sys.stderr)
    handler.niwaki = True  # type: ignore[attr-defined]
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)


def say(text: str) -> None:
    """One line of talk."""
    logging.getLogger("niwaki.cli").info(text)


def show(result: "RenderableType", *, data: Any, as_json: bool) -> None:
    """The result: pure JSON, or what rich draws."""
    if as_json:
        typer.echo(json.dumps(data, indent=2, allow_nan=False))
        return
    from rich.console import Console

    width = None if sys.stdout.isatty() else 160  # a file or pipe has no width of its own
    Console(width=width, soft_wrap=False).print(result)


def show_failure(error: BaseException, *, as_json: bool, debug: bool) -> int:
    """Say what went wrong, in four parts, and return the exit code."""
    if debug and not isinstance(error, (NiwakiError, Usage)):
        import traceback

        traceback.print_exception(error)
    error = translated(error)
    if isinstance(error, (typer.Exit, Usage)) or type(error).__name__ == "Abort":
        code = int(getattr(error, "exit_code", 1))
        if not isinstance(error, Usage):
            return code
        asked, found = "the command line", error.format_message()
        error, shown = NiwakiError(asked, found=found, do="see niwaki --help"), error
        if not as_json:
            shown.show()
    elif isinstance(error, NiwakiError):
        code = error.exit_code
        if not as_json:
            typer.echo(f"error: {error}", err=True)
    elif isinstance(error, KeyboardInterrupt):
        code, error = 130, NiwakiError("stopped", do="run again; nothing half-done was written")
        if not as_json:
            typer.echo("stopped", err=True)
    else:
        code = 1
        lines = str(error).strip().splitlines() or ["no message"]
        error = NiwakiError(f"unexpected {type(error).__name__}", found=lines[0], do="niwaki --debug ... shows where")
        if not as_json:
            typer.echo(f"error: {error}", err=True)
    if as_json:
        parts = {"asked": error.asked, "found": error.found, "where": error.where, "do": error.do}
        typer.echo(json.dumps({"error": parts}, indent=2))
    return code


def translated(error: BaseException) -> BaseException:
    """An out-of-memory error of the device, if torch is there to raise one, as niwaki's own."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        lines = str(error).strip().splitlines() or [""]
        return OutOfMemoryError(
            "run the model", found=lines[0], do="smaller --input or batch, or a larger device; nothing was written"
        )
    return error


Progress = Callable[[int, int, str], None]


@contextmanager
def progress() -> Iterator[Progress]:
    """Inside, a function of steps done, steps in all and a few words; bars on a terminal, plain lines elsewhere."""
    if sys.stderr.isatty() and logging.getLogger("niwaki").isEnabledFor(logging.INFO):
        from rich.console import Console
        from rich.progress import Progress as Bars

        with Bars(console=Console(stderr=True), transient=True) as bars:
            tasks: dict[str, Any] = {}

            def draw(done: int, total: int, words: str) -> None:
                task = tasks.setdefault(words, bars.add_task(words, total=total) if words not in tasks else None)
                bars.update(task, completed=done, total=total)

            yield draw
        return
    last: dict[str, float] = {}

    def line(done: int, total: int, words: str) -> None:
        now = time.monotonic()
        if done >= total or now - last.get("", -EVERY) >= EVERY:
            last[""] = now
            say(f"{words}: {done}/{total}")

    yield line
