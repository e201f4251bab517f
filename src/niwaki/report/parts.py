"""What pages are put together from: the frame, tables, bars, commands."""

import re
from collections.abc import Sequence
from html import escape

from niwaki.report.script import HASH, SCRIPT
from niwaki.report.style import STYLE
from niwaki.report.tables import Table

EXPONENT = re.compile(r"[\d.]+e-\d+")
"""Numbers with a hyphen, behind which a line could break."""
LONG = 16  # rows: longer tables scroll within themselves, a phone shows about this many
POLICY = f"default-src 'none'; style-src 'unsafe-inline'; script-src '{HASH}'; img-src data:"


def page(heading: str, lead: str, body: Sequence[str]) -> str:
    """One HTML page that loads nothing from anywhere."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(heading)}</title><style>{STYLE}</style></head>'
        f"<body><main><header><h1>{escape(heading)}</h1><p>{_beside(lead)}</p></header>{''.join(body)}</main>"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def drawn(table: Table, *, search: str = "", fold: bool = False) -> str:
    """A table in a box that scrolls within itself where it is wide or long; empty tables draw their note, if any.

    Args:
        search: what is searched, where the table gets a search field.
        fold: whether it starts closed, with its number of rows.
    """
    note = f"<p>{escape(table.note)}</p>" if table.note else ""
    if not table.rows:
        return f"<section><h2>{escape(table.title)}</h2>{note}</section>" if note else ""
    classes = ["number" if number in table.right else "text" for number in range(len(table.heads))]
    head = "".join(f'<th class="{kind}">{escape(name)}</th>' for kind, name in zip(classes, table.heads, strict=True))
    body = []
    for number, row in enumerate(table.rows):
        link = table.links[number] if table.links else None
        cells = [_unbroken(escape(cell)) if n in table.right else escape(cell) for n, cell in enumerate(row)]
        if link:
            cells[table.linked] = f'<a href="{escape(link)}">{cells[table.linked]}</a>'
        body.append(
            "<tr>" + "".join(f'<td class="{k}">{c}</td>' for k, c in zip(classes, cells, strict=True)) + "</tr>"
        )
    top = f"<thead><tr>{head}</tr></thead>" if any(table.heads) else ""
    long = " long" if len(table.rows) > LONG else ""
    seek = f' data-search="{escape(search)}"' if search and len(table.rows) > 1 else ""
    box = f'<div class="box{long}"{seek} tabindex="0"><table>{top}<tbody>{"".join(body)}</tbody></table></div>'
    if fold:
        return (
            f"<details><summary><h2>{escape(table.title)}</h2> <small>{len(table.rows)}</small></summary>"
            f"{note}{box}</details>"
        )
    return f"<section><h2>{escape(table.title)}</h2>{note}{box}</section>"


def _beside(words: str) -> str:
    """A sentence in which percentages stay beside their sign."""
    return escape(words).replace(" %", "\u00a0%")


def _unbroken(number: str) -> str:
    """A number that stays beside its unit; where it has to, a line breaks in front of a spread or a remark."""
    if not any(character.isdigit() for character in number):
        return number  # words
    joined = number.replace(" ", "\u00a0").replace("\u00a0±", " ±").replace("\u00a0(", " (")
    return EXPONENT.sub(r'<span class="whole">\g<0></span>', joined)


def bar(after: float, before: float, most: float, said: str) -> str:
    """A bar of length `before` of `most`, filled up to `after`."""
    return (
        f'<svg class="bar" role="img" aria-label="{escape(said)}"><title>{escape(said)}</title>'
        f'<rect class="before" width="{100 * before / most:.2f}%" height="100%" rx="2"/>'
        f'<rect class="after" width="{100 * after / most:.2f}%" height="100%" rx="2"/></svg>'
    )


def bars(title: str, words: str, heads: tuple[str, ...], rows: Sequence[tuple[tuple[str, ...], str]]) -> str:
    """A table whose last column is a bar: each row is its cells (a name, then numbers) and the bar."""
    head = "".join(f'<th class="{"number" if number else "text"}">{escape(h)}</th>' for number, h in enumerate(heads))
    body = []
    for cells, drawing in rows:
        name, *numbers = map(escape, cells)
        body.append(
            f'<tr><td class="text layer">{name}</td>'
            + "".join(f'<td class="number">{_unbroken(n)}</td>' for n in numbers)
            + f'<td class="wide">{drawing}</td></tr>'
        )
    long = " long" if len(rows) > LONG else ""
    return (
        f"<section><h2>{escape(title)}</h2><p>{escape(words)}</p>"
        f'<div class="box{long}" tabindex="0"><table class="bars"><thead><tr>{head}<th></th></tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div></section>"
    )


def command(text: str | None) -> str:
    """The exact command, to copy."""
    if not text:
        return ""
    words = " ".join(f"<span>{escape(word)}</span>" for word in text.split(" "))  # lines break between words only
    return f'<section><h2>Command</h2><div class="command"><code>{words}</code></div></section>'


def figure(drawing: str, caption: str = "") -> str:
    """A picture on a sheet of its own."""
    return f"<figure>{drawing}{f'<figcaption>{escape(caption)}</figcaption>' if caption else ''}</figure>"
