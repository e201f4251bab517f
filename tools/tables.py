"""Writes the tables of the documentation from cards and benchmark rows, so that no figure is ever typed.

    python tools/tables.py            write README.md, docs/methods.md and the cards' measured tables
    python tools/tables.py --check    say what is out of date, and exit 1

Sources: the front matter of docs/cards/<role>/<name>.md, and the rows in benchmarks/results/cifar.jsonl, which
benchmarks/cifar.py makes. What was not measured shows as "-"; `benchmark: NAME` in a card's front matter names the page
of docs/benchmarks that a method without rows there has its figures in.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = "benchmarks/results/cifar.jsonl"
ROLES = {
    "methods": "Methods: one published method, or baseline, each",
    "scores": "Scores: rows of units in, one number per unit out",
    "budgets": "Budget rules: the order in which units go",
    "search": "Search: groups cut in turn, as far as a judge allows",
    "repair": "Repair: after the cut, without training",
    "quantize": "Quantisation: whole numbers for weights and activations",
    "kv": "Key/value caches: fewer tokens, channels and bits",
    "distill": "Distillation: what the uncut network still teaches",
    "pressure": "Pressure: towards sparsity, while a network trains",
    "train": "Training",
    "tasks": "Tasks: what a batch means",
    "measure": "Meters",
    "models": "Sources of models",
    "data": "Sources of data",
    "export": "Export",
}
FACTS = ("source", "needs", "passes over data", "exact", "status")
CATALOGUE = """# What is in niwaki

Written by `python tools/tables.py` from the cards and the benchmark's rows; do not edit.

*trial*: works and is tested; settings may change, or figures were not compared with the source's. *stable*: neither.

## Measured

{}
"""
Row = dict[str, Any]


def front_matter(card: Path) -> dict[str, str]:
    """What stands between the first two `---` lines of a card."""
    head = card.read_text(encoding="utf-8").split("---\n", 2)[1]
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in head.splitlines())}


def cards_of(root: Path, role: str) -> list[Path]:
    return sorted((root / "docs" / "cards" / role).glob("*.md"))


def rows_of(root: Path) -> list[Row]:
    """The benchmark's rows of our own cuts; none where it was not run. A peer's rows stand in their own page."""
    path = root / RESULTS
    if not path.exists():
        return []
    listed = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    whole = {row["network"]: row["accuracy"] for row in listed if row.get("what") == "dense"}
    named = [
        {"title": row["settings"]["score"]["name"], **row, "dense": whole[row["network"]]}
        for row in listed
        if row.get("what") == "cut" and row["network"] in whole
    ]
    return [*named, *(row for row in listed if row.get("what") == "recovery")]


def table(heads: Sequence[str], lines: Iterable[Sequence[str]], *, right: int = 99) -> str:
    """A Markdown table; columns from number `right` on are numbers."""
    rule = "|" + "".join("--:|" if number >= right else "---|" for number in range(len(heads)))
    return "\n".join(["| " + " | ".join(heads) + " |", rule, *("| " + " | ".join(line) + " |" for line in lines)])


def measured(rows: Sequence[Row], title: str) -> dict[tuple[str, str], dict[str, list[float]]]:
    """(network, label without its seed) -> accuracies by stage, over seeds, of the method whose card has this title."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    cuts = [row for row in rows if row.get("what") == "cut" and row["title"] == title]
    for row in cuts:
        label = re.sub(r", seed \d+$", "", row["method"])
        entry = found.setdefault((row["network"], label), {})
        same = [r for r in rows if all(r.get(key) == row[key] for key in ("network", "method"))]
        trained = [r for r in same if r["what"] == "recovery"]
        values = {
            "dense": row["dense"],
            "cut": row["cut"],
            "batch norm": row["batch_norm"],
            "difference": row["difference"],
            "macs": row["macs_counted"] / row["macs_before"],
            "honest": float(row["macs_counted"] == row["macs_promised"]),
        }
        if trained:
            best = max(trained, key=lambda r: r["steps"])
            values |= {"recovered": best["recovered"], "steps": best["steps"] * best["epochs"]}
        for name, value in values.items():
            entry.setdefault(name, []).append(value)
    return found


def mean(values: Sequence[float] | None) -> str:
    """The mean, with the span where there are several; "-" where there is nothing."""
    if not values:
        return "-"
    text = f"{statistics.mean(values):.1f}"
    return text if len(values) == 1 else f"{text} ({min(values):.1f}..{max(values):.1f})"


def recovered(entry: dict[str, list[float]]) -> str:
    if "recovered" not in entry:
        return "-"
    runs = len(entry["recovered"])
    seeds = "" if runs == len(entry["cut"]) else f", {runs} seed{'s' if runs > 1 else ''}"
    return f"{mean(entry['recovered'])}, {entry['steps'][0]:.0f} steps{seeds}"


def networks_of(rows: Sequence[Row]) -> list[str]:
    return sorted({row["network"] for row in rows if row.get("what") == "cut"}, key=lambda name: (len(name), name))


