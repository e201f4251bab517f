"""What the command line says: logs and progress on stderr, results and, with --json, failures on stdout."""

import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from niwaki.errors import BudgetMissedWarning, NiwakiError, NothingChangedWarning, OutOfMemoryError, Setting, joined

if TYPE_CHECKING:
    from rich.console import RenderableType

Usage: Any = typer.BadParameter.__mro__[1].__mro__[
    1
]  # ClickException: typer brings its own click, and names it nowhere


OURS = (NothingChangedWarning, BudgetMissedWarning)


class _Stderr(logging.Handler):
    """Writes to whatever stderr is at the moment: a live display puts itself in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stderr, flush=True)


def start_log(*, quiet: bool) -> None:
    """niwaki's own log lines on stderr, once."""
    log = logging.getLogger("niwaki")
    log.setLevel(logging.WARNING if quiet else logging.INFO)
    for old in [handler for handler in log.handlers if isinstance(handler, _Stderr)]:
        log.removeHandler(old)
    log.addHandler(_Stderr())


def say(text: str) -> None:
    """One line of talk."""
    logging.getLogger("niwaki.cli").info(text)


def warn(text: str) -> None:
    """One line that --quiet leaves."""
    logging.getLogger("niwaki.cli").warning("warning: %s", text)


@contextmanager
def warnings_said() -> Iterator[None]:
    """Inside, niwaki's own warnings are talk, each time; the others are shown as Python shows them."""
    with warnings.catch_warnings():
        for kind in OURS:
            warnings.simplefilter("always", kind)
        shown = warnings.showwarning

        def say_it(message: Any, category: Any, *where: Any, **more: Any) -> None:
            if issubclass(category, OURS):
                warn(str(message))
            else:
                shown(message, category, *where, **more)

        warnings.showwarning = say_it
        yield


def show(result: "RenderableType", *, data: Any, as_json: bool) -> None:
    """The result: pure JSON, or what rich draws."""
    if as_json:
        typer.echo(json.dumps(data, indent=2, allow_nan=False))
        return
    from rich.console import Console

    width = None if sys.stdout.isatty() else 160  # a file or pipe has no width of its own
    Console(width=width, soft_wrap=False).print(result)


def show_failure(raised: BaseException, *, as_json: bool, debug: bool, write: Callable[[Setting], str] = str) -> int:
    """Say what went wrong, in four parts, its settings written by `write`, and return the exit code."""
    if debug and not isinstance(raised, (NiwakiError, Usage)):
        import traceback

        traceback.print_exception(raised)
    error: Any = translated(raised)
    if isinstance(error, Usage):
        code, asked, found = int(error.exit_code), "the command line", error.format_message()
        if not as_json:
            error.show()
        error = NiwakiError(asked, found=found, do="see niwaki --help")
    elif isinstance(error, NiwakiError):
        code = error.exit_code
        if not as_json:
            typer.echo(f"error: {joined(error.told(write))}", err=True)
    elif isinstance(error, (KeyboardInterrupt, typer.Abort)):
        code, error = 130, NiwakiError("stopped", do="run again, or `niwaki resume DIR` where a training was under way")
        if not as_json:
            typer.echo("stopped", err=True)
    else:
        code = 1
        lines = str(error).strip().splitlines() or ["no message"]
        error = NiwakiError(f"unexpected {type(error).__name__}", found=lines[0], do="niwaki --debug ... shows where")
        if not as_json:
            typer.echo(f"error: {error}", err=True)
    if as_json:
        typer.echo(json.dumps({"error": error.told(write)}, indent=2))
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


@contextmanager
def stages() -> Iterator[tuple[Callable[[str, float], None], Callable[[int, int, str], None]]]:
    """Inside, two functions: one hears of each finished stage, one of each training step; bars on a terminal."""
    log = logging.getLogger("niwaki")
    if not (sys.stderr.isatty() and log.isEnabledFor(logging.INFO)):
        yield lambda stage, seconds: say(f"{stage}: {seconds:.2f} s"), lambda step, steps, epoch: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as live:
        task = live.add_task("at work", total=None)

        def hear(stage: str, seconds: float) -> None:
            live.console.print(f"[green]done[/green] {stage} [dim]{seconds:.2f} s[/dim]", highlight=False)
            live.update(task, description=f"after {stage}", total=None)

        def step(number: int, steps: int, epoch: str) -> None:
            what = epoch if epoch.startswith("measuring") else f"training, {epoch}"
            live.update(task, description=what, completed=number, total=steps)

        yield hear, step
