"""QuantizeLinear and DequantizeLinear put into an ONNX graph, at scales that are given."""

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from niwaki.quantize import Grid, Quantised, Ranges

BITS = 8  # of activations: what integer kernels read
MOST = 2**31 - 1
FINE = 2**24  # steps of a bias whose weights are all 0: as fine as float32
ROUNDING = 1e-4  # of what folding batch norm in float32 may differ from a multiple of the filter


@final
@dataclass
class Rewritten:
    """What became of a graph."""

    quantised: list[str] = field(default_factory=list)
    """Layers that compute on whole numbers."""
    outputs: list[str] = field(default_factory=list)
    """Modules whose output is rounded."""
    shifts: dict[str, np.ndarray] = field(default_factory=dict)
    """Module that a bias was folded from (batch norm, or the layer) -> what rounding it to int32 adds, `[c_out]`."""
    left: dict[str, str] = field(default_factory=dict)
    """Layers that stay in floating point, and why."""


def rewrite(graph: Any, layers: Mapping[str, Tensor], weights: Mapping[str, Quantised], ranges: Ranges) -> Rewritten:
    """Change an ONNX `graph` in place: weights become int8, biases int32, and what layers read is rounded to uint8.

    Batch norm must be folded in already: each filter of the graph is a multiple of the model's.

    Args:
        layers: path -> weight of each convolution or linear layer, as the model has it.
        weights: path -> the same weight as whole numbers.
    """
    made = _Graph(graph)
    done = Rewritten()
    for node in list(graph.node):
        made.append_pending()
        path, weight = _layer(node, made.constants, layers)
        if path:
            reason = _cannot(node, path, weight, layers, weights, ranges, made)
            if reason:
                done.left.setdefault(path, reason)
            else:
                grid = Grid.of(ranges.inputs[path], BITS)
                done.shifts[_scope(node) or path] = made.quantise(node, weight, weights[path], layers[path], grid)
                done.quantised.append(path)
        scope = _scope(node)
        if scope in ranges.outputs and made.last[scope] == node.output[0] and node.output[0] not in made.results:
            made.round_output(node, Grid.of(ranges.outputs[scope], BITS))
            done.outputs.append(scope)
        made.nodes.append(node)
    made.finish()
    for path in layers:
        if path not in done.quantised:
            done.left.setdefault(path, ranges.missing.get(path, "the graph does not show it as one product"))
    return done


