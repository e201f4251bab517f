"""Where networks come from: `load` builds a named one and puts weights from a file into it."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, final

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from niwaki.errors import InputError, UnknownNameError
from niwaki.models.checkpoint import file_of, load_checkpoint_, read_checkpoint, refuse_not_finite
from niwaki.models.source import IMAGENET_SHAPE, USUAL, Built, ModelSource, call_builder, refuse_downloads
from niwaki.tasks.detector import Detector
from niwaki.units import Example

# isort: split
from niwaki.models.darknet import Darknet
from niwaki.models.hf import HuggingFace
from niwaki.models.llama2c import Llama2c
from niwaki.models.python_factory import PythonFactory
from niwaki.models.timm import Timm
from niwaki.models.torchvision import Torchvision
from niwaki.models.ultralytics import Ultralytics

__all__ = [
    "IMAGENET_SHAPE",
    "SOURCES",
    "USUAL",
    "Built",
    "Loaded",
    "ModelSource",
    "call_builder",
    "load",
    "load_checkpoint_",
    "outline",
    "read_checkpoint",
    "refuse_downloads",
    "refuse_unknown",
]

SOURCES: dict[str, type[ModelSource]] = {
    "torchvision": Torchvision,
    "timm": Timm,
    "hf": HuggingFace,
    "python": PythonFactory,
    "ultralytics": Ultralytics,
    "darknet": Darknet,
    "llama2c": Llama2c,
}


@final
@dataclass(frozen=True, eq=False)
class Loaded:
    """A network that is ready to be traced."""

    model: nn.Module
    """In evaluation mode, on the CPU."""
    example: Example
    source: str
    """As it was asked for."""
    factory: Callable[[], nn.Module]
    """Builds the same architecture again, untrained."""
    weights: str
    """"random", "stored with the model", or the checkpoint's file name."""
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    """(mean, std) its pictures are normalised with, where the source says so; fits `niwaki.data.open`."""
    assumed: str = ""
    """Where the example's shape came from, if neither the user nor the network says it; see `Built`."""
    detector: Detector | None = None
    """How it is trained and read, if it finds boxes and its family is known here; for `tasks.Detection`."""
    protect: tuple[str, ...] = ()
    """Modules whose outputs have to keep their width, for `compress`: nothing in a forward shows why."""
    drawn: tuple[str, ...] = ()
    """Tensors that the weights have for another number of classes: they are as they were drawn, to be trained."""


def load(
    source: str,
    *,
    checkpoint: str | None = None,
    config: dict[str, Any] | None = None,
    seed: int = 0,
    shape: tuple[int, ...] | None = None,
) -> Loaded:
    """The network that `source` names, with random weights by `seed` or with those of `checkpoint`; never downloads.

    Sources: "torchvision:NAME", "timm:NAME", "hf:FOLDER_OR_CONFIG" (a folder's own weights are used),
    "ultralytics:NAME.yaml" (or FILE.pt), "darknet:FILE.cfg", "llama2c:FILE", and "python:package.module:factory" or
    "python:file.py:factory". Arguments follow a question mark, "&" between them, values in JSON
    ("torchvision:resnet18?num_classes=10"); `config` adds more. `shape` is that of one input without the batch, where
    the usual one (3 x 224 x 224 for pictures) does not fit. Where "torchvision:NAME?num_classes=3", "timm:...", alike,
    "ultralytics:NAME?nc=3" or "darknet:FILE.cfg?classes=3" says the number of classes, weights of another number are
    taken, with heads that are drawn anew (`drawn`).

    Raises:
        UnknownNameError: an unknown source or model.
        InputError: arguments that do not fit, a checkpoint of another model.
        FileDamagedError, NotFiniteError: see `load_checkpoint_`.
        MissingExtraError: the package of the source is not installed.

    Examples:
        >>> loaded = load("torchvision:resnet18?num_classes=10")
        >>> loaded.model.fc.out_features, tuple(loaded.example.shape)
        (10, (1, 3, 224, 224))
    """
    made = _source(source, config, shape)
    if checkpoint is not None:
        file_of(checkpoint)  # before a large network is built for it
    built = _seeded(made, seed=seed, stored=checkpoint is None)
    if checkpoint is not None:
        built = replace(built, drawn=_filled_(made, built.model, checkpoint))
    elif built.stored:
        names = {name for name, _ in built.model.named_parameters(remove_duplicate=False)}
        refuse_not_finite(built.model.state_dict(), names, where=source)
    weights = checkpoint or ("stored with the model" if built.stored else "random")
    return _loaded(built, source, partial(_untrained, made, seed), weights)


