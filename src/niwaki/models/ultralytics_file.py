"""Files of ultralytics (`.pt`): pickles of whole networks, of which only plain data and tensors are read."""

import pickle
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from niwaki.errors import FileDamagedError, InputError

KNOWN = ("ultralytics.", "torch.", "collections.", "pathlib.", "numpy.")
METHODS = "builtins.getattr"  # how methods are stored: networks that are fused have them
"""What such files name. Nothing of it is called; a file that names anything else is not one of these."""
ACTIVATION = re.compile(r"(torch\.)?nn\.[A-Z]\w*\(([\w=., ]*)\)")
"""An activation in a yaml: the package evaluates these words."""
DEEPEST = 60  # modules inside modules; networks have ten
FETCHING = ("TorchVision",)  # layers that download weights
PLAIN = (str, int, float, bool, type(None))


class Inert:
    """Stands in the place of whatever a pickle names: holds what the pickle gives it, and does nothing."""

    def __new__(cls, *_arguments: Any, **_keywords: Any) -> "Inert":
        return super().__new__(cls)

    def __init__(self, *_arguments: Any, **_keywords: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


@final
@dataclass(frozen=True, eq=False)
class Pickled:
    """What is read of a file."""

    yaml: dict[str, Any]
    """Its structure."""
    names: dict[int, str]
    """Of its classes."""
    settings: dict[str, Any]
    """It was trained with."""
    state: dict[str, Tensor]
    """Parameters and buffers by name."""


def read_pickled(file: str | Path) -> Pickled:
    """Reads a network that ultralytics saved, without executing its pickle.

    Torch's own reader for untrusted files builds it, with inert objects in the place of every class and function that
    the file names.

    Raises:
        InputError: no such file.
        FileDamagedError: truncated, no torch file, no network inside, or names of what such files never name.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise InputError("read a network of ultralytics", found="no such file", where=str(path), do="name a .pt file")
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception as cause:  # the reader of a damaged pickle fails in every way
        words = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        raise damaged(path, f"no torch file: {words[:200]}") from cause
    if foreign := sorted(name for name in named if not name.startswith(KNOWN) and name != METHODS):
        found = f"names {', '.join(foreign[:4])}, which a network of ultralytics does not need; nothing of it was run"
        raise damaged(path, found, "do not open it anywhere else, unless you know who made it")
    stand_ins = [(type(name.rpartition(".")[2], (Inert,), {"full": name}), name) for name in named]
    try:
        with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():  # type: ignore[arg-type]
            warnings.simplefilter("ignore")  # on pickle protocols that may fail: then they do, below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError,
            RecursionError, OverflowError) as cause:  # fmt: skip
        raise damaged(path, f"a pickle that does not fit together ({type(cause).__name__})") from cause
    network = content
    if isinstance(content, dict):
        network = content.get("ema") or content.get("model")
    told = _state(network)
    if told is None or not isinstance(told.get("yaml"), dict):
        held = ", ".join(map(str, list(content)[:6])) if isinstance(content, dict) else type(content).__name__
        raise damaged(path, f"no network of ultralytics inside ({held})", "give a .pt that the package saved")
    settings = told.get("args")
    settings = _state(settings) if isinstance(settings, Inert) else settings
    names = told.get("names")
    return Pickled(
        _plain(told["yaml"], path),
        {int(k): str(v) for k, v in names.items()} if isinstance(names, dict) else {},
        {k: v for k, v in settings.items() if isinstance(v, PLAIN)} if isinstance(settings, dict) else {},
        {name: tensor.detach() for name, tensor in _tensors(network, path)},
    )


def refuse_unsafe(structure: dict[str, Any], tasks: Any, where: Path) -> None:
    """Refuse a structure from a file whose words the package would evaluate, call or fetch, but for plain layers.

    Raises:
        FileDamagedError: an activation that is more than a class of `torch.nn`, or a layer that is none.
    """
    do = "build it in a factory of yours, if you know who made it"
    activation = structure.get("activation")
    if activation is not None and not (isinstance(activation, str) and ACTIVATION.fullmatch(activation)):
        raise damaged(where, f"activation {str(activation)[:60]!r}, which would be evaluated", do)
    for part in ("backbone", "head"):
        rows = structure.get(part)
        if not isinstance(rows, list) or not rows:
            raise damaged(where, f"a structure without {part}")
        for row in rows:
            name = row[2] if isinstance(row, list) and len(row) == 4 else None
            if not isinstance(name, str) or name in FETCHING or not _is_layer(name, tasks):
                raise damaged(where, f"a layer {str(name if name else row)[:60]!r}, which is none", do)


def _is_layer(name: str, tasks: Any) -> bool:
    if name.startswith("nn."):
        found = getattr(nn, name.removeprefix("nn."), None)
    else:
        found = getattr(tasks, name, None)
    return isinstance(found, type) and issubclass(found, nn.Module)


def _state(thing: Any) -> dict[str, Any] | None:
    """Attributes of an object of the pickle."""
    return thing.state if isinstance(thing, Inert) and isinstance(thing.state, dict) else None


def _tensors(module: Any, path: Path, before: str = "", depth: int = 0) -> "list[tuple[str, Tensor]]":
    """Names and tensors of a module's tree, as `state_dict` has them."""
    told = _state(module)
    parts = [] if told is None else [told.get(name) for name in ("_parameters", "_buffers", "_modules")]
    held = [part for part in parts if isinstance(part, dict)]
    if told is None or depth > DEEPEST or len(held) < 3:
        raise damaged(path, f"{before.rstrip('.') or 'the network'} is no module")
    parameters, buffers, modules = held
    passing = told.get("_non_persistent_buffers_set") or ()
    found = [(f"{before}{name}", tensor) for name, tensor in parameters.items() if tensor is not None]
    found += [(f"{before}{n}", t) for n, t in buffers.items() if t is not None and n not in passing]
    if wrong := [name for name, tensor in found if not isinstance(tensor, Tensor)]:
        raise damaged(path, f"{wrong[0]} is no tensor")
    for name, inner in modules.items():
        if inner is not None:
            found += _tensors(inner, path, f"{before}{name}.", depth + 1)
    return found


def _plain(value: Any, path: Path, depth: int = 0) -> Any:
    """`value` if it is made of dictionaries, lists, words and numbers."""
    if depth < DEEPEST and isinstance(value, dict):
        return {key: _plain(item, path, depth + 1) for key, item in value.items() if isinstance(key, PLAIN)}
    if depth < DEEPEST and isinstance(value, (list, tuple)):
        return [_plain(item, path, depth + 1) for item in value]
    if not isinstance(value, PLAIN):
        raise damaged(path, f"a structure that holds a {type(value).__name__}")
    return value


def damaged(path: Path, found: str, do: str = "get the file again") -> FileDamagedError:
    return FileDamagedError("read a network of ultralytics", found=found, where=str(path), do=do)
