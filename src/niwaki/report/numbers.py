"""How numbers are written for people: short, with their unit, and the difference between two."""

from typing import Any

NOISE = 0.25  # of the median; an idle machine stays below 0.1
_STEPS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_COUNTED = ("MACs", "parameters", "bytes", "FLOPs")
_SHORT = {"parameters": "", "MACs": "", "bytes": "B"}

TITLES = {"macs": "MACs", "params": "parameters", "memory": "peak memory"}
"""How the usual measurements are called in tables; others go by their own name."""

UNITS = {"macs": "MACs", "params": "parameters", "bytes": "bytes", "memory": "bytes", "latency": "ms", "energy": "J"}
"""Of amounts in budgets."""


def title(name: str) -> str:
    """Name of a measurement as a row's head."""
    return TITLES.get(name, name.replace("_", " "))


def plain(value: float) -> str:
    """Four significant digits, no exponent for everyday sizes; whole numbers whole."""
    if float(value).is_integer() and abs(value) < 1e6:
        return f"{value:.0f}"
    return f"{value:.4g}"


def short(value: float, unit: str) -> str:
    """A value with its unit; large counts in thousands (k), millions (M), milliards (G).

    Examples:
        >>> short(1814073344, "MACs"), short(0.5, "ms"), short(93.39, "%")
        ('1.814 G', '0.5 ms', '93.39 %')
    """
    if unit in _COUNTED:
        suffix = _SHORT.get(unit, unit)
        for size, letter in _STEPS:
            if abs(value) >= size:
                return f"{value / size:.4g} {letter}{suffix}"
        return f"{value:.0f} {suffix}".strip()
    if unit == "%":
        return f"{value:.2f} %"
    return f"{plain(value)} {unit}".strip()


def with_spread(record: dict[str, Any] | None) -> str:
    """A measurement's value and spread; a dash where it was not taken."""
    if record is None:
        return "-"
    unit, spread = record.get("unit") or "", record.get("spread")
    if spread is None:
        return short(record["value"], unit)
    value = f"{record['value']:.2f}" if unit == "%" else plain(record["value"])
    return f"{value} ± {spread:.2g} {unit}".strip()


def noisy(record: dict[str, Any]) -> bool:
    """Whether a time spreads so far that comparing it means nothing: the machine did other work."""
    return record.get("unit") == "ms" and (record.get("spread") or 0.0) > NOISE * record["value"]


def change(before: dict[str, Any] | None, after: dict[str, Any] | None) -> str:
    """What became of it: points for percentages, the factor for everything else."""
    if before is None or after is None:
        return ""
    first, last = before["value"], after["value"]
    if before.get("unit") == "%":
        return f"{last - first:+.2f} points"
    if noisy(before) or noisy(after):
        return "too noisy to compare"
    if first == 0:
        return ""
    return f"× {last / first:.3f}"


def budget(record: dict[str, Any]) -> str:
    """A budget in words."""
    keep, of = record.get("keep"), str(record.get("of"))
    share = f"{100 * keep:g} %" if isinstance(keep, float) else str(keep)
    if record.get("absolute") and isinstance(keep, (int, float)):
        share = f"at most {short(keep, UNITS.get(of, ''))}"
    words = (("floor", "floor"), ("multiple", "multiple of"))
    extra = [f"{word} {record[key]}" for key, word in words if record.get(key) not in (None, 1)]
    return f"{share} of {title(of)}" + (f" ({', '.join(extra)})" if extra else "")
