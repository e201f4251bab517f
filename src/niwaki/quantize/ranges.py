"""Ranges of activations: from batch norm without any data, or from a few inputs without labels."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from niwaki.errors import InputError, NotFiniteError
from niwaki.graph import ChannelGraph, trace
from niwaki.graph.recorder import Record
from niwaki.graph.rules.pointwise import is_pointwise
from niwaki.graph.values import Value
from niwaki.measure.measurement import evaluating
from niwaki.quantize.range_table import Range, Ranges
from niwaki.quantize.spread import Spread
from niwaki.units import device_of, map_tensors, need_module, run

LAYERS = (nn.Linear, nn.Conv2d)
"""Whose inputs get a range."""
NORMS = ("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "miopen_batch_norm")
SUMS = ("add", "add_", "sub", "sub_")
PRODUCTS = ("mul", "mul_")
POOLS = ("max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d", "mean", "amax")
CUTS = ("relu", "relu_", "hardtanh", "hardtanh_")
"""They only cut off."""
PLAIN = (nn.ReLU, nn.ReLU6, nn.Identity, nn.Dropout)
"""What a batch norm may have inside and still put out its own numbers, but for what is cut off."""
EVERYTHING = (-math.inf, math.inf)
BOUNDED = ("sigmoid", "sigmoid_", "hardsigmoid", "hardsigmoid_", "tanh", "tanh_", "hardtanh", "hardtanh_")
"""Their results have bounds whatever they are given."""
FAR = 1e3  # beyond where the bounded ones bend
RESIZING = ("upsample_nearest2d", "upsample_bilinear2d", "_upsample_bilinear2d_aa", "constant_pad_nd")
"""Their results lie between the extremes of what they are given, 0 included."""


def from_batch_norm(
    model: nn.Module, example: Any, *, deviations: float = 6.0, input_range: Range | None = None
) -> Ranges:
    """Ranges without data: behind batch norm a channel has mean beta and deviation |gamma|, whatever comes in.

    A range is that of the whole tensor: the least beta - 6 |gamma| (0 behind ReLU) to the largest beta + 6 |gamma|.
    Means and deviations are followed through activations, pooling, sums, products and concatenations; terms of a sum
    are taken to be independent. The model runs once on `example`'s shape, on the meta device where it can.

    Source: Nagel et al. 2019 (DFQ), arXiv:1906.04721, sec. 5 (n = 6). Differs: sums and other activations than ReLU.

    Args:
        deviations: how many |gamma| a range reaches to either side.
        input_range: the least and the largest value of the model's own inputs, where you know them.

    Raises:
        InputError: `deviations` is not above 0, or `model` is no module; what `niwaki.trace` refuses.
    """
    need_module(model, "find ranges")
    if not deviations > 0:
        raise InputError(f"from_batch_norm(deviations={deviations!r})", found="not above 0", do="6 is usual")
    graph = trace(model, example)
    walk = _Walk(model, deviations, input_range)
    for record in graph.records:
        walk.see(record)
    outside = _read_outside(model, graph)
    outputs = {path: _within(walk.outputs[path].span, ends) for path, ends in outside.items() if path in walk.outputs}
    paths = _layers(model)
    missing = {path: walk.missing.get(path, "no call of it was seen") for path in paths if path not in walk.spans}
    definition = f"beta +- {deviations:g} |gamma| of batch norm, largest over channels; no data"
    return Ranges({path: walk.spans[path] for path in paths if path in walk.spans}, missing, outputs, definition)


def from_inputs(model: nn.Module, batches: Iterable[Any], *, percentile: float = 100.0) -> Ranges:
    """Ranges of what the layers are given in evaluation mode on `batches` (inputs as the model takes them, no labels).

    Args:
        percentile: 100 takes the extremes; 99.9 leaves out a thousandth of each batch's values at either end (the
            widest batch counts). Behind ReLU the lower end is 0 all the same.

    Raises:
        InputError: no batches, or a percentile that is not above 50 and at most 100.
        NotFiniteError: an activation was NaN or infinite; names the layer.
    """
    need_module(model, "find ranges")
    if not 50 < percentile <= 100:
        raise InputError(f"from_inputs(percentile={percentile!r})", found="not in (50, 100]", do="100 is min and max")
    taken = list(batches)
    if not taken:
        raise InputError("find ranges", found="no batches", do="give at least one batch of inputs")
    device = device_of(model)
    taken = [map_tensors(batch, lambda t: t.to(device)) for batch in taken]
    layers, modules = _layers(model), dict(model.named_modules())
    outside = _read_outside(model, trace(model, taken[0]))
    inputs: dict[str, Range] = {}
    outputs: dict[str, Range] = {}

    def note(spans: dict[str, Range], path: str, x: Tensor) -> None:
        low, high = _extremes(x.detach(), percentile)
        if not (np.isfinite(low) and np.isfinite(high)):
            raise NotFiniteError("find ranges", found="NaN or infinity", where=path, do="check the inputs")
        known = spans.get(path, (low, high))
        spans[path] = (min(known[0], low), max(known[1], high))

    def before(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            note(inputs, path, args[0] if args else kwargs["input"])

        return hook

    def after(path: str) -> Any:
        return lambda module, args, output: note(outputs, path, output)

    handles: list[Any] = []
    try:
        handles += [modules[path].register_forward_pre_hook(before(path), with_kwargs=True) for path in layers]
        handles += [modules[path].register_forward_hook(after(path)) for path in outside]
        with evaluating(model):
            for batch in taken:
                run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    missing = {path: "these inputs do not reach it as a call" for path in layers if path not in inputs}
    ends = "least and largest value" if percentile == 100 else f"percentiles {100 - percentile:g} and {percentile:g}"
    definition = f"{ends} of {len(taken)} batches of inputs"
    outputs = {path: _within(outputs[path], ends) for path, ends in outside.items() if path in outputs}
    return Ranges({path: inputs[path] for path in layers if path in inputs}, missing, outputs, definition)


class _Walk:
    """Follows means and deviations from call to call."""

    def __init__(self, model: nn.Module, deviations: float, input_range: Range | None) -> None:
        self.tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.paths = set(_layers(model))
        self.deviations = deviations
        self.known: dict[int, Spread | str] = {}
        self.start: Spread | str = "an input of the model, whose range is not given (input_range)"
        if input_range is not None:
            self.start = Spread.between(*input_range)
        self.spans: dict[str, Range] = {}
        self.missing: dict[str, str] = {}
        self.outputs: dict[str, Spread] = {}

    def of(self, value: Value) -> Spread | str:
        if value.direct:
            return "parameters themselves"
        return self.known.get(id(value), self.start)

    def see(self, record: Record) -> None:
        data = [value for value in record.inputs if not value.direct]
        weighted = any(value.direct for value in record.inputs)
        if record.module in self.paths and weighted and data and not record.moves:
            self._layer(record.module, self.of(data[0]))
        if not data or not record.outputs:
            return
        result = self._result(record, data)
        for value in record.outputs:
            self.known[id(value)] = result
        if isinstance(result, Spread):
            self.outputs[record.module] = result

    def _layer(self, path: str, found: Spread | str) -> None:
        if isinstance(found, str):
            self.missing.setdefault(path, found)
            self.spans.pop(path, None)
        elif path not in self.missing:
            low, high = found.span
            known = self.spans.get(path, (low, high))
            self.spans[path] = (min(known[0], low), max(known[1], high))

    def _result(self, record: Record, data: list[Value]) -> Spread | str:
        if record.name in NORMS:
            return self._norm(record)
        terms = [self.of(value) for value in data]
        unknown = next((term for term in terms if isinstance(term, str)), None)
        if record.name in BOUNDED and len(terms) == 1:
            wide = Spread.between(-FAR, FAR) if isinstance(terms[0], str) else terms[0]
            return wide.through(lambda x: _again(record, x))
        if record.name == "convolution" or any(value.direct for value in record.inputs):
            return f"the output of {record.module or record.name}, which no batch norm follows"
        if unknown is not None:
            return unknown
        spreads = [term for term in terms if isinstance(term, Spread)]
        shape = record.outputs[0].shape
        if record.name == "cat":
            parts = [spread.channels(v.shape[1]) for spread, v in zip(spreads, data, strict=True) if len(v.shape) > 1]
            whole = Spread.joined(parts or spreads)
            return whole if len(shape) > 1 and whole.mean.numel() == shape[1] else whole.together()
        if record.name in POOLS or record.name in RESIZING or record.moves:
            return _moved(spreads[0], data[0].shape, shape, record.name)
        if len(spreads) == 2 and record.name in (*SUMS, *PRODUCTS):
            return self._pair(record, spreads)
        if len(spreads) == 1 and is_pointwise(record.func, record.name):
            return spreads[0].through(lambda x: _again(record, x))
        return f"the result of {record.name} in {record.module or 'the model'}, which is not followed"

    def _pair(self, record: Record, spreads: list[Spread]) -> Spread:
        if record.name in PRODUCTS:
            return spreads[0].times(spreads[1])
        factor = float(record.kwargs.get("alpha", 1)) * (-1 if record.name.startswith("sub") else 1)
        second = spreads[1] if factor == 1 else spreads[1].through(lambda x: x * factor)
        return spreads[0].plus(second, self.deviations)

    def _norm(self, record: Record) -> Spread | str:
        names = [
            value.parameter.name if isinstance(value, Value) and value.parameter else None for value in record.args
        ]
        if names[3] is None or names[4] is None:
            return f"the output of {record.module}, which keeps no running statistics"
        mean, var = self.tensors[names[3]], self.tensors[names[4]]
        if not bool(mean.any()) and bool((var == 1).all()):
            return f"the output of {record.module}, whose statistics look untrained (mean 0, variance 1)"
        gamma = torch.ones_like(mean) if names[1] is None else self.tensors[names[1]]
        beta = torch.zeros_like(mean) if names[2] is None else self.tensors[names[2]]
        if not bool(torch.isfinite(gamma).all()) or not bool(torch.isfinite(beta).all()):
            return f"the output of {record.module}, whose scale or shift is not finite"
        return Spread.normal(beta, gamma.abs(), self.deviations)


def _moved(spread: Spread, before: tuple[int, ...], after: tuple[int, ...], name: str) -> Spread:
    """Channels stay where axis 1 does; else they are taken together."""
    low, high = spread.low, spread.high
    if name == "constant_pad_nd":
        low, high = low.clamp(max=0), high.clamp(min=0)
    one = Spread(spread.mean, spread.std, low, high)
    keeps = len(before) > 1 and len(after) > 1 and before[1] == after[1] and name not in ("transpose", "permute")
    return one if keeps else one.together()


def _again(record: Record, x: Tensor) -> Tensor:
    """The call of a record on other numbers; its tensor argument is replaced."""
    return record.func(*(x if isinstance(value, Value) else value for value in record.args), **record.kwargs)


def _layers(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, LAYERS)]


def _read_outside(model: nn.Module, graph: ChannelGraph) -> dict[str, Range]:
    """Convolutions (or the batch norm behind) that others than layers read -> the ends that all readers see.

    Sums, means, concatenations, other activations than ReLU. A ReLU cuts off what a grid from 0 can't hold anyhow.
    """
    modules, layers = dict(model.named_modules()), set(_layers(model))
    made: dict[int, tuple[str, Range]] = {}
    outside: dict[str, None] = {}
    seen: dict[str, Range] = {}
    for record in graph.records:
        held = [made[id(value)] for value in record.inputs if id(value) in made]
        weighted = any(value.direct for value in record.inputs) and not record.moves
        passed: tuple[str, Range] | None = None
        if (record.name in NORMS or record.name == "convolution") and all(
            isinstance(child, PLAIN) for child in modules[record.module].children()
        ):
            passed = record.module, EVERYTHING
        if record.name in NORMS:
            held = []  # folded into what it follows
        elif held and record.name in CUTS:
            ends = (0.0, math.inf)
            if "tanh" in record.name:  # torch leaves out arguments that are the defaults
                given = record.args[1:3]
                ends = (*given, *(-1.0, 1.0)[len(given) :])
            passed, held = (held[0][0], _within(held[0][1], ends)), []
        elif held and (record.moves or "max_pool" in record.name) and record.name != "cat":
            passed, held = held[0], []
        for path, ends in held:
            known = seen.get(path, ends)
            seen[path] = (min(known[0], ends[0]), max(known[1], ends[1]))
            if not (weighted and record.module in layers):
                outside[path] = None
        for value in record.outputs:
            made.pop(id(value), None)
            if passed is not None:
                made[id(value)] = passed
    return {path: seen[path] for path in outside}


def _within(span: Range, ends: Range) -> Range:
    low, high = max(span[0], ends[0]), min(span[1], ends[1])
    return (low, high) if low <= high else (0.0, 0.0)


def _extremes(x: Tensor, percentile: float) -> Range:
    if x.numel() == 0:
        return 0.0, 0.0
    if percentile == 100 or not bool(torch.isfinite(x).all()):
        return float(x.min()), float(x.max())
    low, high = np.percentile(x.float().cpu().numpy(), [100 - percentile, percentile])
    return float(low), float(high)
