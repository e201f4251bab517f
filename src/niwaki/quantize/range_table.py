"""Which range the activations at each layer have: a value that ranges give, and what quantises activations takes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from niwaki.errors import FileDamagedError, InputError, NotFiniteError

Range = tuple[float, float]
"""The least and the largest value."""


@final
@dataclass(frozen=True)
class Grid:
    """An asymmetric grid of activations: `value = (code - zero) * scale`, codes from 0 to 2^bits - 1, 0 met exactly."""

    scale: float
    """Step, a float32 number above 0."""
    zero: int
    """Code of the value 0."""
    bits: int

    @classmethod
    def of(cls, span: Range, bits: int) -> "Grid":
        """The grid over a range, stretched to include 0. A range of nothing but 0 has the step 1."""
        low, high = min(span[0], 0.0), max(span[1], 0.0)
        steps = 2**bits - 1
        scale = float(torch.tensor((high - low) / steps, dtype=torch.float32))
        if scale == 0:
            return cls(1.0, 0, bits)
        return cls(scale, min(max(round(-low / scale), 0), steps), bits)

    def rounded(self, x: Tensor) -> Tensor:
        """`x` on the grid, computed as ONNX defines it (float32, ties to the even code) and cast back."""
        codes = (x.float() / self.scale).round() + self.zero
        return ((codes.clamp(0, 2**self.bits - 1) - self.zero) * self.scale).to(x.dtype)


@final
@dataclass(frozen=True)
class Ranges:
    """Ranges of activations by module path, and the reason wherever there is none."""

    inputs: Mapping[str, Range]
    """Path of a convolution or linear layer -> range of its input, over the whole tensor."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """Path of a convolution or linear layer -> why its input has no range."""
    outputs: Mapping[str, Range] = field(default_factory=dict)
    """Path of a convolution, or of the batch norm behind it, whose output is not only read by layers (it goes into a
    sum, a mean) -> range of that output. Integer kernels write whole numbers there too, so it needs a grid."""
    definition: str = ""
    """How the ranges were found."""

    def __post_init__(self) -> None:
        for path, (low, high) in (*self.inputs.items(), *self.outputs.items()):
            if not (math.isfinite(low) and math.isfinite(high)):
                raise NotFiniteError(f"range {low} .. {high}", found="NaN or infinity", where=path, do="give numbers")
            if low > high:
                raise InputError(f"range {low} .. {high}", found="the least is the larger", where=path, do="swap them")

    def grid(self, path: str, bits: int = 8) -> Grid | None:
        """Grid of the input of `path`; None where it has no range."""
        return Grid.of(self.inputs[path], bits) if path in self.inputs else None

    def given(self, inputs: Mapping[str, Range]) -> "Ranges":
        """These ranges with some set by hand."""
        missing = {path: why for path, why in self.missing.items() if path not in inputs}
        return Ranges({**self.inputs, **inputs}, missing, self.outputs, self.definition)

    def filled(self, others: "Ranges") -> "Ranges":
        """These ranges, and where one is missing that of `others`."""
        inputs = {**others.inputs, **self.inputs}
        missing = {path: why for path, why in {**others.missing, **self.missing}.items() if path not in inputs}
        definition = f"{self.definition}; where missing: {others.definition}"
        return Ranges(inputs, missing, {**others.outputs, **self.outputs}, definition)

    def to_json(self) -> dict[str, Any]:
        return {
            "definition": self.definition,
            "inputs": {path: list(span) for path, span in self.inputs.items()},
            "outputs": {path: list(span) for path, span in self.outputs.items()},
            "missing": dict(self.missing),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Ranges":
        """The ranges that `to_json` wrote.

        Raises:
            FileDamagedError: a part is missing or of another kind.
        """
        try:
            inputs, outputs = (
                {str(path): (float(low), float(high)) for path, (low, high) in data[part].items()}
                for part in ("inputs", "outputs")
            )
            return cls(inputs, dict(data["missing"]), outputs, str(data["definition"]))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise FileDamagedError("ranges from JSON", found=str(error), do="use the output of to_json()") from error