def overview(root: Path) -> str:
    """The table of methods for the README."""
    rows, lines = rows_of(root), []
    largest = (networks_of(rows) or ["resnet56"])[-1]
    for card in cards_of(root, "methods"):
        matter = front_matter(card)
        taken = measured(rows, matter["title"])
        found = {label: entry for (network, label), entry in taken.items() if network == largest}
        for label, entry in (found or {matter["title"]: {}}).items():
            seeds = len(entry.get("cut", []))
            name = f"[{label}](docs/cards/methods/{card.name})" + (f", {seeds} seeds" if seeds > 1 else "")
            figures = (mean(entry.get("cut")), mean(entry.get("batch norm")), recovered(entry))
            if not entry and "benchmark" in matter:
                figures = ("-", "-", f"[elsewhere](docs/benchmarks/{matter['benchmark']}.md)")
            lines.append((name, matter["source"], matter["status"], *figures))
    heads = ("method", "source", "status", "after the cut", "+ batch norm", "+ training")
    text = table(heads, lines, right=3)
    dense = [row["dense"] for row in rows if row.get("what") == "cut" and row["network"] == largest]
    said = f"{largest} on CIFAR-10, {dense[0]:.2f} % uncut" if dense else "Not measured yet"
    raw = f"[{RESULTS}]({RESULTS})" if rows else f"`{RESULTS}`"
    return (
        f"{said}; accuracy in % on the 10 000 test pictures at half of the MACs. "
        f"Raw rows: {raw}, made by `benchmarks/cifar.py`.\n\n{text}"
    )


def card_table(root: Path, title: str, benchmark: str | None = None) -> str:
    """The measured table of one method's card; `benchmark` is the page of its own, where it has one."""
    rows = rows_of(root)
    found = measured(rows, title)
    if not found:
        elsewhere = f"In [its own benchmark](../../benchmarks/{benchmark}.md), not beside the others on CIFAR-10."
        return elsewhere if benchmark else "Not yet measured."
    lines = []
    for network in networks_of(rows):
        for (where, label), entry in found.items():
            if where == network:
                promised = "=" if all(entry["honest"]) else "IS NOT"
                share = statistics.mean(entry["macs"])
                figures = (mean(entry["dense"][:1]), mean(entry["cut"]), mean(entry["batch norm"]), recovered(entry))
                kept = f"{share:.4f}, promised {promised} counted"
                lines.append((network, label, *figures, kept, f"{max(entry['difference']):.0e}"))
    mine = [row for row in rows if row.get("what") == "cut" and row["title"] == title]
    labels = {row["method"] for row in mine}
    used = [row for row in rows if row.get("what") in ("cut", "recovery") and row["method"] in labels]
    commands = sorted({row["command"] for row in used})
    commits = sorted({row["commit"] + (" with uncommitted changes" if row.get("dirty") else "") for row in used})
    heads = ("network", "settings", "uncut", "cut", "+ batch norm", "+ training", "MACs kept", "cut - mask")
    note = f"CIFAR-10, accuracy in % on 10 000 test pictures; `{'`, `'.join(commands)}`, commit {', '.join(commits)}."
    return f"{table(heads, lines, right=2)}\n\n{note}"


def catalogue(root: Path) -> str:
    """docs/methods.md: everything that has a card."""
    text = CATALOGUE.format(overview(root).replace("(benchmarks/", "(../benchmarks/").replace("(docs/", "("))
    for role, heading in ROLES.items():
        cards = cards_of(root, role)
        if not cards:
            continue
        lines = []
        for card in cards:
            matter = front_matter(card)
            name = f"[{matter['title']}](cards/{role}/{card.name})"
            lines.append((name, *(matter[key] for key in FACTS)))
        text += f"\n## {heading}\n\n{table(('block', *FACTS), lines)}\n"
    return text


def filled(text: str, marker: str, content: str) -> str:
    """`text` with what stands between a pair of markers replaced.

    Raises:
        SystemExit: the markers are not there.
    """
    opening, closing = f"<!-- {marker} -->", f"<!-- /{marker.partition(':')[0]} -->"
    pattern = re.compile(f"({re.escape(opening)}\n).*?({re.escape(closing)})", re.S)
    if not pattern.search(text):
        raise SystemExit(f"no {opening} ... {closing}")
    return pattern.sub(lambda found: f"{found[1]}{content}\n{found[2]}", text)


def pages(root: Path) -> dict[Path, str]:
    """Every generated file, or file with a generated part, as it should be."""
    readme = root / "README.md"
    made = {
        readme: filled(readme.read_text(encoding="utf-8"), "table:methods", overview(root)),
        root / "docs" / "methods.md": catalogue(root),
    }
    for card in cards_of(root, "methods"):
        text = card.read_text(encoding="utf-8")
        matter = front_matter(card)
        made[card] = filled(text, f"measured:{card.stem}", card_table(root, matter["title"], matter.get("benchmark")))
    return made


def out_of_date(root: Path) -> list[Path]:
    """Files that are not as cards and rows say."""
    return [path for path, text in pages(root).items() if not path.exists() or path.read_text(encoding="utf-8") != text]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if something is out of date")
    asked = parser.parse_args(arguments)
    stale = out_of_date(ROOT)
    for path in stale:
        print(f"{'out of date' if asked.check else 'written'}: {path.relative_to(ROOT)}")
        if not asked.check:
            path.write_text(pages(ROOT)[path], encoding="utf-8")
    return 1 if asked.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
