"""`niwaki report`: tables in the terminal and one HTML page."""

from pathlib import Path
from typing import Annotated

import typer

from niwaki.cli.options import AsJson
from niwaki.cli.talk import say, show, warn


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="FOLDER...", help="A run's folder, a sweep's, one that holds several, or several."),
    ],
    html: Annotated[
        Path | None,
        typer.Option(help="Write the page here; unless said into FOLDER, of several folders only if said."),
    ] = None,
    page: Annotated[bool, typer.Option("--page/--no-page", help="Write the HTML page.")] = True,
    as_json: AsJson = False,
) -> None:
    """Show a saved run or a sweep, or several runs side by side. Writes one self-contained HTML page, too."""
    import niwaki.report

    asked = folders[0] if len(folders) == 1 else folders
    data, drawn = niwaki.report.data(asked), niwaki.report.terminal(asked)
    for folder, why in data.get("left_out", {}).items():
        warn(f"left out: {folder}: {why}")
    wanted = html is not None or (page and len(folders) == 1)
    written = niwaki.report.write(asked, html) if wanted else None
    show(drawn, data=data | {"page": written and str(written)}, as_json=as_json)
    if written is not None:
        say(f"page: {written}")
    elif page:
        say("no page: give --html FILE for one of several folders")
