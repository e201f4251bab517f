"""The report as one HTML page that needs nothing from anywhere: no script, no font, no picture from outside."""

from collections.abc import Sequence
from html import escape

from niwaki.report.points import cost_of, layer_widths, points
from niwaki.report.reading import Run
from niwaki.report.scatter import legend, scatter
from niwaki.report.style import STYLE
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
    receipt,
    repaired,
    settings,
    stages,
)

MANY = 24  # longer tables start folded: a phone shows about this many rows


def drawn(table: Table, *, fold: bool = False) -> str:
    """A table in a box that scrolls sideways where the screen is narrow; empty tables draw nothing."""
    if not table.rows:
        return f"<h2>{escape(table.title)}</h2><p>{escape(table.note)}</p>" if table.note else ""
    classes = ["number" if number in table.right else "text" for number in range(len(table.heads))]
    head = "".join(f'<th class="{kind}">{escape(name)}</th>' for kind, name in zip(classes, table.heads, strict=True))
    body = "".join(
        "<tr>"
        + "".join(f'<td class="{kind}">{escape(cell)}</td>' for kind, cell in zip(classes, row, strict=True))
        + "</tr>"
        for row in table.rows
    )
    top = f"<thead><tr>{head}</tr></thead>" if any(table.heads) else ""
    box = f'<div class="box"><table>{top}<tbody>{body}</tbody></table></div>'
    if fold:
        head = f"<h2>{escape(table.title)}</h2> <small>{len(table.rows)}</small>"
        return f"<details><summary>{head}</summary>{box}</details>"
    return f"<h2>{escape(table.title)}</h2>{box}"


def widths(run: Run) -> str:
    """Output width of every cut layer: the bar is the width before, its filled part the width after."""
    layers = layer_widths(run)
    if not layers:
        return ""
    widest = max(before for _, before, _ in layers)
    rows = []
    for name, before, after in layers:
        bar = (
            f'<svg class="bar" role="img" aria-label="{before} before, {after} after">'
            f'<rect class="before" width="{100 * before / widest:.2f}%" height="100%" rx="2"/>'
            f'<rect class="after" width="{100 * after / widest:.2f}%" height="100%" rx="2"/></svg>'
        )
        rows.append(
            f'<tr><td class="text layer">{escape(name)}</td><td class="number">{before}</td>'
            f'<td class="number">{after}</td><td class="wide">{bar}</td></tr>'
        )
    return (
        "<h2>Widths</h2><p>Output width of every cut layer: the whole bar before, the filled part after.</p>"
        '<div class="box"><table class="widths"><thead><tr><th class="text">layer</th><th class="number">before</th>'
        f'<th class="number">after</th><th></th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def trade(runs: Sequence[Run]) -> str:
    """The accuracy/cost plot, or the reason why there is none."""
    found, cost = points(runs), cost_of(runs)
    if cost is None or not any(point.series != "uncut" for point in found):
        return "<h2>Accuracy and cost</h2><p>No plot: accuracy was not measured (no data was given).</p>"
    title = {"macs": "MACs", "params": "parameters"}.get(cost, cost)
    plot = scatter(found, cost=title, joined=len(runs) > 1)
    return f"<h2>Accuracy and cost</h2><figure>{plot}{legend(found)}</figure>"


def page_of(runs: Sequence[Run], *, heading: str) -> str:
    """The page for one run in full or for several side by side."""
    if len(runs) == 1:
        run = runs[0]
        lead = headline(run)
        body = [
            drawn(before_after(run)),
            drawn(stages(run)),
            trade(runs),
            drawn(candidates(run)),
            widths(run),
            drawn(groups(run), fold=len(run.get("groups")) > MANY),
            drawn(repaired(run), fold=len(run.get("repaired")) > MANY),
            drawn(receipt(run)),
            drawn(exports(run)),
            drawn(facts(run)),
            drawn(settings(run), fold=True),
        ]
    else:
        lead = f"{len(runs)} runs"
        body = [drawn(comparison(runs)), trade(runs)]
        for run in runs:
            parts = [drawn(facts(run)), drawn(before_after(run)), widths(run), drawn(receipt(run))]
            body.append(f"<details><summary><h2>{escape(run.name)}</h2></summary>{''.join(parts)}</details>")
    body.append(drawn(definitions(runs)))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f'<meta name="color-scheme" content="light dark"><title>{escape(heading)}</title><style>{STYLE}</style></head>'
        f"<body><main><header><h1>{escape(heading)}</h1><p>{escape(lead)}</p></header>{''.join(body)}</main></body></html>\n"
    )
