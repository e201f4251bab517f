"""Packed codes: bytes by hand, every width and length there and back, and whole states through files."""

import json
import math
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from niwaki.errors import FileDamagedError, InputError
from niwaki.quantize import Uniform, pack, packed_sizes, packed_state, unpack, unpacked_state


def test_three_bits_by_hand() -> None:
    """-3, -1, 1, 3 are 101, 111, 001, 011: from the right 01|111|101 = 125 and 011|0 = 6."""
    packed = pack(torch.tensor([-3, -1, 1, 3], dtype=torch.int8), 3)
    assert packed.dtype == torch.uint8 and packed.tolist() == [0b01111101, 0b0110]
    assert unpack(packed, 3, 4, signed=True).tolist() == [-3, -1, 1, 3]
    assert unpack(packed, 3, 4).tolist() == [5, 7, 1, 3]


def test_other_widths_by_hand() -> None:
    assert pack(torch.tensor([1, 2, 3, 0]), 2).tolist() == [0b00111001]
    assert pack(torch.tensor([15, 1, 8]), 4).tolist() == [0b00011111, 0b1000]
    assert pack(torch.tensor([-127, 127]), 8).tolist() == [129, 127]
    assert pack(torch.tensor([[63], [1]]), 6).tolist() == [0b01111111, 0]
    assert pack(torch.zeros(0, dtype=torch.int8), 5).shape == (0,)


@hypothesis.given(st.integers(2, 8), st.booleans(), st.integers(0, 70), st.integers(0, 2**32))
def test_there_and_back(bits: int, signed: bool, count: int, seed: int) -> None:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    codes = torch.randint(low, high, (count,), generator=torch.Generator().manual_seed(seed))
    codes = codes.to(torch.int8 if signed else torch.uint8)
    packed = pack(codes, bits)
    assert packed.numel() == math.ceil(count * bits / 8)
    assert torch.equal(unpack(packed, bits, count, signed=signed), codes)


@hypothesis.given(st.integers(2, 8), st.lists(st.integers(0, 3), max_size=40))
def test_bytes_are_the_codes_bits_in_a_row(bits: int, codes: list[int]) -> None:
    """Against a plain reference: one long number in base 2^bits."""
    number = sum(code << (bits * place) for place, code in enumerate(codes))
    expected = number.to_bytes(math.ceil(len(codes) * bits / 8), "little")
    assert bytes(pack(torch.tensor(codes, dtype=torch.uint8), bits).tolist()) == expected


def test_refusals() -> None:
    with pytest.raises(InputError, match="codes from 0 to 8"):
        pack(torch.tensor([0, 8]), 3)
    with pytest.raises(InputError, match="codes from -5 to 0"):
        pack(torch.tensor([0, -5]), 3)
    with pytest.raises(InputError, match="2 to 8"):
        pack(torch.tensor([0]), 1)
    with pytest.raises(InputError, match=r"give uint8 \[2\]"):
        unpack(torch.zeros(3, dtype=torch.uint8), 3, 4)


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(5, 7).half())


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("symmetric", "grid"), [(True, "zero"), (False, "zero"), (True, "literal")])
def test_a_state_through_a_file(tmp_path: Path, bits: int, symmetric: bool, grid: str) -> None:
    state = network().state_dict()
    quantised = {
        "0.weight": Uniform(bits, symmetric, "channel", grid)(state["0.weight"]),  # type: ignore[arg-type]
        "3.weight": Uniform(bits, symmetric, "tensor", grid)(state["3.weight"]),  # type: ignore[arg-type]
    }
    tensors, description = packed_state(state, quantised)
    save_file(tensors, tmp_path / "a.safetensors")
    read, codes = unpacked_state(load_file(tmp_path / "a.safetensors"), json.loads(json.dumps(description)))
    assert set(read) == set(state)
    for name, tensor in read.items():
        expected = quantised[name].values() if name in quantised else state[name]
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected), name
    assert all(torch.equal(codes[name].codes, one.codes) for name, one in quantised.items())
    assert tensors["0.weight.codes"].numel() == math.ceil(5 * 3 * 9 * bits / 8)
    network().load_state_dict(read)


def test_sizes_by_hand() -> None:
    """4 bits: 135 codes in 68 bytes, 5 scales in 20; biases 5, norm 4 x 5 and its count, in float32 and int64."""
    state = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)).state_dict()
    found = packed_sizes(state, {"0.weight": Uniform(bits=4)(state["0.weight"])})
    assert found["float_bytes"].value == 4 * (135 + 5 + 20) + 8
    assert found["packed_bytes"].value == 68 + 20 + 4 * 25 + 8
    assert "real width 68, scales in float32 20, zero points 0" in found["packed_bytes"].definition
    assert packed_state(state, {})[1]["sizes"]["packed_bytes"]["value"] == found["float_bytes"].value
    zeros = packed_sizes(state, {"0.weight": Uniform(bits=4, symmetric=False)(state["0.weight"])})
    assert zeros["packed_bytes"].value == found["packed_bytes"].value + 5


def test_states_that_do_not_fit() -> None:
    state = network().state_dict()
    one = Uniform()(state["0.weight"])
    with pytest.raises(InputError, match="no tensor of that name"):
        packed_state(state, {"9.weight": one})
    with pytest.raises(InputError, match="shape"):
        packed_state(state, {"3.weight": one})
    with pytest.raises(InputError, match=r"the state has 0\.weight\.scale"):
        packed_state(state | {"0.weight.scale": one.scale}, {"0.weight": one})


def test_damaged_files_are_named() -> None:
    state = network().state_dict()
    tensors, description = packed_state(state, {"0.weight": Uniform(bits=5)(state["0.weight"])})
    entry = description["tensors"]["0.weight"]
    for change in ({"bits": 6}, {"bits": 12}, {"shape": [2]}, {"grid": "odd"}, {"dtype": "int8"}, {"axis": 9}):
        with pytest.raises(FileDamagedError, match="read packed weights"):
            unpacked_state(tensors, description | {"tensors": {"0.weight": entry | change}})
    for wrong in ({}, {"format": "other", "version": 1}, description | {"version": 99}):
        with pytest.raises(FileDamagedError):
            unpacked_state(tensors, wrong)
    with pytest.raises(FileDamagedError, match=r"0\.weight\.codes"):
        unpacked_state({k: v for k, v in tensors.items() if k != "0.weight.codes"}, description)
