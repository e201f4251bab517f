"""Sums of powers beside the plain formula: precision, blocks, odd types, numbers single precision can not hold."""

import numpy as np
import pytest
import torch

from niwaki.evidence import powers
from niwaki.evidence.powers import Powers, sums
from niwaki.units import Member


def plain(tensor: torch.Tensor, p: float, blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    wide = tensor.to(torch.complex128 if tensor.is_complex() else torch.float64).abs().pow(p)
    flat = wide.reshape(tensor.shape[0], -1)
    return flat.sum(1), flat.reshape(max(blocks, 1), -1, flat.shape[1]).sum(1)[: blocks or 0]


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("blocks", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64])
def test_beside_the_plain_formula(p: float, blocks: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(powers, "CHUNK", 50)  # several chunks, also within a block
    tensor = torch.randn(12, 4, 3, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    for found, expected in zip(sums(tensor, p, blocks), plain(tensor, p, blocks), strict=True):
        assert found.dtype == np.float64
        assert found == pytest.approx(expected.numpy(), rel=1e-6)


@pytest.mark.parametrize("size", [1e25, 1e-25, 3e-20, 0.0])
def test_what_single_precision_can_not_hold(size: float) -> None:
    """Squares of 1e25 overflow there, those of 1e-25 vanish, and half of those of 3e-20 are rounded away."""
    tensor = torch.full((3, 4), size) * torch.tensor([[1.0], [0.0], [2.0]])
    rows, columns = sums(tensor, 2, 1)
    assert rows == pytest.approx([4 * size * size, 0, 16 * size * size], rel=1e-6)
    assert columns[0] == pytest.approx([5 * size * size] * 4, rel=1e-6)


def test_members_of_one_tensor_share_its_reading() -> None:
    weight = torch.arange(12.0).reshape(2, 6)
    every = np.arange(6, dtype=np.int32)
    rows = Member("w", 0, "out", 1, every[:2], every[:2])
    columns = Member("w", 1, "in", 1, every, np.array([0, 0, 1, 1, 2, 2], dtype=np.int32))  # two positions a unit
    found = Powers({"w": weight}, [rows, columns])
    assert found.of(rows, 2, 1).tolist() == [15, 51]
    assert found.of(columns, 3, 1).tolist() == [14, 22, 30]
    assert len(found._known) == 1
