"""Codes at their real width: k bits each, in memory and in files."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from niwaki.errors import FileDamagedError, InputError
from niwaki.measure import Measurement
from niwaki.quantize.quantised import Quantised

FORMAT = "niwaki-packed"
VERSION = 1
DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}


def pack(codes: Tensor, bits: int) -> Tensor:
    """Whole numbers of any shape as uint8 `[ceil(n * bits / 8)]`: the first code in the lowest bits of the first byte.

    Codes below 0 are stored in two's complement. The last byte is filled up with zeros.

    Raises:
        InputError: a width that is not 2 to 8, or a code that needs more bits.
    """
    _check_bits(bits)
    flat = codes.detach().cpu().reshape(-1).numpy()
    signed = flat.size > 0 and int(flat.min()) < 0
    least, most = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    if flat.size and (int(flat.min()) < least or int(flat.max()) > most):
        raise InputError(
            f"pack codes in {bits} bits", found=f"codes from {flat.min()} to {flat.max()}", do=f"give {least} to {most}"
        )
    eights = np.zeros((-(-flat.size // 8), 8), dtype=np.uint64)
    eights.reshape(-1)[: flat.size] = flat.astype(np.int64).view(np.uint64) & np.uint64(2**bits - 1)
    words = np.zeros(len(eights), dtype="<u8")  # eight codes of k bits fill k bytes
    for place in range(8):
        words |= eights[:, place] << np.uint64(place * bits)
    packed = words.view(np.uint8).reshape(-1, 8)[:, :bits].reshape(-1)[: math.ceil(flat.size * bits / 8)]
    return torch.from_numpy(packed.copy())


def unpack(packed: Tensor, bits: int, count: int, *, signed: bool = False) -> Tensor:
    """The `count` codes that `pack` stored: int8 `[count]` if `signed`, else uint8.

    Raises:
        InputError: a width that is not 2 to 8, or other bytes than that many codes take.
    """
    _check_bits(bits)
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() != math.ceil(count * bits / 8):
        raise InputError(
            f"unpack {count} codes of {bits} bits",
            found=f"{packed.dtype} of shape {tuple(packed.shape)}",
            do=f"give uint8 [{math.ceil(count * bits / 8)}]",
        )
    groups = -(-count // 8)
    wide = np.zeros((groups, 8), dtype=np.uint8)
    filled = np.zeros(groups * bits, dtype=np.uint8)
    filled[: packed.numel()] = packed.detach().cpu().numpy()
    wide[:, :bits] = filled.reshape(groups, bits)
    words = wide.reshape(-1).view("<u8")
    codes = np.empty((groups, 8), dtype=np.uint8)
    for place in range(8):
        codes[:, place] = (words >> np.uint64(place * bits)) & np.uint64(2**bits - 1)
    codes = codes.reshape(-1)[:count]
    if not signed:
        return torch.from_numpy(codes.copy())
    shift = np.uint8(8 - bits)  # the sign bit up to the top, and back with its copies
    return torch.from_numpy((codes << shift).view(np.int8) >> shift.view(np.int8))


def packed_state(
    state: Mapping[str, Tensor], quantised: Mapping[str, Quantised]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A state dict whose quantised tensors take k bits per element, and what is needed to read it back (plain JSON).

    A tensor `w` of `quantised` becomes `w.codes` (uint8), `w.scale` (float32) and, unless 0 is the code 0 or half the
    grid, `w.zero` (uint8); all others stay.

    Raises:
        InputError: a name that the state does not have, another shape, or one that takes the name of the parts.
    """
    tensors = {name: tensor for name, tensor in state.items() if name not in quantised}
    entries: dict[str, Any] = {}
    for name, one in quantised.items():
        if name not in state or state[name].shape != one.shape:
            found = "no tensor of that name" if name not in state else f"shape {tuple(state[name].shape)}"
            raise InputError(f"pack {name} {tuple(one.shape)}", found=found, do="give the state that was quantised")
        parts = {"codes": pack(one.codes, one.bits), "scale": one.scale.detach().float().cpu().contiguous()}
        literal = bool((one.zero != one.zero.round()).any())
        if not one.signed and not literal:
            parts["zero"] = one.zero.detach().to(torch.uint8).cpu().contiguous()
        taken = [f"{name}.{part}" for part in parts if f"{name}.{part}" in state]
        if taken:
            raise InputError(f"pack {name}", found=f"the state has {taken[0]}", do="rename that tensor")
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        entries[name] = {
            "bits": one.bits,
            "axis": one.axis,
            "shape": list(one.shape),
            "dtype": str(one.dtype).removeprefix("torch."),
            "grid": "symmetric" if one.signed else "literal" if literal else "asymmetric",
        }
    sizes = {name: measured.to_json() for name, measured in packed_sizes(state, quantised).items()}
    return tensors, {"format": FORMAT, "version": VERSION, "tensors": entries, "sizes": sizes}


