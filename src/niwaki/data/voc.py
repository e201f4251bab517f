"""Boxes in the XML files of PASCAL VOC."""

import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

from niwaki.data import some
from niwaki.data.annotated import Annotated, BoxReader, BoxSource, Drawn, Tally, annotated
from niwaki.data.pictures import ENDINGS, Size
from niwaki.errors import FileDamagedError, InputError

CORNERS = ("xmin", "ymin", "xmax", "ymax")
PARTS = ("train", "val", "trainval", "test")


@final
@dataclass(frozen=True)
class Voc(BoxReader):
    """`DIR/Annotations/*.xml`, `DIR/JPEGImages/*`, and with parts of its own `DIR/ImageSets/Main/{train,val,test}.txt`.

    Classes are the names in all the files, sorted. With `train` and `val` but no `test`, `val` is the test part.
    Objects marked difficult are not learned and not asked for.

    Raises:
        InputError: not this layout, or a part that names pictures without annotations.
        FileDamagedError: a file that is no such XML, a picture that is missing or of another size, a box that is none.
        MissingExtraError: pillow is not installed.
    """

    takes: ClassVar[str] = "the folder with Annotations and JPEGImages"
    place_name: ClassVar[str] = "DIR"

    def read(self, tally: Tally, **more: Path) -> BoxSource:
        if more:
            raise InputError(f"voc with {', '.join(more)}", found="parts are in ImageSets/Main", do="leave it out")
        folder = self.place / "Annotations"
        if not folder.is_dir():
            near = sorted(path.parent.name for path in self.place.glob("*/Annotations"))
            found = "no folder Annotations" + (f"; there is one in {some(near)}" if near else "")
            raise InputError("read VOC", found=found, where=str(self.place), do="name the folder that holds it")
        listed = _listed(self.place / "ImageSets" / "Main", folder)
        names = sorted({name for part in listed.values() for name in part}) if listed else _every(folder)
        texts = {name: _xml(folder / f"{name}.xml") for name in names}
        classes = tuple(
            sorted({_text(one, "name", texts[name][1]) for name in names for one in texts[name][0].findall("object")})
        )
        if not classes:
            raise InputError("read VOC", found="no object in any file", where=str(folder), do="give annotated pictures")
        entries = {name: self._entry(name, texts[name], classes, tally) for name in names}
        parts = {part: [entries[name] for name in members] for part, members in listed.items()}
        if not listed:
            return BoxSource(classes, list(entries.values()), notes={"layout": "VOC"})
        test = parts.get("test") or parts.get("val")
        val = parts.get("val") if "test" in parts else None
        return BoxSource(classes, parts["train"], val, test, {"layout": "VOC", "parts": sorted(listed)})

    def _entry(self, name: str, file: "tuple[Any, Path]", classes: tuple[str, ...], tally: Tally) -> Annotated:
        root, where = file
        drawn = []
        for number, one in enumerate(root.findall("object")):
            place = f"{where}, object {number + 1}"
            left, top, right, bottom = (_number(one, f"bndbox/{corner}", place) for corner in CORNERS)
            hard = (one.findtext("difficult") or "").strip() == "1"
            label = classes.index(_text(one, "name", where))
            drawn.append(Drawn((left, top, right, bottom), label, place, ignored=hard))
        path = _picture(self.place, name, root, where)
        return annotated(path, drawn, tally, size=_size(root, where), where=str(where))


def _xml(path: Path) -> tuple[Any, Path]:
    """The root of an XML file that describes a picture, and the file."""
    try:
        root = ElementTree.parse(path).getroot()
    except FileNotFoundError as cause:
        found, do = "no such file", "add it, or take its name out of ImageSets/Main"
        raise InputError("read VOC annotations", found=found, where=str(path), do=do) from cause
    except (ElementTree.ParseError, OSError, ValueError) as cause:
        raise _damaged(path, str(cause)) from cause
    if root.tag != "annotation":
        raise _damaged(path, f"<{root.tag}> where <annotation> belongs")
    return root, path


def _damaged(where: Path | str, found: str) -> FileDamagedError:
    do = "give the XML of VOC: <annotation> with <object>, <name>, <bndbox>"
    return FileDamagedError("read VOC annotations", found=found, where=str(where), do=do)


def _listed(folder: Path, annotations: Path) -> dict[str, list[str]]:
    """The names of pictures by part: train, and val and test where there are lists of them."""

    def named(line: str) -> str:  # lists for one class have a second column
        return line if (annotations / f"{line}.xml").is_file() else line.split()[0]

    found: dict[str, list[str]] = {}
    for part in PARTS:
        path = folder / f"{part}.txt"
        if not path.is_file():
            continue
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as cause:
            raise _damaged(path, str(cause)) from cause
        found[part] = list(dict.fromkeys(named(line) for line in lines if line))
        if not found[part]:
            raise InputError(f"read the {part} part", found="no names", where=str(path), do="list pictures, or no file")
    both = found.pop("trainval", [])
    if both and "train" not in found:
        found["train"] = [name for name in both if name not in set(found.get("val", ()))]
    elif both and "val" not in found:
        found["val"] = [name for name in both if name not in set(found["train"])]
    if found and not found.get("train"):
        do = "add train.txt, or remove the lists to split by seed"
        raise InputError("read VOC", found=f"lists of {some(found)} only", where=str(folder), do=do)
    return {part: names for part, names in found.items() if names}


def _every(folder: Path) -> list[str]:
    names = sorted(path.stem for path in folder.glob("*.xml") if not path.name.startswith("."))
    if not names:
        raise InputError("read VOC", found="no .xml file", where=str(folder), do="name a folder with annotations")
    return names


def _picture(place: Path, name: str, root: Any, where: Path) -> Path:
    """The picture of a file: of the same name, or of the name that the file says."""
    folder = place / "JPEGImages"
    said = (root.findtext("filename") or "").strip()
    tried = [folder / f"{name}{ending}" for ending in (".jpg", *sorted(ENDINGS - {".jpg"}))]
    tried += [folder / Path(said).name] if said else []
    for path in (*tried, *(path.with_suffix(path.suffix.upper()) for path in tried[: len(ENDINGS)])):
        if path.is_file():
            return path
    found = f"no picture {name}.* in {folder}"
    raise FileDamagedError("read VOC annotations", found=found, where=str(where), do="add the picture")


def _size(root: Any, where: Path) -> Size | None:
    """As the file says it; None where it does not, or says nothing (0)."""
    if root.find("size/width") is None or root.find("size/height") is None:
        return None
    size = (int(_number(root, "size/width", str(where))), int(_number(root, "size/height", str(where))))
    return size if min(size) > 0 else None


def _text(element: Any, name: str, where: Path | str) -> str:
    found = element.findtext(name)
    if found is None or not found.strip():
        raise _damaged(where, f"an object without <{name}>")
    return str(found).strip()


def _number(element: Any, name: str, where: str) -> float:
    text = _text(element, name, where)
    try:
        return float(text)
    except ValueError as cause:
        raise _damaged(where, f"<{name}> {text[:40]!r}, not a number") from cause
