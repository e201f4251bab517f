"""Weights from files: read without executing anything, fitted without leaving anything out."""

import json
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from niwaki.errors import FileDamagedError, InputError, NotFiniteError

WRAPPERS = ("state_dict", "model_state_dict", "model")
PREFIXES = ("module.", "_orig_mod.")  # left by data-parallel wrappers and by torch.compile
UNPICKLED = re.compile(r"(Unsupported [a-z]+:? [^\n]+?)(?: was not an allowed| Please|\n|$)")
SHOWN = 6
COUNTERS = "num_batches_tracked"
"""Of batch norms; old files have none."""
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
"""Files of weights that folders usually have."""


def read_checkpoint(file: str | Path) -> dict[str, Tensor]:
    """Names and tensors of a checkpoint, on the CPU.

    Takes `.safetensors`, a `.safetensors.index.json` with its shards, and torch files, which are read with
    weights_only=True. A dictionary around the weights ("state_dict", "model_state_dict", "model") and a prefix that
    all names share ("module.", "_orig_mod.") are taken off.

    Raises:
        InputError: no such file.
        FileDamagedError: truncated, not a checkpoint, or holding anything but tensors.
    """
    path = file_of(file)
    if path.name.endswith(".index.json"):
        state: Any = _shards(path)
    elif path.suffix == ".safetensors":
        state = _safetensors(path)
    else:
        state = _torch(path)
    while isinstance(state, dict) and (outer := next((w for w in WRAPPERS if isinstance(state.get(w), dict)), None)):
        state = state[outer]
    if not isinstance(state, dict) or not state:
        found = "an empty dictionary" if isinstance(state, dict) else f"a {type(state).__name__}"
        raise _damaged(path, f"{found}, no weights")
    foreign = [f"{name} ({type(value).__name__})" for name, value in state.items() if not isinstance(value, Tensor)]
    if foreign:
        raise _damaged(path, f"entries that are no tensors: {_some(foreign)}")
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def file_of(checkpoint: str | Path) -> Path:
    """Where a checkpoint is.

    Raises:
        InputError: no such file, or a folder.
    """
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        inside = next((path / name for name in WEIGHTS if (path / name).is_file()), path / "FILE")
        raise InputError("read a checkpoint", found="a folder", where=str(path), do=f"name the file: {inside}")
    if not path.is_file():
        raise InputError("read a checkpoint", found="no such file", where=str(path), do="name a file with weights")
    return path


def load_checkpoint_(model: nn.Module, file: str | Path) -> None:
    """Puts the weights of a file into `model`; all of them or, with an error, none.

    Names must match. Two kinds of name may be missing: counters of batch normalisation (old files have none), and
    parameters that share their memory with one that is there.

    Raises:
        InputError: missing or unexpected names, or other shapes, all listed.
        NotFiniteError: NaN in any tensor, or infinite parameters.
        FileDamagedError: see `read_checkpoint`.
    """
    fit_state_(model, read_checkpoint(file), where=str(file))


def fit_state_(model: nn.Module, state: dict[str, Tensor], *, where: str) -> None:
    """Puts names and tensors into `model`; all of them or, with an error, none.

    Raises:
        InputError, NotFiniteError: see `load_checkpoint_`.
    """
    own = model.state_dict(keep_vars=True)
    present = {_memory(own[name]) for name in state if name in own}
    missing = [
        name
        for name, tensor in own.items()
        if name not in state and not name.endswith(COUNTERS) and _memory(tensor) not in present
    ]
    unexpected = [name for name in state if name not in own]
    shapes = [
        f"{name} {tuple(tensor.shape)}, in the model {tuple(own[name].shape)}"
        for name, tensor in state.items()
        if name in own and tensor.shape != own[name].shape
    ]
    if missing or unexpected or shapes:
        lists = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
        raise InputError(
            "fit a checkpoint to the model",
            found="; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in lists.items() if names),
            where=where,
            do="use the checkpoint of this very model, or build the model with the arguments it was trained with",
        )
    refuse_not_finite(state, {name for name, _ in model.named_parameters(remove_duplicate=False)}, where=where)
    model.load_state_dict(state, strict=False)


def refuse_not_finite(state: dict[str, Tensor], parameters: set[str], *, where: str) -> None:
    """NaN is refused everywhere, infinity in parameters only: buffers may hold attention masks."""
    bad = []
    for name, tensor in state.items():
        if not tensor.is_floating_point() or tensor.is_meta:
            continue
        values = tensor.float() if tensor.element_size() == 1 else tensor  # 8-bit floats have no isnan of their own
        wrong = ~values.isfinite() if name in parameters else values.isnan()
        if count := int(wrong.sum()):
            bad.append(f"{name} ({count} of {tensor.numel()})")
    if bad:
        do = "train again from a checkpoint before the divergence"
        raise NotFiniteError("use these weights", found=f"NaN or infinity in {_some(bad)}", where=where, do=do)


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for two tensors exactly if they are the same numbers in the same memory."""
    return (tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride())


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as cause:
        raise _damaged(path, str(cause)) from cause


def _shards(path: Path) -> dict[str, Tensor]:
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as cause:
        raise _damaged(path, f"no weight_map of shards: {cause}") from cause
    state: dict[str, Tensor] = {}
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise _damaged(path, f"shard {name!r}, not the name of a safetensors file beside the index")
        state.update(_safetensors(path.parent / name))
    return state


def _torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # on pickle protocols that may fail: then they do, below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as cause:
        told = UNPICKLED.search(str(cause))  # the rest of torch's message is advice to load without care
        found = "not only tensors, or no checkpoint" + (f": {told[1][:200]}" if told else "")
        do = "save model.state_dict(), best as safetensors; a pickle of anything else could run code and is not read"
        raise _damaged(path, found, do) from cause
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as cause:
        # which key or place torch's reader missed helps nobody
        words = "" if isinstance(cause, LookupError) else str(cause).strip()
        raise _damaged(path, (words or "no checkpoint of torch").splitlines()[0][:300]) from cause


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _damaged(path: Path, found: str, do: str = "get the file again") -> FileDamagedError:
    return FileDamagedError("read a checkpoint", found=found, where=str(path), do=do)
