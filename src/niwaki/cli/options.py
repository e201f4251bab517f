"""Options that several commands share, and the reading of their small grammars."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from niwaki.errors import InputError, UnknownNameError

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="torchvision:NAME, timm:NAME, hf:FOLDER_OR_CONFIG, ultralytics:NAME.yaml or FILE.pt, darknet:FILE.cfg, "
        "llama2c:FILE, python:file.py:factory or python:pkg.mod:factory; arguments after '?' as name=JSON, joined by "
        "&. Or a run's folder, of `niwaki train` or `niwaki compress`.",
    ),
]
Checkpoint = Annotated[
    str | None,
    typer.Option(
        help="Weights: safetensors, a torch file (read with weights_only), darknet's .weights.", metavar="FILE"
    ),
]
Input = Annotated[
    str | None, typer.Option("--input", help="Shape of the example, such as 1x3x224x224.", metavar="SHAPE")
]
Protect = Annotated[
    list[str] | None, typer.Option(help="Module whose outputs keep their width (repeat).", metavar="NAME")
]
SEEDS = {"min": 0, "max": 2**32 - 1}
"""What every generator takes as a seed."""
THREADS = 1024
"""More than any machine runs well: OpenMP ends the process where it can't start as many as are asked for."""
Seed = Annotated[
    int, typer.Option(help="Of random weights and scores, fresh inputs, and the order of training.", **SEEDS)
]
Threads = Annotated[int | None, typer.Option(min=1, max=THREADS, help="CPU threads inside an operation.")]
Device = Annotated[
    str | None, typer.Option(help="Where the model runs: cpu (unless said), cuda, cuda:1, ...", metavar="NAME")
]
TraceDevice = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="Where the forward runs: meta (no memory) or cpu, cuda, ...; meta and, if that fails, cpu unless said.",
        metavar="NAME",
    ),
]
CheckDevice = Annotated[
    str | None,
    typer.Option(
        "--device", help="Where the model runs; where it was saved, if that is here, unless said.", metavar="NAME"
    ),
]
EXPORTS = ("onnx", "openvino", "pt2", "tensorrt", "executorch", "int8")
RUNTIMES = ("eager", "compile", "onnxruntime", "openvino")
"""Names that the command line knows before torch is imported; a test compares them with the library's."""
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else, on stdout.")]
Data = Annotated[
    str | None,
    typer.Option(
        help="digits, imagefolder:DIR, cifar10:DIR, npz:FILE; for detectors voc:DIR, coco:FILE, yolo:FOLDER/data.yaml "
        "(settings after '?', such as fit=squash); for language models text:FILE.",
        metavar="SPEC",
    ),
]
Normalisation = Annotated[
    str | None, typer.Option(help="none, half, imagenet, cifar10 or digits; the model's or source's own unless said.")
]
Batch = Annotated[
    int | None, typer.Option(min=1, help="Samples in a batch; 128 unless said, of detectors 16.", metavar="N")
]
Augment = Annotated[
    str | None,
    typer.Option(
        help="Of training pictures: none (unless said) or flip_crop; of detectors none, flip or mosaic (unless said).",
        metavar="NAME",
    ),
]
DETECTORS = ("voc", "coco", "yolo")
"""Kinds of data with boxes, that the command line knows before torch is imported; a test compares them."""
TargetName = Annotated[
    str | None,
    typer.Option(
        "--target",
        help="Runtime to measure layers in, for --of latency or energy: onnxruntime, openvino or pytorch (eager).",
        metavar="RUNTIME",
    ),
]
TargetBatch = Annotated[int, typer.Option(min=1, help="Samples in a forward pass on the target.")]
TableFile = Annotated[
    Path | None,
    typer.Option(
        "--table", help="File that keeps measured layers; one in the cache folder unless said.", metavar="FILE"
    ),
]
SplitSeed = Annotated[
    int | None,
    typer.Option(
        help="Of the data split; keep it for the whole life of a model. A run's own unless said, of others 0.", **SEEDS
    ),
]

Distill = Annotated[
    list[str] | None,
    typer.Option(
        "--distill",
        metavar="LOSS",
        help="Let the uncut model teach in the recovery: logits, channel_wise, spatial_attention or features; settings "
        "after '?', joined by &: \"channel_wise?taps=layer1,layer2&temperature=4&weight=3\" (repeat).",
    ),
]


def target_of(
    name: str | None, *, batch: int, threads: int | None, table: Path | None, budgets: tuple[Any, ...] = ()
) -> tuple[Any, Path | None]:
    """The target and the file of its measured layers; nothing where no target is named.

    Raises:
        InputError: an unknown runtime, one that is not installed, or settings of a target that is not named.
    """
    if name is None:
        if table is not None or batch != 1:
            option = "--table" if table is not None else "--target-batch"
            raise InputError(option, found="no target to set it for", do="give --target onnxruntime")
        return None, None
    from niwaki.budgets import table_path
    from niwaki.measure import Target

    energy = any(budget.of == "energy" for budget in budgets)
    target = Target(name, batch=batch, threads=threads or 1, of="energy" if energy else "latency")
    target.need()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "niwaki"
    return target, table or table_path(cache, target)


def shape_of(text: str | None) -> tuple[int, ...] | None:
    """The numbers in "1x3x224x224", batch first.

    Raises:
        InputError: not whole numbers from 1 joined by x.
    """
    if text is None:
        return None
    try:
        shape = tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise InputError(
            f"--input {text}", found="not a shape", do="write whole numbers joined by x, batch first: 1x3x224x224"
        )
    return shape


