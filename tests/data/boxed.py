"""Small data sets with boxes, written as VOC, COCO and YOLO have them."""

import json
from pathlib import Path

import numpy as np
from PIL import Image


def picture(path: Path, width: int = 40, height: int = 30, *, colour: int = 0) -> Path:
    """A picture of one colour with a white square from (10, 10) to (20, 20)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((height, width, 3), colour, np.uint8)
    pixels[10:20, 10:20] = 255
    Image.fromarray(pixels).save(path)
    return path


SQUARE = ("thing", 10, 10, 20, 20)


def voc(folder: Path, name: str, *objects: tuple, size: tuple[int, int] | None = (40, 30)) -> None:
    """A picture and its XML; an object is (class, xmin, ymin, xmax, ymax) and if need be what else it says."""
    picture(folder / "JPEGImages" / f"{name}.png")
    said = "".join(
        f"<object><name>{label}</name>{''.join(more)}<bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax>"
        f"<ymax>{d}</ymax></bndbox></object>"
        for label, a, b, c, d, *more in objects
    )
    sides = "" if size is None else f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
    text = f"<annotation><filename>{name}.png</filename>{sides}{said}</annotation>"
    (folder / "Annotations").mkdir(exist_ok=True)
    (folder / "Annotations" / f"{name}.xml").write_text(text)


def listed(folder: Path, **parts: list[str]) -> None:
    """The lists of pictures of each part."""
    lists = folder / "ImageSets" / "Main"
    lists.mkdir(parents=True, exist_ok=True)
    for part, names in parts.items():
        (lists / f"{part}.txt").write_text("\n".join(names) + "\n")


def coco(file: Path, count: int = 2, **change: object) -> dict:
    """A JSON file with pictures beside it, one square on each."""
    data = {
        "images": [{"id": n + 7, "file_name": f"{n}.png", "width": 40, "height": 30} for n in range(count)],
        "annotations": [
            {"id": n, "image_id": n + 7, "category_id": 18, "bbox": [10, 10, 10, 10], "area": 60.0, "iscrowd": 0}
            for n in range(count)
        ],
        "categories": [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}],
        **change,
    }
    for n in range(count):
        picture(file.parent / f"{n}.png")
    file.write_text(json.dumps(data))
    return data


def yolo(folder: Path, *lines: str, names: str = "[thing, other]", count: int = 4, more: str = "") -> str:
    """A data.yaml with `count` pictures that have these lines each; what to open."""
    for number in range(count):
        picture(folder / "images" / f"frame-{number}.png")
        (folder / "labels").mkdir(exist_ok=True)
        (folder / "labels" / f"frame-{number}.txt").write_text("\n".join(lines))
    (folder / "data.yaml").write_text(f"train: images\nnames: {names}\n{more}")
    return f"yolo:{folder / 'data.yaml'}"
