"""Pictures with boxes: VOC, COCO and YOLO read to the pixel, and what is refused."""

import json
import logging
import sys

import pytest
import torch
from boxed import SQUARE, coco, listed, picture, voc, yolo
from PIL import Image

from niwaki.data import open_boxes
from niwaki.errors import FileDamagedError, InputError, MissingExtraError, UnknownNameError


def corners(pictures, number=0):
    return pictures[number].boxes.corners.tolist()


def test_voc_by_its_lists(tmp_path):
    for name in "abcde":
        voc(tmp_path, name, SQUARE, ("zebra", 0, 0, 40, 30, "<difficult>1</difficult>"))
    listed(tmp_path, train=["a", "b"], val=["c"], test=["d", "e"])
    splits = open_boxes(f"voc:{tmp_path}")
    assert splits.classes == ("thing", "zebra")
    assert [len(splits.train), len(splits.val), len(splits.test)] == [2, 1, 2]
    one = splits.test[0]
    assert one.path.name == "d.png" and (one.width, one.height) == (40, 30)
    assert one.boxes.corners.tolist() == [[10, 10, 20, 20], [0, 0, 40, 30]]
    assert one.boxes.labels.tolist() == [0, 1] and one.ignored.tolist() == [False, True]
    assert one.areas.tolist() == [100, 1200]
    assert splits.record["split_by_seed"] == [] and splits.record["boxes"] == {"train": 2, "val": 1, "test": 2}


def test_voc_without_a_test_list_tests_on_val(tmp_path):
    for name in "abcdef":
        voc(tmp_path, name, SQUARE, size=None)
    listed(tmp_path, trainval=["a", "b", "c", "d", "e 1", "f"], val=["f"])
    splits = open_boxes(f"voc:{tmp_path}", val=0.2)
    assert [one.path.stem for one in splits.test.entries] == ["f"]
    assert len(splits.train) == 4 and len(splits.val) == 1
    assert {one.path.stem for one in (*splits.train.entries, *splits.val.entries)} == set("abcde")


def test_coco_numbers_categories_by_rising_id(tmp_path):
    data = coco(tmp_path / "instances_train.json", 4)
    crowd = {"id": 9, "image_id": 7, "category_id": 3, "bbox": [0, 0, 5, 5], "iscrowd": 1}
    (tmp_path / "instances_train.json").write_text(
        json.dumps({**data, "annotations": [*data["annotations"][:1], crowd]})
    )
    splits = open_boxes(f"coco:{tmp_path / 'instances_train.json'}", val=0.25, test=0.25)
    assert splits.classes == ("car", "dog")
    assert [len(splits.train), len(splits.val), len(splits.test)] == [2, 1, 1]
    (one,) = [e for part in (splits.train, splits.val, splits.test) for e in part.entries if len(e.boxes)]
    assert one.boxes.labels.tolist() == [1, 0] and one.ignored.tolist() == [False, True]
    assert one.areas.tolist() == [60.0, 25.0]  # of the object where the file says so, else of the box
    assert splits.record["background"] == 3


def test_coco_with_a_file_for_each_part(tmp_path):
    (tmp_path / "annotations").mkdir()
    for part in ("train2017", "val2017"):
        data = coco(tmp_path / "annotations" / f"instances_{part}.json", 3)
        for one in data["images"]:
            picture(tmp_path / part / one["file_name"])
            (tmp_path / "annotations" / one["file_name"]).unlink()
    file = tmp_path / "annotations" / "instances_train2017.json"
    splits = open_boxes(f"coco:{file}", test=str(file).replace("train2017", "val2017"))
    assert splits.test[0].path == tmp_path / "val2017" / "0.png"
    assert [len(splits.train), len(splits.val), len(splits.test)] == [2, 1, 3]
    with pytest.raises(InputError, match="name the folder of the pictures"):
        open_boxes(f"coco:{file}", images=tmp_path)


def test_yolo_lines_are_shares_of_the_picture(tmp_path):
    spec = yolo(tmp_path, "0 0.375 0.5 0.25 0.3333333", "1 0.25 0.3333333 0.5 0.3333333 0.5 0.6666667", "")
    (tmp_path / "labels" / "frame-3.txt").unlink()  # background
    (tmp_path / "labels" / "frame-2.txt").write_text("")  # the same
    (tmp_path / "labels" / "lonely.txt").write_text("0 0.5 0.5 0.2 0.2")
    splits = open_boxes(spec, val=0.25, test=0.25)
    entries = {e.path.stem: e for part in (splits.train, splits.val, splits.test) for e in part.entries}
    assert len(entries) == 4
    torch.testing.assert_close(
        entries["frame-0"].boxes.corners, torch.tensor([[10.0, 10, 20, 20], [10, 10, 20, 20]]), atol=1e-4, rtol=0
    )  # a box, and the box around a polygon
    assert entries["frame-0"].boxes.labels.tolist() == [0, 1]
    assert len(entries["frame-2"].boxes) == len(entries["frame-3"].boxes) == 0
    assert splits.record["without_labels"] == 1 and splits.record["background"] == 2
    assert splits.record["without_pictures"] == 1


