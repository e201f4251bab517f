"""The tables of a report as plain rows; the terminal and the page draw the same ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from niwaki.report.aimed import aimed, called, sides
from niwaki.report.numbers import budget, change, noisy, plain, short, title, with_spread
from niwaki.report.points import candidates_of, layer_widths, metric_of
from niwaki.report.reading import Run

EXPORTED = ("bytes", "difference", "float_difference", "agreement", "integer_layers", "latency", "pytorch_latency")
COSTS = ("params", "macs", "bytes", "latency", "runtime_latency", "runtime_energy")


@final
@dataclass(frozen=True)
class Table:
    """Title, column heads and rows of text; columns in `right` are numbers."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: frozenset[int] = frozenset()
    note: str = ""
    links: tuple[str | None, ...] = ()
    """Where the row's cell number `linked` leads, on a page."""
    linked: int = 0


def names_of(*sides: dict[str, Any]) -> list[str]:
    """Names of all measurements in the order they first appear."""
    return list(dict.fromkeys(name for side in sides for name in side))


def before_after(run: Run) -> Table:
    """Every measurement before and after."""
    before, after = sides(run)
    rows = tuple(
        (
            called(run, name),
            with_spread(before.get(name)),
            with_spread(after.get(name)),
            change(before.get(name), after.get(name)),
        )
        for name in names_of(before, after)
    )
    return Table("Before and after", ("", "before", "after", "change"), rows, frozenset({1, 2, 3}))


def validation(run: Run) -> Table:
    """What a training measured on the split that it was stopped and chosen by."""
    rows = tuple(
        (title(name), with_spread(record), str(record.get("definition") or ""))
        for name, record in run.get("validation").items()
    )
    return Table("On the validation split", ("", "after", "definition"), rows, frozenset({1}))


def stages(run: Run) -> Table:
    """What was measured after each stage, but for the costs, which only the cut changes."""
    taken = [(str(stage.get("stage", "?")), stage.get("measurements") or {}) for stage in run.get("stages")]
    names = names_of(*(measurements for _, measurements in taken))
    names = [name for name in names if name not in COSTS]  # what the cut fixed for all stages after it
    rows = tuple((stage, *(with_spread(found.get(name)) for name in names)) for stage, found in taken)
    if not names:
        rows = ()
    return Table("Stage by stage", ("stage", *map(title, names)), rows, frozenset(range(1, len(names) + 1)))


def groups(run: Run) -> Table:
    """The plan: what every group keeps, and why the others keep everything."""
    rows = []
    for group in run.get("groups"):
        units, kept = group.get("units"), group.get("kept")
        share = "" if not units or kept is None else f"{100 * kept / units:.0f} %"
        why = group.get("fixed") or ""
        if not why and group.get("exact") is False:
            why = f"inexact: {group.get('inexact') or 'not said'}"
        why = f"fixed: {why}" if group.get("fixed") else why
        if group.get("new"):
            why = "; ".join(filter(None, (f"{_count(group['new'])} new", why)))
        rows.append((str(group.get("name")), _count(kept), _count(units), share, why))
    return Table("Plan", ("group", "kept", "of", "share", "remark"), tuple(rows), frozenset({1, 2, 3}))


def repaired(run: Run) -> Table:
    """What stands in for removed and rounded channels, as far as it was predicted; and what was left whole."""
    rows = [
        (
            str(one.get("weight")),
            str(one.get("reader")),
            f"{_count(one.get('kept'))} of {_count(one.get('of'))}",
            f"{100 * (one.get('unrepaired') or 0):.2f} %",
            f"{100 * (one.get('error') or 0):.2f} %",
            "; ".join(one.get("warnings") or ()),
        )
        for one in run.get("repaired")
    ]
    rows += [(name, "", "all", "", "", f"left whole: {why}") for name, why in run.get("left_whole").items()]
    note = "Predicted errors are shares of the channels' power, by weights and statistics alone; no data was seen."
    heads = ("layer", "read by", "kept", "predicted error, bare", "repaired", "remark")
    return Table("Channels that others stand in for", heads, tuple(rows), frozenset({2, 3, 4}), note if rows else "")


def exports(run: Run) -> Table:
    """The files for other runtimes."""
    return exports_table(run.get("exports"))


