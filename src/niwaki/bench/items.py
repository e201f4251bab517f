"""What can be timed: a run's folder, a source of models, an ONNX, OpenVINO or torch.export file."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from niwaki.errors import InputError
from niwaki.export.pt2_archive import read_pt2
from niwaki.export.runtimes import unreadable
from niwaki.files import nearest
from niwaki.measure import Macs, Params, measure
from niwaki.models import refuse_unknown
from niwaki.opening import open_network, saved_run
from niwaki.units import Example, map_tensors, tensors_in

FILES = {".onnx": "onnx", ".xml": "openvino", ".pt2": "pt2"}
RUNS_IN = {
    "run": ("eager", "compile", "onnxruntime", "openvino"),
    "model": ("eager", "compile", "onnxruntime", "openvino"),
    "pt2": ("eager", "compile"),
    "onnx": ("onnxruntime", "openvino"),
    "openvino": ("openvino",),
}
"""Kind -> runtimes."""


@final
@dataclass(frozen=True, eq=False)
class Item:
    """One thing to time, and what is known of it without running it."""

    label: str
    kind: str
    """run, model, pt2, onnx, openvino."""
    place: str
    """Folder, file or source."""
    macs: float | None = None
    """Multiply-adds of one sample; None where they can't be counted."""
    params: float | None = None
    bytes: float | None = None
    """On disk, where it is there; None for a model by its name."""
    example: Example | None = field(default=None, repr=False)
    """What it takes, if it says so."""
    shape: tuple[int, ...] | None = None
    """Of the example, where the user gave one."""
    opened: Any = field(default=None, repr=False)
    assumed: str = ""
    """Where the example's shape came from, if nobody said it."""

    @property
    def runtimes(self) -> tuple[str, ...]:
        return RUNS_IN[self.kind]

    def called(self, label: str) -> "Item":
        return replace(self, label=label)

    def counted(self, example: Example) -> "Item":
        """The same with its multiply-adds and parameters, its network dropped."""
        if self.opened is None:
            return self
        params = Params()(self.opened, None).value
        network = _Hiding(self.opened) if self.kind == "pt2" else self.opened
        macs = measure(network, fitted(self, example), meters=(Macs(),))["macs"].value
        return replace(self, opened=None, macs=macs, params=params)

    def to_json(self) -> dict[str, Any]:
        names = ("label", "kind", "place", "macs", "params", "bytes")
        return {name: getattr(self, name) for name in names}


class _Hiding(nn.Module):
    """A program of torch.export, which refuses to be put into a mode."""

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.called = (program,)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return self.called[0](*arguments, **named)


def kind_of(name: str) -> str:
    """What a name is of (see `RUNS_IN`); nothing is opened yet.

    Raises:
        InputError: nothing has this name, or a folder without a run.
    """
    path = Path(name)
    kind = FILES.get(path.suffix)
    if kind is None or not (path.exists() or ":" not in name):
        if saved_run(name) is not None:
            return "run"
        refuse_unknown(name)
        return "model"
    if not path.is_file():
        near = nearest(path)
        found = "no such file" + (f"; near: {', '.join(near)}" if near else "")
        raise InputError(f"bench {name}", found=found, where=str(path.absolute().parent), do="check the path")
    return kind


def open_item(name: str, *, shape: tuple[int, ...] | None, seed: int) -> Item:
    """The item of a name.

    Raises:
        InputError: nothing has this name, or a folder without a run.
        FileDamagedError: a file that is none of its kind.
    """
    path, kind = Path(name), kind_of(name)
    if kind in FILES.values():
        size = float(sum(part.stat().st_size for part in parts_of(path) if part.exists()))
        if kind == "onnx":
            example, params = _onnx(path)
            return Item(name, kind, name, None, params, size, example, shape)
        if kind == "openvino":
            return Item(name, kind, name, None, None, size, _openvino(path), shape)
        program = read_pt2(path)
        arguments, named = program.example_inputs or ((), {})
        return Item(name, kind, name, None, None, size, named or tuple(arguments), shape, program.module())
    network = open_network(name, shape=shape, seed=seed)
    if network.run is None:
        return Item(name, "model", name, example=network.example, shape=shape, opened=network.model,
                    assumed=network.loaded.assumed)  # fmt: skip
    on_disk = float(sum(part.stat().st_size for part in path.glob("*.safetensors")))
    return Item(name.rstrip("/"), "run", name, bytes=on_disk, example=network.example, shape=shape,
                opened=network.model)  # fmt: skip


