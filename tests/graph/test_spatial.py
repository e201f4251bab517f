"""Pooling and sampling: what becomes of the labels of channels."""

import numpy as np
import pytest
import torch
from labelled import Seen


def test_regions_keep_the_channels_of_the_pictures() -> None:
    """Five boxes on two pictures of six channels: `[5, 6, 3, 3]`, channel by channel."""
    ops = pytest.importorskip("torchvision.ops")
    boxes = torch.zeros(5, 5, device="meta")
    seen = Seen(lambda x: ops.roi_align(x, boxes, (3, 3)), (2, 6, 8, 8), (1,))
    (labels,) = seen.fields()
    assert seen.outputs[0].shape == (5, 6, 3, 3) and labels.shape == (1, 6, 1, 1)
    assert np.array_equal(labels.ravel(), seen.labels.ravel())
    assert not seen.recorder.unknown and not seen.space.fixed


def test_labels_along_the_pictures_are_fixed() -> None:
    ops = pytest.importorskip("torchvision.ops")
    boxes = torch.zeros(5, 5, device="meta")
    seen = Seen(lambda x: ops.roi_align(x, boxes, (3, 3)), (2, 6, 8, 8), (0,))
    assert seen.fields() == ()
    assert [reason for _, reason in seen.space.fixed] == ["pictures and places are picked by boxes"]