def exports_table(told: dict[str, Any]) -> Table:
    """What was written for which runtime, how far it is from PyTorch, and how long both take."""
    rows = []
    for name, entry in told.items():
        known = {key: one for key in EXPORTED if isinstance((one := entry.get(key) or {}).get("value"), (int, float))}
        latency, beside, difference = known.get("latency"), known.get("pytorch_latency"), known.get("difference")
        faster = ""
        if latency and beside and latency["value"]:
            noise = noisy(latency) or noisy(beside)
            faster = "too noisy to compare" if noise else f"{beside['value'] / latency['value']:.2f}"
        refused = ", ".join(map(str, entry.get("tensorrt_refuses") or ()))
        judge = " from simulated INT8" if "agreement" in known else ""
        remarks = (
            entry.get("failed") and f"FAILED: {entry['failed']}",
            *_integers(known),
            entry.get("note"),
            refused and f"TensorRT would refuse {refused}",
        )
        rows.append(
            (
                name,
                str(entry.get("file") or ""),
                str(entry.get("batch") or ""),
                with_spread(known.get("bytes")),
                "-" if difference is None else f"{difference['value']:.1e}{judge}",
                with_spread(latency),
                with_spread(beside),
                faster,
                "; ".join(filter(None, remarks)),
            )
        )
    heads = (
        "export",
        "file",
        "batch",
        "size",
        "difference",
        "its runtime",
        "PyTorch eager",
        "times as fast",
        "remark",
    )
    note = "Each file was run in its own runtime on inputs it was not exported with; times are medians, taken in turns."
    note += " The difference is from PyTorch, relative to the largest output."
    if any("agreement" in entry for entry in told.values()):
        note += (
            " But INT8 is held to the network that rounds as it does, simulated in PyTorch: a number near a tie may "
            "fall either way there, so its difference is not held to the 1e-4 of the others, and agreement says more."
        )
    return Table("Exports", heads, tuple(rows), frozenset({3, 4, 5, 6, 7}), note if rows else "")


def _integers(known: dict[str, Any]) -> list[str]:
    """What an INT8 file gives up, in words."""
    said = []
    if "agreement" in known:
        said.append(f"largest output agrees in {100 * known['agreement']['value']:.1f} %")
    if "float_difference" in known:
        said.append(f"{known['float_difference']['value']:.1e} from PyTorch in floats")
    if "integer_layers" in known:
        said.append(f"{known['integer_layers']['value']:.0f} products on integers")
        said += known["integer_layers"].get("uncounted") or []
    return said


def candidates(run: Run) -> Table:
    """What else was tried."""
    rows = tuple(
        (
            str(candidate.get("label") or ""),
            _short(candidate.get("macs"), "MACs"),
            _short(candidate.get("params"), "parameters"),
            _short(candidate.get(run.metric), "%"),
        )
        for candidate in candidates_of(run)
    )
    return Table("Candidates", ("", "MACs", "parameters", title(run.metric)), rows, frozenset({1, 2, 3}))


def receipt(run: Run) -> Table:
    """What the judge found."""
    found = run.get("receipt")
    if not found and run.trained:
        return Table("Judge", ("", ""), ())
    if not found:
        return Table("Judge", ("", ""), (), note="No receipt: nobody compared the cut model with the masked original.")
    inexact = found.get("inexact") or []
    rows = (
        ("verdict", "passed" if found.get("passed") else "NOT passed"),
        ("largest difference, float64", f"{found.get('difference', float('nan')):.3g}"),
        ("largest output", f"{found.get('scale', float('nan')):.3g}"),
        ("exact", "yes" if found.get("exact") else "no: " + ("; ".join(inexact) or "not said why")),
        ("door", str(found.get("door", "-"))),
        ("saving", "physical" if found.get("physical", True) else "simulated: zeros in unchanged tensors"),
    )
    return Table("Judge", ("cut model against masked original", ""), rows)


def uncounted(run: Run) -> Table:
    """What the trace and the numbers leave out: said, so that nobody takes silence for a yes."""
    everything = "every operation has a rule, no number was read out of data, every cost was counted"
    rows = [
        ("unknown operation", f"{one.get('operation') or '?'}{_in(one)}", "held fixed: what it touches keeps its width")
        for one in run.get("unknown")
    ]
    rows += [
        ("read out of data", _pairs(one), "a branch that other data take was not seen") for one in run.get("data_reads")
    ]
    rows += [
        ("constants not folded", name, "it reads removed units and could not take them over")
        for name in run.get("unfolded")
    ]
    seen: dict[str, list[str]] = {}
    for side in ("before", "after"):
        for name, record in run.get(side).items():
            for what in record.get("uncounted") or ():
                seen.setdefault(str(what), [])
                seen[what] += [title(name)] if title(name) not in seen[what] else []
    rows += [("not counted", what, "in " + ", ".join(names)) for what, names in seen.items()]
    note = "" if rows else f"Nothing: {'every cost was counted' if run.trained else everything}."
    return Table("What was not seen or not counted", ("", "what", "meaning"), tuple(rows), note=note)


