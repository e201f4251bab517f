"""`niwaki report`: tables in the terminal and one HTML page."""

from pathlib import Path
from typing import Annotated

import typer

from niwaki.cli.options import AsJson
from niwaki.cli.talk import say, show


def report(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A run's folder, or one that holds several.")],
    html: Annotated[Path | None, typer.Option(help="Write the page here instead of FOLDER/report.html.")] = None,
    page: Annotated[bool, typer.Option("--page/--no-page", help="Write the HTML page.")] = True,
    as_json: AsJson = False,
) -> None:
    """Show a saved run, or several side by side. Writes one self-contained HTML page, too."""
    import niwaki.report
    from niwaki.report.reading import read

    runs = read(folder)
    drawn = niwaki.report.terminal(folder)
    written = niwaki.report.write(folder, html) if page or html is not None else None
    data = [{"folder": str(run.folder), **run.data} for run in runs]
    show(drawn, data={"runs": data, "page": written and str(written)}, as_json=as_json)
    if written is not None:
        say(f"page: {written}")
