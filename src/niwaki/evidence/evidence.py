"""Evidence, and how a score sees it: rows of units."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from niwaki.errors import InputError, NotFiniteError
from niwaki.evidence.curvature import Curvature, heard, layers_of, samples_in
from niwaki.evidence.powers import Powers
from niwaki.graph import ChannelGraph
from niwaki.graph.skeleton import named_tensors
from niwaki.stored import Stored
from niwaki.units import Group, Member


class Need(Enum):
    """What a score may ask for."""

    WEIGHT = "weight"
    GRADIENT = "gradient"
    CURVATURE = "curvature"


@final
@dataclass(frozen=True, eq=False)
class Evidence:
    """Tensors by parameter name. Weights are the model's own, not copies, or on disk, where each is read when it is
    looked at; gradients are means over the batches seen.
    """

    weights: Mapping[str, Tensor] = field(repr=False)
    gradients: dict[str, Tensor] | None = field(default=None, repr=False)
    batches: int = 0
    curvature: dict[str, Curvature] | None = field(default=None, repr=False)
    """Of the layers that read units which can be cut, by the name of their weight: linear layers and plain
    convolutions, of up to 8192 inputs."""


@final
class Checked(Mapping[str, Tensor]):
    """Weights, on disk or here, each looked at for NaN and infinity as it is read."""

    def __init__(self, weights: Stored | dict[str, Tensor]) -> None:
        self.weights = weights
        self.seen: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.weights[name]
        if name not in self.seen and not tensor.is_meta:
            refuse_not_finite(name, tensor)
            self.seen.add(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def __contains__(self, name: object) -> bool:
        return name in self.weights


@final
class Rows(Sequence[Tensor]):
    """One `[units, rest]` per member, each made when it is read and not kept."""

    def __init__(self, weights: Mapping[str, Tensor], members: tuple[Member, ...], units: int) -> None:
        self.weights, self.members, self.units = weights, members, units

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        member = self.members[at]
        return rows(self.weights[member.tensor], member, self.units)

    def __len__(self) -> int:
        return len(self.members)


@final
@dataclass(frozen=True, eq=False)
class GroupView:
    """One group as a score sees it: for each parameter axis, the slices of its units as rows.

    Rows are made when they are read; a score that only sums powers of weights (norms) needs none.
    """

    group: Group
    members: tuple[Member, ...]
    """The group's axes of parameters (buffers are left out)."""
    evidence: Evidence
    sums: Powers

    @cached_property
    def weights(self) -> Sequence[Tensor]:
        """One `[units, rest]` per member; on disk, each is read anew every time it is taken."""
        made = Rows(self.evidence.weights, self.members, self.group.units)
        return tuple(made) if isinstance(self.evidence.weights, dict) else made

    @cached_property
    def gradients(self) -> tuple[Tensor, ...] | None:
        """The same of the gradients, where there are any."""
        known, units = self.evidence.gradients, self.group.units
        if known is None:
            return None
        return tuple(
            rows(known[m.tensor], m, units) if m.tensor in known else torch.zeros(units, 1) for m in self.members
        )

    @property
    def roles(self) -> tuple[str, ...]:
        """The members' roles, in the same order."""
        return tuple(m.role for m in self.members)

    @property
    def biases(self) -> tuple[bool, ...]:
        """Whether a member is a vector (bias, scale, shift) and not a matrix or kernel."""
        return tuple(self.evidence.weights[m.tensor].dim() == 1 for m in self.members)

    def powers(self, p: float) -> tuple[Tensor, ...]:
        """Per member, the sum of `|w|^p` over each unit's row; float64 `[units]`, on the CPU."""
        return tuple(self.sums.of(m, self.group.units, p) for m in self.members)


