"""One layer of a traced network again, alone, at any widths."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from niwaki.graph.layers import Layer, shape_at
from niwaki.graph.recorder import Record
from niwaki.graph.values import Value

BATCH_NORMS = ("native_batch_norm", "_native_batch_norm_legit_no_training", "batch_norm")
Inputs = tuple[Tensor, ...]


class Alone(nn.Module):
    """A layer with weights of its own, and the calls that are computed with it."""

    def __init__(self, call: Any, weights: dict[str, Tensor], then: tuple[Record, ...]) -> None:
        super().__init__()
        for name, tensor in weights.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.call, self.then = call, then

    def forward(self, *inputs: Tensor) -> Any:
        out = self.call(self, *inputs)
        for record in self.then:
            name = record.name.removesuffix("_")
            out = getattr(torch.ops.aten, name)(out, *[a for a in record.args[1:] if not isinstance(a, Value)])
        return out


def alone(layer: Layer, out: int, into: int, *, batch: int) -> tuple[nn.Module, Inputs]:
    """The layer at these widths (`Layer.full` says what they are of), with inputs for it; numbers are random.

    Raises:
        NotImplementedError: there is no way known to run a call of this kind alone.
    """
    if layer.kind == "convolution":
        return _convolution(layer, out, into, batch)
    if layer.kind == "linear":
        record = layer.record
        rows = record.outputs[0].shape[:-1]
        bias = {"bias": torch.randn(out)} if record.name == "addmm" or len(record.inputs) > 2 else {}
        weights = {"weight": torch.randn(out, into) * into**-0.5, **bias}
        module = Alone(lambda own, x: functional.linear(x, own.weight, getattr(own, "bias", None)), weights, layer.then)
        return module, (torch.randn(*rows, into),)
    share = out / max(layer.full[0], 1)
    if layer.kind == "product":
        tensors = [value for value in layer.record.inputs if len(value.shape) == 3][-2:]
        return Alone(lambda own, a, b: a @ b, {}, ()), tuple(torch.randn(shape_at(t, share)) for t in tensors)
    return _plain(layer.record, layer.kind, share)


def _convolution(layer: Layer, out: int, into: int, batch: int) -> tuple[nn.Module, Inputs]:
    record = layer.record
    x, weight = record.inputs[:2]
    _, _, _, stride, padding, dilation, transposed, extra, groups = record.args[:9]
    if groups > 1:
        share = out / layer.full[0]
        depthwise = groups == x.shape[1]
        groups = max(1, round(x.shape[1] * share)) if depthwise else groups
        into = max(1, round(x.shape[1] * share / groups)) * groups
        out = max(1, round(record.outputs[0].shape[1] * share / groups)) * groups
    sizes = (into, out // groups) if transposed else (out, into // groups)
    made = torch.randn(*sizes, *weight.shape[2:]) * (into * max(weight.shape[-1], 1)) ** -0.5
    bias = torch.randn(out)  # batch norm becomes one

    def call(own: Any, given: Tensor) -> Any:
        settings = (stride, padding, dilation, transposed, extra, groups)
        return torch.ops.aten.convolution(given, own.weight, own.bias, *settings)

    return Alone(call, {"weight": made, "bias": bias}, layer.then), (torch.randn(batch, into, *x.shape[2:]),)


def _plain(record: Record, kind: str, share: float) -> tuple[nn.Module, Inputs]:
    """Any other call, on tensors of which this share stays."""
    tensors = [value for value in record.inputs if value.parameter is None]
    if kind == "copy":  # data from one order to another: as much is read and written
        shape = shape_at(record.outputs[0], share)
        count = max(1, int(torch.Size(shape).numel()))
        side = shape[-1] if shape else 1
        return Alone(lambda own, x: x.transpose(0, 1).contiguous(), {}, ()), (torch.randn(side, count // side),)
    inputs = tuple(torch.randn(shape_at(value, share)) for value in tensors[:4])
    if kind in BATCH_NORMS:
        size = inputs[0].shape[1]
        weights = {name: torch.ones(size) for name in ("scale", "shift", "mean", "var")}
        return Alone(
            lambda own, x: functional.batch_norm(x, own.mean, own.var, own.scale, own.shift), weights, ()
        ), inputs[:1]
    if kind == "native_layer_norm":
        size = inputs[0].shape[-1]
        weights = {name: torch.ones(size) for name in ("scale", "shift")}
        return Alone(lambda own, x: functional.layer_norm(x, (size,), own.scale, own.shift), weights, ()), inputs[:1]
    rest = [argument for argument in record.args[1:] if not isinstance(argument, Value)]
    if kind in ("softmax", "_softmax", "_safe_softmax"):
        return Alone(lambda own, x: torch.softmax(x, int(rest[0])), {}, ()), inputs[:1]
    if kind.startswith("max_pool2d"):
        return Alone(lambda own, x: functional.max_pool2d(x, *rest), {}, ()), inputs[:1]
    name = record.name.removesuffix("_")
    if not hasattr(torch.ops.aten, name) or any(isinstance(a, (list, tuple)) and _has_values(a) for a in record.args):
        raise NotImplementedError(record.name)
    function = getattr(torch.ops.aten, name)
    kwargs = {key: value for key, value in record.kwargs.items() if not isinstance(value, Value)}
    if len(inputs) == len(record.inputs):  # in the places where its tensors were

        def call(own: Any, *given: Tensor) -> Any:
            following = iter(given)
            return function(*[next(following) if isinstance(a, Value) else a for a in record.args], **kwargs)

        return Alone(call, {}, ()), inputs
    return Alone(lambda own, x: x * 1.0, {}, ()), inputs[:1] or (torch.randn(shape_at(record.outputs[0], share)),)


def _has_values(given: Any) -> bool:
    return any(isinstance(item, Value) for item in given)