class _Graph:
    """An ONNX graph whose nodes are written again, in order."""

    def __init__(self, graph: Any) -> None:
        from onnx import numpy_helper

        self.graph = graph
        self.arrays = numpy_helper
        self.constants = {one.name: one for one in graph.initializer}
        self.nodes: list[Any] = []
        self.rounded: dict[tuple[str, Grid], str] = {}
        self.renamed: dict[str, str] = {}
        self.last = {_scope(node): node.output[0] for node in graph.node}
        self.results = {one.name for one in graph.output}
        self.pending: list[Any] = []

    def append_pending(self) -> None:
        self.nodes.extend(self.pending)
        self.pending = []

    def array(self, name: str) -> np.ndarray:
        return np.asarray(self.arrays.to_array(self.constants[name]))

    def constant(self, name: str, value: np.ndarray) -> str:
        if name not in self.constants:
            self.constants[name] = self.arrays.from_array(np.array(value, order="C"), name)
            self.graph.initializer.append(self.constants[name])
        return name

    def node(self, kind: str, inputs: list[str], output: str, **settings: Any) -> Any:
        from onnx import helper

        return helper.make_node(kind, inputs, [output], name=f"{output}_node", **settings)

    def on_grid(self, name: str, grid: Grid) -> str:
        """The name of `name` rounded to a grid and back; made once."""
        key = (name, grid)
        if key not in self.rounded:
            number = f"{name}_grid{len(self.rounded)}"
            scale = self.constant(f"{number}_scale", np.array(grid.scale, np.float32))
            zero = self.constant(f"{number}_zero", np.array(grid.zero, np.uint8))
            self.nodes.append(self.node("QuantizeLinear", [name, scale, zero], f"{number}_codes"))
            self.nodes.append(self.node("DequantizeLinear", [f"{number}_codes", scale, zero], number))
            self.rounded[key] = number
        return self.rounded[key]

    def round_output(self, node: Any, grid: Grid) -> None:
        """What reads the node's output reads it rounded."""
        name = node.output[0]
        raw = f"{name}_raw"
        node.output[0] = raw
        before, self.nodes = self.nodes, []
        self.on_grid(raw, grid)
        self.pending, self.nodes = self.nodes, before
        self.pending[-1].output[0] = name  # everything downstream keeps its name
        self.rounded[raw, grid] = name

    def quantise(self, node: Any, weight: str, one: Quantised, original: Tensor, grid: Grid) -> np.ndarray:
        """Give a node its input on the grid, int8 weights and an int32 bias; what rounding adds to the bias."""
        folded = self.filters(node, weight).astype(np.float64)
        codes, scale = folded_codes(one, original, folded)
        bias = self.array(node.input[2]).astype(np.float64) if self.bias(node) else np.zeros(len(folded))
        codes, scale = _fitted(codes, scale, folded, bias, grid.scale)
        stem = f"{node.output[0]}_weight"
        axis = 0
        if node.op_type == "MatMul":
            codes, axis = codes.T, 1
        data = self.constant(f"{stem}_codes", codes.astype(np.int8))
        scales = self.constant(f"{stem}_scale", scale.astype(np.float32))
        zeros = self.constant(f"{stem}_zero", np.zeros(len(scale), np.int8))
        node.input[0] = self.on_grid(node.input[0], grid)
        self.nodes.append(self.node("DequantizeLinear", [data, scales, zeros], stem, axis=axis))
        node.input[1] = stem
        if self.bias(node):
            step = (scale.astype(np.float32) * np.float32(grid.scale)).astype(np.float32)
            whole = np.clip(np.round(bias / step.astype(np.float64)), -MOST, MOST).astype(np.int32)
            name = f"{node.output[0]}_bias"
            inputs = [
                self.constant(f"{name}_codes", whole),
                self.constant(f"{name}_scale", step),
                self.constant(f"{name}_zero", np.zeros(len(step), np.int32)),
            ]
            self.nodes.append(self.node("DequantizeLinear", inputs, name, axis=0))
            node.input[2] = name
            return whole * step.astype(np.float64) - bias
        return np.zeros_like(bias)

    def bias(self, node: Any) -> bool:
        return node.op_type != "MatMul" and len(node.input) > 2 and bool(node.input[2])

    def filters(self, node: Any, weight: str) -> np.ndarray:
        """The constant weight of a node, output channels first."""
        array = self.array(weight)
        return array.T if node.op_type == "MatMul" else array

    def finish(self) -> None:
        """Write the nodes back, without weights that nobody reads any more and without the exporter's notes."""
        self.append_pending()
        used = {name for node in self.nodes for name in node.input} | self.results
        kept = [one for one in self.graph.initializer if one.name in used]
        for node in self.nodes:
            del node.metadata_props[:]
        nodes = [type(node).FromString(node.SerializeToString()) for node in self.nodes]
        del self.graph.node[:], self.graph.initializer[:]
        self.graph.node.extend(nodes)
        self.graph.initializer.extend(kept)


