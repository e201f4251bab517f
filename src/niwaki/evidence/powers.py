"""Sums of powers of the weights along their axes: what a norm needs, with every weight read once for all its axes."""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from niwaki.units import Member

CHUNK = 1 << 17
"""Numbers taken at a time on the CPU: their squares stay in its second cache."""
SMALLEST = 1e-30
"""Sums of squares below this may have lost what single precision rounds to zero (squares below 1e-38)."""


class Powers:
    """For each unit of a member the sum of `|w|^p` over its slice, for as long as the weights stay as they are."""

    def __init__(self, weights: Mapping[str, Tensor], members: Iterable[Member]) -> None:
        self.weights = weights
        self.asked: dict[str, set[int]] = {}
        """Blocks in which each tensor's columns are asked for; none where its rows are enough."""
        for member in members:
            blocks = self.asked.setdefault(member.tensor, set())
            if member.axis:
                blocks.add(member.blocks)
        self._known: dict[tuple[str, float, int], tuple[np.ndarray, np.ndarray, torch.Size]] = {}

    def of(self, member: Member, units: int, p: float) -> Tensor:
        """Float64 `[units]`, on the CPU."""
        blocks = member.blocks if member.axis else min(self.asked[member.tensor], default=0)
        key = (member.tensor, p, blocks)
        if key not in self._known:
            tensor = self.weights[member.tensor].detach()
            self._known[key] = *sums(tensor, p, blocks), tensor.shape
        rows, columns, shape = self._known[key]
        if member.axis == 0:
            along = rows
        else:  # [blocks, size, after]
            after = int(np.prod(shape[member.axis + 1 :]))
            along = columns.reshape(member.blocks, -1, shape[member.axis], after).sum((1, 3)).ravel()
        return torch.from_numpy(np.bincount(member.unit, weights=along[member.index], minlength=units))


def sums(tensor: Tensor, p: float, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums of `|w|^p` over each row, `[rows]`, and over each column of each block of rows, `[blocks, rest]`.

    Taken in the weights' own precision, some rows at a time; added up in double precision. Where that could lose
    anything, all of it is done in double precision.
    """
    flat = tensor.reshape(tensor.shape[0], -1)
    if not flat.dtype.is_complex and flat.dtype != torch.float64:
        found = _sums(flat, p, blocks, torch.float32)
        if all(np.isfinite(part).all() and (p == 1 or (part > SMALLEST).all()) for part in found):
            return found
    return _sums(flat, p, blocks, torch.float64)


def _sums(flat: Tensor, p: float, blocks: int, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    height, width = flat.shape
    step = max(1, CHUNK // max(width, 1)) if flat.device.type == "cpu" else height
    rows, columns = [], torch.zeros(blocks, width, dtype=torch.float64, device=flat.device)
    room = torch.empty(min(step, height), width, dtype=dtype, device=flat.device)
    count = max(blocks, 1)
    for block in range(count):
        for part in flat[block * height // count : (block + 1) * height // count].split(step):
            size = part.abs() if p == 1 or part.is_complex() else part
            size = size.to(dtype)
            powers = size if p == 1 else torch.mul(size, size, out=room[: size.shape[0]])
            rows.append(powers.sum(1))
            if blocks:
                columns[block] += powers.sum(0)
    return torch.cat(rows).double().cpu().numpy(), columns.cpu().numpy()