def parts_of(path: Path) -> tuple[Path, ...]:
    """A file and what belongs to it."""
    return {
        ".onnx": (path, path.with_name(path.name + ".data")),
        ".xml": (path, path.with_suffix(".bin")),
    }.get(path.suffix, (path,))


def example_of(items: Sequence[Item], shape: tuple[int, ...] | None) -> Any:
    """The input of all: the first network's that knows what it takes, else the first file's, else the first guess.

    Raises:
        InputError: no item says, or a given shape is of several inputs.
    """
    networks = [item for item in items if item.kind in ("run", "model")]
    sure = [item for item in networks if not item.assumed]
    files = [item for item in items if item not in networks]
    example = next((item.example for item in (*sure, *files, *networks) if item.example is not None), None)
    if shape is not None and not any(item.kind in ("run", "model") for item in items):
        found = tensors_in(example) if example is not None else [torch.zeros(1)]
        if len(found) != 1:
            raise InputError(f"--input for {len(found)} inputs", found="one shape", do="leave --input out")
        return torch.zeros(shape, dtype=found[0].dtype)
    if example is None or not tensors_in(example):
        raise InputError(
            "bench", found="no item says which shapes it takes", do="give --input, such as --input 1x3x224x224"
        )
    return example


def fitted(item: Item, inputs: Any) -> Any:
    """`inputs` in the form that an item's example has: one tensor, several, or named ones.

    Raises:
        InputError: it takes another number of tensors.
    """
    given = tensors_in(inputs)
    own = item.example if item.example is not None else tuple(given)
    if len(tensors_in(own)) != len(given):
        raise InputError(
            f"bench {item.label}",
            found=f"it takes {len(tensors_in(own))} inputs, the others {len(given)}",
            do="compare networks that take the same",
        )
    left = iter(given)
    if isinstance(own, torch.Tensor):
        return next(left)
    return map_tensors(own, lambda _: next(left))


def _onnx(path: Path) -> tuple[Any, float]:
    """Zeros of the shapes that a file takes (None where it leaves more than the batch open), and its parameters."""
    import onnx

    try:
        graph = onnx.load(str(path), load_external_data=False).graph
        if not graph.node:
            raise ValueError("no graph in it")
        kinds = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.INT8}
        params = float(sum(prod(one.dims) for one in graph.initializer if one.data_type in kinds))
        constants = {one.name for one in graph.initializer}
        entries = [
            (onnx.helper.tensor_dtype_to_np_dtype(one.type.tensor_type.elem_type), one.type.tensor_type.shape.dim)
            for one in graph.input
            if one.name not in constants
        ]
        shapes = [([length.dim_value for length in dims], kind) for kind, dims in entries]
    except Exception as error:  # protobuf's errors have no common class
        raise unreadable(path, "ONNX", error) from error
    return _zeros(shapes), params


def _openvino(path: Path) -> Any:
    import openvino

    try:
        ports = openvino.Core().read_model(str(path)).inputs
        shapes = [
            (
                [0 if length.is_dynamic else length.get_length() for length in port.partial_shape],
                port.element_type.to_dtype(),
            )
            for port in ports
        ]
    except Exception as error:
        raise unreadable(path, "OpenVINO", error) from error
    return _zeros(shapes)


def _zeros(shapes: list[tuple[list[int], Any]]) -> Any:
    if any(0 in lengths[1:] for lengths, _ in shapes):
        return None
    import numpy as np

    made = tuple(
        torch.from_numpy(np.zeros([lengths[0] or 1, *lengths[1:]], kind)) for lengths, kind in shapes if lengths
    )
    return made or None
