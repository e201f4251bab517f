"""Pictures with several targets, from an archive and from a folder."""

import numpy as np
import pytest
import torch

from niwaki.data import open_samples
from niwaki.errors import FileDamagedError, InputError

ARRAYS = {"x": np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1) * 25, "depth": np.arange(10.0, dtype=np.float32)}


@pytest.fixture
def archive(tmp_path):
    np.savez(tmp_path / "a.npz", **ARRAYS)
    return tmp_path / "a.npz"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a").mkdir()
    for name, array in ARRAYS.items():
        np.save(tmp_path / "a" / f"{name}.npy", array)
    return tmp_path / "a"


def test_an_archive_and_a_folder_say_the_same(archive, folder):
    found = []
    for place in (archive, folder):
        splits = open_samples(place, ("depth",), seed=3)
        assert splits.record["counts"] == {"train": 7, "val": 1, "test": 2}
        entries = []
        for part in (splits.train, splits.val, splits.test):
            for inputs, targets in part.batches(2):
                assert torch.allclose(inputs.flatten() * 255 / 25, targets["depth"])
                entries += targets["depth"].tolist()
        assert sorted(entries) == list(range(10))
        found.append((entries, splits.record["split_sha256"]))
    assert found[0] == found[1]
    assert open_samples(archive, ("depth",), seed=4).record["split_sha256"] != found[0][1]


def test_batches_in_order_shuffled_and_whole(archive):
    train = open_samples(archive, ("depth",)).train
    assert [len(x) for x, _ in train.batches(4)] == [4, 3] and [len(x) for x, _ in train.batches(4, whole=True)] == [4]
    orders = [torch.cat([t["depth"] for _, t in train.batches(4, shuffle_seed=s)]).tolist() for s in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    with pytest.raises(InputError, match="batch size"):
        train.batches(0)


def test_refusals(archive, folder, tmp_path):
    np.savez(tmp_path / "short.npz", x=np.zeros((10, 1)), depth=np.zeros(9))
    np.savez(tmp_path / "words.npz", x=np.array(["a"] * 10), depth=np.zeros(10))
    np.savez(tmp_path / "objects.npz", x=np.array([None] * 10, dtype=object), depth=np.zeros(10))
    np.savez(tmp_path / "few.npz", x=np.zeros((2, 1)), depth=np.zeros(2))
    np.save(tmp_path / "single.npy", np.zeros(3))
    (tmp_path / "torn.npz").write_bytes(archive.read_bytes()[:200])
    for name, error, says in (
        ("nothing.npz", InputError, "no such file or folder"),
        ("short.npz", InputError, "lengths x 10, depth 9"),
        ("words.npz", InputError, "store numbers"),
        ("objects.npz", FileDamagedError, "plain arrays only"),
        ("few.npz", InputError, "2 samples"),
        ("single.npy", FileDamagedError, "a single array"),
        ("torn.npz", FileDamagedError, "write it again"),
    ):
        with pytest.raises(error, match=says):
            open_samples(tmp_path / name, ("depth",))
    for place in (archive, folder):
        with pytest.raises(InputError, match=r"read normals of .*arrays: depth, x"):
            open_samples(place, ("normals",))
    with pytest.raises(InputError, match=r"val=0\.0"):
        open_samples(archive, ("depth",), val=0.0)
