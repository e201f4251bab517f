"""The built-in digits."""

import sys

import pytest
import torch

import niwaki.data
from niwaki.errors import MissingExtraError


def test_the_digits_are_all_there_with_their_levels_stretched():
    splits = niwaki.data.open("digits")
    assert splits.shape == (1, 8, 8) and splits.classes == tuple("0123456789")
    assert sum(splits.record["counts"].values()) == 1797
    pixels = splits.train.pixels
    assert pixels.dtype == torch.uint8 and int(pixels.max()) == 255
    assert set(pixels.unique().tolist()) <= {round(level * 255 / 16) for level in range(17)}
    inputs = torch.cat([inputs for inputs, _ in splits.train.batches(500)])
    assert abs(float(inputs.mean())) < 0.02 and abs(float(inputs.std()) - 1) < 0.02


def test_the_digits_come_in_other_sizes_and_in_three_channels():
    splits = niwaki.data.open("digits", size=32, channels=3, normalisation="half")
    inputs, labels = next(splits.test.batches(7))
    assert inputs.shape == (7, 3, 32, 32) and labels.shape == (7,)
    assert inputs[:, 0].equal(inputs[:, 2]) and float(inputs.min()) >= -1 and float(inputs.max()) <= 1


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r"niwaki\[data\]") as caught:
        niwaki.data.open("digits")
    assert caught.value.exit_code == 2
