"""From the command line's words to a model, an example and data. Imports torch, so commands import this late."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
import typer

from niwaki import data
from niwaki.cli.options import pairs_of, shape_of
from niwaki.cli.talk import say, warn
from niwaki.data import BoxSplits, Splits, TextSplits
from niwaki.errors import InputError, UnknownNameError
from niwaki.measure.measurement import evaluating
from niwaki.models import Loaded
from niwaki.opening import Network, SavedRun, open_network, saved_run
from niwaki.tasks import Augmentation, Classification, Detection, LanguageModelling, Task
from niwaki.tasks.classification import refuse_settings
from niwaki.units import map_tensors, run, tensors_in

TEXT = f"{data.TEXT}:"
CONTEXT = 128
"""Tokens in a block of text, unless the model's context is shorter."""
BATCH, DETECTED = 128, 16
"""Samples in a batch, and pictures in one of a detector, unless said."""
OF_BOXES = ("fit", "together", "val", "test", "images")
"""Settings of pictures with boxes: of the frame, and of `niwaki.data.open_boxes`."""
CLASSES = {"ultralytics": ("nc", 0), "torchvision": ("num_classes", 1)}
"""Arguments of detectors' builders for the number of classes, and how many are not the data's (background)."""
CHANGES = {"none": None, "flip": Augmentation(mosaic=0.0), "mosaic": Augmentation()}
"""Of a detector's training pictures: what --augment names."""


@final
@dataclass(frozen=True, eq=False)
class Asked:
    """What a command works on."""

    loaded: Loaded
    example: Any
    splits: Splits | TextSplits | BoxSplits | None
    run: SavedRun | None = None
    """The run whose network it is."""
    fit: Any = "letterbox"
    """How pictures with boxes are fitted into a frame."""


def ask(
    source: str,
    *,
    factory: str | None = None,
    checkpoint: str | None = None,
    shape: str | None = None,
    spec: str | None = None,
    normalisation: str | None = None,
    split_seed: int | None = None,
    seed: int = 0,
    threads: int | None = None,
    device: str | None = None,
) -> Asked:
    """The model, an example, and the data if a `spec` is given.

    Of a text (`text:FILE`) the example is its first block. Otherwise the example's shape is `shape` if given, then that
    of the run whose network it is, then that of the data's pictures, then the model's usual one.
    Pictures are normalised as the option says, else as the run saw them, else as the model's source does, else as the
    data's source does; they are split as the run split its own. Pictures with boxes are fitted into a frame of the
    example's size, and looked at by models of which niwaki knows how they are trained and read as detectors.
    """
    if normalisation is not None and spec is None:
        raise InputError(f"--normalisation {normalisation}", found="no data to normalise", do="give --data")
    if spec is not None:
        _refuse_data(spec, normalisation)
    if threads is not None:
        torch.set_num_threads(threads)
    place = device_named(device)
    wanted = shape_of(shape)
    opened = partial(open_network, source, factory=factory, checkpoint=checkpoint, seed=seed)
    if spec is not None and spec.startswith(TEXT):
        return _reading(opened, spec, place, asked=(shape, normalisation))
    run = saved_run(source)
    split = _split_seed(split_seed, run)
    if wanted is None and run is not None and (spec is None or data.is_boxes(spec) or _square(run.shape)):
        wanted = run.shape
    if spec is not None and wanted is not None and not data.is_boxes(spec):
        _refuse_oblong(spec, wanted)
    splits = None
    if spec is not None and data.is_boxes(spec):
        named = partial(open_network, factory=factory, checkpoint=checkpoint, seed=seed, shape=wanted)
        return _placed(_detecting(named, source, spec, split), place)
    if spec is not None and wanted is None:
        splits = _data(spec, None, normalisation, split)
        wanted = (1, *splits.shape)
    network = opened(shape=wanted)
    usual = network.loaded.normalisation
    if spec is not None and wanted is not None and normalisation is None and usual is not None:
        _refuse_other_channels(source, spec, wanted, len(data.Normalisation.of(usual).mean))
    if spec is not None and (splits is None or (normalisation is None and usual is not None)):
        splits = _data(spec, wanted, normalisation or usual, split)
    return _fitting(_placed(Asked(network.loaded, network.example, splits, run), place), source, spec)


