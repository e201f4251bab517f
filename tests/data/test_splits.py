"""Splitting, resizing, normalising, shuffling and augmenting, on pictures small enough to check by hand."""

import dataclasses

import pytest
import torch

import niwaki.data
from niwaki.data import Images, Normalisation, Part, Source
from niwaki.data.splits import assemble, fit, flip_crop, split_indices
from niwaki.errors import InputError, UnknownNameError


def source(counts=(10, 10), **changes):
    """A source whose picture number n has every pixel equal to n."""
    total = sum(counts)
    pixels = torch.arange(total, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return Source(("a", "b", "c")[: len(counts)], "none", Part(pixels, labels), **changes)


def split(given, **changes):
    settings = {"name": "x", "size": None, "channels": None, "normalisation": None, "seed": 0, "val": 0.1, "test": 0.2}
    return assemble(given, **{**settings, **changes})


def pixels_of(images, **how):
    """The first pixel of every picture, as the counts they were made of, in the order of the batches."""
    return [round(255 * float(x)) for inputs, _ in images.batches(3, **how) for x in inputs[:, 0, 0, 0]]


def test_every_class_gives_its_share_and_no_picture_is_in_two_parts():
    splits = split(source((10, 30)))
    parts = [set(pixels_of(images)) for images in (splits.train, splits.val, splits.test)]
    assert [len(part) for part in parts] == [28, 4, 8]
    assert set.union(*parts) == set(range(40))
    assert sum(n < 10 for n in parts[2]) == 2 and sum(n < 10 for n in parts[1]) == 1


def test_the_record_tells_the_split_and_changes_only_with_the_seed():
    one, again, other = split(source()), split(source()), split(source(), seed=1)
    assert one.record == again.record
    assert one.record["split_sha256"] != other.record["split_sha256"]
    assert one.record["counts"] == {"train": 14, "val": 2, "test": 4}
    assert one.record["split_by_seed"] == ["val", "test"]
    assert one.record["normalisation"] == {"mean": [0.0], "std": [1.0]}


def test_the_publishers_test_part_stays_whole():
    published = source().train
    splits = split(dataclasses.replace(source(), test=published))
    assert len(splits.test) == 20 and len(splits.val) == 2 and len(splits.train) == 18
    assert splits.record["split_by_seed"] == ["val"]


def test_val_of_zero_leaves_everything_for_training():
    splits = split(source(), val=0.0)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (16, 0, 4)


def test_labels_stay_with_their_pictures_when_shuffled_and_augmented():
    images = split(source((10, 10)), val=0.0).train
    for how in ({}, {"shuffle_seed": 3}):
        for inputs, labels in images.batches(3, **how):
            assert ((255 * inputs[:, 0, 2, 2]).round() >= 10).long().equal(labels)
    for inputs, labels in images.batches(3, shuffle_seed=3, augment=True):
        assert ((255 * inputs.amax(dim=(1, 2, 3))).round() >= 10).long().equal(labels)


def test_shuffling_is_decided_by_the_seed_alone():
    images = split(source(), val=0.0).train
    torch.manual_seed(1)
    first = pixels_of(images, shuffle_seed=5)
    torch.manual_seed(2)
    assert pixels_of(images, shuffle_seed=5) == first
    assert pixels_of(images, shuffle_seed=6) != first
    assert sorted(first) == pixels_of(images) != first


def test_batches_leave_the_global_random_state_alone():
    before = torch.get_rng_state()
    list(split(source()).train.batches(3, shuffle_seed=0, augment=True))
    assert torch.get_rng_state().equal(before)


def test_whole_leaves_out_a_short_last_batch_unless_it_is_the_only_one():
    images = split(source(), val=0.0).train  # 16 pictures
    assert [len(y) for _, y in images.batches(5)] == [5, 5, 5, 1]
    assert [len(y) for _, y in images.batches(5, whole=True)] == [5, 5, 5]
    assert [len(y) for _, y in images.batches(50, whole=True)] == [16]


def test_normalisation_by_hand():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    out = Normalisation((0.0, 0.2, 0.5), (1.0, 0.1, 0.25))(pixels).flatten()
    assert torch.allclose(out, torch.tensor([0.0, 0.0, 2.0]), atol=1e-6)
    floats = Normalisation.of("half")(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64).view(1, 3, 1, 1))
    assert floats.flatten().tolist() == [-1.0, 0.0, 1.0] and floats.dtype == torch.float32
    assert Normalisation.of(([0.5], [2])) == Normalisation((0.5,), (2.0,))


def test_fit_leaves_fitting_pictures_alone_and_repeats_grey():
    pixels = torch.arange(4, dtype=torch.uint8).view(1, 1, 2, 2)
    assert fit(pixels, size=2, channels=1) is pixels
    three = fit(pixels, size=2, channels=3)
    assert three.dtype == torch.uint8 and three.shape == (1, 3, 2, 2) and three[0, 1].equal(three[0, 2])


def test_fit_averages_when_it_halves_and_greys_by_luma():
    pixels = torch.tensor([0, 51, 102, 255], dtype=torch.uint8).view(1, 1, 2, 2)
    assert fit(pixels, size=1, channels=1).item() == pytest.approx(0.4, abs=1e-6)
    colour = torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1)
    assert fit(colour, size=1, channels=1).item() == pytest.approx(0.299, abs=1e-6)