def refuse_unknown(source: str) -> None:
    """Refuse a name of no kind of source.

    Raises:
        UnknownNameError: there is none such; the message lists all.
    """
    kind, colon, _ = source.partition(":")
    if kind not in SOURCES or not colon:
        raise UnknownNameError.of("source of models", source, [f"{name}:..." for name in SOURCES])


def _source(source: str, config: dict[str, Any] | None, shape: tuple[int, ...] | None) -> ModelSource:
    refuse_unknown(source)
    kind, _, rest = source.partition(":")
    name, _, question = rest.partition("?")
    if not name:
        raise InputError(f"model {source!r}", found="no name after the colon", do=f"write {kind}:NAME")
    return SOURCES[kind](name, {**arguments_of(question, source), **(config or {})}, shape)


def outline(
    source: str, *, config: dict[str, Any] | None = None, seed: int = 0, shape: tuple[int, ...] | None = None
) -> Loaded:
    """The network that `source` names without its parameters, which are on the meta device; buffers are there.

    What `trace` and `cut_stored` need of a network that does not fit into memory. Weights that the source stores are
    not read.

    Raises:
        UnknownNameError, InputError, MissingExtraError: see `load`.

    Examples:
        >>> outline("torchvision:resnet18").model.fc.weight.device
        device(type='meta')
    """
    made = _source(source, config, shape)
    return _loaded(_outlined(made, seed), source, lambda: _outlined(made, seed).model, "not read")


def _loaded(built: Built, source: str, factory: Callable[[], nn.Module], weights: str) -> Loaded:
    return Loaded(
        built.model,
        built.example,
        source,
        factory,
        weights,
        normalisation=built.normalisation,
        assumed=built.assumed,
        detector=built.detector,
        protect=built.protect,
        drawn=built.drawn,
    )


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Inside, what modules register as a parameter goes to the meta device as it is registered."""

    def change(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or type(parameter) is not nn.Parameter:
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(change)  # type: ignore[arg-type]  # may return another one
    try:
        yield
    finally:
        handle.remove()


def arguments_of(question: str, source: str) -> dict[str, Any]:
    """Arguments written as `name=value&name=value`, values in JSON."""
    arguments: dict[str, Any] = {}
    for item in filter(None, question.split("&")):
        name, equals, value = item.partition("=")
        try:
            if not equals or not name.isidentifier() or name in arguments:
                raise ValueError("not one name=value")
            arguments[name] = json.loads(value)
        except ValueError as cause:
            do = 'write name=value with JSON values (12, 0.5, true, null, "text", [1, 2]), each name once'
            raise InputError(f"model {source!r}", found=f"argument {item!r}: {cause}", do=do) from cause
    return arguments


def _seeded(made: ModelSource, *, seed: int, stored: bool) -> Built:
    with torch.random.fork_rng(devices=[]):  # networks are built on the CPU
        torch.random.default_generator.manual_seed(seed)
        return made.build(stored=stored)


def _outlined(made: ModelSource, seed: int) -> Built:
    """Without parameters; those of networks that are run as they are built go when they are."""
    if not made.runs:
        with parameters_on_meta():
            return _seeded(made, seed=seed, stored=False)
    built = _seeded(made, seed=seed, stored=False)
    on_meta: dict[int, nn.Parameter] = {}
    for module in built.model.modules():
        for name, one in module._parameters.items():
            if one is not None:
                gone = on_meta.setdefault(id(one), nn.Parameter(one.detach().to("meta"), one.requires_grad))
                module._parameters[name] = gone
    return built


def _filled_(made: ModelSource, model: nn.Module, checkpoint: str) -> tuple[str, ...]:
    """What stays drawn; networks that are built to compare with take no random numbers."""
    with torch.random.fork_rng(devices=[]):
        return made.fill_(model, checkpoint)


def _untrained(made: ModelSource, seed: int) -> nn.Module:
    return _seeded(made, seed=seed, stored=False).model
