"""`niwaki load-check`: a saved run loads in a fresh process and computes what it computed when it was saved."""

from pathlib import Path
from typing import Annotated

import typer

from niwaki.cli.options import AsJson, Input, Model
from niwaki.cli.talk import show
from niwaki.errors import InputError


def load_check(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A run's folder.")],
    model: Model,
    shape: Input = None,
    as_json: AsJson = False,
) -> None:
    """Load a saved run and compare its outputs bit by bit with those recorded when it was saved; exit 1 if they differ."""
