"""NumPy archives."""

import numpy as np
import pytest
import torch

import niwaki.data
from niwaki.errors import FileDamagedError, InputError, NotFiniteError

X = np.arange(20 * 6 * 5 * 3, dtype=np.uint64).reshape(20, 6, 5, 3).astype(np.uint8)
Y = np.arange(20) % 2


def opened(tmp_path, **arrays):
    np.savez(tmp_path / "data.npz", **arrays)
    return niwaki.data.open("npz:data.npz", root=tmp_path, size=6)


def test_channels_are_found_first_or_last(tmp_path):
    last = opened(tmp_path, x=X, y=Y)
    first = opened(tmp_path, x=X.transpose(0, 3, 1, 2), y=Y)
    assert last.shape == first.shape == (3, 6, 6)
    assert last.train.pixels.equal(first.train.pixels)


def test_parts_and_class_names_of_the_file_are_used(tmp_path):
    names = np.array(["cat", "dog"])
    splits = opened(tmp_path, x_train=X[..., 0], y_train=Y, x_test=X[:4, ..., 0], y_test=Y[:4], classes=names)
    assert splits.classes == ("cat", "dog") and splits.shape == (1, 6, 6)
    assert splits.record["counts"] == {"train": 18, "val": 2, "test": 4}
    assert splits.test.pixels[:, 0].equal(torch.from_numpy(X[:4, ..., 0]))


def test_floats_are_taken_as_they_are(tmp_path):
    np.savez(tmp_path / "data.npz", x=np.full((20, 4, 4), 7.5), y=Y)
    inputs, _ = next(niwaki.data.open("npz:data.npz", root=tmp_path).test.batches(1))
    assert inputs.unique().tolist() == [7.5]


def test_pictures_that_are_not_square_need_a_size(tmp_path):
    np.savez(tmp_path / "data.npz", x=X, y=Y)
    with pytest.raises(InputError, match="6 x 5 pixels; do: give a size"):
        niwaki.data.open("npz:data.npz", root=tmp_path)


@pytest.mark.parametrize(
    ("arrays", "error", "says"),
    [
        ({"x": X}, InputError, "x without y"),
        ({"z": X}, InputError, "store x and y"),
        ({"x": X, "y": Y, "x_test": X, "y_test": Y}, InputError, "store x and y"),
        ({"x": X, "y": Y[:5]}, InputError, "one label for each picture"),
        ({"x": X, "y": Y + 0.5}, FileDamagedError, "whole class numbers"),
        ({"x": X, "y": np.where(np.arange(20) == 3, -1, Y)}, InputError, "labels from -1 to 1"),
        ({"x": X, "y": Y * 2}, InputError, "no training picture of 1"),
        ({"x": X, "y": Y, "classes": np.array(["one"])}, InputError, "at least two classes"),
        ({"x": X.astype(np.int32), "y": Y}, InputError, "pixels of type int32"),
        ({"x": X[:, 0, 0], "y": Y}, InputError, r"shape \(20, 3\)"),
        ({"x": X[:, :3], "y": Y}, InputError, "either of two axes"),
        ({"x": X[..., :2], "y": Y}, InputError, "no axis can be the channels"),
        ({"x": X[:0], "y": Y[:0]}, InputError, "empty data set"),
        ({"x": np.where(X == 7, np.nan, X), "y": Y}, NotFiniteError, "NaN or infinite pixels"),
        ({"x": X, "y": np.array([object()] * 20)}, FileDamagedError, "Object arrays cannot be loaded"),
    ],
)
def test_what_cannot_be_used_is_refused(arrays, error, says, tmp_path):
    with pytest.raises(error, match=says) as caught:
        opened(tmp_path, **arrays)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "text", "single"])
def test_damaged_archives_are_refused(damage, tmp_path):
    file = tmp_path / "data.npz"
    np.savez_compressed(file, x=X, y=Y)
    whole = file.read_bytes()
    if damage == "single":
        with file.open("wb") as stream:
            np.save(stream, X)
    else:
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes(255 - byte for byte in whole[middle : middle + 9]) + whole[middle + 9 :]
        file.write_bytes({"truncated": whole[:-60], "flipped": flipped, "empty": b"", "text": b"hello"}[damage])
    with pytest.raises(FileDamagedError, match=r"data\.npz"):
        niwaki.data.open("npz:data.npz", root=tmp_path, size=6)