def promises(run: Run) -> Table:
    """What the plan promised before anything was cut, beside what was measured afterwards."""
    rows = []
    after, alone = sides(run)[1], run.get("after")
    for name, value in run.get("promised").items():
        there = f"runtime_{name}" if f"runtime_{name}" in after else name  # of the budget's target
        record = after.get(there)
        if record is None or not isinstance(value, (int, float)) or isinstance(value, bool):
            continue
        label = called(run, there) if there != name else title(name)
        rows.append((label, *_promise(value, record)))
        if there in alone and alone[there] is not record:
            rows.append(("the same, measured again by itself", *_promise(value, alone[there])))
    heads = ("", "promised by the plan", "measured", "difference")
    chosen = run.get("measured")
    what, unit = chosen.get("of") or "latency", chosen.get("unit") or "ms"
    rounds = [(one.get("promised"), one.get("measured")) for one in chosen.get("rounds") or ()]
    for number, (said, took) in enumerate(rounds, start=1):
        if said and took:
            pair = short(said, unit), short(took, unit)
            rows.append((f"{what} in turns with the uncut, plan {number}", *pair, f"{100 * (took / said - 1):+.2f} %"))
    note = ""
    if rounds and chosen.get("limit") and chosen.get("off") is not None:
        note = (
            f"Asked for: {short(chosen['limit'], unit)} of {what}. Plans were chosen, cut and measured until one was "
        )
        note += f"near enough: {len(rounds)}; that of this run is off by {100 * chosen['off']:+.1f} %."
        note += " The result is what was measured in turns with the uncut network, in the budget's runtime."
    return Table("Promised and measured", heads, tuple(rows), frozenset({1, 2, 3}), note=note)


def _promise(value: float, record: dict[str, Any]) -> tuple[str, str, str]:
    """What was promised, what was measured, and how far they are apart."""
    unit, found = record.get("unit") or "", float(record["value"])
    apart = "equal" if found == value else f"{100 * (found - value) / value:+.2f} %" if value else ""
    whole = unit in ("MACs", "parameters", "bytes")
    said = (f"{value:,}", f"{found:,.0f}") if whole else (short(value, unit), with_spread(record))
    return *said, apart


def widths_beside(runs: Sequence[Run]) -> Table:
    """Widths of every layer that some run cut, run by run; only of runs of one and the same model."""
    if len({run.get("model").get("fingerprint") for run in runs}) != 1 or not runs[0].get("model").get("fingerprint"):
        return Table("Widths side by side", (), ())
    found = [{name: (before, after) for name, before, after in layer_widths(run)} for run in runs]
    names = list(dict.fromkeys(name for widths in found for name in widths))
    before = {name: widths[name][0] for widths in found for name in widths}
    rows = tuple(
        (name, str(before[name]), *(str(widths[name][1]) if name in widths else "all" for widths in found))
        for name in names
    )
    heads = ("layer", "before", *(run.name for run in runs))
    return Table("Widths side by side", heads, rows, frozenset(range(1, len(heads))))


def comparison(runs: Sequence[Run]) -> Table:
    """Several runs side by side."""
    rows = []
    for run in runs:
        verdict = run.get("receipt").get("passed")
        rows.append(
            (
                run.name,
                str(run.get("method").get("name", "?")),
                "; ".join(map(budget, run.get("budget"))),
                _side(run, "macs"),
                _side(run, "params"),
                _side(run, "latency"),
                _points(run),
                "-" if verdict is None else "passed" if verdict else "NOT passed",
            )
        )
    heads = ("run", "method", "budget", "MACs", "parameters", "latency", metric_of(runs), "judge")
    return Table("Runs side by side", heads, tuple(rows), frozenset({3, 4, 5, 6}))


def missing(left_out: Mapping[str, str]) -> Table:
    """Runs that could not be read."""
    return Table("Left out", ("run", "why"), tuple(left_out.items()))


