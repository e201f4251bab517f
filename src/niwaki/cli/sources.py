"""From the command line's words to a model, an example and data. Imports torch, so commands import this late."""

from dataclasses import dataclass, replace
from typing import Any, final

import torch

from niwaki import data, models
from niwaki.cli.options import pairs_of, shape_of
from niwaki.cli.talk import say
from niwaki.data import Splits, TextSplits
from niwaki.errors import InputError, UnknownNameError
from niwaki.measure.latency import at_batch
from niwaki.models import Loaded
from niwaki.tasks import Classification, LanguageModelling, Task
from niwaki.units import map_tensors

TEXT = "text:"
CONTEXT = 128
"""Tokens in a block of text, unless the model's context is shorter."""


@final
@dataclass(frozen=True, eq=False)
class Asked:
    """What a command works on."""

    loaded: Loaded
    example: Any
    splits: Splits | TextSplits | None


def ask(
    source: str,
    *,
    checkpoint: str | None = None,
    shape: str | None = None,
    spec: str | None = None,
    normalisation: str | tuple[Any, Any] | None = None,
    split_seed: int = 0,
    seed: int = 0,
    threads: int | None = None,
    device: str | None = None,
    own_weights: bool = True,
) -> Asked:
    """The model, an example, and the data if a `spec` is given.

    Of a text (`text:FILE`) the example is its first block. Otherwise the example's shape is `shape` if given, then that
    of the data's pictures, then the model's usual one.
    Pictures are normalised as the option says, else as the model's source does, else as the data's source does.
    `own_weights` is False where the model's weights do not matter because others replace them.
    """
    if normalisation is not None and spec is None:
        raise InputError(f"--normalisation {normalisation}", found="no data to normalise", do="give --data")
    if threads is not None:
        torch.set_num_threads(threads)
    place = device_named(device)
    wanted = shape_of(shape)
    if spec is not None and spec.startswith(TEXT):
        return _reading(source, checkpoint, spec, place, seed=seed, asked=(shape, normalisation), own=own_weights)
    splits = None
    if spec is not None and wanted is None:
        splits = _data(spec, None, normalisation, split_seed)
    inner = wanted[1:] if wanted else splits.shape if splits is not None else None
    loaded = models.load(source, checkpoint=checkpoint, seed=seed, shape=inner)
    if spec is not None and (splits is None or (normalisation is None and loaded.normalisation is not None)):
        splits = _data(spec, wanted or inner, normalisation or loaded.normalisation, split_seed)
    example = loaded.example if not wanted or wanted[0] == 1 else at_batch(loaded.example, wanted[0])
    return _placed(Asked(loaded, example, splits), place, own=own_weights)


def _placed(asked: Asked, place: torch.device | None, *, own: bool) -> Asked:
    """Model and example where they are to be."""
    if own and asked.loaded.weights == "random":
        say(f"{asked.loaded.source}: the weights are random (no --checkpoint)")
    if place is None:
        return asked
    asked.loaded.model.to(place)
    return replace(asked, example=map_tensors(asked.example, lambda tensor: tensor.to(place)))


def _reading(
    source: str,
    checkpoint: str | None,
    spec: str,
    place: torch.device | None,
    *,
    seed: int,
    asked: tuple[Any, Any],
    own: bool,
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
    loaded = models.load(source, checkpoint=checkpoint, seed=seed)
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
        raise InputError(f"{source} on a text", found=f"an example of type {type(example).__name__}", do=do)
    return _placed(Asked(loaded, example, splits), place, own=own)


def task_of(asked: Asked, *, batch: int = 128, augment: str = "none", label_smoothing: float = 0.0) -> Task | None:
    """What a batch of the data means; None without data."""
    if isinstance(asked.splits, TextSplits):
        if augment != "none":
            raise InputError(f"--augment {augment}", found="a text as data", do="leave it out")
        if label_smoothing:
            raise InputError(f"--label-smoothing {label_smoothing}", found="a text as data", do="leave it out")
        kind: Any = "causal" if asked.splits.mask is None else "masked"
        return LanguageModelling(asked.splits, batch=batch, kind=kind)
    if asked.splits is None:
        return None
    return Classification(asked.splits, batch=batch, augment=augment, label_smoothing=label_smoothing)


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


def _data(spec: str, shape: tuple[int, ...] | None, normalisation: Any, seed: int) -> Splits:
    if shape is None:
        return data.open(spec, normalisation=normalisation, seed=seed)
    if len(shape) < 3 or shape[-1] != shape[-2]:
        found = "x".join(map(str, shape))
        raise InputError(f"--data {spec}", found=f"an input of {found}", do="give a square picture: --input 1x3x32x32")
    return data.open(spec, size=shape[-1], channels=shape[-3], normalisation=normalisation, seed=seed)
