"""Layers that read what a plan removes: which they are, what they read, and how they take a constant."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from niwaki.errors import InputError
from niwaki.evidence.patches import stock
from niwaki.graph import ChannelGraph, trace
from niwaki.plan import Plan, decode_example
from niwaki.surgery.record import add_bias, surgery_of
from niwaki.surgery.verify import scale_slices
from niwaki.units import device_of, map_tensors, run


def need_modules(small: nn.Module, what: str) -> None:
    """Refuse a cut model whose modules are not those that it was cut from.

    Raises:
        InputError: it was cut through the exported door.
    """
    if surgery_of(small).door != "eager":
        raise InputError(what, found="a model cut through the exported door", do="repair batch norm instead")


@final
class Readers:
    """Linear layers and plain convolutions that lose inputs by a plan, and how they take a constant.

    Raises:
        InputError: a model that was not cut through the eager door, or another model's optimiser.
    """

    def __init__(
        self, model: nn.Module, small: nn.Module, plan: Plan, optimizer: torch.optim.Optimizer | None, *, what: str
    ) -> None:
        need_modules(small, what)
        if optimizer is not None:
            trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            if trained.isdisjoint(map(id, small.parameters())):
                raise InputError(
                    f"{what} with an optimiser",
                    found="it holds no parameter of the small model",
                    do="call niwaki.cut_optimizer_ first",
                )
        graph = (
            plan.graph if plan.graph is not None else trace(model, decode_example(plan.example, str(device_of(model))))
        )
        self.model, self.small, self.plan, self.optimizer = model, small, plan, optimizer
        self.whole, self.modules = dict(model.named_modules()), dict(small.named_modules())
        self.shared = _sharing(small)
        """Modules of the small model of which another parameter or buffer shares the memory of a tensor."""
        self.gone, self.skipped = _consumers(model, plan, graph, self.shared)
        """Layer -> the removed positions of its input; and what reads some and can't be changed."""
        norms = _norm_after(graph, self.whole)
        self.follows = {layer: norm for layer, norm in norms.items() if norm not in self.shared}
        self.scaled = {str(entry["tensor"]): entry for entry in surgery_of(small).scaled if entry["axis"] == 0}

    def weight(self, name: str) -> Tensor:
        """What the layer's weight was, `[outputs that stay, all inputs, ...]`, as its rows are scaled now."""
        weight: Tensor = self.whole[name].weight.detach()  # type: ignore[assignment, operator, union-attr]
        rows = self.rows(name)
        if rows is not None:
            weight = weight.index_select(0, rows)
        entry = self.scaled.get(f"{name}.weight")
        return weight if entry is None else scale_slices(weight.double(), entry)

    def rows(self, name: str) -> Int[Tensor, " outputs"] | None:
        """Which outputs of the layer stay; None where all do."""
        keep = next((c["keep"] for c in self.plan.by_tensor().get(f"{name}.weight", ()) if c["axis"] == 0), None)
        return None if keep is None else torch.tensor(keep, device=device_of(self.whole[name]))

    def first(self, name: str) -> Int[Tensor, " inputs"]:
        """Where in the small layer's input each one that stays is, in order; of several copies the first."""
        keep = next(c["keep"] for c in self.plan.by_tensor()[f"{name}.weight"] if c["axis"] == 1)
        return torch.from_numpy(np.unique(keep, return_index=True)[1]).to(device_of(self.small))

    @torch.no_grad()
    def shift(self, name: str, delta: Float[Tensor, " outputs"]) -> None:
        """Add a constant to what the layer puts out."""
        layer: Any = self.modules[name]
        norm = self.follows.get(name)
        if layer.bias is not None:
            layer.bias.add_(delta.to(layer.bias.dtype))
        elif norm is not None:
            mean = self.modules[norm].running_mean
            if mean is not None:  # else the norm takes off the batch's own mean, whatever constant is in it
                mean.sub_(delta.to(mean.dtype))  # type: ignore[operator, union-attr, arg-type]
        else:
            bias = add_bias(self.small, name)
            bias.copy_(delta.to(bias.dtype))
            if self.optimizer is not None:
                _join(self.optimizer, layer.weight, bias)