def facts(run: Run, *, command: bool = True) -> Table:
    """Who made this, with what, from what, how long it took; `command` is False where it is shown on its own."""
    model, method = run.get("model"), run.get("method")
    rows = [
        ("model", " ".join(filter(None, (model.get("source"), model.get("class") and f"({model['class']})")))),
        ("fingerprint", model.get("fingerprint") or ""),
        ("method", ", ".join([str(method.get("name", "?")), *(f"{k}={v}" for k, v in method.items() if k != "name")])),
        ("budget", "; ".join(map(budget, run.get("budget")))),
        ("data", _pairs(run.get("splits"))),
        ("command", (run.data.get("command") or "") if command else ""),
        ("made", run.data.get("created") or ""),
        ("versions", _pairs({"niwaki": run.data.get("niwaki"), **run.get("versions")})),
        ("for from_pretrained", run.data.get("pretrained") or ""),
        ("seconds", _pairs({k: f"{v:.2f}" if isinstance(v, float) else v for k, v in run.get("seconds").items()})),
    ]
    return Table("How it was made", ("", ""), tuple((head, text) for head, text in rows if text))


def settings(run: Run) -> Table:
    """Every setting of the run, nested ones by dotted name."""
    return Table("Settings", ("setting", "value"), tuple(_flat(run.settings)))


def definitions(runs: Sequence[Run]) -> Table:
    """What every number means, where it was taken, and what it leaves out."""
    seen: dict[str, tuple[str, ...]] = {}
    for run in runs:
        for side in reversed(sides(run)):
            for name, record in side.items():
                uncounted = ", ".join(record.get("uncounted") or ()) or "-"
                words = called(run, name) if len(runs) == 1 else title(name)
                seen.setdefault(name, (words, record.get("definition") or "", record.get("device") or "", uncounted))
    return Table("What the numbers mean", ("", "definition", "measured on", "not counted"), tuple(seen.values()))


def headline(run: Run) -> str:
    """The run in one sentence."""
    who = run.get("model").get("class") or run.get("model").get("source") or "the model"
    costs = () if run.trained else ("macs", "params")
    shares = {name: share for name in costs if (share := run.share(name))}
    grown = any(share > 1 for share in shares.values())
    said = [f"{100 * share:.1f} % of the {title(name)}" + ("" if grown else " stay") for name, share in shares.items()]
    new = sum(bool(group.get("new")) for group in run.get("groups"))
    if new:
        said.append(f"{new} group{'s' if new > 1 else ''} grew")
    timed = aimed(run)
    if timed is not None:
        said.append(timed.words)
    before, after = run.number("before", run.metric), run.number("after", run.metric)
    if before is not None and after is not None:
        said.append(f"{title(run.metric)} {before:.2f} → {after:.2f} %")
    passed = run.get("receipt").get("passed")
    if passed is not None:
        said.append("the judge passed the cut" if passed else "the judge did NOT pass the cut")
    words = "; ".join(said) or "no cost was measured before and after"
    if run.trained:
        return f"Trained {who}: {'; '.join(said) or 'no accuracy was measured'}."
    if grown:
        return f"{run.get('method').get('name', 'A method')} made some of {who} wider: {words}."
    return f"{run.get('method').get('name', 'A method')} made {who} smaller: {words}."


def _side(run: Run, name: str) -> str:
    value, share = run.number("after", name), run.share(name)
    if value is None:
        return "-"
    text = short(value, run.get("after")[name].get("unit") or "")
    if any(noisy(record) for record in (run.get("before").get(name), run.get("after")[name]) if record):
        return f"{text} (noisy)"
    return text if share is None else f"{text} ({100 * share:.0f} %)"


def _points(run: Run) -> str:
    before, after = run.number("before", run.metric), run.number("after", run.metric)
    if after is None:
        return "-"
    return f"{after:.2f} %" if before is None else f"{after:.2f} % ({after - before:+.2f})"


def _short(value: float | None, unit: str) -> str:
    return "-" if value is None else short(value, unit)


def _count(value: float | None) -> str:
    return "-" if value is None else plain(value)


def _in(record: dict[str, Any]) -> str:
    places = [str(record[key]) for key in ("module", "where") if record.get(key)]
    return f" ({', '.join(places)})" if places else ""


def _pairs(record: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in _flat(record))


def _flat(record: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in record.items():
        if isinstance(value, dict) and value:
            rows += _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            for number, item in enumerate(value):
                rows += _flat(item, f"{prefix}{key}." if len(value) == 1 else f"{prefix}{key}.{number}.")
        elif value is not None and value != {} and value != []:
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            rows.append((f"{prefix}{key}", text))
    return rows
