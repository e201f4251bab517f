"""CIFAR-10 as sheets, as python batches (without trusting the pickles) and as binary batches."""

import contextlib
import io
import os
import pickle
import pickletools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import niwaki.data
from niwaki.data import cifar10
from niwaki.errors import FileDamagedError, InputError

SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "cifar10"


def batch(count=40, seed=0):
    """Random pictures [n, 3072] and labels with every class in them."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 3072), np.uint8), [number % 10 for number in range(count)]


def python_files(folder, protocol=2):
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(("data_batch_1", "data_batch_2", "test_batch")):
        data, labels = batch(seed=number)
        content = {"batch_label": b"x", "labels": labels, "data": data, "filenames": [b"a.png"] * 40}
        (folder / name).write_bytes(pickle.dumps(content, protocol=protocol))


def binary_files(folder):
    for number, name in enumerate(("data_batch_1.bin", "data_batch_2.bin", "test_batch.bin")):
        data, labels = batch(seed=number)
        (folder / name).write_bytes(np.concatenate([np.array(labels, np.uint8)[:, None], data], 1).tobytes())


def sheet_files(folder, count=1):
    for part in ("train", "test"):
        labels = (np.arange(1000 * count) % 10).astype(np.uint8)
        np.save(folder / f"y_{part}.npy", labels)
        for sheet in range(count):
            pixels = np.zeros((25, 32, 40, 32, 3), np.uint8)
            pixels[..., 0] = (np.arange(1000) % 10 * 20).reshape(25, 1, 40, 1)  # red tells the class
            pixels[:, 0, :, 1, 2] = (np.arange(1000) // 4).reshape(25, 40)  # one blue pixel counts, row 0, column 1
            Image.fromarray(pixels.reshape(800, 1280, 3)).save(folder / f"{part}_{sheet:02d}.webp", lossless=True)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_python_batches_are_read_without_numpy_rebuilding_anything(tmp_path, protocol):
    python_files(tmp_path / "cifar-10-batches-py", protocol)
    splits = niwaki.data.open("cifar10:.", root=tmp_path, val=0.25)
    assert splits.record["layout"] == "CIFAR-10 python batches"
    assert splits.record["counts"] == {"train": 60, "val": 20, "test": 40}
    data, labels = batch(seed=2)
    assert splits.test.pixels.equal(torch.from_numpy(data).reshape(-1, 3, 32, 32))
    assert splits.test.labels.tolist() == labels


def test_batches_as_python_two_wrote_them(tmp_path):
    """The published files: text keys and the array's bytes as Python 2 strings."""
    python_files(tmp_path, protocol=2)
    by_python_3 = (tmp_path / "test_batch").read_bytes()
    assert b"_codecs" in by_python_3
    # one label, one picture: ('numpy.core.multiarray' '_reconstruct'), dtype 'u1', and a str (BINSTRING) for its bytes
    raw = bytes(range(256)) * 12
    published = (
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff"
        b"K\x00tb\x89T\x00\x0c\x00\x00" + raw + b"tbU\x06labels]K\x07au."
    )
    (tmp_path / "one").write_bytes(published)
    pixels, labels = cifar10.read_python_batch(tmp_path / "one")
    assert pixels.flatten().tolist() == list(raw) and labels.tolist() == [7]


def test_binary_batches_give_the_same_pictures(tmp_path):
    (tmp_path / "b").mkdir()
    python_files(tmp_path / "p")
    binary_files(tmp_path / "b")
    one, other = (niwaki.data.open(f"cifar10:{name}", root=tmp_path, val=0.25) for name in "pb")
    assert other.record["layout"] == "CIFAR-10 binary batches"
    assert one.train.pixels.equal(other.train.pixels) and one.train.labels.equal(other.train.labels)


