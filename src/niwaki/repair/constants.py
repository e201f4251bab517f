"""What removed channels still put out as a constant, moved into the bias of what reads them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from niwaki.errors import InputError
from niwaki.graph import ChannelGraph, trace
from niwaki.graph.skeleton import copy_with, like
from niwaki.plan import Plan, decode_example
from niwaki.surgery.record import add_bias, surgery_of
from niwaki.surgery.verify import scale_slices
from niwaki.units import device_of, map_tensors, run


@final
@dataclass(frozen=True)
class FoldedConstants:
    """Removed channels put out something; its constant part goes into the next layer's bias (or running mean).

    "shift": a channel whose norm scale is zero still emits `act(beta)`. Exact for these where nothing is padded.
    "mean": the channel's mean over given batches, whatever its scale; the best constant for any channel.

    Consumers are linear layers and plain convolutions; others (recurrent layers, attention's own projections, grouped
    or transposed convolutions, parameters of your own) are left alone and returned by name.

    Source: Chu et al. 2022, arXiv:2306.01526, code, stage 2c (constants of channels with gamma = 0).
    Differs: the constant is measured at the consumer's input, so any path (add, concat, any activation) counts; a
    consumer with neither bias nor batch norm gets a bias, and one whose batch norm keeps no running mean needs none.
    """

    source: Literal["shift", "mean"] = "shift"
    """Where the constant comes from."""

    def __call__(
        self,
        model: nn.Module,
        small: nn.Module,
        plan: Plan,
        *,
        batches: Iterable[Any],
        optimizer: torch.optim.Optimizer | None = None,
    ) -> tuple[str, ...]:
        """Fold into `small`, in place; returns the consumers that could not take their constant.

        A consumer that gets a bias remembers it with its surgery, so that a saved run loads again.

        Args:
            batches: inputs; for "shift" one batch of any values will do, as the constants do not depend on it.
            optimizer: one in use for `small`; biases that are added join the group of their layer's weight. One that
                is made later from `small.parameters()` has them anyhow.

        Raises:
            InputError: no batches, a model that was not cut through the eager door, or another model's optimiser.
        """
        if surgery_of(small).door != "eager":
            raise InputError(
                "fold constants", found="a model cut through the exported door", do="repair batch norm instead"
            )
        if optimizer is not None:
            trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            if trained.isdisjoint(map(id, small.parameters())):
                raise InputError(
                    "fold constants with an optimiser",
                    found="it holds no parameter of the small model",
                    do="call niwaki.cut_optimizer_ first",
                )
        graph = (
            plan.graph if plan.graph is not None else trace(model, decode_example(plan.example, str(device_of(model))))
        )
        consumers, skipped = _consumers(model, plan, graph)
        source = _without_scales(model, plan) if self.source == "shift" else model
        means = _means(source, consumers, batches)
        modules = dict(small.named_modules())
        before = dict(model.named_modules())
        follows = _norm_after(graph)
        scaled: dict[str, Any] = {}
        for name, gone in consumers.items():
            if name not in means:  # its weight is read without a call of the layer, as attention does with its output
                skipped.append(name)
                continue
            layer: Any = modules[name]
            weight = before[name].weight.detach()  # type: ignore[union-attr]
            for entry in surgery_of(small).scaled:
                if entry["tensor"] == f"{name}.weight" and entry["axis"] == 0:
                    scaled[name] = entry
            rows = next((c["keep"] for c in plan.by_tensor().get(f"{name}.weight", ()) if c["axis"] == 0), None)
            if rows is not None:
                weight = weight.index_select(0, torch.tensor(rows, device=weight.device))
            if name in scaled:
                weight = scale_slices(weight.double(), scaled[name])
            taken = weight.index_select(1, gone.to(weight.device))
            share = taken.flatten(2).sum(2) if taken.dim() > 2 else taken  # [c_out, removed]
            delta = share.double() @ means[name][gone.cpu()].to(share.device)
            with torch.no_grad():
                norm = follows.get(name)
                if layer.bias is not None:
                    layer.bias.add_(delta.to(layer.bias.dtype))
                elif norm is not None:
                    mean = modules[norm].running_mean
                    if mean is not None:  # else the norm takes off the batch's own mean, whatever constant is in it
                        mean.sub_(delta.to(mean.dtype))  # type: ignore[operator, union-attr, arg-type]
                else:
                    bias = add_bias(small, name)
                    bias.copy_(delta.to(bias.dtype))
                    if optimizer is not None:
                        _join(optimizer, layer.weight, bias)
        return tuple(dict.fromkeys(skipped))


STOCK = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
"""What adds its bias to weight times input, and nothing else."""


def _consumers(model: nn.Module, plan: Plan, graph: ChannelGraph) -> tuple[dict[str, Tensor], list[str]]:
    """Layers that lose input channels -> the removed positions; and whatever else reads some and can't take a bias."""
    modules = dict(model.named_modules())
    cuts = {(str(cut["tensor"]), cut["axis"]): cut for cut in plan.cuts}
    found: dict[str, Tensor] = {}
    skipped = []
    for axis in graph.axes:
        for tensor in graph.names[axis.tensor] if axis.role == "in" else ():
            cut = cuts.get((tensor, axis.axis))
            if cut is None or plan.drops(tensor):
                continue
            path, _, leaf = tensor.rpartition(".")
            module = modules.get(path)
            stock = isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and type(module).forward in STOCK
            if not stock or (leaf, axis.axis, axis.blocks) != ("weight", 1, 1):
                skipped.append(tensor if leaf != "weight" or module is None else path)
                continue
            gone = torch.ones(module.weight.shape[1], dtype=torch.bool)  # type: ignore[index, operator, union-attr]
            gone[torch.tensor(cut["keep"])] = False
            found[path] = torch.nonzero(gone).ravel()
    return found, skipped


