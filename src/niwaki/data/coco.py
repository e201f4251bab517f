"""Boxes in the JSON files of COCO."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

from niwaki.data import some
from niwaki.data.annotated import Annotated, BoxReader, BoxSource, Drawn, Tally, annotated
from niwaki.errors import FileDamagedError, InputError

SHAPE: dict[str, dict[str, Any]] = {
    "images": {"id": (int, str), "file_name": str},
    "annotations": {"image_id": (int, str), "category_id": int, "bbox": list},
    "categories": {"id": int, "name": str},
}
"""What niwaki reads of such a file; "width" and "height" of images, "iscrowd" and "area" of annotations where there."""
OTHERS = {"images", "val", "test"}


@final
@dataclass(frozen=True)
class Coco(BoxReader):
    """One file for the training pictures, and if named one for `val` and one for `test`; all of the same categories.

    The categories, by rising id, become classes 0, 1, ... Pictures are looked for in `images` if named, beside the
    file, in `images` beside it or above it, and in folders above it that have the last word of the file's name
    (`annotations/instances_train2017.json`: `train2017`, `images/train2017`). Crowds are not learned and not asked for.

    Raises:
        InputError: another place than these named, files of other categories, no pictures.
        FileDamagedError: no such JSON, a box of no picture or of no category, a picture that is missing or of another
            size, a box that is none.
        MissingExtraError: pillow is not installed.
    """

    takes: ClassVar[str] = "a JSON file with images, annotations and categories"

    def read(self, tally: Tally, **more: Path) -> BoxSource:
        if unknown := sorted(set(more) - OTHERS):
            found, do = unknown[0], f"give {some(sorted(OTHERS))} only"
            raise InputError("read COCO annotations", found=found, where=str(self.place), do=do)
        classes, train = _file(self.place, more.get("images"), tally)
        parts: dict[str, list[Annotated]] = {}
        for part in ("val", "test"):
            if part in more:
                here, parts[part] = _file(more[part], more.get("images"), tally)
                if here != classes:
                    odd = some(sorted(set(here) ^ set(classes))) or "their order"
                    do = "give files of the same categories"
                    raise InputError(f"read the {part} part", found=f"differs: {odd}", where=str(more[part]), do=do)
        files = {part: str(path) for part, path in more.items()}
        return BoxSource(classes, train, parts.get("val"), parts.get("test"), {"layout": "COCO", **files})


def _file(path: Path, images: Path | None, tally: Tally) -> tuple[tuple[str, ...], list[Annotated]]:
    """Classes and pictures of one file."""
    data = _json(path)
    categories = sorted(data["categories"], key=lambda one: one["id"])
    numbers = {one["id"]: number for number, one in enumerate(categories)}
    if len(numbers) < len(categories) or not categories:
        raise _damaged(path, "no categories" if not categories else "two categories of one id")
    pictures = {one["id"]: one for one in data["images"]}
    if len(pictures) < len(data["images"]) or not pictures:
        raise _damaged(path, "no images" if not pictures else "two images of one id")
    drawn: dict[Any, list[Drawn]] = {number: [] for number in pictures}
    for place, one in enumerate(data["annotations"]):
        where = f"{path}, annotation {one.get('id', f'number {place + 1}')}"
        if one["image_id"] not in pictures:
            raise _damaged(where, f"no image of id {one['image_id']}")
        if one["category_id"] not in numbers:
            raise _damaged(where, f"category {one['category_id']}; known: {some(numbers)}")
        left, top, width, height = _four(one["bbox"], where)
        area = one.get("area")
        drawn[one["image_id"]].append(
            Drawn(
                (left, top, left + width, top + height),
                numbers[one["category_id"]],
                where,
                ignored=bool(one.get("iscrowd", 0)),
                area=float(area) if isinstance(area, (int, float)) and area > 0 else None,
            )
        )
    folder = _folder(path, images, str(data["images"][0]["file_name"]))
    entries = []
    for number, one in pictures.items():
        where = f"{path}, image {number}"
        sides = (one.get("width"), one.get("height"))
        size = (int(sides[0]), int(sides[1])) if all(isinstance(side, int) and side > 0 for side in sides) else None
        entries.append(annotated(folder / one["file_name"], drawn[number], tally, size=size, where=where))
    return tuple(str(one["name"]) for one in categories), entries


def _json(path: Path) -> Mapping[str, Any]:
    """The file, its parts of the types that `SHAPE` states."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as cause:
        raise InputError("read COCO annotations", found="no such file", where=str(path), do="check the path") from cause
    except (OSError, ValueError, RecursionError) as cause:
        raise _damaged(path, f"no readable JSON: {cause}") from cause
    for part, fields in SHAPE.items():
        listed = data.get(part) if isinstance(data, dict) else None
        if not isinstance(listed, list):
            raise _damaged(path, f"no list {part!r}")
        for number, one in enumerate(listed):
            for name, kind in fields.items():
                value = one.get(name) if isinstance(one, dict) else None
                if not isinstance(value, kind) or isinstance(value, bool):  # type: ignore[arg-type]
                    raise _damaged(path, f"{part}[{number}] without a {name} that is right")
    return dict(data)


def _four(box: list[Any], where: str) -> tuple[float, float, float, float]:
    if len(box) != 4 or not all(isinstance(side, (int, float)) and not isinstance(side, bool) for side in box):
        raise _damaged(where, f"bbox {str(box)[:60]}, not left, top, width, height")
    left, top, width, height = map(float, box)
    return left, top, width, height


def _folder(path: Path, images: Path | None, first: str) -> Path:
    """Where the first picture is, and so the others."""
    word = path.stem.rpartition("_")[2]
    above = path.parent.parent
    near = [path.parent, path.parent / "images", above / word, above / "images" / word, above / "images"]
    tried = near if images is None else [images]
    for folder in tried:
        if (folder / first).is_file():
            return folder
    found = f"no {first} in {', '.join(str(folder) for folder in tried)}"
    do = "name the folder of the pictures: images=FOLDER"
    raise InputError("read the pictures of COCO annotations", found=found, where=str(path), do=do)


def _damaged(where: Path | str, found: str) -> FileDamagedError:
    do = "give a file of COCO's object detection: images, annotations with bbox, categories"
    return FileDamagedError("read COCO annotations", found=found, where=str(where), do=do)
