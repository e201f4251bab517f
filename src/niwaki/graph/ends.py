"""Where a trace begins and ends: parameters and buffers made known to the recorder, outputs held as they are."""

from typing import Any

from torch import Tensor, nn

from niwaki.graph.labels import varying
from niwaki.graph.recorder import Recorder
from niwaki.graph.skeleton import named_tensors
from niwaki.graph.values import Parameter, Value
from niwaki.units import tensors_in


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
