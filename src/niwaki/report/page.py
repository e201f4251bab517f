"""The report as one HTML page that needs nothing from anywhere: no script, no font, no picture from outside."""

from collections.abc import Mapping, Sequence
from html import escape

from niwaki.report.curves import training
from niwaki.report.numbers import noisy, with_spread
from niwaki.report.parts import bar, bars, command, drawn, figure, page
from niwaki.report.pictures import pictures
from niwaki.report.points import cost_of, layer_widths, metric_of, points, runtimes
from niwaki.report.reading import Run
from niwaki.report.scatter import legend, scatter
from niwaki.report.searches import notes, searches
from niwaki.report.tables import (
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
    settings,
    stages,
    uncounted,
    validation,
    widths_beside,
)

MANY = 24  # longer lists of what stands in for what start folded


def widths(run: Run) -> str:
    """Output width of every cut layer: the bar is the width before, its filled part the width after."""
    layers = layer_widths(run)
    if not layers:
        return ""
    widest = max(max(before, after) for _, before, after in layers)
    rows = [
        ((name, str(before), str(after)), bar(after, before, widest, f"{before} before, {after} after"))
        for name, before, after in layers
    ]
    words = "Output width of every cut layer: the whole bar before, the filled part after."
    if any(after > before for _, before, after in layers):
        words += " Where the filled part is longer, the layer grew."
    return bars("Widths", words, ("layer", "before", "after"), rows)


def latencies(run: Run) -> str:
    """Latency of the small model in every runtime that was timed; nothing where there is one at most."""
    found = runtimes(run)
    if len(found) < 2:
        return ""
    most = max(float(record["value"]) for _, record in found) or 1.0
    rows = []
    for label, record in found:
        value = float(record["value"])
        cell = with_spread(record) + (" (noisy)" if noisy(record) else "")
        rows.append(((label, cell), bar(value, value, most, f"{label}: {cell}; {record.get('definition') or ''}")))
    words = (
        "Median time of a pass of the small model and its spread, of the budget's target the shortest; PyTorch beside "
        "an export was timed in turns with it."
    )
    return bars("Latency by runtime", words, ("runtime", "latency"), rows)


def trade(runs: Sequence[Run]) -> str:
    """The accuracy/cost plot, or the reason why there is none; nothing for a training, which costs what it did."""
    if len(runs) == 1 and runs[0].trained:
        return ""
    found, cost = points(runs), cost_of(runs)
    metric = metric_of(runs)
    head = f"<h2>{escape(metric[:1].upper() + metric[1:])} and cost</h2>"
    if cost is None or not any(point.series != "uncut" for point in found):
        return f"<section>{head}<p>No plot: {escape(metric)} was not measured.</p></section>"
    title = {"macs": "MACs", "params": "parameters"}.get(cost, cost)
    plot = scatter(found, cost=title, joined=len(runs) > 1, metric=metric)
    return f"<section>{head}{figure(plot + legend(found))}</section>"


def page_of(runs: Sequence[Run], *, heading: str, left_out: Mapping[str, str] | None = None) -> str:
    """The page for one run in full or for several side by side, with what was left out."""
    if len(runs) == 1 and not left_out:
        run = runs[0]
        lead = headline(run)
        body = [
            drawn(before_after(run)),
            drawn(validation(run)),
            drawn(stages(run)),
            trade(runs),
            pictures(run),
            training(run),
            latencies(run),
            drawn(notes(run)),
            searches(run),
            widths(run),
            drawn(candidates(run)),
            drawn(groups(run), search="groups"),
            drawn(repaired(run), search="layers", fold=len(run.get("repaired")) > MANY),
            drawn(receipt(run)),
            drawn(promises(run)),
            drawn(exports(run)),
            drawn(uncounted(run)),
            command(run.data.get("command")),
            drawn(facts(run, command=False)),
            drawn(settings(run), search="settings", fold=True),
        ]
    else:
        lead = f"{len(runs)} run{'s' if len(runs) > 1 else ''} side by side."
        body = [drawn(comparison(runs), search="runs"), drawn(missing(left_out or {})), trade(runs)]
        body.append(drawn(widths_beside(runs), search="layers", fold=True))
        for run in runs:
            parts = [
                command(run.data.get("command")),
                drawn(facts(run, command=False)),
                drawn(before_after(run)),
                drawn(validation(run)),
                training(run),
                widths(run),
                drawn(receipt(run)),
                drawn(uncounted(run)),
            ]
            body.append(f"<details><summary><h2>{escape(run.name)}</h2></summary>{''.join(parts)}</details>")
    body.append(drawn(definitions(runs)))
    return page(heading, lead, body)