def unpacked_state(
    tensors: Mapping[str, Tensor], description: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Quantised]]:
    """The state that was packed, with the quantised tensors at their values, and their codes.

    Raises:
        FileDamagedError: a description that is not one, or tensors that do not fit it.
    """
    try:
        if description["format"] != FORMAT or description["version"] != VERSION:
            raise ValueError(f"format {description['format']!r}, version {description['version']!r}")
        entries = dict(description["tensors"])
        quantised = {name: _read(name, tensors, entry) for name, entry in entries.items()}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise FileDamagedError(
            "read packed weights", found=reason, do="give the tensors and the description of one packing"
        ) from error
    parts = {f"{name}.{part}" for name in entries for part in ("codes", "scale", "zero")}
    state = {name: tensor for name, tensor in tensors.items() if name not in parts}
    return state | {name: one.values() for name, one in quantised.items()}, quantised


def packed_sizes(state: Mapping[str, Tensor], quantised: Mapping[str, Quantised]) -> dict[str, Measurement]:
    """Bytes of a state before and after: "float_bytes", and "packed_bytes" with what it counts; headers are not."""
    before = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    codes = sum(math.ceil(one.codes.numel() * one.bits / 8) for one in quantised.values())
    scales = sum(4 * one.scale.numel() for one in quantised.values())
    offset = [one for one in quantised.values() if not one.signed and not bool((one.zero != one.zero.round()).any())]
    zeros = sum(one.zero.numel() for one in offset)
    rest = sum(t.numel() * t.element_size() for name, t in state.items() if name not in quantised)
    uncounted = ("header of the file", "description")
    return {
        "float_bytes": Measurement(
            "float_bytes", float(before), "bytes", "all tensors of the state in their own types", uncounted=uncounted
        ),
        "packed_bytes": Measurement(
            "packed_bytes",
            float(codes + scales + zeros + rest),
            "bytes",
            f"codes at their real width {codes}, scales in float32 {scales}, zero points {zeros}, "
            f"tensors that are not quantised (biases, norms) {rest}",
            uncounted=uncounted,
        ),
    }


def _read(name: str, tensors: Mapping[str, Tensor], entry: Mapping[str, Any]) -> Quantised:
    bits, axis, shape, grid = entry["bits"], entry["axis"], tuple(entry["shape"]), entry["grid"]
    if grid not in ("symmetric", "asymmetric", "literal") or entry["dtype"] not in DTYPES:
        raise ValueError(f"{name}: grid {grid!r}, dtype {entry['dtype']!r}")
    scale = tensors[f"{name}.scale"]
    if scale.shape != (() if axis is None else (shape[axis],)) or scale.dtype != torch.float32:
        raise ValueError(f"{name}: scales {scale.dtype} of shape {tuple(scale.shape)}")
    codes = unpack(tensors[f"{name}.codes"], bits, math.prod(shape), signed=grid == "symmetric").reshape(shape)
    if grid == "symmetric":
        zero = torch.zeros_like(scale)
    elif grid == "literal":
        zero = torch.full_like(scale, (2**bits - 1) / 2)
    else:
        zero = tensors[f"{name}.zero"].float().reshape(scale.shape)
    return Quantised(codes.to(scale.device), scale, zero, bits, axis, DTYPES[entry["dtype"]])


def _check_bits(bits: int) -> None:
    if isinstance(bits, bool) or bits not in range(2, 9):
        raise InputError(f"codes of {bits!r} bits", found="not a width of 2 to 8", do="give 2 to 8")
