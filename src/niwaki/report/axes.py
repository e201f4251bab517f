"""The frame of a plot: axes, grid and labels as inline SVG, coloured by the page's own variables."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import final

WIDTH, HEIGHT = 480, 330
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 16, 46


def ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) inside [low, high].

    Examples:
        >>> ticks(0, 100)
        [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]
    """
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 10) for number in range(first, math.floor(high / step + 1e-9) + 1)]


@final
@dataclass(frozen=True)
class Axes:
    """What lies where: numbers in, places in the picture out."""

    across: tuple[float, float]
    up: tuple[float, float]
    width: int = WIDTH
    height: int = HEIGHT

    @property
    def x(self) -> Callable[[float], float]:
        low, high = self.across
        return lambda value: LEFT + (value - low) / ((high - low) or 1) * (self.width - LEFT - RIGHT)

    @property
    def y(self) -> Callable[[float], float]:
        low, high = self.up
        return lambda value: self.height - BOTTOM - (value - low) / ((high - low) or 1) * (self.height - TOP - BOTTOM)

    def frame(self, below: str, beside: str, *, whole: bool = False) -> str:
        """Grid lines, their numbers, and what the axes are called; `whole` leaves only whole numbers below."""
        x, y, bottom = self.x, self.y, self.height - BOTTOM
        parts = []
        for value in ticks(*self.across):
            if whole and value != int(value):
                continue
            parts.append(f'<line class="grid" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{TOP}" y2="{bottom}"/>')
            parts.append(f'<text x="{x(value):.1f}" y="{bottom + 18}" text-anchor="middle">{value:g}</text>')
        for value in ticks(*self.up, most=max(3, self.height // 45)):
            line = f'x1="{LEFT}" x2="{self.width - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"'
            parts.append(f'<line class="grid" {line}/>')
            parts.append(f'<text x="{LEFT - 7}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
        middle, height = (LEFT + self.width - RIGHT) / 2, (TOP + bottom) / 2
        parts.append(f'<text x="{middle:.0f}" y="{self.height - 7}" text-anchor="middle">{escape(below)}</text>')
        if beside:
            place = f'transform="translate(13 {height:.0f}) rotate(-90)"'
            parts.append(f'<text {place} text-anchor="middle">{escape(beside)}</text>')
        return "".join(parts)

    def picture(self, inside: str, said: str, kind: str = "plot") -> str:
        """The whole picture; `said` is what it shows, for those who can't see it."""
        return (
            f'<svg class="{kind}" viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(said)}">'
            f"{inside}</svg>"
        )


def spread_out(values: list[float], *, floor: float | None = None, ceiling: float | None = None) -> tuple[float, float]:
    """A range that holds all values with some air, within [floor, ceiling]; never empty."""
    low, high = min(values), max(values)
    air = 0.08 * (high - low) or max(abs(high) * 0.1, 1e-6)
    low, high = low - air, high + air
    if floor is not None:
        low = max(low, floor)
    if ceiling is not None:
        high = min(high, ceiling)
    return (low, high) if high > low else (low - 1, high + 1)