def test_sheets_are_cut_row_by_row(tmp_path):
    sheet_files(tmp_path)
    splits = niwaki.data.open("cifar10:.", root=tmp_path)
    pixels, labels = splits.test.pixels, splits.test.labels
    assert pixels.shape == (1000, 3, 32, 32)
    assert (pixels[:, 0, 5, 5] == labels * 20).all()
    assert pixels[:, 2, 0, 1].tolist() == [number // 4 for number in range(1000)]
    assert int(pixels[:, 2].ne(0).sum()) == 996  # nowhere else, and four pictures count zero


class Calls:
    """Pickles into a call of a harmless function that would leave a trace."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def test_a_pickle_that_calls_something_is_refused_before_it_does(tmp_path):
    python_files(tmp_path)
    trace = tmp_path / "trace"
    for evil in (
        Calls(os.mkdir, str(trace)),
        Calls(eval, f"__import__('os').mkdir({str(trace)!r})"),
        Calls(print, "x"),
    ):
        (tmp_path / "data_batch_1").write_bytes(pickle.dumps({"data": evil, "labels": [1]}, protocol=2))
        with pytest.raises(FileDamagedError, match="the pickle asks for") as caught:
            niwaki.data.open("cifar10:.", root=tmp_path)
        assert caught.value.exit_code == 2 and not trace.exists()


def test_the_admitted_names_cannot_be_misused():
    """Setting state on what stands for numpy's functions leaves the next unpickling alone."""
    spoil = b"\x80\x02cnumpy\ndtype\n(N}U\x04codeU\x04evils\x86b."
    with contextlib.suppress(Exception):
        cifar10.PlainUnpickler(io.BytesIO(spoil), encoding="bytes").load()
    content = pickle.dumps(np.arange(3, dtype=np.uint8), protocol=2)
    assert cifar10.array_of(cifar10.PlainUnpickler(io.BytesIO(content)).load()).tolist() == [0, 1, 2]
    assert {op.name for op, _, _ in pickletools.genops(content)} >= {"REDUCE", "BUILD"}


@pytest.mark.parametrize("content", ["truncated", "empty", "not a dict", "object array", "floats", "short", "strings"])
def test_damaged_python_batches_are_refused(content, tmp_path):
    python_files(tmp_path)
    data, labels = batch()
    made = {
        "truncated": (tmp_path / "data_batch_1").read_bytes()[:-1000],
        "empty": b"",
        "not a dict": pickle.dumps([1, 2]),
        "object array": pickle.dumps({"data": np.array([None] * 3072, object), "labels": labels}),
        "floats": pickle.dumps({"data": data.astype(np.float32), "labels": labels}),
        "short": pickle.dumps({"data": data, "labels": labels[:-1]}),
        "strings": pickle.dumps({"data": data, "labels": ["1"] * 40}),
    }
    (tmp_path / "data_batch_1").write_bytes(made[content])
    with pytest.raises(FileDamagedError, match="data_batch_1"):
        niwaki.data.open("cifar10:.", root=tmp_path)


def test_damaged_binary_batches_and_labels_out_of_range_are_refused(tmp_path):
    binary_files(tmp_path)
    whole = (tmp_path / "data_batch_1.bin").read_bytes()
    (tmp_path / "data_batch_1.bin").write_bytes(whole[:-1])
    with pytest.raises(FileDamagedError, match="not a multiple of 3073"):
        niwaki.data.open("cifar10:.", root=tmp_path)
    (tmp_path / "data_batch_1.bin").write_bytes(b"\x0b" + whole[1:])
    with pytest.raises(InputError, match="labels from 0 to 11, but 10 classes"):
        niwaki.data.open("cifar10:.", root=tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "size", "labels", "lost", "meta"])
def test_damaged_sheets_are_refused(damage, tmp_path):
    sheet_files(tmp_path)
    sheet = tmp_path / "train_00.webp"
    if damage == "truncated":
        sheet.write_bytes(sheet.read_bytes()[:200])
    elif damage == "size":
        Image.new("RGB", (32, 32)).save(sheet, lossless=True)
    elif damage == "labels":
        (tmp_path / "y_train.npy").write_bytes(b"hello")
    elif damage == "lost":
        sheet.unlink()
    else:
        (tmp_path / "meta.json").write_text("[]")
    with pytest.raises(FileDamagedError) as caught:
        niwaki.data.open("cifar10:.", root=tmp_path)
    assert caught.value.exit_code == 2


def test_a_folder_without_cifar10_is_refused(tmp_path):
    with pytest.raises(InputError, match="no python batches"):
        niwaki.data.open("cifar10:.", root=tmp_path)


@pytest.mark.skipif(not SHARED.exists(), reason="the shared CIFAR-10 sheets are not on this machine")
def test_the_real_sheets_have_the_published_statistics():
    splits = niwaki.data.open(f"cifar10:{SHARED}", val=0.0)
    assert splits.record["counts"] == {"train": 50000, "val": 0, "test": 10000}
    assert splits.classes[3] == "cat"
    assert splits.test.labels.bincount().tolist() == [1000] * 10
    mean = torch.stack([plane.double().mean() / 255 for plane in splits.train.pixels[:].unbind(1)])
    assert mean.tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=2e-4)
