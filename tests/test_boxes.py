"""Boxes and what detectors found: shapes, areas, refusals."""

import pytest
import torch

from niwaki.boxes import Boxes, Found
from niwaki.errors import InputError


def test_boxes_have_areas_in_square_pixels() -> None:
    boxes = Boxes(torch.tensor([[0.0, 0.0, 4.0, 3.0], [1.5, 2.0, 2.0, 2.5]]), torch.tensor([1, 0]))
    assert len(boxes) == 2
    assert boxes.areas.tolist() == [12.0, 0.25]
    moved = boxes.to("meta")
    assert moved.corners.is_meta and moved.labels.is_meta


def test_a_picture_may_have_no_boxes() -> None:
    assert len(Boxes.none()) == 0
    assert Boxes.none().areas.tolist() == []


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"corners \(2, 4\), labels \(1,\)"):
        Boxes(torch.zeros(2, 4), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(InputError, match="give corners"):
        Boxes(torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(InputError, match="one score for each box"):
        Found(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), torch.zeros(3))


def test_cells_that_boxes_reach_into():
    """A picture of 40 rows and 60 columns, in cells of 20 x 20."""
    corners = torch.tensor(
        [
            [19.9, 5.0, 20.1, 15.0],  # over the border of two columns
            [40.0, 20.0, 60.0, 40.0],  # the last cell exactly
            [30.0, 30.0, 30.0, 39.0],  # no width: nothing
            [-9.0, 25.0, 1.0, 50.0],  # beyond the picture on two sides
        ]
    )
    one_by_one = [
        Boxes(corners[i : i + 1], torch.tensor([0])).covered((40, 60), (2, 3)).int().tolist() for i in range(4)
    ]
    assert one_by_one == [
        [[1, 1, 0], [0, 0, 0]],
        [[0, 0, 0], [0, 0, 1]],
        [[0, 0, 0], [0, 0, 0]],
        [[0, 0, 0], [1, 0, 0]],
    ]
    together = Boxes(corners, torch.zeros(4, dtype=torch.int64)).covered((40, 60), (2, 3))
    assert together.int().tolist() == [[1, 1, 0], [1, 0, 1]] and together.dtype == torch.bool
    assert not Boxes.none().covered((40, 60), (2, 3)).any()
