"""Detection on real pictures: data sets as they are, and trained detectors at their published precision."""

from pathlib import Path

import pytest
import yaml

import niwaki

pytest.importorskip("pycocotools")
SHARED = Path(__file__).parents[3] / "shared" / "data"
BCCD, COCO = SHARED / "detection" / "bccd" / "BCCD", SHARED / "coco256"
WEIGHTS = SHARED / "weights" / "coco-yolo-fastest-darknet"


@pytest.mark.skipif(not BCCD.is_dir(), reason="the blood cells are not here")
def test_blood_cells_as_they_were_published():
    splits = niwaki.data.open_boxes(f"voc:{BCCD}")
    assert splits.classes == ("Platelets", "RBC", "WBC")
    assert splits.record["counts"] == {"train": 205, "val": 87, "test": 72}
    every = [one for part in (splits.train, splits.val, splits.test) for one in part.entries]
    labels = [label for one in every for label in one.boxes.labels.tolist()]
    # of 4155 red cells two are drawn without area: 00338 and 00343
    assert [labels.count(number) for number in range(3)] == [361, 4153, 372]
    assert splits.record["without_area"] == 2


@pytest.mark.slow
@pytest.mark.skipif(not (COCO.is_dir() and WEIGHTS.is_dir()), reason="pictures of COCO and weights are not here")
@pytest.mark.parametrize(("name", "published"), [("yolo-fastest-1.1", 35.6), ("yolo-fastest-1.1-xl", 43.2)])
def test_yolo_fastest_on_128_pictures_of_coco(name, published, tmp_path):
    for kind, place in (("images", COCO / "images"), ("labels", COCO / "boxes" / "labels")):
        (tmp_path / kind).symlink_to(place)
    names = (WEIGHTS / "coco.names").read_text().split("\n")
    parts = {"train": "images/train2017", "val": "images/val2017", "names": [one for one in names if one]}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(parts))
    loaded = niwaki.models.load(f"darknet:{WEIGHTS / name}.cfg", checkpoint=str(WEIGHTS / f"{name}.weights"))
    task = niwaki.tasks.Detection(niwaki.data.open_boxes(f"yolo:{tmp_path / 'data.yaml'}"), loaded.detector, size=320)
    found = task.evaluate(loaded.model)
    # pictures were resized and boxes suppressed in ways of its own there
    assert found.value == pytest.approx(published, abs=1.0)
    assert 2 < found.spread < 4
