"""Folders of pictures."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError

import niwaki.data
from niwaki.data import image_folder
from niwaki.data.pictures import read_picture, sizes_of
from niwaki.errors import FileDamagedError, InputError, MissingExtraError


def paint(file, colour, size=(12, 8), mode="RGB", **how):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(file, **how)


@pytest.fixture
def folder(tmp_path):
    for number in range(5):
        paint(tmp_path / "photos" / "red" / f"{number}.png", (255, 0, 0))
        paint(tmp_path / "photos" / "blue" / "more" / f"{number}.JPG", (0, 0, 255))
    (tmp_path / "photos" / "red" / "notes.txt").write_text("no picture")
    (tmp_path / "photos" / ".cache").mkdir()
    return tmp_path


def test_classes_are_the_sorted_folder_names_and_pictures_their_content(folder):
    splits = niwaki.data.open("imagefolder:photos", root=folder, size=8, normalisation="none")
    assert splits.classes == ("blue", "red") and splits.shape == (3, 8, 8)
    assert splits.record["counts"] == {"train": 6, "val": 2, "test": 2}
    for inputs, labels in splits.train.batches(4):
        assert ((inputs[:, 0] > 0.9).flatten(1).all(1)).long().equal(labels)
        assert ((inputs[:, 2] > 0.9).flatten(1).all(1)).long().equal(1 - labels)


def test_size_and_normalisation_default_to_those_of_imagenet(folder):
    splits = niwaki.data.open("imagefolder:photos", root=folder)
    assert splits.shape == (3, 224, 224)
    assert splits.record["normalisation"]["mean"] == [0.485, 0.456, 0.406]


def test_grey_on_request(folder):
    splits = niwaki.data.open("imagefolder:photos", root=folder, size=4, channels=1)
    assert splits.shape == (1, 4, 4) and splits.record["normalisation"]["mean"] == [0.5]
    inputs, labels = next(splits.test.batches(2))
    assert inputs[labels == 1].mean().item() == pytest.approx(2 * 76 / 255 - 1, abs=0.01)  # red is 76 of 255


def test_more_pictures_than_fit_are_decoded_for_every_batch(folder, monkeypatch):
    held = niwaki.data.open("imagefolder:photos", root=folder, size=8)
    monkeypatch.setattr(image_folder, "IN_MEMORY_BYTES", 0)
    lazy = niwaki.data.open("imagefolder:photos", root=folder, size=8)
    assert isinstance(held.train.pixels, torch.Tensor) and not isinstance(lazy.train.pixels, torch.Tensor)
    assert held.record == lazy.record
    how = {"shuffle_seed": 1, "augment": True}
    for one, other in zip(held.train.batches(4, **how), lazy.train.batches(4, **how), strict=True):
        assert one[0].equal(other[0]) and one[1].equal(other[1])


def test_the_publishers_parts_are_used_and_val_is_the_test_part_if_there_is_no_other(folder, tmp_path):
    for part, count in (("train", 4), ("val", 2)):
        for number in range(count):
            paint(tmp_path / "net" / part / "a" / f"{number}.png", (9, 9, 9))
            paint(tmp_path / "net" / part / "b" / f"{number}.png", (99, 9, 9))
    splits = niwaki.data.open("imagefolder:net", root=tmp_path, size=4)
    assert splits.record["counts"] == {"train": 6, "val": 2, "test": 4}
    assert splits.record["folders"] == {"train": "train", "test": "val"}


def test_only_the_centre_is_kept_and_the_sides_are_square(tmp_path):
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 200  # the middle third, as wide as the picture is high
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert image_folder.decode(tmp_path / "wide.png", size=8, channels=3).unique().tolist() == [200]


def test_a_large_picture_loses_an_eighth_and_a_small_one_nothing(tmp_path):
    framed = np.zeros((64, 64), np.uint8)
    framed[4:60, 4:60] = 100  # a frame of 4 of 64 pixels: 56 of 64 is 0.875
    Image.fromarray(framed).save(tmp_path / "framed.png")
    large = image_folder.decode(tmp_path / "framed.png", size=14, channels=1)
    small = image_folder.decode(tmp_path / "framed.png", size=64, channels=1)
    # The resampling reaches over the border with an eighth of its weight: 7/8 at a side, twice that in a corner.
    assert large[0, 0, :2].tolist() == [77, 88] and large[0, 1:-1, 1:-1].unique().tolist() == [100]
    assert small.min() == 0 and small[0, 4:60, 4:60].unique().tolist() == [100]


def test_pictures_are_turned_upright(tmp_path):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 250
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    upright = image_folder.decode(tmp_path / "turned.png", size=8, channels=1)[0]
    assert upright[:, 4:].min() == 250 and upright[:, :4].max() == 0


def test_palettes_transparency_and_grey_all_become_colour(tmp_path):
    Image.new("P", (8, 8), 3).save(tmp_path / "palette.png", transparency=b"\x00\x10")
    Image.new("RGBA", (8, 8), (1, 2, 3, 0)).save(tmp_path / "clear.png")
    Image.new("L", (8, 8), 7).save(tmp_path / "grey.png")
    for name in ("palette", "clear", "grey"):
        assert image_folder.decode(tmp_path / f"{name}.png", size=8, channels=3).shape == (3, 8, 8)
    assert image_folder.decode(tmp_path / "grey.png", size=8, channels=3).unique().tolist() == [7]


def test_folders_without_classes_or_pictures_are_refused(folder, tmp_path):
    (tmp_path / "bare").mkdir()
    with pytest.raises(InputError, match="no class folders"):
        niwaki.data.open("imagefolder:bare", root=tmp_path)
    (tmp_path / "photos" / "green").mkdir()
    with pytest.raises(InputError, match="class 'green'; found: no pictures") as caught:
        niwaki.data.open("imagefolder:photos", root=tmp_path)
    assert caught.value.exit_code == 2
    with pytest.raises(InputError, match="not a folder"):
        niwaki.data.open("imagefolder:photos/red/notes.txt", root=tmp_path)


def test_a_class_that_one_part_lacks_is_named(tmp_path):
    for part, names in (("train", "abc"), ("test", "ab")):
        for name in names:
            paint(tmp_path / part / name / "0.png", (1, 2, 3))
    with pytest.raises(InputError, match="only one of the two: c"):
        niwaki.data.open("imagefolder:.", root=tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_a_picture_that_cannot_be_read_is_named(damage, folder):
    file = folder / "photos" / "red" / "3.png"
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(noise).save(file)
    file.write_bytes({"truncated": file.read_bytes()[:2000], "text": b"hello", "empty": b""}[damage])
    with pytest.raises(FileDamagedError, match=r"red.3\.png") as caught:
        niwaki.data.open("imagefolder:photos", root=folder, size=8)
    assert caught.value.exit_code == 2


def test_channels_other_than_one_and_three_are_refused(folder):
    with pytest.raises(InputError, match="use 1"):
        niwaki.data.open("imagefolder:photos", root=folder, channels=4)


def test_without_pillow_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtraError, match=r"niwaki\[data\]"):
        niwaki.data.open("imagefolder:photos", root=folder, size=8)


@pytest.mark.parametrize("read", [lambda path: read_picture(path, "RGB", near=8), sizes_of])
def test_what_is_no_picture_is_damaged_where_another_package_opens_pictures(read, tmp_path, monkeypatch):
    """ultralytics replaces `Image.open` by one that looks for a package of other formats, which may not be there."""
    path, own = tmp_path / "note.jpg", Image.open
    path.write_bytes(b"hello")

    def opened(file):
        try:
            return own(file)
        except UnidentifiedImageError:
            import reader_of_other_formats  # noqa: F401

    monkeypatch.setattr(Image, "open", opened)
    with pytest.raises(
        FileDamagedError, match=r"read a picture; found: cannot identify image file .*; where: .*note\.jpg"
    ):
        read(path)
