"""`niwaki resume`: a run that was killed goes on where its last checkpoint is."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from niwaki.cli.options import AsJson
from niwaki.cli.runs import going_on, read_record
from niwaki.cli.talk import say
from niwaki.errors import FileDamagedError
from niwaki.files import REPORT, partial_of

RESUMABLE = ("train", "compress")


def resume(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The --out of the run.")],
    as_json: AsJson = False,
) -> None:
    """Go on with a run that was killed. Of `niwaki train`, or of `niwaki compress` while it searched or recovered.

    On the CPU the weights at the end are those of a run without the break, bit for bit.
    """
    from niwaki.cli import app
    from niwaki.cli.report import report

    if (folder / REPORT).is_file() and not partial_of(folder).exists():
        say(f"{folder}: ended already")
        report([folder], page=False, as_json=as_json)
        return
    record = read_record(folder)
    arguments = [*record.arguments, *(["--json"] if as_json and "--json" not in record.arguments else [])]
    command = next((word for word in arguments if not word.startswith("-")), "")
    if command not in RESUMABLE:
        found, do = f"the command {command!r}", f"known: {', '.join(RESUMABLE)}"
        raise FileDamagedError(f"resume {folder}", found=found, where=str(record.folder), do=do)
    spoken = shlex.join(["niwaki", *record.arguments])
    with going_on(record):
        code = typer.main.get_command(app).main(args=arguments, prog_name="niwaki", standalone_mode=False, obj=spoken)
    if isinstance(code, int) and code:
        raise typer.Exit(code)
