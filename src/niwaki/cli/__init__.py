"""The command line: one file per command; results on stdout, talk on stderr. Importing this imports no torch."""

import os
import shlex
import sys

import typer

from niwaki.cli.bench import bench
from niwaki.cli.compress import compress
from niwaki.cli.export import export
from niwaki.cli.kv import kv
from niwaki.cli.listing import Listing
from niwaki.cli.load_check import load_check
from niwaki.cli.measure import measure
from niwaki.cli.methods import methods
from niwaki.cli.report import report
from niwaki.cli.resume import resume
from niwaki.cli.sensitivity import sensitivity
from niwaki.cli.sweep import sweep
from niwaki.cli.talk import show_failure, start_log, warnings_said
from niwaki.cli.trace import trace
from niwaki.cli.train import train
from niwaki.cli.verify import verify
from niwaki.cli.wording import writer
from niwaki.files import first_process

__all__ = ["app", "main"]

app = typer.Typer(
    name="niwaki",
    help="Make trained PyTorch networks smaller and really faster, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command(cls=Listing)(compress)
app.command()(trace)
app.command()(methods)
app.command()(verify)
app.command()(measure)
app.command()(report)
app.command()(kv)
app.command()(sensitivity)
app.command()(sweep)
app.command()(train)
app.command()(resume)
app.command(cls=Listing)(export)
app.command(cls=Listing)(bench)
app.command(name="load-check")(load_check)


def _print_version(wanted: bool) -> None:
    if wanted:
        from niwaki import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    debug: bool = typer.Option(False, "--debug", help="Show the whole traceback of an unexpected error."),
    quiet: bool = typer.Option(False, "--quiet", "-q", help="Say nothing on stderr but warnings and errors."),
    version: bool = typer.Option(
        False, "--version", is_eager=True, callback=_print_version, help="Print the version and stop."
    ),
) -> None:
    """Make trained PyTorch networks smaller and really faster, and prove it.

    Exit codes: 0 done, 1 failed, 2 the input was wrong.
    """
    start_log(quiet=quiet or not first_process())


def main(arguments: list[str] | None = None) -> int:
    """Run the command line on `arguments` (the process's own unless given) and return its exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    spoken = shlex.join(["niwaki", *given])
    command = typer.main.get_command(app)
    try:
        with warnings_said():
            code = command.main(args=list(given), prog_name="niwaki", standalone_mode=False, obj=spoken)
        sys.stdout.flush()
        if code == 130:  # typer swallows the interrupt and says nothing
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except BrokenPipeError:  # the reader went away (`niwaki ... | head`): nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        return show_failure(error, as_json="--json" in given, debug="--debug" in given, write=writer(command, given))
