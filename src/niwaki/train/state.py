"""What training knows besides the weights, as plain tensors: random states, and the optimiser's memory."""

import random
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor, nn

NUMPY, PYTHON = struct.Struct("<qqd"), struct.Struct("<qd")
NUMPY_WORDS, PYTHON_WORDS, CPU_BYTES = 624, 625, 5056
"""32-bit words of the Mersenne twister as numpy and as Python keep it; bytes of torch's state on the CPU."""


def random_state(device: torch.device) -> UInt8[Tensor, " bytes"]:
    """State of the random generators of torch (on the CPU, and on `device` if that is a GPU), numpy and Python; of one
    length for all processes.
    """
    _, words, position, spare, normal = np.random.get_state()
    _, pythons, gauss = random.getstate()
    raw = b"".join(
        (
            torch.get_rng_state().numpy().tobytes(),
            np.asarray(words, "<u4").tobytes(),
            NUMPY.pack(position, spare, normal),
            np.asarray(pythons, "<u4").tobytes(),
            PYTHON.pack(gauss is not None, gauss or 0.0),
            torch.cuda.get_rng_state(device).numpy().tobytes() if device.type == "cuda" else b"",
        )
    )
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def set_random_state(state: UInt8[Tensor, " bytes"], device: torch.device) -> None:
    """Put back what `random_state` gave."""
    raw, at = state.cpu().contiguous().numpy().tobytes(), 0

    def take(length: int) -> bytes:
        nonlocal at
        at += length
        return raw[at - length : at]

    torch.set_rng_state(_bytes(take(CPU_BYTES)))
    words = np.frombuffer(take(4 * NUMPY_WORDS), "<u4")
    np.random.set_state(("MT19937", words, *NUMPY.unpack(take(NUMPY.size))))
    pythons = tuple(np.frombuffer(take(4 * PYTHON_WORDS), "<u4").tolist())
    has, gauss = PYTHON.unpack(take(PYTHON.size))
    random.setstate((3, pythons, gauss if has else None))
    if device.type == "cuda" and at < len(raw):
        torch.cuda.set_rng_state(_bytes(raw[at:]), device)


def seed_all(seed: int, device: torch.device) -> None:
    """Seed all of them."""
    torch.random.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


@contextmanager
def random_kept(device: torch.device) -> Iterator[None]:
    """Afterwards all random states are those of before."""
    before = random_state(device)
    try:
        yield
    finally:
        set_random_state(before, device)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded over processes; each of them must ask."""
    full: Any = getattr(tensor, "full_tensor", None)
    return full() if full is not None else tensor


def placed_like(value: Tensor, place: Tensor) -> Tensor:
    """`value`, which is whole, on the device, in the memory order and in the shards of `place`."""
    mesh: Any = getattr(place, "device_mesh", None)
    if mesh is not None:
        from torch.distributed.tensor import distribute_tensor

        kinds = place.placements  # type: ignore[attr-defined]
        return distribute_tensor(value.to(place.device), mesh, kinds, src_data_rank=None)
    return torch.empty_like(place, dtype=value.dtype).copy_(value)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state, tensors with several names under the first of them only."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = whole(tensor.detach())
    return found


@torch.no_grad()
def put_whole(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Put what `whole_state` gave into a model, sharded or not."""
    for name, tensor in model.state_dict().items():
        if name in values:
            tensor.copy_(placed_like(values[name].to(tensor.dtype), tensor))


def optimizer_state(
    optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of an optimiser, and the description that puts them back: by parameter and key, None for a tensor."""
    tensors: dict[str, Tensor] = {}
    described: dict[str, Any] = {}
    for name, parameter in named.items():
        entries = optimizer.state.get(parameter, {})
        described[name] = {key: None if isinstance(value, Tensor) else [value] for key, value in entries.items()}
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{name}.{key}"] = whole(value)
    return tensors, described


def put_optimizer_state(
    optimizer: torch.optim.Optimizer,
    named: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    described: Mapping[str, Any],
) -> None:
    """Put back what `optimizer_state` gave."""
    for name, parameter in named.items():
        for key, value in described.get(name, {}).items():
            if value is not None:
                optimizer.state[parameter][key] = value[0]
                continue
            tensor = tensors[f"optimizer.{name}.{key}"]
            same = tensor.shape == parameter.shape and key != "step"  # counters stay on the CPU, as torch makes them
            optimizer.state[parameter][key] = placed_like(tensor, parameter.detach()) if same else tensor.clone()


def _bytes(raw: bytes) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)