SHARED = ("factory", "checkpoint", "shape", "normalisation", "split_seed", "seed", "threads", "device")
"""Options that commands on a model share, by the names of their parameters."""


def ask_as_typed(context: typer.Context) -> Asked:
    """What the command at hand works on, by those of the shared options that it has."""
    typed = context.params
    shared = {name: typed[name] for name in SHARED if name in typed}
    return ask(typed["model"], spec=typed.get("data"), **shared)


def _square(shape: tuple[int, ...] | None) -> bool:
    """Whether it is that of a batch of square pictures."""
    return shape is not None and len(shape) == 4 and shape[-1] == shape[-2]


def _split_seed(asked: int | None, run: SavedRun | None) -> int:
    """The seed that data are split by: the run's own, or pictures that it was trained on would be tested on."""
    own = None if run is None else run.split_seed
    if asked is not None and own is not None and asked != own:
        warn(f"--split-seed {asked}, the run's was {own}: pictures that it was trained on may be among the test")
    return asked if asked is not None else own or 0


def _placed(asked: Asked, place: torch.device | None) -> Asked:
    """Model and example where they are to be."""
    if asked.loaded.weights == "random":
        say(f"{asked.loaded.source}: the weights are random (no --checkpoint)")
    if asked.loaded.assumed:
        say(assumption(asked.loaded.assumed, asked.example))
    if place is None:
        return asked
    asked.loaded.model.to(place)
    return replace(asked, example=map_tensors(asked.example, lambda tensor: tensor.to(place)))


def assumption(assumed: str, example: Any) -> str:
    """What a command says of an input that nobody asked for."""
    shapes = ", ".join("x".join(map(str, tensor.shape)) for tensor in tensors_in(example))
    return f"input {shapes}: {assumed} (no --input)"


def _reading(
    opened: Callable[[], Network],
    spec: str,
    place: torch.device | None,
    *,
    asked: tuple[Any, Any],
) -> Asked:
    """A language model, and the text that it reads: `text:FILE?length=128&tokenizer=FOLDER&mask=103`."""
    for option, value in zip(("--input", "--normalisation"), asked, strict=True):
        if value is not None:
            do = f'a text has blocks: --data "{spec.partition("?")[0]}?length=128"'
            raise InputError(f"{option} {value}", found="a text as data", do=do)
    file, _, rest = spec.removeprefix(TEXT).partition("?")
    settings = pairs_of(rest.split("&"), f"--data {TEXT}FILE?") if rest else {}
    if unknown := sorted(set(settings) - {"length", "tokenizer", "mask", "val", "test"}):
        raise UnknownNameError.of("setting of a text", unknown[0], ["length", "tokenizer", "mask", "val", "test"])
    if not file:
        raise InputError(f"data {spec!r}", found="nothing after the colon", do=f"write {TEXT}FILE")
    network = opened()
    loaded = network.loaded
    context = getattr(getattr(loaded.model, "config", None), "max_position_embeddings", None)
    settings.setdefault("length", min(CONTEXT, context) if isinstance(context, int) else CONTEXT)
    splits = data.open_text(file, **settings)
    tokens, example = next(splits.train.batches(1)), loaded.example
    if isinstance(example, dict) and "input_ids" in example:
        example = {**example, "input_ids": tokens}
    elif isinstance(example, torch.Tensor):
        example = tokens
    else:
        do = "return (model, tokens [1, length]) from the factory, or use a language model of hf:"
        raise InputError(f"{loaded.source} on a text", found=f"an example of type {type(example).__name__}", do=do)
    return _fitting(_placed(Asked(loaded, example, splits, network.run), place), loaded.source, spec)