def test_flip_crop_equals_a_loop_over_single_pictures():
    pixels = torch.randint(256, (50, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    out = flip_crop(pixels, torch.Generator().manual_seed(1), reach=2)
    seen = set()
    for before, after in zip(pixels, out, strict=True):
        padded = torch.nn.functional.pad(before, (2, 2, 2, 2))
        windows = {
            (top, left, mirrored): (window.flip(-1) if mirrored else window)
            for top in range(5)
            for left in range(5)
            for mirrored in (False, True)
            for window in [padded[:, top : top + 6, left : left + 6]]
        }
        matches = [key for key, window in windows.items() if window.equal(after)]
        assert len(matches) == 1
        seen.add(matches[0])
    assert {key[2] for key in seen} == {False, True} and {key[0] for key in seen} == set(range(5))


def test_open_takes_a_pair_for_the_normalisation_and_a_root(tmp_path):
    splits = niwaki.data.open("digits", normalisation=((0.5,), (0.25,)), root=tmp_path)
    assert splits.normalisation == Normalisation((0.5,), (0.25,))


@pytest.mark.parametrize(
    ("spec", "error", "says"),
    [
        (
            "mnist",
            UnknownNameError,
            "digits, imagefolder:DIR, cifar10:DIR, npz:FILE, voc:DIR, coco:FILE, yolo:FOLDER/data.yaml, text:FILE",
        ),
        ("digits:here", InputError, "write digits alone"),
        ("npz", InputError, "write npz:PATH"),
        ("npz:nowhere.npz", InputError, "no such file or folder"),
    ],
)
def test_open_refuses_what_it_does_not_know(spec, error, says, tmp_path):
    with pytest.raises(error, match=says.replace(".", r"\.")) as caught:
        niwaki.data.open(spec, root=tmp_path)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"val": 0.9, "test": 0.2}, "leave something to train on"),
        ({"val": -0.1}, "leave something to train on"),
        ({"channels": 2}, "use 1 or 3"),
        ({"normalisation": "imagenet"}, "3 means for pictures with 1 channels"),
        ({"normalisation": "mnist"}, "none, half, imagenet, cifar10, digits"),
        ({"normalisation": ((0.5,), (0.0,))}, "positive std"),
    ],
)
def test_assemble_refuses_settings_that_contradict(changes, says):
    with pytest.raises(InputError, match=says):
        split(source(), **changes)


def test_open_refuses_sizes_below_one():
    with pytest.raises(InputError, match="size 0"):
        niwaki.data.open("digits", size=0)


def test_a_class_with_too_few_pictures_is_named():
    with pytest.raises(InputError, match="class 'b' into 3 parts; found: 2 pictures"):
        split(source((10, 2)))


def test_split_indices_keeps_one_picture_for_every_part():
    test, val, train = split_indices(torch.tensor([0, 0, 0]), shares=(0.01, 0.01), seed=0, classes=("a",))
    assert [len(test), len(val), len(train)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("pixels", "labels", "says"),
    [
        (torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(2).long(), r"\[pictures, channels, height, width\]"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.int32), torch.zeros(2).long(), "torch.int32"),
        (torch.zeros(2, 1, 4, 4), torch.zeros(3).long(), "one label for each picture"),
        (torch.zeros(0, 1, 4, 4), torch.zeros(0).long(), "empty data set"),
    ],
)
def test_parts_refuse_shapes_that_do_not_fit(pixels, labels, says):
    with pytest.raises(InputError, match=says):
        Part(pixels, labels)


@pytest.mark.parametrize(
    ("classes", "labels", "says"),
    [(("a", "b"), [0, 2], "labels from 0 to 2, but 2 classes"), (("a", "b"), [0, -1], "labels from -1 to 0")],
)
def test_sources_refuse_labels_out_of_range(classes, labels, says):
    with pytest.raises(InputError, match=says):
        Source(classes, "none", Part(torch.zeros(2, 1, 4, 4), torch.tensor(labels)))


def test_sources_refuse_a_missing_class_a_single_class_and_parts_of_two_sizes():
    part = Part(torch.zeros(2, 1, 4, 4), torch.tensor([0, 1]))
    with pytest.raises(InputError, match="no training picture of c"):
        Source(("a", "b", "c"), "none", part)
    with pytest.raises(InputError, match="at least two classes"):
        Source(("a",), "none", Part(torch.zeros(1, 1, 4, 4), torch.tensor([0])))
    with pytest.raises(InputError, match="give all parts one size"):
        Source(("a", "b"), "none", part, test=Part(torch.zeros(2, 1, 5, 5), torch.tensor([0, 1])))


def test_batches_refuse_no_size_and_augmentation_without_a_seed():
    images = Images(torch.zeros(2, 1, 4, 4), torch.tensor([0, 1]), Normalisation.of("none"), 4, 1)
    with pytest.raises(InputError, match="at least 1"):
        images.batches(0)
    with pytest.raises(InputError, match="shuffle_seed"):
        images.batches(1, augment=True)