def test_yolo_parts_lists_and_names_by_number(tmp_path):
    yolo(tmp_path, "0 0.5 0.5 0.2 0.2", count=0)
    for part in ("train", "valid"):
        for number in range(3):
            picture(tmp_path / part / "images" / f"{number}.png")
            (tmp_path / part / "labels").mkdir(exist_ok=True)
            (tmp_path / part / "labels" / f"{number}.txt").write_text("1 0.5 0.5 0.2 0.2")
    (tmp_path / "some.txt").write_text("./train/images/0.png\ntrain/images/2.png\n")
    (tmp_path / "data.yaml").write_text("train: [some.txt]\nval: ../valid/images\nnames: {1: b, 0: a}\nnc: 2\n")
    splits = open_boxes(f"yolo:{tmp_path / 'data.yaml'}", val=0.5)
    assert splits.classes == ("a", "b")
    assert len(splits.test) == 3 and {len(splits.train), len(splits.val)} == {1}


def test_videos_stay_together(tmp_path):
    for video, count in (("a-", 6), ("b_", 2), ("c", 2)):
        for number in range(count):
            picture(tmp_path / "images" / f"{video}{number}.png")
            (tmp_path / "labels").mkdir(exist_ok=True)
            (tmp_path / "labels" / f"{video}{number}.txt").write_text("0 0.5 0.5 0.2 0.2")
    (tmp_path / "data.yaml").write_text("train: images\nnames: [x]\n")
    for seed in range(5):
        splits = open_boxes(f"yolo:{tmp_path / 'data.yaml'}", seed=seed, together="prefix")
        videos = [{one.path.stem[0] for one in part.entries} for part in (splits.train, splits.val, splits.test)]
        assert videos[0] and videos[1] and videos[2] and sum(map(len, videos)) == 3
        again = open_boxes(f"yolo:{tmp_path / 'data.yaml'}", seed=seed, together="prefix")
        assert again.record == splits.record
    with pytest.raises(InputError, match="1 videos"):
        (tmp_path / "data.yaml").write_text("train: images/a-0.png\nnames: [x]\n")
        open_boxes(f"yolo:{tmp_path / 'data.yaml'}", together="prefix")


def test_boxes_that_reach_over_the_edge_or_have_no_area(tmp_path, caplog):
    for name in "abcd":
        voc(tmp_path, name, SQUARE, ("thing", -4, 5, 50, 29), ("thing", 7, 7, 7, 9))
    with caplog.at_level(logging.WARNING, "niwaki"):
        splits = open_boxes(f"voc:{tmp_path}")
    assert corners(splits.train) == [[10, 10, 20, 20], [0, 5, 40, 29]]
    assert splits.record["clipped"] == 4 and splits.record["without_area"] == 4
    said = " ".join(caplog.messages)
    assert "4 boxes reached over the edge" in said and "a.xml, object 2" in said
    assert "4 boxes had no area and were left out" in said and "a.xml, object 3" in said


def test_pictures_are_decoded_when_asked_for_and_kept(tmp_path):
    splits = open_boxes(yolo(tmp_path, "0 0.375 0.5 0.25 0.333"))
    pixels = splits.train.picture(0, 30, 40)
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 30, 40)
    assert pixels[:, 10:20, 10:20].eq(255).all() and pixels.sum() == 3 * 100 * 255
    splits.train[0].path.unlink()
    assert splits.train.picture(0, 30, 40) is pixels
    assert splits.test.picture(0, 15, 20).shape == (3, 15, 20)


