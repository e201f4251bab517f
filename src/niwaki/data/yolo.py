"""Boxes in the text files of YOLO, by their data.yaml."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

from niwaki.data import some
from niwaki.data.annotated import Annotated, BoxReader, BoxSource, Drawn, Tally, annotated
from niwaki.data.pictures import ENDINGS, sizes_of
from niwaki.errors import FileDamagedError, InputError, MissingExtraError

IMAGES, LABELS = "images", "labels"
"""The last folder of the first name on a picture's path has its labels in a folder of the second name beside it."""
SHARES = 5  # numbers in a line with a box: class, centre x and y, width, height


@final
@dataclass(frozen=True)
class Yolo(BoxReader):
    """A data.yaml with `names`, `train`, and if there are any `val` and `test`: folders, lists of files, or several.

    Places are meant from `path`, which is meant from the yaml's folder (or the current one). Labels of
    `.../images/.../NAME.jpg` are in `.../labels/.../NAME.txt`, else beside the picture: a line a box, class and shares
    of the picture (centre x, y, width, height), or class and the corners of a polygon, whose box is taken. An empty
    file or none is a picture of background. With `val` but no `test`, `val` is the test part. Nothing is downloaded and
    no code of the yaml is run.

    Raises:
        InputError: places that point nowhere, no pictures, no labels at all.
        FileDamagedError: a yaml or a line that is not so, a class out of range, a picture that can't be read.
        MissingExtraError: pillow or pyyaml is not installed.
    """

    takes: ClassVar[str] = "a data.yaml with path, train, val and names"
    place_name: ClassVar[str] = "FOLDER/data.yaml"

    def read(self, tally: Tally, **more: Path) -> BoxSource:
        if more:
            raise InputError(f"yolo with {', '.join(more)}", found="places are in the yaml", do="leave it out")
        data = _yaml(self.place)
        classes = _names(data, self.place)
        parts: dict[str, list[Annotated]] = {}
        for part in ("train", "val", "test"):
            if part == "train" or data.get(part):
                pictures = _pictures(data, part, self.place)
                parts[part] = [self._entry(path, classes, tally) for path in pictures]
                if all(len(one.boxes) == 0 for one in parts[part]):
                    found = f"not one box for {len(pictures)} pictures, looked for in {labels_of(pictures[0])}, ..."
                    do = "put labels where YOLO has them: .../labels/NAME.txt for .../images/NAME.jpg"
                    raise InputError(f"read the {part} part", found=found, where=str(self.place), do=do)
        self._tell_lonely([one.path for entries in parts.values() for one in entries], tally)
        test = parts.get("test") or parts.get("val")
        return BoxSource(
            classes, parts["train"], parts.get("val") if "test" in parts else None, test, {"layout": "YOLO"}
        )

    @staticmethod
    def _entry(path: Path, classes: tuple[str, ...], tally: Tally) -> Annotated:
        file = labels_of(path)
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            tally.without_labels.append(str(path))
            lines = []
        except (OSError, UnicodeDecodeError) as cause:
            raise _damaged(file, str(cause)) from cause
        size, _ = sizes_of(path)
        numbered = [(f"{file}:{number}", line.split()) for number, line in enumerate(lines, start=1)]
        drawn = [_line(words, size, classes, where) for where, words in numbered if words]
        return annotated(path, drawn, tally, size=None, where=str(file))

    @staticmethod
    def _tell_lonely(pictures: list[Path], tally: Tally) -> None:
        """Count files of labels whose picture is not there, in folders that hold labels and nothing else."""
        used = {labels_of(path) for path in pictures}
        for folder in sorted({file.parent for file in used} - {path.parent for path in pictures}):
            beside = sorted(folder.glob("*.txt"))
            home = next(path.parent for path in pictures if labels_of(path).parent == folder)
            there = {path.stem for path in home.iterdir()} if beside else set()
            tally.without_pictures += [str(file) for file in beside if file not in used and file.stem not in there]


def labels_of(path: Path) -> Path:
    """Where the labels of a picture are."""
    folders = list(path.parts[:-1])
    if IMAGES in folders:
        last = len(folders) - 1 - folders[::-1].index(IMAGES)
        folders[last] = LABELS
    return Path(*folders) / f"{path.stem}.txt"


