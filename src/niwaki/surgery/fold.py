"""A factor that depended on a removed width is folded into the weights that lead to it."""

import numpy as np
import torch
from torch import nn

from niwaki.graph.labels import varying
from niwaki.graph.recorder import Record
from niwaki.graph.rules import MOVEMENT, RULES
from niwaki.graph.values import Value
from niwaki.surgery.check import Retrace
from niwaki.surgery.factors import Scale

PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "linear", "convolution", "addmm_")
SUMS = ("add", "sub", "add_", "sub_")
NORMS = (
    "native_batch_norm",
    "_native_batch_norm_legit_no_training",
    "_native_batch_norm_legit",
    "native_layer_norm",
    "native_group_norm",
    "_fused_rms_norm",
    "cudnn_batch_norm",
)
HOMOGENEOUS = ("relu", "relu_", "neg", "leaky_relu", "abs", "_to_copy")

Slice = tuple[str, int, tuple[int, ...]]
"""Parameter, axis, positions."""


class Walk:
    """Goes back from a value to the parameter slices whose scale it follows, through linear calls only."""

    def __init__(self, seen: Retrace, until: Record) -> None:
        self.producer: dict[int, Record] = {}
        self.readers: dict[int, list[Record]] = {}
        for record in seen.records:
            for value in record.outputs:
                self.producer.setdefault(id(value), record)
            for value in record.inputs:
                self.readers.setdefault(id(value), []).append(record)
        self.parameters = {id(v): v for r in seen.records for v in r.inputs if v.parameter is not None}
        self.visited: set[int] = {id(until)}
        self.touched: list[tuple[Value, np.ndarray]] = []
        self.slices: dict[tuple[str, int], np.ndarray] = {}

    def back(self, value: Value, labels: np.ndarray) -> bool:
        """Scale `value` where its labels are among `labels`; False where that can't be done in the weights."""
        if value.parameter is not None:
            if value.parameter.buffer:
                return False
            for axis, seeds in value.parameter.seeds.items():
                hit = np.flatnonzero(np.isin(seeds, labels))
                if hit.size and value.parameter.blocks[axis] == 1:
                    self.slices[value.parameter.name, axis] = hit
                    return True
            return False
        record = self.producer.get(id(value))
        if record is None:
            return False
        self.touched.append((value, labels))
        if id(record) in self.visited:
            return True
        self.visited.add(id(record))
        inputs = record.inputs
        rule = RULES.get(record.name)
        if (rule is not None and rule.__module__ in MOVEMENT) or record.name in HOMOGENEOUS:
            return all(self.back(v, labels) for v in inputs if self._carries(v, labels))
        if record.name in SUMS:
            return all(self.back(v, self._places(v, value, labels)) for v in inputs)
        if record.name in NORMS:
            parts = [v for v in inputs if v.parameter is not None and not v.parameter.buffer]
            return bool(parts) and all(self.back(v, self._places(v, value, labels)) for v in parts)
        if record.name in ("mul", "mul_", "div", "div_"):
            choices = [v for v in inputs if v.parameter is not None] + [v for v in inputs if v.parameter is None]
            choices = inputs[:1] if record.name.startswith("div") else choices
            return any(self.back(v, self._places(v, value, labels)) for v in choices if self._carries(v, labels, value))
        if record.name in PRODUCTS:
            terms = list(inputs)
            bias = None
            if record.name in ("addmm", "baddbmm", "addmm_"):
                bias, *terms = terms
            elif len(inputs) == 3:
                *terms, bias = inputs
            found = any(self.back(v, labels) for v in terms if self._carries(v, labels))
            return found and (bias is None or self.back(bias, self._places(bias, value, labels)))
        return False

    def alone(self) -> bool:
        """Whether nobody else reads what is scaled on the way."""
        for value, labels in self.touched:
            for record in self.readers.get(id(value), ()):
                if id(record) not in self.visited and self.passes(record, labels):
                    return False
        return True

    def passes(self, record: Record, labels: np.ndarray) -> bool:
        """Whether a call uses what is labelled so: all do that read it, but those that take another part of it."""
        rule = RULES.get(record.name)
        moved = rule is not None and rule.__module__ in MOVEMENT
        return not moved or any(self._carries(out, labels) for out in record.outputs)

    def read_parameters(self) -> list[tuple[Value, list[Record]]]:
        """Parameters and the calls that read them."""
        return [(value, self.readers[key]) for key, value in self.parameters.items()]

    def _carries(self, value: Value, labels: np.ndarray, near: Value | None = None) -> bool:
        fields = value.fields if value.parameter is None else tuple(value.parameter.seeds.values())
        if any(np.isin(field.ravel(), labels).any() for field in fields):
            return True
        return near is not None and self._places(value, near, labels).size > 0

    def _places(self, part: Value, whole: Value, labels: np.ndarray) -> np.ndarray:
        """Labels of `part` at the positions where `whole` has `labels` (the same numbers after broadcasting)."""
        if part.parameter is not None:
            fields = []
            for axis, seeds in part.parameter.seeds.items():
                if part.parameter.blocks[axis] == 1:
                    fields.append(seeds.reshape([part.shape[axis] if a == axis else 1 for a in range(len(part.shape))]))
        else:
            fields = list(part.fields)
        found = [labels]
        for mine in fields:
            if len(part.shape) == 1 and len(whole.shape) > 1:
                for theirs in whole.fields:
                    axes = [a for a in varying(theirs) if theirs.shape[a] == part.shape[0]]
                    if len(axes) == 1 and varying(theirs) == (axes[0],):
                        found.append(mine.ravel()[np.isin(theirs.ravel(), labels)])
                continue
            mine = mine.reshape((1,) * (len(whole.shape) - mine.ndim) + mine.shape)
            for theirs in whole.fields:
                if varying(theirs) and all(mine.shape[a] in (1, theirs.shape[a]) for a in range(mine.ndim)):
                    pick = np.isin(theirs, labels)
                    found.append(
                        np.broadcast_to(mine, np.broadcast_shapes(mine.shape, theirs.shape))[
                            np.broadcast_to(pick, np.broadcast_shapes(mine.shape, theirs.shape))
                        ]
                    )
        return np.unique(np.concatenate([f.ravel() for f in found]))