def test_pictures_that_lie_on_their_side_are_turned_upright(tmp_path):
    spec = yolo(tmp_path, "0 0.5 0.5 0.2 0.2")
    for path in (tmp_path / "images").iterdir():
        path.unlink()
        turned = Image.new("RGB", (40, 30))
        exif = turned.getexif()
        exif[0x0112] = 6
        turned.save(path.with_suffix(".jpg"), exif=exif)
    one = open_boxes(spec).train[0]
    assert (one.width, one.height) == (30, 40)
    assert open_boxes(spec).train.picture(0, 40, 30).shape == (3, 40, 30)
    voc(tmp_path / "v", "a", SQUARE)
    voc(tmp_path / "v", "b", SQUARE)
    voc(tmp_path / "v", "c", SQUARE)
    for name in "abc":  # annotated as stored: 40 x 30
        (tmp_path / "v" / "JPEGImages" / f"{name}.png").unlink()
        turned.save(tmp_path / "v" / "JPEGImages" / f"{name}.jpg", exif=exif)
    one = open_boxes(f"voc:{tmp_path / 'v'}").train[0]
    assert (one.width, one.height, one.stored) == (40, 30, True)


def test_test_pictures_that_are_trained_on_are_told(tmp_path, caplog):
    spec = yolo(tmp_path, "0 0.5 0.5 0.2 0.2", more="val: images\n")
    with caplog.at_level(logging.WARNING, "niwaki"):
        record = open_boxes(spec).record
    assert record["test_in_train"] == 3 and "3 of 4 test pictures are training pictures" in " ".join(caplog.messages)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("2 0.5 0.5 0.2 0.2", "class 2 of 2 (0 to 1); where: {labels}/frame-0.txt:2"),
        ("0.5 0.5 0.5 0.2 0.2", "class 0.5 of 2"),
        ("-1 0.5 0.5 0.2 0.2", "class -1 of 2"),
        ("0 0.5 0.5 0.2", "4 numbers; where: {labels}/frame-0.txt:2"),
        ("0 a 0.5 0.2 0.2", "could not convert string to float: 'a'"),
        ("0 0.5 nan 0.2 0.2", "corners"),
        ("0 0.5 0.5 -0.2 0.2", "a box of -0.2 x 0.2"),
        ("0 25 15 10 10", "outside of the picture, 40 x 30; where: {labels}/frame-0.txt:2"),  # pixels, not shares
    ],
)
def test_lines_that_are_no_boxes_are_refused(tmp_path, line, says):
    spec = yolo(tmp_path, "1 0.5 0.5 0.2 0.2", line)
    with pytest.raises(FileDamagedError) as caught:
        open_boxes(spec)
    assert says.format(labels=tmp_path / "labels") in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train: nowhere\nnames: [x]\n", "train: nowhere points nowhere; tried"),
        ("path: /nowhere\ntrain: images\nnames: [x]\n", "points nowhere; tried /nowhere/images"),
        ("train: images\nval: nowhere\nnames: [x, y]\n", "val: nowhere points nowhere"),
        ("train: images\n", "names: None"),
        ("train: images\nnames: {0: a, 2: b}\n", "names: {0: 'a', 2: 'b'}"),
        ("train: images\nnames: [a, b]\nnc: 3\n", "nc: 3, but 2 names"),
        ("names: [a]\n", "no train"),
        ("train: [images\n", "while parsing"),
        ("- 3\n", "a list"),
        ("train: 3\nnames: [a]\n", "train: 3"),
        ("train: !!python/object/apply:os.system ['touch gone']\nnames: [a]\n", "could not determine a constructor"),
        ("train: labels\nnames: [a, b]\n", "no picture in labels"),
        ("train: bare\nnames: [a, b]\n", "not one box for 1 pictures, looked for in"),
    ],
)
def test_a_yaml_that_is_not_right_is_refused(tmp_path, text, says, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = yolo(tmp_path, "0 0.5 0.5 0.2 0.2")
    picture(tmp_path / "bare" / "a.png")
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        open_boxes(spec)
    assert says in str(caught.value)
    assert not (tmp_path / "gone").exists()  # no code of a yaml is run


def broken(tmp_path):
    path = tmp_path / "images" / "frame-1.png"
    path.write_bytes(b"\x89PNG nothing more")
    return path


def test_a_corrupt_picture_is_named(tmp_path):
    spec = yolo(tmp_path, "0 0.5 0.5 0.2 0.2")
    path = broken(tmp_path)
    with pytest.raises(FileDamagedError, match=f"cannot identify image file.*where: {path}"):
        open_boxes(spec)
    picture(path)
    splits = open_boxes(spec)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])  # its head is right
    (number, part) = next(
        (n, part) for part in (splits.train, splits.val, splits.test) for n in range(len(part)) if part[n].path == path
    )
    with pytest.raises(FileDamagedError, match=str(path)):
        part.picture(number, 30, 40)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"annotations": 3}, "no list 'annotations'"),
        ({"categories": []}, "no categories"),
        ({"images": [{"id": 1}]}, "images[0] without a file_name"),
        ({"annotations": [{"image_id": 5, "category_id": 3, "bbox": [0, 0, 5, 5]}]}, "no image of id 5"),
        ({"annotations": [{"image_id": 7, "category_id": 4, "bbox": [0, 0, 5, 5]}]}, "category 4; known: 3, 18"),
        ({"annotations": [{"image_id": 7, "category_id": 3, "bbox": [0, 0, 5]}]}, "bbox [0, 0, 5]"),
        ({"annotations": [{"image_id": 7, "category_id": 3, "bbox": [0, 0, -5, 5]}]}, "corners (0.0, 0.0, -5.0, 5.0)"),
        ({"images": [{"id": 7, "file_name": "0.png", "width": 41, "height": 30}], "annotations": []}, "41 x 30 in"),
    ],
)
def test_a_json_that_is_not_right_is_refused(tmp_path, change, says):
    coco(tmp_path / "a.json", **change)
    with pytest.raises(FileDamagedError) as caught:
        open_boxes(f"coco:{tmp_path / 'a.json'}")
    assert says in str(caught.value)