def folded_codes(one: Quantised, original: Tensor, folded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of filters that are multiples of the original ones: the codes stay, the scales take the factor.

    `folded` is `[c_out, ...]` in float64; gives int8 of its shape and float64 `[c_out]`. A negative factor turns the
    codes' signs round.
    """
    codes, scale = one.centred()
    factor = _factor(original, folded)
    scales = np.broadcast_to(scale.detach().cpu().double().numpy(), factor.shape) * np.abs(factor)
    signs = np.where(factor < 0, -1, 1) * (factor != 0)
    whole = codes.cpu().numpy().astype(np.int16) * signs.astype(np.int16).reshape(-1, *[1] * (folded.ndim - 1))
    return np.clip(whole, -127, 127).astype(np.int8), scales


def _factor(original: Tensor, folded: np.ndarray) -> np.ndarray:
    """Least-squares factor of each filter, `[c_out]`."""
    rows, other = original.detach().cpu().double().flatten(1).numpy(), folded.reshape(len(folded), -1)
    square = (rows * rows).sum(1)
    return (rows * other).sum(1) / np.where(square > 0, square, 1)


def _fitted(
    codes: np.ndarray, scale: np.ndarray, folded: np.ndarray, bias: np.ndarray, step: float
) -> tuple[np.ndarray, np.ndarray]:
    """Scales at which every bias fits into 32 bits; codes of filters whose scale had to grow are taken again.

    Filters that are all 0 get a scale at which the bias is as exact as float32.
    """
    dead = ~codes.reshape(len(codes), -1).any(1)
    least = np.abs(bias) / (step * (MOST // 2))
    fine = np.where(bias != 0, np.abs(bias) / (step * FINE), 1.0)
    grown = ~dead & (scale < least)
    scale = np.where(dead, fine, np.maximum(scale, least))
    scale = np.maximum(scale, np.finfo(np.float32).tiny)
    if grown.any():
        shaped = scale[grown].reshape(-1, *[1] * (codes.ndim - 1))
        codes = codes.copy()
        codes[grown] = np.clip(np.round(folded[grown] / shaped), -127, 127).astype(np.int8)
    return codes, scale


def _layer(node: Any, constants: Mapping[str, Any], layers: Mapping[str, Tensor]) -> tuple[str, str]:
    """Path and weight of the layer that a node is, or nothing."""
    if node.op_type not in ("Conv", "Gemm", "MatMul"):
        return "", ""
    path = node.input[1].removesuffix(".weight")
    if path not in layers or not node.input[1].endswith(".weight"):
        path = _scope(node)
    return (path, node.input[1]) if path in layers else ("", "")


def _cannot(
    node: Any,
    path: str,
    weight: str,
    layers: Mapping[str, Tensor],
    weights: Mapping[str, Quantised],
    ranges: Ranges,
    made: _Graph,
) -> str:
    """Why a node stays in floating point, or nothing."""
    if path not in ranges.inputs:
        return ranges.missing.get(path, "its input has no range")
    if path not in weights:
        return "its weight is not quantised"
    if weight not in made.constants or (made.bias(node) and node.input[2] not in made.constants):
        return "its weight or bias is computed"
    settings = {one.name: one for one in node.attribute}
    plain = all(settings[name].f == 1 for name in ("alpha", "beta") if name in settings)
    if node.op_type == "Gemm" and not (plain and "transB" in settings and settings["transB"].i == 1):
        return "its product is scaled or turned"
    folded = made.filters(node, weight).astype(np.float64)
    original = layers[path]
    if tuple(folded.shape) != tuple(original.shape):
        return f"its weight has the shape {folded.shape} in the graph, {tuple(original.shape)} in the model"
    if weights[path].axis not in (None, 0):
        return "its scales run along another axis than the output channels"
    factor = _factor(original, folded).reshape(-1, *[1] * (folded.ndim - 1))
    off = np.abs(folded - factor * original.detach().cpu().double().numpy()).max(initial=0)
    if off > ROUNDING * np.abs(folded).max(initial=0):
        return "its weight in the graph is no multiple of the model's, filter by filter"
    return ""


def _scope(node: Any) -> str:
    """Path of the module that a node is from, as the exporter notes it."""
    for note in node.metadata_props:
        if note.key == "pkg.torch.onnx.name_scopes":
            scopes = ast.literal_eval(note.value)
            return str(scopes[-2]) if len(scopes) > 1 else ""
    return ""


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """Path -> weight of every convolution and linear layer."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return {path: module.weight for path, module in model.named_modules() if isinstance(module, kinds)}