def _fitting(asked: Asked, source: str, spec: str | None) -> Asked:
    """The same; where there are data, the model takes one example of them, or both are named.

    Raises:
        InputError: the forward fails on the example.
    """
    given = list(tensors_in(asked.example))
    if spec is None or any(tensor.is_meta for tensor in given):
        return asked
    try:
        with evaluating(asked.loaded.model):
            run(asked.loaded.model, asked.example)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        lines = str(error).strip().splitlines() or [""]
        shapes = ", ".join(f"{'x'.join(map(str, tensor.shape))} ({str(tensor.dtype)[6:]})" for tensor in given)
        kind = "a text: token numbers" if spec.startswith(TEXT) else "pictures"
        raise InputError(
            f"{source} on {spec}",
            found=f"{kind}, as an input of {shapes}, on which its forward failed: "
            f"{type(error).__name__}: {lines[0][:300]}",
            where="the forward of the model on an example of the data",
            do="give a language model, or pictures as --data" if spec.startswith(TEXT)
            else "give --input as the model wants it (1x3x32x32: batch, channels, height, width; pictures are made "
            "to fit), or other --data",
        ) from error  # fmt: skip
    return asked


def _refuse_data(spec: str, normalisation: str | None) -> None:
    """Refuse data that can't be, before a model is made for them."""
    if data.is_boxes(spec):
        if normalisation is not None:
            found, do = "pictures with boxes as data", "leave it out: detectors see colours from 0 to 1"
            raise InputError(f"--normalisation {normalisation}", found=found, do=do)
        data.place_of_boxes(spec.partition("?")[0])
        return
    if normalisation is not None:
        data.Normalisation.of(normalisation)
    if not spec.startswith(TEXT):
        data.reader_of(spec)
        return
    file = spec.removeprefix(TEXT).partition("?")[0]
    if file and not Path(file).expanduser().is_file():
        raise InputError(f"text {file}", found="no such file", do="check the path")


def refuse_task(spec: str | None, *, augment: str | None = None, label_smoothing: float = 0.0) -> None:
    """Refuse settings of a task that no data of this kind have, before anything is read."""
    if spec is not None and spec.startswith(TEXT):
        for option, value in (("--augment", augment != "none" and augment), ("--label-smoothing", label_smoothing)):
            if value:
                raise InputError(f"{option} {value}", found="a text as data", do="leave it out")
    elif spec is not None and data.is_boxes(spec):
        if label_smoothing:
            do = "leave it out: a detector's losses are its own"
            raise InputError(f"--label-smoothing {label_smoothing}", found="pictures with boxes as data", do=do)
        if augment is not None and augment not in CHANGES:
            raise UnknownNameError.of("augmentation of a detector's pictures", augment, list(CHANGES))
    else:
        refuse_settings(augment or "none", label_smoothing)


def _detecting(named: Callable[[str], Network], source: str, spec: str, seed: int) -> Asked:
    """A detector, and the pictures with boxes that it looks at: `yolo:FOLDER/data.yaml?fit=squash&together=prefix`."""
    place, _, rest = spec.partition("?")
    settings = pairs_of(rest.split("&"), f"--data {place}?") if rest else {}
    if unknown := sorted(set(settings) - set(OF_BOXES)):
        raise UnknownNameError.of("setting of pictures with boxes", unknown[0], OF_BOXES)
    network = named(source)
    loaded = network.loaded
    if loaded.detector is None:
        do = (
            "use a detector of darknet:, ultralytics: (losses of segmentation, poses, oriented boxes and RT-DETR are "
            "not called here) or torchvision:; methods without data cut this one, too: leave --data out "
            "(--method magnitude; with --rule uniform it stays of its own class, for your code to train); in Python, "
            "niwaki.tasks.Detection takes a detector of yours"
        )
        found = f"{loaded.source} is no detector that niwaki knows how to train and read"
        raise InputError(f"--data {place}", found=found, do=do)
    said = (network.run.settings.get("task") or {}).get("fit") if network.run is not None else None
    fit = settings.pop("fit", None) or said or loaded.detector.fit
    splits = data.open_boxes(place, seed=seed, **settings)
    kind, count = source.partition(":")[0], len(splits.classes)
    if loaded.detector.classes != count and loaded.weights == "random" and kind in CLASSES:
        argument, more = CLASSES[kind]
        if f"{argument}=" not in source.partition("?")[2]:
            source += f"{'&' if '?' in source else '?'}{argument}={count + more}"
            say(f"{source}: built for the {count} classes of the data")
            network = named(source)
    return Asked(network.loaded, network.example, splits, network.run, fit)