def value_of(text: str) -> Any:
    """JSON where it is JSON, text where it is not: 3, 0.5, true, null, "quoted", plain."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def pairs_of(items: list[str] | None, option: str) -> dict[str, Any]:
    """What `--set field=value --set other=value` says.

    Raises:
        InputError: an item is no field=value, or a field is given twice.
    """
    found: dict[str, Any] = {}
    for item in items or []:
        name, equals, value = item.partition("=")
        if not equals or not all(part.isidentifier() for part in name.split(".")):
            raise InputError(f"{option} {item}", found="no field=value", do=f"write {option} field=value")
        if name in found:
            raise InputError(f"{option} {item}", found=f"{name} given twice", do="give each field once")
        found[name] = value_of(value)
    return found


def training_of(texts: list[str] | None, option: str, shortcuts: dict[str, Any]) -> dict[str, Any]:
    """Settings of a training from `--set field=value` or `group.field=value`, and from the options that stand for one
    (by the same names).

    Raises:
        InputError: a setting is given twice, or is not for the user to set.
    """
    given = pairs_of(texts, option)
    said = {name: value for name, value in shortcuts.items() if value is not None}
    for name in given:
        if name in said or name == "folder":
            option_of = name.rpartition(".")[2].replace("_", "-")
            found = "the run's own" if name == "folder" else f"--{option_of} as well, given or by its default"
            do = (
                "leave it out"
                if name == "folder"
                else f"give --{option_of} {given[name]}, and leave {option} {name} out"
            )
            raise InputError(f"{option} {name}=...", found=found, do=do)
    tree: dict[str, Any] = {}
    for name, value in {**said, **given}.items():
        *groups, last = name.split(".")
        place = tree
        for group in groups:
            if place.get(group) is True:
                place[group] = {}
            place = place.setdefault(group, {})
            if not isinstance(place, dict):
                raise InputError(f"{option} {name}={value}", found=f"{group}={place!r}", do="give one of them")
        if isinstance(place.get(last), dict):
            raise InputError(f"{option} {name}={value}", found=f"settings of {name}", do="give one of them")
        place[last] = value
    return tree


def losses_of(texts: list[str] | None) -> tuple[Any, ...]:
    """What `--distill` says, as `niwaki.distill.Weighted`.

    Raises:
        UnknownNameError: no such loss, or a setting that it does not have; the message lists those there are.
        InputError: a value that does not fit, or a loss of features without taps.
    """
    if not texts:
        return ()
    from dataclasses import fields

    from niwaki import distill
    from niwaki.distill import Weighted

    kinds: dict[str, Any] = {
        one.__module__.rpartition(".")[2]: one
        for one in map(vars(distill).get, distill.__all__)
        if isinstance(one, type) and issubclass(one, distill.Loss) and one is not distill.Loss
    }
    found = []
    for text in texts:
        name, mark, rest = text.partition("?")
        if name not in kinds:
            raise UnknownNameError.of("distillation", name, sorted(kinds))
        given = pairs_of(rest.split("&"), f"--distill {name}?") if mark else {}
        weight, taps = given.pop("weight", 1.0), given.pop("taps", None)
        known = [field.name for field in fields(kinds[name])]
        for setting in given:
            if setting not in known:
                raise UnknownNameError.of(f"setting of {name}", setting, [*known, "weight", "taps"])
        if taps is None and name != "logits":
            do = f'name modules: --distill "{name}?taps=layer1,layer2"'
            raise InputError(f"--distill {text}", found="no taps to compare features at", do=do)
        try:
            paths = {} if taps is None else {"taps": tuple(str(taps).split(","))}
            found.append(Weighted(kinds[name](**given), weight, **paths))
        except TypeError as cause:
            raise InputError(
                f"--distill {text}", found=str(cause), do="give numbers where numbers are meant"
            ) from cause
    return tuple(found)


def number_of(text: str, asked: str) -> int | float:
    """A count (12) or a share (0.5).

    Raises:
        InputError: not a number.
    """
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise InputError(asked, found=f"{text!r} is not a number", do="give a share such as 0.5 or a count such as 1000000")


def budgets_of(
    texts: list[str] | None, *, keep: str | None, of: str | None, floor: str | None, multiple: int | None
) -> tuple[Any, ...]:
    """The budgets: one from --keep and its friends (half of the MACs unless said), or one for each --budget.

    Raises:
        InputError: both ways at once, a part that is no part of a budget, or a value that `niwaki.Budget` refuses.
    """
    from niwaki.units import Budget

    if not texts:
        share = 0.5 if keep is None else number_of(keep, f"--keep {keep}")
        bottom = 1 if floor is None else number_of(floor, f"--floor {floor}")
        return (Budget(keep=share, of=of or "macs", floor=bottom, multiple=1 if multiple is None else multiple),)
    if any(value is not None for value in (keep, of, floor, multiple)):
        raise InputError(
            "--budget and --keep, --of, --floor or --multiple", found="both", do="say all of it in --budget"
        )
    budgets = []
    for text in texts:
        parts = pairs_of([part.strip() for part in text.split(",")], "--budget")
        if "at_most" in parts and "keep" not in parts:
            parts |= {"keep": parts.pop("at_most"), "absolute": True}
        unknown = sorted(set(parts) - {"keep", "of", "floor", "multiple", "absolute"})
        if unknown or "keep" not in parts or type(parts.get("absolute", True)) is not bool:
            raise InputError(
                f"--budget {text}",
                found=f"unknown: {', '.join(unknown)}" if unknown else "no keep",
                do='write --budget "keep=0.5,of=macs" or "at_most=12.5,of=latency"; floor= and multiple= if wanted',
            )
        budgets.append(Budget(**parts))
    return tuple(budgets)