def _line(words: list[str], size: tuple[int, int], classes: tuple[str, ...], where: str) -> Drawn:
    """The box of one line."""
    try:
        label, values = float(words[0]), [float(word) for word in words[1:]]
    except ValueError as cause:
        raise _damaged(where, str(cause)) from cause
    if not label.is_integer() or not 0 <= label < len(classes):
        found = f"class {words[0]} of {len(classes)} (0 to {len(classes) - 1})"
        do = "correct the label, or add the class to names"
        raise FileDamagedError("read YOLO labels", found=found, where=where, do=do)
    if len(words) == SHARES:
        x, y, width, height = values
        if width < 0 or height < 0:
            raise _damaged(where, f"a box of {width} x {height}")
        sides = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    elif len(words) > SHARES and len(words) % 2:  # a polygon
        sides = (min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2]))
    else:
        raise _damaged(where, f"{len(words)} numbers")
    left, top, right, bottom = (side * size[axis % 2] for axis, side in enumerate(sides))
    return Drawn((left, top, right, bottom), int(label), where)


def _damaged(where: Path | str, found: str) -> FileDamagedError:
    do = "write a line a box: class, then centre x, y, width and height as shares of the picture, from 0 to 1"
    return FileDamagedError("read YOLO labels", found=found, where=str(where), do=do)


def _yaml(path: Path) -> dict[str, Any]:
    """What a data.yaml says; plain values only."""
    try:
        import yaml
    except ImportError as cause:
        raise MissingExtraError("reading a data.yaml needs pyyaml", do='pip install "niwaki[detection]"') from cause
    do = "give a data.yaml: path, train, val, names"
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as cause:
        found = " ".join(str(cause).split())
        raise FileDamagedError("read a data.yaml", found=found, where=str(path), do=do) from cause
    if not isinstance(data, dict):
        raise FileDamagedError("read a data.yaml", found=f"a {type(data).__name__}", where=str(path), do=do)
    if not data.get("train"):
        raise InputError("read a data.yaml", found="no train", where=str(path), do=do)
    return data


def _names(data: dict[str, Any], where: Path) -> tuple[str, ...]:
    """The classes' names: a list, numbers and names, or how many there are."""
    names, count = data.get("names"), data.get("nc")
    if names is None and type(count) is int and count > 0:
        names = [f"class {number}" for number in range(count)]
    if isinstance(names, dict) and sorted(map(str, names)) == sorted(map(str, range(len(names)))):
        by_number = {int(number): name for number, name in names.items()}
        names = [by_number[number] for number in range(len(names))]
    if not isinstance(names, list) or not names:
        found = f"names: {str(names)[:80]}"
        do = "give names as a list, or by numbers from 0 without gaps"
        raise FileDamagedError("read a data.yaml", found=found, where=str(where), do=do)
    if count is not None and count != len(names):
        found, do = f"nc: {count}, but {len(names)} names", "leave nc out, or give as many names"
        raise FileDamagedError("read a data.yaml", found=found, where=str(where), do=do)
    return tuple(map(str, names))


def _pictures(data: dict[str, Any], part: str, where: Path) -> list[Path]:
    """The pictures of a part, sorted; of lists of files in their order."""
    places = data[part] if isinstance(data[part], list) else [data[part]]
    found = list(dict.fromkeys(path for place in places for path in _below(_place(data, place, part, where))))
    if not found:
        do = f"add pictures ({', '.join(sorted(ENDINGS))})"
        raise InputError(f"read the {part} part", found=f"no picture in {some(places)}", where=str(where), do=do)
    return found


def _place(data: dict[str, Any], named: Any, part: str, where: Path) -> Path:
    """The folder or list that a data.yaml names."""
    if not isinstance(named, str):
        found = f"{part}: {str(named)[:80]}"
        raise FileDamagedError("read a data.yaml", found=found, where=str(where), do="name folders or lists of files")
    home = where.parent
    root = Path(str(data.get("path") or "")).expanduser()
    bases = [home / root] + ([root] if data.get("path") and not root.is_absolute() else [])
    tried = [base / Path(named).expanduser() for base in bases]
    if named.startswith("../"):  # as some exporters write it, though the folder is beside the yaml
        tried += [base / named.removeprefix("../") for base in bases]
    for path in tried:
        if path.exists():
            return path
    found = f"{part}: {named} points nowhere; tried {', '.join(str(path) for path in dict.fromkeys(tried))}"
    do = "correct path and the parts: they are meant from the yaml's folder"
    raise InputError("read a data.yaml", found=found, where=str(where), do=do)


def _below(place: Path) -> Iterable[Path]:
    """Pictures in a folder and below it, or those that a list names."""
    if place.is_dir():
        every = sorted(path for path in place.rglob("*") if path.suffix.lower() in ENDINGS)
        return (path for path in every if not path.name.startswith("."))
    if place.suffix.lower() in ENDINGS:
        return [place]
    try:
        lines = place.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as cause:
        do = "name a folder, or a text file with a picture a line"
        raise FileDamagedError("read a list of pictures", found=str(cause), where=str(place), do=do) from cause
    named = [Path(re.sub(r"^\./", "", line.strip())) for line in lines if line.strip()]
    return [path if path.is_absolute() else place.parent / path for path in named]
