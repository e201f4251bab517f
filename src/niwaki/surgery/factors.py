"""Numbers that calls are given, where they follow a width: factors, which weights can make good, and others."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from niwaki.graph import ChannelGraph
from niwaki.graph.recorder import Record
from niwaki.graph.rules import convolution, normalisation, pointwise, reduction, spatial
from niwaki.graph.rules.registry import signature
from niwaki.graph.values import Value
from niwaki.surgery.evidence import Sizes

SCALARS = ("mul", "div", "mul_", "div_", "true_divide")
ATTENTION = "_scaled_dot_product"
SPANNING = (normalisation.__name__, reduction.__name__)
WINDOWED = (convolution.__name__, spatial.__name__)

Pair = tuple[Record, Record, bool]
"""A call of the original, the same one of the cut model, and whether their module makes the very calls it made."""


@dataclass(frozen=True, eq=False)
class Scale:
    """A factor that depended on a width: what `value` must be multiplied by to undo its change."""

    value: Value
    factor: float
    record: Record


def followed(pairs: list[Pair]) -> str | None:
    """Numbers that follow a width, where they are more than a factor (see `Scale`): what is cut would be added to
    another number than it was, or raised to another power."""
    for was, now, _ in pairs:
        known = all(value.constant is not None for value in was.inputs)
        if was.kind in WINDOWED or (known and not any(value.fields for value in was.outputs)):
            continue
        scaled = (was.name in SCALARS and _factor(was) is not None) or was.name.startswith(ATTENTION)
        for name, a, b in () if scaled else _settings(was, now):
            if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and was.kind in SPANNING:
                a, b = len(a), len(b)  # over so many axes
            elif was.kind != pointwise.__name__ and name != "fill_value" and not isinstance(a, float):
                continue
            if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
                same = a.shape != b.shape or a.dtype != b.dtype or torch.equal(a, b)
                a, b = (str(t.tolist()) if t.numel() == 1 else "a table" for t in (a, b))
            else:
                same = a == b if isinstance(a, (int, float)) and isinstance(b, (int, float)) else True
            if not same:
                where = now.module or "the model"
                return f"{now.name} in {where} is given {b} where it was given {a}, a number that follows a width"
    return None


def _settings(was: Record, now: Record) -> Iterator[tuple[str, Any, Any]]:
    """What two calls are given by the same name: numbers, and tensors of no labels whose numbers are known."""
    names = list(signature(was.func))
    listed = [*zip(names, was.args, now.args, strict=False)]
    listed += [(name, item, now.kwargs[name]) for name, item in was.kwargs.items() if name in now.kwargs]
    for name, *items in listed:
        a, b = (
            (None if item.fields or item.parameter is not None else item.constant) if isinstance(item, Value) else item
            for item in items
        )
        yield name, a, b


def scales_of(records: list[Record], graph: ChannelGraph, sizes: Sizes) -> tuple[Scale, ...]:
    """Factors that differ between the two forwards, call by call of each module."""

    def keyed(listing: tuple[Record, ...] | list[Record]) -> dict[tuple[str, str], list[Record]]:
        table: dict[tuple[str, str], list[Record]] = {}
        for record in listing:
            if record.name in SCALARS or record.name.startswith(ATTENTION):
                table.setdefault((record.module, record.name), []).append(record)
        return table

    before, found = keyed(graph.records), []
    pairs = [pair for key, made in keyed(records).items() for pair in _aligned(before.get(key, []), made, sizes)]
    for old, record in pairs:
        was, now = _factor(old), _factor(record)
        if was is not None and now is not None and was != now and now != 0:
            factor = was / now
            if record.name.startswith("div") or record.name == "true_divide":
                factor = now / was
            if abs(factor - 1) > 1e-12:
                found.append(Scale(record.args[0], factor, record))
    return tuple(found)


def _aligned(old: list[Record], made: list[Record], sizes: Sizes) -> list[tuple[Record, Record]]:
    """Calls and what they were, in order.

    A forward that remembers what it computed once (anchors, tables of positions) makes fewer calls the next time: as
    many as can be are then those of the same shape, and of these as many as can be those with the same factor.
    """
    if len(old) == len(made):
        return list(zip(old, made, strict=True))
    best: dict[tuple[int, int], tuple[int, int, tuple[tuple[Record, Record], ...]]] = {}
    for i in range(len(old), -1, -1):
        for j in range(len(made), -1, -1):
            ways = [best[place] for place in ((i + 1, j), (i, j + 1)) if place in best] or [(0, 0, ())]
            if i < len(old) and j < len(made) and sizes.of(old[i].outputs[0]) == made[j].outputs[0].shape:
                met, like, pairs = best[i + 1, j + 1]
                ways.append((met + 1, like + (_factor(old[i]) == _factor(made[j])), ((old[i], made[j]), *pairs)))
            best[i, j] = max(ways, key=lambda way: way[:2])
    return list(best[0, 0][2])


def _factor(record: Record) -> float | None:
    """The number a call multiplies or divides by, where it is one number."""
    if record.name.startswith(ATTENTION):
        given = record.kwargs.get("scale")
        width = record.args[0].shape[-1]
        return float(given) if given is not None else float(width) ** -0.5
    other = record.args[1]
    if isinstance(other, (int, float)) and not isinstance(other, bool):
        return float(other)
    if isinstance(other, Value) and other.shape == () and other.constant is not None:
        return float(other.constant)
    return None