def task_of(
    asked: Asked, *, batch: int | None = None, augment: str | None = None, label_smoothing: float = 0.0
) -> Task | None:
    """What a batch of the data means; None without data. What is not said is the usual of the task."""
    splits = asked.splits
    if isinstance(splits, TextSplits):
        kind: Any = "causal" if splits.mask is None else "masked"
        return LanguageModelling(splits, batch=batch or BATCH, kind=kind)
    if isinstance(splits, BoxSplits):
        assert asked.loaded.detector is not None
        return Detection(
            splits,
            asked.loaded.detector,
            size=_sides(asked),
            fit=asked.fit,
            batch=batch or DETECTED,
            augment=CHANGES[augment or "mosaic"],
        )
    if splits is None:
        return None
    return Classification(splits, batch=batch or BATCH, augment=augment or "none", label_smoothing=label_smoothing)


def _sides(asked: Asked) -> tuple[int, int]:
    """Height and width of the pictures that the model's example has."""
    shape = tuple(next(iter(tensors_in(asked.example)), torch.empty(0)).shape)
    if len(shape) not in (3, 4) or shape[-3] != 3:
        found = f"an example of {'x'.join(map(str, shape))}"
        raise InputError(f"{asked.loaded.source} on pictures with boxes", found=found, do="give --input 1x3x320x320")
    return int(shape[-2]), int(shape[-1])


def device_named(name: str | None, *, meta: bool = False) -> torch.device | None:
    """The device of this name; "meta", which holds no numbers, where that is enough.

    Raises:
        InputError: no such device here.
    """
    if name is None:
        return None
    try:
        place = torch.device(name)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        found = "cpu" + "".join(f", cuda:{i}" for i in range(torch.cuda.device_count()))
        raise InputError(f"--device {name}", found=lines[0], do=f"give a device of this machine: {found}") from error
    if place.type == "meta" and not meta:
        raise InputError("--device meta", found="it holds no numbers", do="give a device that computes")
    return place


def device_here(name: Any) -> str | None:
    """The name of a device that was recorded, if it is on this machine."""
    try:
        return str(device_named(name)) if isinstance(name, str) else None
    except InputError:
        return None


def shape_text(example: Any) -> str | None:
    """The --input of an example that a plan or report recorded, where it is a single tensor of floating numbers.

    Whole-number inputs (tokens) are left to the model's source: their shape says nothing of their range.
    """
    if isinstance(example, dict) and "float" in str(example.get("dtype")) and isinstance(example.get("tensor"), list):
        return "x".join(map(str, example["tensor"]))
    return None


def _refuse_oblong(spec: str, shape: tuple[int, ...]) -> None:
    """Refuse pictures for an input that is no square."""
    if len(shape) < 3 or shape[-1] != shape[-2]:
        found = "x".join(map(str, shape))
        raise InputError(f"--data {spec}", found=f"an input of {found}", do="give a square picture: --input 1x3x32x32")


def _refuse_other_channels(source: str, spec: str, shape: tuple[int, ...], channels: int) -> None:
    """Refuse grey pictures for a model that was made for coloured ones, where --input does not say so."""
    if len(shape) == 4 and channels > 1 and shape[1] == 1:
        wanted = "x".join(map(str, (shape[0], channels, *shape[2:])))
        raise InputError(
            f"{source} on {spec}",
            found=f"pictures of {shape[1]} channel, the model's have {channels}",
            do=f"give --input {wanted}, which repeats them, or --normalisation none if it does take one",
        )


def _data(spec: str, shape: tuple[int, ...] | None, normalisation: Any, seed: int) -> Splits:
    if shape is None:
        return data.open(spec, normalisation=normalisation, seed=seed)
    return data.open(spec, size=shape[-1], channels=shape[-3], normalisation=normalisation, seed=seed)