@contextmanager
def evaluating(model: nn.Module, handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards modules are in the modes they had, and hooks are gone."""
    modes = {module: module.training for module in model.modules()}
    own = [module for module in modes if type(module).train is not nn.Module.train]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for module in own:  # a mode may be more than its flag: weights put together for evaluation
            module.train(modes[module])
        for module, mode in modes.items():
            module.training = mode


def listen(
    model: nn.Module,
    layers: Iterable[str],
    batches: Iterable[Any],
    hear: Callable[[str, nn.Module, Tensor], None],
    *,
    what: str,
) -> None:
    """Run the model on batches of inputs in evaluation mode; `hear` gets each of the layers that is called, by name and
    module, and its input.

    Raises:
        InputError: no batches.
    """
    modules = dict(model.named_modules())

    def watch(name: str) -> Any:
        return lambda module, args, kwargs: hear(name, module, input_of(args, kwargs).detach())

    device, seen = device_of(model), 0
    hooks = [modules[name].register_forward_pre_hook(watch(name), with_kwargs=True) for name in layers]
    with evaluating(model, hooks):
        for batch in batches:
            run(model, map_tensors(batch, lambda t: t.to(device)))
            seen += 1
    if seen == 0:
        raise InputError(what, found="no batches", do="give at least one batch of inputs")


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a linear layer, convolution or batch norm is called on."""
    given: Tensor = args[0] if args else kwargs["input"]
    return given


def _sharing(model: nn.Module) -> set[str]:
    """Modules of which a parameter or buffer lies where another one does, in whole or in part, by their first names."""
    spans = []
    for name, module in model.named_modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and tensor.layout == torch.strided and tensor.numel():
                steps = zip(tensor.shape, tensor.stride(), strict=True)
                last = tensor.storage_offset() + sum((count - 1) * stride for count, stride in steps) + 1
                size = tensor.element_size()
                memory = tensor.untyped_storage()._cdata
                spans.append((memory, tensor.storage_offset() * size, last * size, name))
    spans.sort()
    found: set[str] = set()
    furthest = (-1, 0, 0, "")  # of the spans so far, where it ends last
    for span in spans:
        if span[0] == furthest[0] and span[1] < furthest[2]:
            found |= {span[3], furthest[3]}
        furthest = max(furthest, span, key=lambda one: (one[0] == span[0], one[2]))
    return found


def _consumers(
    model: nn.Module, plan: Plan, graph: ChannelGraph, shared: set[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """Layers that lose input channels -> the removed positions; and whatever else reads some and can't take a bias."""
    modules = dict(model.named_modules())
    cuts = {(str(cut["tensor"]), cut["axis"]): cut for cut in plan.cuts}
    found: dict[str, Tensor] = {}
    skipped = []
    computed = {axis.tensor for axis in graph.axes if axis.role == "direction"}  # of a weight of norm one
    for axis in graph.axes:
        reads = axis.role == "in" or (axis.role == "other" and axis.tensor in computed)
        aliases = graph.names[axis.tensor] if reads else ()
        for tensor in aliases:
            cut = cuts.get((tensor, axis.axis))
            if cut is None or plan.drops(tensor):
                continue
            path, _, leaf = tensor.rpartition(".")
            module = modules.get(path)
            if module is None and leaf == "weight" and any(name.rpartition(".")[0] in found for name in aliases):
                continue  # another name of the same module
            own = module is not None and module._parameters.get("weight") is not None
            if not own or not stock(module) or path in shared or (leaf, axis.axis, axis.blocks) != ("weight", 1, 1):
                skipped.append(tensor if leaf != "weight" or module is None else path)
                continue
            assert module is not None
            gone = torch.ones(module.weight.shape[1], dtype=torch.bool)  # type: ignore[index, operator, union-attr]
            gone[torch.tensor(cut["keep"])] = False
            found[path] = torch.nonzero(gone).ravel().to(module.weight.device)  # type: ignore[operator, union-attr]
    return found, skipped


def _join(optimizer: torch.optim.Optimizer, weight: Tensor, bias: nn.Parameter) -> None:
    """Put `bias` into the group that holds `weight`; a weight that is not trained has none."""
    for group in optimizer.param_groups:
        if any(parameter is weight for parameter in group["params"]):
            group["params"].append(bias)


def _norm_after(graph: ChannelGraph, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Layer -> the batch norm that reads its output directly, and no other one's, by the trace."""
    made: dict[int, str] = {}
    readers: Counter[int] = Counter()
    found: dict[str, str] = {}
    norms: Counter[str] = Counter()
    for record in graph.records:
        readers.update(id(value) for value in record.inputs)
        if record.name in ("convolution", "addmm", "mm", "_unsafe_view", "view") and record.outputs:
            made[id(record.outputs[0])] = record.module
        if "batch_norm" in record.name and isinstance(modules.get(record.module), _BatchNorm):
            norms[record.module] += 1
            given = record.inputs[0]
            layer = modules.get(made.get(id(given), ""))
            channels = 1 if isinstance(layer, nn.modules.conv._ConvNd) else len(given.shape) - 1
            if layer is not None and channels == 1 and readers[id(given)] == 1:
                found[made[id(given)]] = record.module
    return {layer: norm for layer, norm in found.items() if layer != norm and norms[norm] == 1}
