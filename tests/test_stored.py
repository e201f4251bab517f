"""Weights on disk: what is read and written, and what is refused by name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from niwaki.errors import FileDamagedError, InputError
from niwaki.stored import INDEX, SINGLE, Stored, write_index, write_safetensors

A = {"a": torch.arange(6, dtype=torch.float32).reshape(2, 3), "b": torch.tensor([True, False, True])}
B = {"c": torch.arange(4).bfloat16(), "d": torch.tensor(7), "e": torch.zeros(0, 3)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(A, tmp_path / "one.safetensors", metadata={"format": "pt"})
    save_file(B, tmp_path / "two.safetensors")
    write_index(tmp_path / INDEX, {"one.safetensors": A, "two.safetensors": B}, {"total_size": 27 + 8 + 8})
    return tmp_path


def test_every_tensor_is_read_from_its_shard(folder: Path) -> None:
    stored = Stored(folder)
    assert set(stored) == {*A, *B} and len(stored) == 5 and "a" in stored
    for name, tensor in {**A, **B}.items():
        assert torch.equal(stored[name], tensor) and stored[name].dtype == tensor.dtype
        assert stored.places[name].shape == tuple(tensor.shape)
    assert stored.bytes == 6 * 4 + 3 + 4 * 2 + 8
    assert stored.files == {"one.safetensors": ["a", "b"], "two.safetensors": ["c", "d", "e"]}
    assert stored.notes["one.safetensors"] == {"format": "pt"}
    assert set(Stored(folder / INDEX)) == set(stored) and set(Stored(folder / "two.safetensors")) == set(B)


def test_a_folder_with_one_file_needs_no_index(tmp_path: Path) -> None:
    save_file(A, tmp_path / SINGLE)
    assert set(Stored(tmp_path)) == set(A) and Stored(tmp_path).index is None


def test_tensors_are_found_under_any_of_their_names(folder: Path) -> None:
    named = Stored(folder).named({"first": ("first", "a"), "c": ("c", "tied"), "nowhere": ("nowhere",)})
    assert set(named) == {"first", "c"} and torch.equal(named["first"], A["a"])


def test_what_is_written_is_what_safetensors_reads(tmp_path: Path) -> None:
    every = {**A, **B, "wide": torch.randn(3, dtype=torch.float64), "turned": torch.randn(4, 2).t()}
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in every.items()}
    size = write_safetensors(tmp_path / "f.safetensors", layout, every.__getitem__, {"format": "pt"})
    assert size == (tmp_path / "f.safetensors").stat().st_size
    read = load_file(tmp_path / "f.safetensors")
    assert set(read) == set(every) and all(torch.equal(read[name], every[name]) for name in every)
    with safe_open(str(tmp_path / "f.safetensors"), framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    with pytest.raises(ValueError, match="announced"):
        write_safetensors(tmp_path / "g.safetensors", {"a": (torch.float32, (3, 3))}, every.__getitem__, {})


def damaged(folder: Path) -> str:
    with pytest.raises(FileDamagedError) as caught:
        Stored(folder)
    return str(caught.value)


def test_a_missing_shard_is_named_with_what_it_holds(folder: Path) -> None:
    (folder / "two.safetensors").unlink()
    assert "shard two.safetensors is missing, which holds 3 of the tensors" in damaged(folder)


def test_an_index_and_its_shards_must_name_the_same(folder: Path) -> None:
    save_file({**A, "extra": torch.zeros(1)}, folder / "one.safetensors")
    assert "tensor extra: the index does not name it" in damaged(folder)
    save_file({"a": A["a"]}, folder / "one.safetensors")
    assert "tensor b: the index says so, the shard has none" in damaged(folder)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"a": "../x.safetensors"}}'],
)
def test_a_damaged_index_is_refused(folder: Path, text: str) -> None:
    (folder / INDEX).write_text(text)
    assert INDEX in damaged(folder)


def test_a_truncated_shard_is_refused(folder: Path) -> None:
    whole = (folder / "one.safetensors").read_bytes()
    for cut in (0, 5, len(whole) - 1):
        (folder / "one.safetensors").write_bytes(whole[:cut])
        assert "one.safetensors" in damaged(folder)


@pytest.mark.parametrize("name", ["nowhere", "empty", "weights.bin"])
def test_a_place_without_safetensors_is_the_wrong_place(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.bin").write_text("x")
    with pytest.raises(InputError, match="name a folder"):
        Stored(tmp_path / name)


def test_the_index_counts(folder: Path) -> None:
    data = json.loads((folder / INDEX).read_text())
    assert data["weight_map"]["c"] == "two.safetensors" and data["metadata"] == {"total_size": 43}
