"""docs/benchmarks/precropping.md and its picture, from the rows of precropping.py."""

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, final

from rows import Rows, prose, svg, table

ARMS = {
    "dense": "the whole network",
    "g": "one width for all, as many parameters",
    "e": "PreCrop by parameters (width program)",
    "a": "SynFlow's weight mask",
    "b": "its densities, other weights at random",
    "d": "crop to its densities (first generation)",
    "g, MACs": "one width for all, as many MACs as e has",
    "f": "PreCrop by MACs, as many as e has",
    "h": "crop to the program's densities in reverse order",
    "c": "its densities, whole kernels at random",
}
"""In the order of the runs: what is compared first comes first."""
COLOURS = {
    "dense": "#5d6661", "a": "#0067a5", "b": "#5fa8d8", "c": "#8d6bb8", "d": "#2a9d8f",
    "e": "#2f7d4f", "f": "#94a83a", "g": "#c2500a", "g, MACs": "#e39a5f", "h": "#b3264b",
}  # fmt: skip
PICTURE, WIDTHS = "precropping.svg", "precropping_widths.svg"
Row = dict[str, Any]


@final
@dataclass(frozen=True)
class Series:
    """Accuracies over seeds of one arm, in percent."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    @property
    def error(self) -> float:
        """Standard error of the mean; of one value unknown, hence infinite."""
        return statistics.stdev(self.values) / math.sqrt(len(self.values)) if len(self.values) > 1 else math.inf

    def __str__(self) -> str:
        spread = f" +- {statistics.stdev(self.values):.1f}" if len(self.values) > 1 else ""
        return f"{self.mean:.1f}{spread} ({len(self.values)})"


def series(rows: Iterable[Row], arm: str, shrink: int) -> Series | None:
    found = tuple(r["accuracy"] for r in rows if r["arm"] == arm and (r["shrink"] == shrink or arm == "dense"))
    return Series(found) if found else None


def setting(row: Row) -> tuple[Any, ...]:
    """What rows that may be compared have in common."""
    return (row["network"], row["epochs"], row["steps"], row["batch"], row["stride"], row["device"])


def near(limit: float) -> Callable[[float, float], str]:
    """Judges whether a difference lies within `limit` points, given twice its standard error."""

    def judge(gap: float, doubt: float) -> str:
        if abs(gap) + doubt <= limit:
            return "held"
        return "did not hold" if abs(gap) - doubt > limit else "held on average" if abs(gap) <= limit else "open"

    return judge


def above(gap: float, doubt: float) -> str:
    """Judges whether a difference is 0 or more, given twice its standard error."""
    return "held, better" if gap > doubt else "did not hold, worse" if gap < -doubt else "no difference shown"


CLAIMS: tuple[tuple[str, str, str, tuple[int, ...], Callable[[float, float], str]], ...] = (
    ("which weights of a layer are kept does not matter: b within 0.5 of a", "b", "a", (2, 4, 10), near(0.5)),
    ("nor does the granularity: c within 1 of a", "c", "a", (2, 4), near(1.0)),
    ("channels of these densities do as well: d within 1 of a", "d", "a", (2, 4), near(1.0)),
    ("and channels of the program's: e within 1 of a", "e", "a", (2, 4), near(1.0)),
    ("the program is worth it: e at least as good as g", "e", "g", (2, 4, 10), above),
    ("at equal MACs, too: e at least as good as g, MACs", "e", "g, MACs", (2, 4, 10), above),
    ("a budget of MACs uses them better: f at least as good as e", "f", "e", (2, 4, 10), above),
    ("the order of the densities matters: e better than h", "e", "h", (2, 4, 10), above),
)  # fmt: skip
"""Claims as the paper and its reviews have them: words, arm, other arm, where, judge of the difference."""


def claims(rows: list[Row]) -> list[tuple[str, ...]]:
    """One line for each claim and compression that rows exist for."""
    lines = []
    for words, one, other, shrinks, judge in CLAIMS:
        for shrink in shrinks:
            left, right = series(rows, one, shrink), series(rows, other, shrink)
            if left is None or right is None or min(len(left.values), len(right.values)) < 2:
                continue
            gap, doubt = left.mean - right.mean, 2 * math.hypot(left.error, right.error)
            lines.append((words, f"{shrink}x", f"{gap:+.1f} +- {doubt:.1f}", judge(gap, doubt)))
    return lines


def page(rows: Rows) -> None:
    """The page and the picture."""
    text = prose("""
        # Cropping before training

        Written by `python benchmarks/precropping.py --table`; do not edit.

        Everything here is trained from scratch on CIFAR-10 by one recipe (SGD with Nesterov's momentum, highest rate
        0.1, a short warm-up, cosine, weight decay 5e-4, mirrored and shifted pictures), for as many steps as the
        headings say; accuracies in percent on the 10 000 test pictures, mean +- standard deviation (seeds). Nothing was
        chosen by them. Masks are simulated: a masked network is as dear as the dense one. Widths meet budgets of the
        whole network, batch norm included; masks are shares of the weights alone.

        Trainings on a CPU are a small fraction of the usual 100 epochs, and where the heading says stride 2 the first
        convolution looks at every second pixel, so that a step costs a quarter. Such networks are far from converged:
        what holds here is a hint for full trainings, not a result about them.
    """)
    taken = [row for row in rows.rows if row["what"] == "accuracy"]
    parts = {key: [r for r in taken if setting(r) == key] for key in dict.fromkeys(map(setting, taken))}
    if parts:
        (rows.page.parent / PICTURE).write_text(picture(parts), encoding="utf-8")
        text += f"![Accuracy over the share of parameters that stay]({PICTURE})\n\n"
    planned = 2 * (3 + 3 * 3 * (len(ARMS) - 1))
    if len(taken) < planned:
        text += prose(f"""
            **Not finished**: {len(taken)} of the {planned} trainings of two networks (ResNet-20, VGG-11-BN) at 2x, 4x
            and 10x with three seeds were made so far. What is not in the tables was not run, and of claims that are
            not listed nothing was shown, neither for nor against.
        """)
    for key, here in parts.items():
        text += f"## {heading(key)}\n\n"
        shrinks = sorted({r["shrink"] for r in here if r["arm"] != "dense"})
        lines = []
        for arm, meaning in ARMS.items():
            cells = []
            for shrink in shrinks:
                found = [r for r in here if r["arm"] == arm and (r["shrink"] == shrink or arm == "dense")]
                counts = [f"{r['params'] / 1e3:.0f} k, {r['macs'] / 1e6:.1f} M" for r in found[:1] if r["params"]]
                cells.append(f"{series(here, arm, shrink)}; {counts[0] if counts else 'masked'}" if found else "-")
            if any(cell != "-" for cell in cells):
                lines.append((arm, meaning, *cells))
        text += table(("arm", "what", *(f"{n}x: accuracy; parameters, MACs" for n in shrinks)), lines) + "\n\n"
        if judged := claims(here):
            text += "Differences of means in points, +- twice their standard error; claims as the paper has them:\n\n"
            text += table(("claim", "at", "difference", "here"), judged) + "\n\n"
    found = [row for row in rows.rows if row["what"] == "structure"]
    if found:
        (rows.page.parent / WIDTHS).write_text(widths_picture(found), encoding="utf-8")
    text += structures(found)
    rows.write(text)


def heading(key: tuple[Any, ...]) -> str:
    network, epochs, steps, batch, stride, device = key
    passes = f"{epochs} x {steps} steps of {batch} pictures"
    return f"{network}: {passes}{', stride 2' if stride == 2 else ''}, {device}"


def structures(found: list[Row]) -> str:
    """What networks cropped by either budget came to."""
    if not found:
        return ""
    text = prose("""
        ## Any structure, either budget

        Shares of the dense network that stay, what is left of the budget, and the cheapest unit that could still
        stay (more than what is left, or all are whole); time and memory of a training step, dense and cropped in turns
        in one process. Time on a CPU is that of the process, since the machine had other work as well; the rows hold
        what a clock showed, too. Memory on a GPU is the peak that was allocated, on a CPU what is kept for the backward
        pass with weights, gradients and momentum.
    """)
    heads = ("network", "budget", "parameters", "MACs", "unused", "one unit more", "step, ms", "ratio", "memory, MB",
             "ratio", "device")  # fmt: skip
    lines = [
        (
            r["network"],
            f"{r['keep']} of {r['of']}",
            f"{r['params_cropped'] / r['params_dense']:.4f}",
            f"{r['macs_cropped'] / r['macs_dense']:.4f}",
            f"{r['unused']:.0f}",
            f"{r['next_unit']:.0f}" if r["next_unit"] is not None else "-",
            "{dense:.0f} -> {cropped:.0f}".format(**(r["step_cpu_ms"] or r["step_ms"])),
            "{:.2f}".format(
                (r["step_cpu_ms"] or r["step_ms"])["cropped"] / (r["step_cpu_ms"] or r["step_ms"])["dense"]
            ),
            f"{r['step_bytes']['dense'] / 1e6:.0f} -> {r['step_bytes']['cropped'] / 1e6:.0f}",
            f"{r['step_bytes']['cropped'] / r['step_bytes']['dense']:.2f}",
            f"{r['device']}, batch {r['batch']}",
        )
        for r in found
    ]
    text += table(heads, lines) + f"\n\n![Share of every width that stays, from input to output]({WIDTHS})\n\n"
    text += "Widths, dense -> cropped, in the order of the groups:\n\n"
    for r in found:
        widths = ", ".join(f"{full}->{left}" if left < full else str(full) for full, left in r["widths"].values())
        text += f"- {r['network']}, {r['keep']} of {r['of']}: {widths}\n"
    return text + "\n"


def widths_picture(found: list[Row]) -> str:
    """Share of every group that stays, in the order of the forward; a strip for each network and budget."""
    wide, high, left = 620, 70, 250
    body = []
    for number, row in enumerate(found):
        y0 = 20 + number * (high + 26)
        body.append(f'<text x="8" y="{y0 + 14}" class="head">{row["network"]}</text>')
        body.append(f'<text x="8" y="{y0 + 32}">{row["keep"]} of {row["of"]}</text>')
        body.append(f'<rect x="{left}" y="{y0}" width="{wide}" height="{high}" class="frame"/>')
        shares = [stays / full for full, stays in row["widths"].values()]
        step = wide / max(len(shares), 1)
        for at, share in enumerate(shares):
            tall = high * min(share, 1.0)
            place = f'x="{left + at * step + 0.1 * step:.1f}" y="{y0 + high - tall:.1f}"'
            colour = "#b9c2bd" if share == 1 else COLOURS["e"]
            body.append(f'<rect {place} width="{0.8 * step:.1f}" height="{tall:.1f}" fill="{colour}"/>')
    return svg(body, left + wide + 20, 20 + len(found) * (high + 26))


def picture(parts: dict[tuple[Any, ...], list[Row]]) -> str:
    """Accuracy over compression, one panel for each setting, a mark for the mean and a bar for the deviation."""
    wide, high, left, top = 430, 300, 46, 34
    body = []
    for number, (key, here) in enumerate(parts.items()):
        shrinks = sorted({r["shrink"] for r in here if r["arm"] != "dense"})
        every = [r["accuracy"] for r in here]
        low, peak = 5 * math.floor(min(every) / 5), 5 * math.ceil(max(every) / 5 + 1e-9)
        x0, y0 = left, number * (high + 70) + top

        def across(at: float, x0: float = x0, count: int = len(shrinks)) -> float:
            return x0 + wide * (at + 0.5) / max(count, 1)

        def up(value: float, y0: float = y0, low: int = low, peak: int = peak) -> float:
            return y0 + high * (1 - (value - low) / max(peak - low, 1))

        body.append(f'<text x="{x0}" y="{y0 - 12}" class="head">{heading(key)}</text>')
        body.append(f'<rect x="{x0}" y="{y0}" width="{wide}" height="{high}" class="frame"/>')
        for mark in range(low, peak + 1, 5):
            body.append(f'<line x1="{x0}" x2="{x0 + wide}" y1="{up(mark):.1f}" y2="{up(mark):.1f}" class="grid"/>')
            body.append(f'<text x="{x0 - 6}" y="{up(mark) + 4:.1f}" text-anchor="end">{mark}</text>')
        for at, shrink in enumerate(shrinks):
            body.append(f'<text x="{across(at):.1f}" y="{y0 + high + 18}" text-anchor="middle">{shrink}x</text>')
        for place, (arm, meaning) in enumerate(ARMS.items()):
            shift = (place - len(ARMS) / 2) * 0.07  # side by side
            points = []
            for at, shrink in enumerate(shrinks):
                found = series(here, arm, shrink)
                if found is None:
                    continue
                x, y = across(at + shift), up(found.mean)
                points.append(f"{x:.1f},{y:.1f}")
                if len(found.values) > 1:
                    spread = statistics.stdev(found.values)
                    ends = f'y1="{up(found.mean - spread):.1f}" y2="{up(found.mean + spread):.1f}"'
                    body.append(f'<line x1="{x:.1f}" x2="{x:.1f}" {ends} stroke="{COLOURS[arm]}"/>')
                body.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{COLOURS[arm]}"/>')
            if points:
                body.append(
                    f'<polyline points="{" ".join(points)}" fill="none" stroke="{COLOURS[arm]}" opacity="0.5"/>'
                )
                y = y0 + 14 + 20 * place
                body.append(f'<circle cx="{x0 + wide + 18}" cy="{y - 4}" r="4" fill="{COLOURS[arm]}"/>')
                body.append(f'<text x="{x0 + wide + 28}" y="{y}">{arm}: {meaning}</text>')
    return svg(body, left + wide + 360, len(parts) * (high + 70) + top)
