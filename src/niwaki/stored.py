"""Weights on disk: safetensors in one file or in shards, read one tensor at a time and written the same way."""

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from niwaki.errors import FileDamagedError, InputError

SINGLE = "model.safetensors"
INDEX = f"{SINGLE}.index.json"
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""Types by their names in the format."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 8
"""Bytes that the numbers of a file start at a multiple of."""


@final
@dataclass(frozen=True)
class Place:
    """Where a tensor lies."""

    file: Path
    name: str
    """In the file."""
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return size(self.dtype, self.shape)


@final
class Stored(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name. Each is read when it is asked for and not kept, so that what is in memory
    is what the caller holds.

    A folder with `model.safetensors` or `model.safetensors.index.json` and its shards, or one such file.

    Raises:
        InputError: no such place.
        FileDamagedError: an index or a shard that cannot be read, or that do not name the same tensors.
    """

    def __init__(self, place: str | Path) -> None:
        path = Path(place).expanduser()
        if path.is_dir():
            path = next((path / name for name in (INDEX, SINGLE) if (path / name).is_file()), path)
        if not path.is_file() or not path.name.endswith((".safetensors", ".index.json")):
            found = "no safetensors" if path.exists() else "no such place"
            do = f"name a folder with {SINGLE} or {INDEX}, or such a file"
            raise InputError("read weights shard by shard", found=found, where=str(path), do=do)
        self.folder = path.parent
        self.index = path if path.name.endswith(".index.json") else None
        self.metadata: dict[str, Any] = {}
        """Of the index."""
        self.notes: dict[str, dict[str, str]] = {}
        """Metadata of each file, by its name."""
        listed = {path.name: None} if self.index is None else self._listed(self.index)
        self.places: dict[str, Place] = {}
        for file, names in sorted(listed.items()):
            self._open(file, names)

    def __getitem__(self, name: str) -> Tensor:
        place = self.places[name]
        try:
            # opened for each tensor: what is read stays in memory for as long as its file is open
            with safe_open(str(place.file), framework="pt") as file:  # type: ignore[no-untyped-call]
                tensor: Tensor = file.get_tensor(place.name)
        except (SafetensorError, OSError, ValueError, RuntimeError) as cause:
            raise _damaged(place.file, f"{place.name}: {cause}") from cause
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def __contains__(self, name: object) -> bool:
        return name in self.places

    @property
    def bytes(self) -> int:
        """Of all tensors together."""
        return sum(place.bytes for place in self.places.values())

    @property
    def files(self) -> dict[str, list[str]]:
        """Names of the tensors of every file."""
        table: dict[str, list[str]] = {}
        for name, place in self.places.items():
            table.setdefault(place.file.name, []).append(name)
        return table

    def named(self, names: Mapping[str, tuple[str, ...]]) -> "Stored":
        """The tensors found under any of their names, each under the first (`ChannelGraph.names`); no others."""
        twin = object.__new__(Stored)
        twin.__dict__.update(self.__dict__)
        twin.places = {}
        for first, every in names.items():
            held = next((name for name in every if name in self.places), None)
            if held is not None:
                twin.places[first] = self.places[held]
        return twin

    def _listed(self, index: Path) -> dict[str, list[str] | None]:
        """Files and the names the index says they hold."""
        try:
            data = json.loads(index.read_text(encoding="utf-8"))
            table = dict(data["weight_map"])
            self.metadata = dict(data.get("metadata") or {})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as cause:
            raise _damaged(index, f"no weight_map of shards ({type(cause).__name__}: {cause})") from cause
        files: dict[str, list[str] | None] = {}
        for name, file in table.items():
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise _damaged(index, f"shard {file!r}, not the name of a safetensors file beside the index")
            held = files.setdefault(file, [])
            assert held is not None
            held.append(name)
        if not files:
            raise _damaged(index, "a weight_map that names no tensor")
        return files

    def _open(self, file: str, names: list[str] | None) -> None:
        path = self.folder / file
        if not path.is_file():
            do = "fetch the missing shard; all of them have to lie beside the index"
            found = f"shard {file} is missing, which holds {len(names or ())} of the tensors"
            raise FileDamagedError("read weights shard by shard", found=found, where=str(path), do=do)
        try:
            with safe_open(str(path), framework="pt") as reader:  # type: ignore[no-untyped-call]
                self.notes[file] = dict(reader.metadata() or {})
                held = list(reader.keys())
                if names is not None and (odd := sorted(set(names) ^ set(held))):
                    there = "the index does not name it" if odd[0] in held else "the index says so, the shard has none"
                    raise _damaged(path, f"tensor {odd[0]}: {there}" + _more(len(odd) - 1))
                for name in held:
                    part = reader.get_slice(name)
                    kind = str(part.get_dtype())
                    if kind not in DTYPES:
                        raise _damaged(path, f"tensor {name} of type {kind}", "use types that torch knows")
                    self.places[name] = Place(path, name, DTYPES[kind], tuple(part.get_shape()))
        except (SafetensorError, OSError, ValueError) as cause:
            if isinstance(cause, FileDamagedError):
                raise
            raise _damaged(path, str(cause)) from cause


Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Types and shapes by name."""


def write_safetensors(path: Path, layout: Layout, read: Callable[[str], Tensor], notes: Mapping[str, str]) -> int:
    """Write a safetensors file of this layout, asking `read` for one tensor after the other; returns its bytes.

    The result is what `safetensors.torch.save_file` writes, but no more than one tensor is in memory.
    """
    order = sorted(layout, key=lambda name: (-layout[name][0].itemsize, name))  # the wider types first: all aligned
    head: dict[str, Any] = {"__metadata__": dict(notes)} if notes else {}
    at = 0
    for name in order:
        dtype, shape = layout[name]
        end = at + size(dtype, shape)
        head[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            tensor = read(name)
            if (tensor.dtype, tuple(tensor.shape)) != (layout[name][0], tuple(layout[name][1])):
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, announced {layout[name]}")
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return len(text) + ALIGNMENT + at


def write_index(path: Path, files: Mapping[str, Iterable[str]], metadata: Mapping[str, Any]) -> None:
    """The index of shards: which file holds which tensor."""
    table = {name: file for file, names in files.items() for name in names}
    data = {"metadata": dict(metadata), "weight_map": dict(sorted(table.items()))}
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def size(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    count = dtype.itemsize
    for n in shape:
        count *= n
    return count


def _more(others: int) -> str:
    return f" (and {others} more)" if others else ""


def _damaged(path: Path, found: str, do: str = "get the file again") -> FileDamagedError:
    return FileDamagedError("read weights shard by shard", found=found, where=str(path), do=do)
