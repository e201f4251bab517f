"""Pictures in frames and boxes with them, by hand; changed training pictures keep boxes on what they are of."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from niwaki.boxes import Boxes
from niwaki.errors import InputError, UnknownNameError
from niwaki.tasks import Augmentation
from niwaki.tasks.augmentation import mirrored, mosaic, visible, zoomed
from niwaki.tasks.framing import GREY, Framing, moved, moved_back

PLAIN = {"hue": 0.0, "saturation": 0.0, "brightness": 0.0}


@dataclass
class One:
    width: int
    height: int
    boxes: Boxes
    ignored: Tensor
    areas: Tensor = field(default_factory=lambda: torch.zeros(0))


class Squares:
    """Black pictures of some sizes with a white square each, from (12, 8) to (36, 32)."""

    def __init__(self, *sizes: tuple[int, int]) -> None:
        self.sizes = sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, number: int) -> One:
        boxes = Boxes(torch.tensor([[12.0, 8, 36, 32], [0, 0, 5, 5]]), torch.tensor([number, 9]))
        return One(*self.sizes[number], boxes, torch.tensor([False, True]))

    def picture(self, number: int, height: int, width: int) -> Tensor:
        from torchvision.transforms.v2 import functional

        whole = torch.zeros(3, *self.sizes[number][::-1], dtype=torch.uint8)
        whole[:, 8:32, 12:36] = 255
        return functional.resize(whole, [height, width], antialias=True)


def white(picture: Tensor) -> list[float]:
    """Corners of what is white."""
    rows, columns = torch.nonzero(picture.amin(0) > 200).unbind(1)
    return [float(x) for x in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)]


def test_a_letterbox_by_hand():
    frame = Framing(20, 20)
    place = frame.place(40, 30)
    assert (place.left, place.top, place.width, place.height) == (0, 2, 20, 15)
    boxes = moved(Boxes(torch.tensor([[10.0, 10, 20, 20]]), torch.tensor([0])), place)
    assert boxes.corners.tolist() == [[5, 7, 10, 12]]
    assert moved_back(boxes.corners, place, 40, 30).tolist() == [[10, 10, 20, 20]]
    beyond = torch.tensor([[-3.0, 0, 25, 30]])
    assert moved_back(beyond, place, 40, 30).tolist() == [[0, 0, 40, 30]]


def test_squashing_fills_the_frame():
    place = Framing(20, 20, "squash").place(40, 30)
    assert (place.left, place.top, place.width, place.height) == (0, 0, 20, 20)
    boxes = moved(Boxes(torch.tensor([[10.0, 15, 20, 30]]), torch.tensor([0])), place)
    assert boxes.corners.tolist() == [[5, 10, 10, 20]]


def test_a_framed_picture_is_grey_around_and_ignored_boxes_are_not_learned():
    pixels, boxes = Framing(40, 40).framed(Squares((80, 60)), 0)
    assert pixels[:, :5].eq(GREY).all() and pixels[:, 35:].eq(GREY).all() and not pixels[:, 5:35].eq(GREY).any()
    assert boxes.corners.tolist() == [[6, 9, 18, 21]] and boxes.labels.tolist() == [0]
    assert white(pixels) == [6, 9, 18, 21]


def test_frames_that_are_none():
    with pytest.raises(InputError, match="at least 1 pixel"):
        Framing(0, 3)
    with pytest.raises(UnknownNameError, match="letterbox, squash"):
        Framing(3, 3, "stretch")  # type: ignore[arg-type]


def test_mirrored_boxes_are_torchvisions():
    from torchvision.transforms.v2 import functional
    from torchvision.tv_tensors import BoundingBoxes

    corners = torch.tensor([[2.0, 3, 10, 8], [0, 0, 40, 30]])
    theirs = functional.horizontal_flip(BoundingBoxes(corners, format="XYXY", canvas_size=(30, 40)))
    assert mirrored(Boxes(corners, torch.zeros(2).long()), 40).corners.tolist() == theirs.tolist()
    assert theirs.tolist() == [[30, 3, 38, 8], [0, 0, 40, 30]]


def test_boxes_of_which_too_little_is_seen_go():
    frame = Framing(20, 20)
    corners = torch.tensor([
        [-9.0, 0, 1, 10],  # a pixel wide
        [-80, 0, 8, 10],  # 8 of 88
        [-20, 0, 5, 10],  # 5 of 25
        [3, 3, 4, 4],  # small, but whole
        [30, 0, 40, 10],  # outside
    ])  # fmt: skip
    stay = visible(corners, torch.arange(5), frame)
    assert stay.labels.tolist() == [2, 3] and stay.corners[0].tolist() == [0, 0, 5, 10]


def test_a_zoom_by_hand():
    frame = Framing(40, 40)
    picture, boxes = frame.framed(Squares((40, 40)), 0)
    seen, there = zoomed(picture, boxes, frame, centre=(20, 20), zoom=2.0)
    assert there.corners.tolist() == [[4, 0, 40, 40]]  # (12, 8, 36, 32) less 10, twice, clipped
    assert white(seen) == pytest.approx(there.corners[0].tolist(), abs=1)
    seen, there = zoomed(picture, boxes, frame, centre=(30, 20), zoom=0.5)
    assert there.corners.tolist() == [[11, 14, 23, 26]]  # (12 + 10, 8 + 20, ...), halved
    assert white(seen) == pytest.approx(there.corners[0].tolist(), abs=1)
    assert seen[:, 0].eq(GREY).all()


@pytest.mark.parametrize("seed", range(3))
def test_a_mosaic_holds_four_pictures_around_a_point(seed):
    frame = Framing(64, 64)
    squares = Squares((64, 64), (64, 48), (48, 64))
    canvas, boxes = mosaic(squares, 1, frame, torch.Generator().manual_seed(seed))
    assert canvas.shape == (3, 128, 128) and boxes.labels[0] == 1 and len(boxes) == 4
    inside = boxes.corners
    assert inside.min() >= 0 and inside.max() <= 128
    for corners in inside[((inside[:, 2:] - inside[:, :2]) > 4).all(dim=1)]:
        left, top, right, bottom = corners.round().int().tolist()
        assert canvas[:, top + 1 : bottom - 1, left + 1 : right - 1].float().mean() > 250
    covered = torch.zeros(128, 128, dtype=torch.bool)
    for left, top, right, bottom in inside.round().int().tolist():
        covered[max(top - 1, 0) : bottom + 1, max(left - 1, 0) : right + 1] = True
    assert canvas[:, ~covered].amax() < 200  # nothing white outside of the boxes


def test_what_the_canvas_cuts_off_is_no_box():
    """Frames of 64 by 48 hold the last picture to 59: beyond 128, or 96, nothing is labelled."""
    frame, squares, cut = Framing(48, 64), Squares((64, 48), (45, 48), (64, 34)), 0
    for seed in range(60):
        canvas, boxes = mosaic(squares, 0, frame, torch.Generator().manual_seed(seed))
        left, top, right, bottom = boxes.corners.unbind(1)
        assert left.min() >= 0 and top.min() >= 0 and right.max() <= 128 and bottom.max() <= 96
        assert bool((right > left).all() and (bottom > top).all())
        for corners in boxes.corners.round().int().tolist():  # what is labelled is white, however little of it is left
            seen = canvas[:, corners[1] : max(corners[3], corners[1] + 1), corners[0] : max(corners[2], corners[0] + 1)]
            assert seen.float().mean() > 120
        cut += len(boxes) < 4 or bool((boxes.corners[:, 3] == 96).any() or (boxes.corners[:, 2] == 128).any())
    assert cut  # the case was there


def test_the_point_of_a_mosaic_lies_in_the_middle_half():
    """Pictures of 64 around a point from 32 to 96 cover at least 96 of 128 columns and rows."""
    squares, covered = Squares((64, 64)), []
    for seed in range(60):
        canvas, _ = mosaic(squares, 0, Framing(64, 64), torch.Generator().manual_seed(seed))
        there = canvas.ne(GREY).all(0)
        covered += [int(there.any(0).sum()), int(there.any(1).sum())]
    assert 96 <= min(covered) < 104 and max(covered) > 120


def test_zoom_and_shift_are_drawn_both_ways():
    """Of a square of 24: zooms from 0.5 to 1.5, shifts of a tenth of 64 to all sides."""
    still = {"mosaic": 0.0, "flip": 0.0, **PLAIN}
    frame, squares = Framing(64, 64), Squares((64, 64))
    sides, middles = [], []
    for seed in range(80):
        for settings, found in (({"translate": 0.0}, sides), ({"scale": 0.0}, middles)):
            change = Augmentation(**still, **settings)  # type: ignore[arg-type]
            _, boxes = change(squares, 0, frame, torch.Generator().manual_seed(seed))
            left, top, right, bottom = boxes.corners[0].tolist()
            if settings == {"scale": 0.0}:
                found.append((left + right, top + bottom))
            else:  # its left and right stay inside
                found.append((right - left) / 24)
    assert 0.5 <= min(sides) < 0.6 and 1.4 < max(sides) <= 1.5
    for shifts, still_at in zip(zip(*middles, strict=True), (48, 40), strict=True):
        apart = [(one - still_at) / 2 for one in shifts]
        assert -6.5 <= min(apart) < -5 and 5 < max(apart) <= 6.5


@pytest.mark.parametrize("fit", ["letterbox", "squash"])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_boxes_stay_on_what_they_are_of(share, fit):
    frame, change = Framing(64, 48, fit), Augmentation(mosaic=share, **PLAIN)
    squares = Squares((64, 64), (90, 48), (48, 64))
    seen = 0
    for seed in range(12):
        picture, boxes = change(squares, seed % 3, frame, torch.Generator().manual_seed(seed))
        assert picture.shape == (3, 64, 48) and picture.dtype == torch.uint8
        covered = torch.zeros(64, 48, dtype=torch.bool)
        for left, top, right, bottom in boxes.corners.round().int().tolist():
            middle = picture[:, (top + bottom) // 2, (left + right) // 2]
            assert middle.float().mean() > 230
            covered[max(top - 1, 0) : bottom + 1, max(left - 1, 0) : right + 1] = True
            seen += 1
        outside = picture.amin(0)[~covered]
        assert (outside > 230).sum() <= 2 * 64  # slivers of boxes that went at most
    assert seen >= 8


def test_what_is_drawn_is_the_seeds_alone():
    frame, change, squares = Framing(32, 32), Augmentation(), Squares((64, 64), (90, 48))
    before = torch.random.get_rng_state()
    made = [change(squares, 0, frame, torch.Generator().manual_seed(seed)) for seed in (3, 4, 3)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(made[0][0], made[2][0]) and torch.equal(made[0][1].corners, made[2][1].corners)
    assert not torch.equal(made[0][0], made[1][0])


def test_colours_change_and_boxes_do_not():
    frame, squares = Framing(64, 64), Squares((64, 64))
    still = {"mosaic": 0.0, "flip": 0.0, "scale": 0.0, "translate": 0.0}
    plain, boxes = Augmentation(**still, **PLAIN)(squares, 0, frame, torch.Generator().manual_seed(1))
    assert torch.equal(plain, frame.framed(squares, 0)[0])
    dark, same = Augmentation(**still)(squares, 0, frame, torch.Generator().manual_seed(1))
    assert torch.equal(boxes.corners, same.corners) and not torch.equal(plain, dark)
    always, turned = Augmentation(**{**still, "flip": 1.0}, **PLAIN)(squares, 0, frame, torch.Generator())
    assert torch.equal(always, plain.flip(2)) and turned.corners.tolist() == [[28, 8, 52, 32]]


def test_settings_out_of_range():
    for wrong in ({"mosaic": 1.5}, {"hue": 0.6}, {"scale": 1.0}, {"flip": True}):
        with pytest.raises(InputError):
            Augmentation(**wrong)
