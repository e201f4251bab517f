"""What a task shows of its models, inside the page."""

from base64 import b64encode
from html import escape
from itertools import groupby

from niwaki.errors import FileDamagedError
from niwaki.files import PICTURES
from niwaki.report.reading import Run

LARGEST = 1 << 19
"""Bytes of one picture: those that a task shows have a few ten thousand."""
JPEG = b"\xff\xd8\xff"


def pictures(run: Run) -> str:
    """The pictures of a run, those of one row side by side; nothing where there are none.

    Raises:
        FileDamagedError: a file that is missing, too large, or no JPEG.
    """
    listed = run.get("pictures")
    if not listed:
        return ""
    body = []
    for row, group in groupby(listed, key=lambda one: str(one.get("row") or "")):
        figures = []
        for one in group:
            words = str(one.get("words") or "")
            source = f"data:image/jpeg;base64,{_encoded(run, str(one.get('file') or ''))}"
            alt = escape(f"{row}: {words}")
            figures.append(f'<figure><img src="{source}" alt="{alt}"><figcaption>{escape(words)}</figcaption></figure>')
        body.append(f'<p>{escape(row)}</p><div class="row">{"".join(figures)}</div>')
    return f"<section><h2>What it sees</h2>{''.join(body)}</section>"


def _encoded(run: Run, name: str) -> str:
    folder = run.folder / PICTURES
    path = folder / name.rpartition("/")[2]  # whatever the report says, no file of another folder
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as cause:
        raise _damaged(name, str(cause), str(path)) from cause
    if len(content) > LARGEST or not content.startswith(JPEG):
        raise _damaged(name, "no small JPEG", str(path))
    return b64encode(content).decode("ascii")


def _damaged(name: str, found: str, where: str) -> FileDamagedError:
    do = "the file is damaged or was changed; run again"
    return FileDamagedError(f"read the picture {name!r}", found=found, where=where, do=do)
