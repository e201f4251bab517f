"""A picture of a channel graph: every group as a box between the tensors that write it and those that read it.

Three layers from left to right: what produces the units, the group, what consumes them. A consumer that itself produces
another group carries that group's number, so that the eye can walk on; groups stand in the order of the forward.
"""

import os
import tempfile
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, final

from niwaki.errors import InputError

LINE, HEAD, GAP = 17, 22, 20  # heights of a line of text, of a box's head, and between groups
SIDE, BOX, WIRE = 300, 270, 70  # widths of a side's text, of a box, and of the wires between
WIDTH = 2 * SIDE + BOX + 2 * WIRE
LETTERS = 38  # that fit a side at 12 px
MOST = 10  # names shown on a side; DenseNet's streams have fifty readers
STYLE = """
svg{--back:#fff;--ink:#1d2320;--soft:#5d6661;--wire:#a9b4ae;--free:#d5e7db;--freeline:#2f7d4f;--fixed:#eceeed;
--fixedline:#8d9791;--grid:#dbe7f5;--gridline:#0067a5;--inexact:#fbe9d5;--inexactline:#c2500a}
@media (prefers-color-scheme:dark){svg{--back:#141816;--ink:#e6ebe8;--soft:#9aa59f;--wire:#55605a;--free:#21392b;
--freeline:#62b985;--fixed:#242a27;--fixedline:#6d7771;--grid:#1c3046;--gridline:#5fb1ea;--inexact:#40301f;
--inexactline:#f2925a}}
text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;fill:var(--ink)}
.soft{fill:var(--soft)}.name{font-weight:600;font-size:13px}.title{font-weight:600;font-size:16px}
.wire{fill:none;stroke:var(--wire);stroke-width:1.3}.back{fill:var(--back)}
.box{stroke-width:1.6}.free{fill:var(--free);stroke:var(--freeline)}.fixed{fill:var(--fixed);stroke:var(--fixedline)}
.grid{fill:var(--grid);stroke:var(--gridline)}.inexact{fill:var(--inexact);stroke:var(--inexactline)}
"""
LEGEND = (
    ("free", "free: channels may go"),
    ("grid", "free: whole rows or equal columns"),
    ("inexact", "free, but removal changes values"),
    ("fixed", "fixed: stays, for the reason given"),
)


@final
@dataclass(frozen=True)
class Sides:
    """The tensors around one group."""

    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    others: tuple[str, ...]
    """What scales, shifts or stores the units: norms, biases, statistics."""


def sides_of(group: dict[str, Any]) -> Sides:
    """Who writes, reads and accompanies a group; biases and norms by their module."""
    by_role: dict[str, dict[str, None]] = {"out": {}, "in": {}, "": {}}
    for member in group["members"]:
        role, tensor = member["role"], member["tensor"]
        if role in ("out", "in"):
            by_role[role][tensor.removesuffix(".weight").removesuffix(".bias")] = None
        else:
            by_role[""][tensor.rpartition(".")[0] or tensor] = None
    known = {**by_role["out"], **by_role["in"]}
    others = tuple(name for name in by_role[""] if name not in known)
    return Sides(tuple(by_role["out"]), tuple(by_role["in"]), others)


def kind_of(group: dict[str, Any]) -> str:
    """The legend's class of a group."""
    if group["fixed"] is not None:
        return "fixed"
    return "inexact" if not group["exact"] else "grid" if group["kind"] == "grid" else "free"


def picture(graph: dict[str, Any], *, title: str = "") -> str:
    """An SVG of `ChannelGraph.to_json()`; stands alone, light and dark.

    Raises:
        InputError: a graph without groups.
    """
    groups = graph["groups"]
    if not groups:
        raise InputError("a picture of the graph", found="no groups", do="trace a model that has parameters")
    sides = [sides_of(group) for group in groups]
    made_by: dict[str, list[int]] = {}
    for number, side in enumerate(sides, start=1):
        for name in side.producers:
            made_by.setdefault(name, []).append(number)
    parts, top = _header(title), 88
    for number, (group, side) in enumerate(zip(groups, sides, strict=True), start=1):
        drawn, height = _row(number, group, side, made_by, top)
        parts += drawn
        top += height + GAP
    size = f'viewBox="0 0 {WIDTH} {top}" width="{WIDTH}" height="{top}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
        f'<style>{STYLE}</style><rect class="back" width="{WIDTH}" height="{top}"/>{"".join(parts)}</svg>\n'
    )


