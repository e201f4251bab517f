"""Second derivatives of the loss, layer by layer, in two factors: what a layer reads, and what its outputs matter."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from niwaki.errors import NotFiniteError
from niwaki.evidence.patches import patches, stock
from niwaki.graph import ChannelGraph
from niwaki.units import tensors_in

SAMPLES = 4096
"""Positions (tokens, pixels) that are drawn from a call for its inputs; of fewer, all are taken."""
LARGEST = 8192
"""Most inputs (channels times places of the kernel) and outputs of a layer: 0.5 GiB for the products of 8192."""


@final
@dataclass(frozen=True, eq=False)
class Curvature:
    """The curvature of the loss in the weight of a layer: when it changes by D, half of `tr(D inputs D^T outputs)`.

    Source: Martens and Grosse 2015, arXiv:1503.05671, sec. 3; of convolutions Grosse and Martens 2016,
    arXiv:1602.01407, sec. 3. Differs: inputs without their means, which a constant beside the weight takes up.
    """

    inputs: Float[Tensor, "inputs inputs"]
    """Covariance of what the weight is multiplied by, over samples and positions; float64."""
    outputs: Float[Tensor, "outputs outputs"]
    """Products of the loss' gradients at two outputs, summed over positions, mean over samples; float64."""


@dataclass(eq=False)
class _Sums:
    """Over the calls of one layer."""

    total: Tensor
    products: Tensor
    gradients: Tensor
    count: int = 0


@final
@dataclass(eq=False)
class Heard:
    """Sums over batches, for layers by the name of their weight."""

    generator: torch.Generator
    sums: dict[str, _Sums] = field(default_factory=dict)
    samples: int = 1
    """In the batch that is run now: a loss is the mean over them."""

    def hear(self, name: str, module: nn.Module, x: Tensor, output: Tensor) -> None:
        """A call of a layer."""
        rows = patches(module, x.detach(), SAMPLES, self.generator).double()
        if name not in self.sums:
            inputs, outputs = rows.shape[1], len(module.weight)  # type: ignore[arg-type]
            products, gradients = (rows.new_zeros(size, size) for size in (inputs, outputs))
            self.sums[name] = _Sums(rows.new_zeros(inputs), products, gradients)
        seen = self.sums[name]
        seen.total += rows.sum(0)
        seen.products.addmm_(rows.T, rows)
        seen.count += len(rows)
        if output.requires_grad:
            channels = 1 - module.weight.dim()  # type: ignore[operator]
            output.register_hook(lambda gradient: self.felt(seen, gradient.detach().movedim(channels, -1)))

    def felt(self, seen: _Sums, gradient: Tensor) -> None:
        rows = gradient.reshape(-1, gradient.shape[-1])  # [positions, outputs]
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        seen.gradients += self.samples * (rows.T @ rows)

    def found(self, batches: int) -> dict[str, Curvature]:
        """Raises NotFiniteError where something is NaN or infinite."""
        made = {}
        for name, seen in self.sums.items():
            mean = seen.total / seen.count
            pair = seen.products / seen.count - mean[:, None] * mean, seen.gradients / batches
            for matrix, what in zip(pair, ("an input", "a gradient"), strict=True):
                if not bool(matrix.isfinite().all()):
                    do = "check data and loss"
                    raise NotFiniteError("curvature as evidence", found=f"{what}: NaN or infinity", where=name, do=do)
            made[name] = Curvature(*pair)
        return made


def layers_of(model: nn.Module, graph: ChannelGraph) -> dict[str, list[nn.Module]]:
    """Linear layers and plain convolutions that read units which can be cut, by the name of their weight."""
    modules = dict(model.named_modules())
    found: dict[str, list[nn.Module]] = {}
    for member in (m for group in graph.groups if group.fixed is None for m in group.members):
        if (member.role, member.axis, member.blocks) != ("in", 1, 1) or member.tensor in found:
            continue
        layers = [modules.get(name.rpartition(".")[0]) for name in graph.names[member.tensor]]
        weight: Any = getattr(layers[0], "weight", None)
        if all(map(stock, layers)) and max(weight[0].numel(), len(weight)) <= LARGEST:
            found[member.tensor] = layers  # type: ignore[assignment]
    return found


@contextmanager
def heard(layers: dict[str, list[nn.Module]], seed: int) -> Iterator[Heard]:
    """Listens to the layers' calls and to the gradients at what they put out."""
    sums = Heard(torch.Generator().manual_seed(seed))
    handles = []

    def watch(name: str) -> Any:
        return lambda module, args, named, output: sums.hear(name, module, (*args, *named.values())[0], output)

    try:
        for name, modules in layers.items():
            for module in modules:
                handles.append(module.register_forward_hook(watch(name), with_kwargs=True))
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def samples_in(batch: Any) -> int:
    """Size of a batch: the first axis of its first tensor."""
    tensors = tensors_in(batch)
    return tensors[0].shape[0] if tensors and tensors[0].dim() else 1
