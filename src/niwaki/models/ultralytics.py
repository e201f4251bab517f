"""Networks of ultralytics, by the name of a yaml file that comes with the package."""

import contextlib
import difflib
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from niwaki.errors import FileDamagedError, InputError, MissingExtraError, UnknownNameError
from niwaki.models import IMAGENET_SHAPE, USUAL, Built, ModelSource, call_builder, refuse_downloads

SIZE = 320  # a multiple of every stride, and a quarter of the work of the usual 640
SIZED = re.compile(r"(yolov?\d+)([a-z])(-.*)?")  # yolo11s-seg is the size s of yolo11-seg
CLASSES = {
    "detect": "DetectionModel",
    "segment": "SegmentationModel",
    "semantic": "SemanticSegmentationModel",
    "pose": "PoseModel",
    "obb": "OBBModel",
    "depth": "DepthModel",
    "classify": "ClassificationModel",
}
SAVE = (
    "where the file is trusted, in a Python of yours: `from safetensors.torch import save_file; "
    'save_file({k: v.clone() for k, v in YOLO("FILE.pt").model.float().state_dict().items()}, "FILE.safetensors")`'
)


@final
@dataclass(frozen=True)
class Ultralytics(ModelSource):
    """`ultralytics:NAME`, untrained, from the package's own yaml of that name (`ultralytics:yolo11s-seg.yaml?nc=3`).

    Sizes are letters as in the package's own names. The head is set to `export`: decoded predictions are all it puts
    out while evaluating, so that the features it has read can be cut.

    Raises:
        UnknownNameError: no yaml of that name in the package; the nearest are listed.
        InputError: weights where a structure is named, arguments that do not fit, networks that read texts too.
        MissingExtraError: ultralytics is not installed.
    """

    def build(self, *, stored: bool) -> Built:
        tasks, folder = self._package()
        refuse_downloads(self)
        settings = self._settings(folder)
        head = settings["head"][-1][2]
        if head.startswith(("World", "YOLOE")):
            do = "build it in a factory of yours that returns (model, example)"
            raise InputError(f"model ultralytics:{self.name}", found=f"a head that reads texts too ({head})", do=do)
        task = tasks.guess_model_task(settings)
        kind = "RTDETRDetectionModel" if head.startswith("RTDETR") else CLASSES[task]
        model = call_builder(self, getattr(tasks, kind), cfg=settings, verbose=False).eval()
        for module in model.modules():
            if hasattr(type(module), "export"):
                module.export = True
        channels = self.arguments.get("ch", 3)
        usual = (channels, *IMAGENET_SHAPE[1:]) if task == "classify" else (channels, SIZE, SIZE)
        scale = ((0.0,) * channels, (1.0,) * channels)  # pixels from 0 to 1, as they are
        return Built(model, torch.zeros(1, *(self.shape or usual)), scale, assumed="" if self.shape else USUAL)

    def fill_(self, model: nn.Module, file: str | Path) -> None:
        try:
            super().fill_(model, file)
        except FileDamagedError as cause:
            if Path(file).suffix != ".pt":
                raise
            raise FileDamagedError(cause.asked, found=cause.found, where=cause.where, do=SAVE) from cause

    def _package(self) -> tuple[Any, Path]:
        """The package's builders, and the folder of its yaml files."""
        try:
            with alone():
                import ultralytics
                from ultralytics.nn import tasks
        except ImportError as cause:
            raise MissingExtraError(
                "ultralytics: models need ultralytics",
                found=str(cause),
                do="pip install ultralytics (its licence is AGPL-3.0; niwaki brings none of it)",
            ) from cause
        return tasks, Path(ultralytics.__file__).parent / "cfg" / "models"

    def _settings(self, folder: Path) -> dict[str, Any]:
        """What the named yaml says, with its size."""
        import yaml

        known = {path.stem: path for path in sorted(folder.rglob("*.yaml"))}
        place = Path(self.name)
        if place.suffix not in ("", ".yaml", ".yml"):
            raise InputError(
                f"model ultralytics:{self.name}",
                found=f"a file of kind {place.suffix}, where a structure is named",
                do="name the yaml (ultralytics:yolo11n.yaml) and give weights as --checkpoint; niwaki never downloads",
            )
        stem = self.name.removesuffix(place.suffix)
        parts = SIZED.fullmatch(stem)
        of_size = parts.group(1) + (parts.group(3) or "") if parts else stem
        if file := known.get(stem, known.get(of_size)):
            settings: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
            sizes = settings.get("scales") or {}
            if parts and parts.group(2) in sizes:
                return {**settings, "scale": parts.group(2), "yaml_file": f"{stem}.yaml"}
            if stem in known:
                return {**settings, "scale": next(iter(sizes), ""), "yaml_file": f"{stem}.yaml"}
        near = difflib.get_close_matches(of_size, known, n=8, cutoff=0.4)
        raise UnknownNameError(
            f"unknown ultralytics model {self.name!r}",
            found=f"{len(known)} known, nearest: {', '.join(near) or 'none is near'}",
            do="use a name of the package's cfg/models, with a letter for the size; your own yaml through a factory",
        )


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside, the package asks no network and installs nothing, and what it says goes to stderr."""
    wanted = {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