def test_files_of_other_categories_are_refused(tmp_path):
    coco(tmp_path / "a.json")
    coco(tmp_path / "b.json", categories=[{"id": 18, "name": "cat"}, {"id": 3, "name": "car"}])
    with pytest.raises(InputError, match="differs: cat, dog"):
        open_boxes(f"coco:{tmp_path / 'a.json'}", test=tmp_path / "b.json")
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(FileDamagedError, match="no readable JSON"):
        open_boxes(f"coco:{tmp_path / 'b.json'}")


def test_xml_that_is_not_right_is_refused(tmp_path):
    voc(tmp_path, "a", SQUARE)
    file = tmp_path / "Annotations" / "a.xml"
    right = file.read_text()
    for wrong, says in (
        (right.replace("</annotation>", ""), "no element found"),
        ("<html/>", "<html> where <annotation> belongs"),
        (right.replace("<name>thing</name>", ""), "without <name>"),
        (right.replace("<xmin>10</xmin>", "<xmin>ten</xmin>"), "<bndbox/xmin> 'ten', not a number"),
        (right.replace("<width>40</width>", "<width>50</width>"), "50 x 30 in the annotations, 40 x 30 in"),
    ):
        file.write_text(wrong)
        with pytest.raises(FileDamagedError) as caught:
            open_boxes(f"voc:{tmp_path}")
        assert says in str(caught.value)
    file.write_text(right)
    listed(tmp_path, train=["a", "b"])
    with pytest.raises(InputError, match="no such file"):
        open_boxes(f"voc:{tmp_path}")
    listed(tmp_path, train=["a"], test=[""])
    with pytest.raises(InputError, match="no names"):
        open_boxes(f"voc:{tmp_path}")


def test_names_and_places_that_are_wrong(tmp_path):
    voc(tmp_path / "inner", "a", SQUARE)
    for call, error, says in (
        (lambda: open_boxes("tiles:x"), UnknownNameError, "voc:DIR, coco:FILE, yolo:FOLDER/data.yaml"),
        (lambda: open_boxes("voc:"), InputError, "nothing after the colon"),
        (lambda: open_boxes(f"voc:{tmp_path / 'no'}"), InputError, "no such file or folder"),
        (lambda: open_boxes(f"voc:{tmp_path}"), InputError, "there is one in inner"),
        (lambda: open_boxes(f"yolo:{tmp_path}"), InputError, "a folder"),
        (lambda: open_boxes(f"voc:{tmp_path / 'inner'}", together="day"), UnknownNameError, "nothing, prefix"),
        (lambda: open_boxes(f"voc:{tmp_path / 'inner'}", images=tmp_path), InputError, "voc with images"),
        (lambda: open_boxes(f"voc:{tmp_path / 'inner'}"), InputError, "1 pictures"),
        (lambda: open_boxes(f"voc:{tmp_path / 'inner'}", val=0.5, test=0.5), InputError, "shares from 0"),
    ):
        with pytest.raises(error) as caught:
            call()
        assert says in str(caught.value)


def test_a_yaml_needs_pyyaml(tmp_path, monkeypatch):
    spec = yolo(tmp_path, "0 0.5 0.5 0.2 0.2")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(MissingExtraError, match=r"niwaki\[detection\]"):
        open_boxes(spec)