def collect(
    model: nn.Module,
    graph: ChannelGraph,
    needs: frozenset[Need],
    *,
    batches: Iterable[Any] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    stored: Stored | None = None,
    seed: int = 0,
) -> Evidence:
    """Gather what `needs` names. Gradients are computed in eval mode over `batches` with `loss(model, batch)`.

    Curvature comes from the same pass as gradients and is gathered only with them; of many positions of a layer's
    inputs some are drawn, by `seed`.

    With `stored` the weights are those on disk, and `model` may be on the meta device: a score then reads one tensor
    after the other. The model's mode, its `.grad` fields and its `requires_grad` flags are as before afterwards.

    Raises:
        InputError: gradients are needed but no batches or loss are given, or the weights are on disk or on the meta
            device; or the model, or what is stored, is not the graph's.
        NotFiniteError: a weight or gradient is not finite. Where nothing is needed, weights are looked at when they are
            read.
    """
    first: dict[int, tuple[str, Tensor]] = {}
    for name, parameter in named_tensors(model)[0]:
        first.setdefault(id(parameter), (name, parameter))
    weights = {name: parameter.detach() for name, parameter in first.values()}
    missing = [axis.tensor for axis in graph.axes if not axis.buffer and axis.tensor not in weights]
    if missing:
        raise InputError(
            "collect evidence", found=f"the model has no {missing[0]}", do="pass the model that was traced"
        )
    if stored is not None:
        if Need.GRADIENT in needs:
            do = "load the whole model, or use a score of the weights alone"
            raise InputError("gradients as evidence", found="weights that stay on disk", do=do)
        return Evidence(Checked(on_disk(stored, graph, weights)))
    if not needs:  # nobody asked for weights: they are looked at when somebody does
        return Evidence(Checked(weights))
    for name, tensor in weights.items():
        if not tensor.is_meta:
            refuse_not_finite(name, tensor)
    if Need.GRADIENT not in needs:
        return Evidence(weights)
    need_numbers(weights, "gradients as evidence")
    if batches is None or loss is None:
        raise InputError(
            "gradients as evidence", found="no batches or no loss", do="give batches= and loss=, or a task"
        )
    modes = {module: module.training for module in model.modules()}
    asked = {parameter: parameter.requires_grad for parameter in model.parameters()}
    sums: dict[str, Tensor] = {}
    count = 0
    try:
        model.eval()
        for parameter in asked:
            parameter.requires_grad_(parameter.is_floating_point())
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        with heard(layers_of(model, graph) if Need.CURVATURE in needs else {}, seed) as listener:
            for batch in batches:
                listener.samples = samples_in(batch)
                with torch.enable_grad():
                    value = loss(model, batch)
                    found = torch.autograd.grad(value, [p for _, p in named], allow_unused=True)
                for (name, parameter), gradient in zip(named, found, strict=True):
                    if gradient is None:
                        gradient = torch.zeros_like(parameter)
                    sums[name] = sums[name] + gradient if name in sums else gradient.detach()
                count += 1
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, flag in asked.items():
            parameter.requires_grad_(flag)
    if count == 0:
        raise InputError("gradients as evidence", found="no batches came", do="give at least one batch")
    for name, total in sums.items():
        if not finite(total):
            raise NotFiniteError("gradients as evidence", found="NaN or infinity", where=name, do="check data and loss")
    curvature = listener.found(count) if Need.CURVATURE in needs else None
    return Evidence(weights, {name: total / count for name, total in sums.items()}, count, curvature)


def need_numbers(tensors: Mapping[str, Tensor], asked: str) -> None:
    """Refuse tensors on the meta device, where something is asked of their values.

    Raises:
        InputError: names the first one.
    """
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise InputError(
                asked,
                found="a model on the meta device holds no numbers",
                where=name,
                do="load the weights on a real device, or use a score that needs none (Random)",
            )


def on_disk(stored: Stored, graph: ChannelGraph, weights: Mapping[str, Tensor]) -> Stored:
    """What is stored of the parameters, under the graph's names.

    Raises:
        InputError: a parameter that the graph knows is missing or has another shape.
    """
    held = stored.named({name: graph.names.get(name, (name,)) for name in weights})
    for axis in graph.axes:
        if axis.buffer:
            continue
        shape = tuple(weights[axis.tensor].shape)
        place = held.places.get(axis.tensor)
        if place is None or place.shape != shape:
            found = f"no {axis.tensor}" if place is None else f"{axis.tensor} {place.shape}, in the model {shape}"
            where = str(stored.index or stored.folder)
            raise InputError("score stored weights", found=found, where=where, do="name the checkpoint of this model")
    return held


def refuse_not_finite(name: str, tensor: Tensor) -> None:
    """Raises NotFiniteError where a weight holds NaN or infinity."""
    if not finite(tensor):
        raise NotFiniteError(
            "score the weights", found="NaN or infinity", where=name, do="repair or reload the checkpoint"
        )


def finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite, in one pass without a temporary (two where their sum overflows)."""
    if tensor.numel() == 0 or not tensor.dtype.is_floating_point:
        return True
    if bool(torch.isfinite(tensor.detach().sum())):  # anything not finite would have spread to the sum
        return True
    low, high = torch.aminmax(tensor.detach())
    return bool(torch.isfinite(low) & torch.isfinite(high))


def views(graph: ChannelGraph, evidence: Evidence) -> Iterator[GroupView]:
    """Every group that can be cut, as rows of units; blocks last, each as one row."""
    free = [group for group in (*graph.groups, *graph.blocks) if group.fixed is None]
    members = [tuple(m for m in group.members if m.tensor in evidence.weights) for group in free]
    sums = Powers(evidence.weights, [m for listed in members for m in listed])
    for group, listed in zip(free, members, strict=True):
        yield GroupView(group, listed, evidence, sums)


def rows(tensor: Tensor, member: Member, units: int) -> Tensor:
    """The slices of `tensor` that belong to each unit, `[units, rest]`."""
    if member.blocks > 1:
        size = tensor.shape[member.axis]
        split = tensor.reshape(member.blocks, tensor.shape[0] // member.blocks, *tensor.shape[1:])
        flat = split.movedim(member.axis + 1, 1).reshape(member.blocks * size, -1)  # [blocks * size, rest]
    else:
        flat = tensor.movedim(member.axis, 0).reshape(tensor.shape[member.axis], -1)  # [size, rest]
    order = np.argsort(member.unit, kind="stable")
    index = member.index[order].astype(np.int64)
    if np.array_equal(index, np.arange(flat.shape[0])):
        return flat.reshape(units, -1)
    return flat.index_select(0, torch.from_numpy(index).to(flat.device)).reshape(units, -1)