def write_picture(graph: dict[str, Any], file: str | Path, *, title: str = "") -> Path:
    """Write `picture` to `file` in one step.

    Raises:
        InputError: the place cannot be written to; what was there is still there.
    """
    text, target = picture(graph, title=title), Path(file)
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as aside:
            made = Path(aside) / "picture"
            made.write_text(text, encoding="utf-8")
            os.replace(made, target)
    except OSError as error:
        raise InputError(f"write {target}", found=str(error), do="give a file in a folder you may write to") from error
    return target


def _header(title: str) -> list[str]:
    parts = [f'<text class="title" x="16" y="26">{escape(title)}</text>']
    x = 16
    for kind, words in LEGEND:
        parts.append(f'<rect class="box {kind}" x="{x}" y="40" width="16" height="12" rx="3"/>')
        parts.append(f'<text class="soft" x="{x + 22}" y="50">{words}</text>')
        x += 245
    words = "left: what writes the units; right: what reads them, with → the number of the group that it writes itself"
    return [*parts, f'<text class="soft" x="16" y="70">{words}</text>']


def _row(
    number: int, group: dict[str, Any], side: Sides, made_by: dict[str, list[int]], top: int
) -> tuple[list[str], int]:
    """One group with its sides, and how high it is."""
    left = _shown(side.producers)
    right = _shown(side.consumers)
    notes = _notes(group, side)
    height = max(HEAD + 10 + LINE * len(notes), LINE * len(left) + 8, LINE * len(right) + 8)
    box_left, box_right = SIDE + WIRE, SIDE + WIRE + BOX
    middle = top + height / 2
    parts = [
        f'<rect class="box {kind_of(group)}" x="{box_left}" y="{top}" width="{BOX}" height="{height}" rx="7"/>',
        _text(box_left + 12, top + 18, f"{number}. {group['name']}", letters=34, kind="name"),
    ]
    for line, note in enumerate(notes):
        parts.append(_text(box_left + 12, top + HEAD + 13 + LINE * line, note, letters=36, kind="soft"))
    for names, at_right in ((left, False), (right, True)):
        start = middle - LINE * len(names) / 2
        for line, name in enumerate(names):
            y = start + LINE * line + 12
            near = box_right + WIRE if at_right else SIDE
            far = box_right if at_right else box_left
            meet = min(max(y - 4, top + 6), top + height - 6)
            bend = (near + far) / 2
            parts.append(
                f'<path class="wire" d="M{near} {y - 4:.1f}C{bend} {y - 4:.1f} {bend} {meet:.1f} {far} {meet:.1f}"/>'
            )
            targets = [n for n in made_by.get(name, []) if n != number] if at_right else []
            tail = f" → {', '.join(map(str, targets))}" if targets else ""
            x = near + 6 if at_right else near - 6
            parts.append(_text(x, y, name, letters=LETTERS - len(tail), end=not at_right, tail=tail))
    return parts, int(height)


def _notes(group: dict[str, Any], side: Sides) -> list[str]:
    rows = group["rows"]
    size = f"{group['units']} units" if rows == 1 else f"{group['units']} units in {rows} rows"
    notes = [size]
    if group["fixed"] is not None:
        notes.append(f"fixed: {group['fixed']}")
    elif not group["exact"]:
        notes.append(f"inexact: {group['inexact']}")
    if side.others:
        more = f" and {len(side.others) - 1} more" if len(side.others) > 1 else ""
        notes.append(f"with {side.others[0]}{more}")
    return notes


def _shown(names: tuple[str, ...]) -> list[str]:
    return list(names) if len(names) <= MOST else [*names[: MOST - 1], f"and {len(names) - MOST + 1} more"]


def _text(x: float, y: float, text: str, *, letters: int, kind: str = "", end: bool = False, tail: str = "") -> str:
    """A line of text, shortened in its middle where it is too long, the whole of it as a title."""
    short = text if len(text) <= letters else f"{text[: letters // 2 - 1]}…{text[-(letters - letters // 2) :]}"
    title = f"<title>{escape(text)}</title>" if short != text else ""
    anchor = ' text-anchor="end"' if end else ""
    return f'<text class="{kind}" x="{x:.0f}" y="{y:.1f}"{anchor}>{title}{escape(short + tail)}</text>'
