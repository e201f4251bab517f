"""Codes of 2, 4 and 8 bits: exact where the grid has the numbers, packed as elsewhere, off by half a step at most."""

import pytest
import torch

from niwaki.errors import InputError, NotFiniteError
from niwaki.kv import KIVI, Grid, Packed
from niwaki.kv.packed import join, part
from niwaki.quantize import pack


@pytest.mark.parametrize("numbers", [[0, 1, 2, 3], [-1, 0, 1, 2], [2, 3, 4, 5], [1, 1, 1, 1], [-7, -7, -4, -7]])
@pytest.mark.parametrize("axis", ["tokens", "channels"])
def test_two_bits_hold_four_steps_wherever_they_begin(numbers: list[int], axis: str) -> None:
    """The paper's reference clamps the zero point and fails for groups without a 0; least value and scale do not."""
    rows = torch.tensor(numbers * 2, dtype=torch.float32)
    rows = rows[None, None, :, None] if axis == "tokens" else rows[None, None, None, :]
    packed = Packed.of(rows, Grid(2, axis, group=8))  # type: ignore[arg-type]
    assert torch.equal(packed.read(), rows)
    assert packed.codes.numel() == 2  # eight codes


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_lie_as_elsewhere(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 2, 16, 5), dtype=torch.uint8)
    for axis in (2, 3):
        if codes.shape[axis] % (8 // bits):
            continue
        joined = join(codes, bits, axis)
        assert torch.equal(part(joined, bits, axis), codes)
        assert joined.shape[axis] == codes.shape[axis] * bits // 8
    row = codes[0, 0, :, 0]
    assert torch.equal(join(row, bits, 0), pack(row, bits))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("width", [8, 20, 77])
def test_no_number_is_off_by_more_than_half_a_step(bits: int, width: int) -> None:
    rows = torch.randn(2, 3, 64, width) + 5
    for grid in KIVI(bits).grids():
        packed = Packed.of(rows, grid)
        found = packed.read()
        assert found.shape == rows.shape
        if grid.axis == "tokens":
            spread = rows.unflatten(2, (2, 32)).amax(3) - rows.unflatten(2, (2, 32)).amin(3)
            step = spread[:, :, :, None].expand(-1, -1, -1, 32, -1).flatten(2, 3) / (2**bits - 1)
        else:
            step = (rows.amax(-1, keepdim=True) - rows.amin(-1, keepdim=True)) / (2**bits - 1)
        # float16 scales: 2^-11 of the range, and of the least value
        assert ((found - rows).abs() <= step / 2 + rows.abs().max() * 2**-9).all()
        held = sum(tensor.untyped_storage().nbytes() for tensor in packed.tensors())
        assert held == 6 * grid.nbytes(64, width)


def test_bytes_of_a_row() -> None:
    """77 channels: three groups of 26, filled up to bytes; 4 bits: 39 bytes and three times four for the scales."""
    assert Grid(4, "channels").groups(77) == (3, 26)
    assert Grid(4, "channels").nbytes(1, 77) == 3 * (13 + 4)
    assert Grid(2, "channels").groups(77) == (3, 28)
    assert Grid(4, "tokens").nbytes(64, 77) == 77 * 2 * (16 + 4)


def test_rows_grow_shrink_and_move() -> None:
    rows, more = torch.randn(3, 2, 32, 8), torch.randn(3, 2, 64, 8)
    for grid in KIVI(4).grids():
        packed = Packed.of(rows, grid)
        both = packed.append(more)
        assert both.tokens == 96
        assert torch.equal(both.read()[:, :, :32], packed.read())
        assert torch.equal(both.read()[:, :, 32:], Packed.of(more, grid).read())
        assert torch.equal(both.first(64).read(), both.read()[:, :, :64])
        assert torch.equal(both.batch(torch.tensor([2, 0])).read(), both.read()[[2, 0]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_keep_their_type(dtype: torch.dtype) -> None:
    rows = torch.randn(1, 1, 32, 8).to(dtype)
    for grid in KIVI(8).grids():
        found = Packed.of(rows, grid).read()
        assert found.dtype == dtype
        assert (found.float() - rows.float()).abs().max() < 0.05


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_are_rounded_to_their_type_once(dtype: torch.dtype) -> None:
    """Scales rounded to bfloat16 first would be off by half a step of 8 bits on their own."""
    torch.manual_seed(0)
    rows = (torch.randn(1, 1, 64, 64) + 30).to(dtype)
    for grid in KIVI(8).grids():
        assert torch.equal(Packed.of(rows, grid).read(), Packed.of(rows.float(), grid).read().to(dtype))


def test_what_cannot_be_packed() -> None:
    with pytest.raises(InputError, match="not 2, 4 or 8"):
        KIVI(bits=3)
    with pytest.raises(InputError, match="multiple of 8"):
        KIVI(group=12)
    keys, _ = KIVI(4).grids()
    with pytest.raises(InputError, match="33 tokens"):
        Packed.of(torch.zeros(1, 1, 33, 8), keys)
    with pytest.raises(NotFiniteError, match="65504"):
        Packed.of(torch.full((1, 1, 32, 8), 1e6), keys)
    packed = Packed.of(torch.randn(1, 1, 64, 8), keys)
    with pytest.raises(InputError, match="to a multiple of 32"):
        packed.first(40)
    with pytest.raises(InputError, match="share their scales"):
        packed.take(torch.zeros(1, 1, 2, dtype=torch.long))