def fold(model: nn.Module, seen: Retrace) -> tuple[list[dict[str, object]], str | None]:
    """Undo every changed factor by scaling weights of `model` in place; what could not be undone is named."""
    done: list[dict[str, object]] = []
    if not seen.scales:
        return done, None
    parameters = dict(model.named_parameters())
    listed = [(scale, _walks(seen, scale)) for scale in seen.scales]
    stuck = next((scale for scale, walks in listed if not walks), None)
    if stuck is not None:
        return done, f"{_place(stuck)} has a factor that depends on the width"
    factors: dict[tuple[str, int], dict[int, float]] | None = {}
    for pick in range(max((len(walks) for _, walks in listed), default=0)):
        factors = _joined([(scale, walks[min(pick, len(walks) - 1)]) for scale, walks in listed])
        if factors is not None:
            break
    if factors is None:
        return done, f"{_place(listed[0][0])} has a factor that depends on the width, and its weights serve others too"
    for (name, axis), known in factors.items():
        with torch.no_grad():
            data = parameters[name].detach()
            shape = [1] * data.dim()
            shape[axis] = data.shape[axis]
            factor = torch.ones(data.shape[axis], dtype=torch.float64)
            factor[list(known)] = torch.tensor(list(known.values()), dtype=torch.float64)
            data.copy_(data.double() * factor.to(data.device).reshape(shape)) if not data.is_meta else None
        for value in sorted(set(known.values())):
            positions = sorted(position for position, own in known.items() if own == value)
            done.append({"tensor": name, "axis": axis, "positions": positions, "factor": value})
    return done, None


def _place(scale: Scale) -> str:
    return f"{scale.record.name} in {scale.record.module or 'the model'}"


def _walks(seen: Retrace, scale: Scale) -> list[Walk]:
    """Ways back from a scale to slices that can carry it."""
    candidates = [scale.value]
    if scale.record.name.startswith("_scaled_dot_product"):
        candidates = [v for v in scale.record.args[:2] if isinstance(v, Value)]
    found = []
    for value in candidates:
        if value.fields:
            walk = Walk(seen, scale.record)
            labels = np.unique(np.concatenate([f.ravel() for f in value.fields]))
            if walk.back(value, labels) and walk.alone():
                found.append(walk)
    return found


def _joined(chosen: list[tuple[Scale, Walk]]) -> dict[tuple[str, int], dict[int, float]] | None:
    """The factor of each position, where a weight that is used several times needs the same at every use."""
    factors: dict[tuple[str, int], dict[int, float]] = {}
    reached: set[int] = set()
    for scale, walk in chosen:
        if any(other is not scale and id(other.record) in walk.visited for other, _ in chosen):
            return None  # one behind the other: the weight would need both
        reached |= walk.visited
        for key, positions in walk.slices.items():
            known = factors.setdefault(key, {})
            if any(known.setdefault(int(position), scale.factor) != scale.factor for position in positions):
                return None
    for _, walk in chosen:
        for value, readers in walk.read_parameters():
            for (name, axis), known in factors.items():
                if value.parameter is None or value.parameter.name != name:
                    continue
                labels = value.parameter.seeds[axis][list(known)]
                if any(id(r) not in reached and walk.passes(r, labels) for r in readers):
                    return None
    return factors
