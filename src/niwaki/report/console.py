"""The report for the terminal."""

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from niwaki.report.reading import Run
from niwaki.report.searches import notes as said
from niwaki.report.tables import (
    Table,
    before_after,
    candidates,
    comparison,
    definitions,
    exports,
    facts,
    groups,
    headline,
    missing,
    promises,
    receipt,
    repaired,
    stages,
    uncounted,
    validation,
)


def drawn(table: Table) -> RenderableType:
    """One table as rich draws it."""
    made = RichTable(title=escape(table.title), title_justify="left", show_header=any(table.heads), expand=False)
    for number, head in enumerate(table.heads):
        made.add_column(escape(head), justify="right" if number in table.right else "left", overflow="fold")
    for row in table.rows:
        made.add_row(*map(escape, row))
    return Padding(made, (0, 0, 1, 0), expand=False)


def terminal_of(runs: Sequence[Run], *, left_out: Mapping[str, str] | None = None) -> RenderableType:
    """One run in full, or several side by side, with what was left out."""
    if len(runs) == 1 and not left_out:
        run = runs[0]
        tables = [before_after(run), validation(run), stages(run), candidates(run), groups(run), repaired(run)]
        tables += [said(run), receipt(run), promises(run), exports(run), uncounted(run), facts(run)]
        head = headline(run)
    else:
        tables, head = [comparison(runs), missing(left_out or {})], f"{len(runs)} run{'s' if len(runs) > 1 else ''}"
    tables.append(definitions(runs))
    notes = [Text(table.note) for table in tables if table.note]
    return Group(Text(head, style="bold"), *(drawn(table) for table in tables if table.rows), *notes)
