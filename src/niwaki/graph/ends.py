"""Where a trace begins and ends: parameters and buffers made known to the recorder, outputs held as they are."""

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn

from niwaki.graph.labels import varying
from niwaki.graph.recorder import Recorder
from niwaki.graph.skeleton import Ties, named_tensors
from niwaki.graph.values import Parameter, Value
from niwaki.units import Needed, tensors_in


def seed(recorder: Recorder, model: nn.Module) -> dict[str, Parameter]:
    """Make every parameter and buffer known to the recorder, under its first name."""
    found: dict[str, Parameter] = {}
    for kind, tensors in zip(("parameter", "buffer"), named_tensors(model), strict=True):
        first: dict[int, tuple[str, Tensor]] = {}
        for name, tensor in tensors:
            first.setdefault(id(tensor), (name, tensor))
        for name, tensor in first.values():
            if not (tensor.dtype.is_floating_point or tensor.dtype.is_complex):
                # tables of positions and counters: their values are known, their width is nobody's choice
                if kind == "buffer":
                    recorder.value(tensor).table = name
                continue
            parameter = Parameter(name, tuple(tensor.shape), buffer=kind == "buffer", itemsize=tensor.dtype.itemsize)
            found[name] = parameter
            recorder.know(
                tensor,
                Value(
                    tuple(tensor.shape),
                    why=f"the {kind} {name}",
                    zero=kind == "parameter",
                    parameter=parameter,
                    direct=True,
                ),
            )
    return found


def fix_outputs(recorder: Recorder, output: Any, reason: str = "output of the model") -> None:
    for tensor in tensors_in(output):
        for labels in recorder.value(tensor).get(recorder.space):
            if varying(labels):
                recorder.space.fix(labels, reason)


def held_twice(ties: Ties, listings: Sequence[list[tuple[str, Tensor]]], known: Collection[str]) -> list[Needed]:
    """Registered tensors, by their `known` names, that can't be cut: another one is a view of them, and would go on
    with what was cut away."""
    if not (overlapping := ties.overlapping()):
        return []
    names = {id(tensor): name for listing in reversed(listings) for name, tensor in reversed(listing)}
    found = []
    for mine, other in overlapping:
        if names.get(id(mine)) in known:
            what = f"{names.get(id(other), 'a tensor of its module')} {tuple(other.shape)}"
            found.append(Needed(names[id(mine)], f"its memory is also that of {what}"))
    return found