def _join(optimizer: torch.optim.Optimizer, weight: Tensor, bias: nn.Parameter) -> None:
    """Put `bias` into the group that holds `weight`; a weight that is not trained has none."""
    for group in optimizer.param_groups:
        if any(parameter is weight for parameter in group["params"]):
            group["params"].append(bias)


def _without_scales(model: nn.Module, plan: Plan) -> nn.Module:
    """The model with the norm scales of removed channels at zero, their shifts as they are."""
    cuts = plan.by_tensor()
    scales = {
        f"{path}.weight"
        for path, m in model.named_modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine
    }
    names = {id(p): name for name, p in model.named_parameters()}

    def change(tensor: Tensor) -> Tensor:
        name = names.get(id(tensor))
        data = tensor.detach()
        if name not in scales or name not in cuts:
            return like(tensor, data)
        zeroed = torch.zeros_like(data)
        keep = torch.tensor(cuts[name][0]["keep"], device=data.device)
        zeroed[keep] = data[keep]
        return like(tensor, zeroed)

    return copy_with(model, change)


def _means(model: nn.Module, consumers: dict[str, Tensor], batches: Iterable[Any]) -> dict[str, Tensor]:
    """Mean of every input channel of the consumers that are called, float64."""
    modules = dict(model.named_modules())
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    handles = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach().double()
            axis = x.dim() - 1 if isinstance(module, nn.Linear) else 1 if x.dim() == module.weight.dim() else 0  # type: ignore[operator, union-attr]
            flat = x.movedim(axis, 0).flatten(1)
            sums[name] = sums.get(name, 0) + flat.sum(1).cpu()
            counts[name] = counts.get(name, 0) + flat.shape[1]

        return hook

    modes = {module: module.training for module in model.modules()}
    device, seen = device_of(model), 0
    try:
        for name in consumers:
            handles.append(modules[name].register_forward_pre_hook(watch(name)))
        model.eval()
        with torch.no_grad():
            for batch in batches:
                run(model, map_tensors(batch, lambda t: t.to(device)))
                seen += 1
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    if seen == 0:
        raise InputError("fold constants", found="no batches", do="give at least one batch of inputs")
    return {name: total / counts[name] for name, total in sums.items()}


def _norm_after(graph: ChannelGraph) -> dict[str, str]:
    """Layer -> the batch norm that reads its output directly, by the trace."""
    made: dict[int, str] = {}
    readers: dict[int, int] = {}
    found: dict[str, str] = {}
    for record in graph.records:
        for value in record.args:
            readers[id(value)] = readers.get(id(value), 0) + 1
        if record.name in ("convolution", "addmm", "mm", "_unsafe_view", "view") and record.outputs:
            made[id(record.outputs[0])] = record.module
        if "batch_norm" in record.name and id(record.args[0]) in made and readers[id(record.args[0])] == 1:
            found[made[id(record.args[0])]] = record.module
    return {layer: norm for layer, norm in found.items() if layer != norm}
