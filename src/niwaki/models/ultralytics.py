"""Networks of ultralytics: by the name of a yaml file that comes with the package, or as it saved them."""

import contextlib
import difflib
import logging
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from niwaki.errors import FileDamagedError, InputError, MissingExtraError, UnknownNameError
from niwaki.models import IMAGENET_SHAPE, USUAL, Built, ModelSource, call_builder, refuse_downloads
from niwaki.models.ultralytics_detector import UltralyticsDetector, pattern_of
from niwaki.models.ultralytics_file import damaged, read_pickled, refuse_unsafe
from niwaki.units import Needed

SIZE = 320  # a multiple of every stride, and a quarter of the work of the usual 640
LARGEST = 4096  # pixels; what a file says beyond that is no size of pictures
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
COUNTED = "protected by ultralytics: bins of distance, all of which its decoding and loss count on"
GAINS = ("box", "cls", "dfl")  # of the losses, among the settings that a network was trained with


@final
@dataclass(frozen=True)
class Ultralytics(ModelSource):
    """`ultralytics:NAME`, untrained, from the package's own yaml of that name (`ultralytics:yolo11s-seg.yaml?nc=3`), or
    `ultralytics:FILE.pt`, a network that the package saved.

    Sizes are letters as in the package's own names. A file's pickle is not executed: its structure, names and tensors
    are read, and the same network is built again. The head is set to `export`: decoded predictions are all it puts
    out while evaluating, so that the features it has read can be cut.

    Raises:
        UnknownNameError: no yaml of that name in the package; the nearest are listed.
        InputError: no such file, arguments that do not fit, networks that read texts too, a file whose widths are not
            those of its own structure.
        FileDamagedError: a file that holds no network of the package, or would run what is no layer.
        MissingExtraError: ultralytics is not installed.
    """

    runs: ClassVar[bool] = True
    """The package looks for the strides of a network by running it."""
    counting: ClassVar[str] = "nc"

    def build(self, *, stored: bool) -> Built:
        tasks, folder = package()
        refuse_downloads(self)
        file = Path(self.name).expanduser() if self.name.endswith(".pt") else None
        pickled = None if file is None else read_pickled(file)
        settings = self._settings(folder) if pickled is None else pickled.yaml
        if pickled is not None:
            refuse_unsafe(settings, tasks, Path(self.name))
        head = settings["head"][-1][2]
        if head.startswith(("World", "YOLOE")):
            do = "build it in a factory of yours that returns (model, example)"
            raise InputError(f"model ultralytics:{self.name}", found=f"a head that reads texts too ({head})", do=do)
        task = tasks.guess_model_task(settings)
        kind = "RTDETRDetectionModel" if head.startswith("RTDETR") else CLASSES[task]
        channels = self.arguments.get("ch", settings.get("channels", 3))
        given = {} if "ch" in self.arguments else {"ch": channels}
        try:
            model = call_builder(self, getattr(tasks, kind), cfg=settings, verbose=False, **given).eval()
        except (TypeError, ValueError, LookupError, AttributeError, RuntimeError, ArithmeticError) as cause:
            if pickled is None or isinstance(cause, InputError):
                raise
            found = f"a structure that cannot be built ({type(cause).__name__}: {cause})"
            raise damaged(Path(self.name), found) from cause
        for module in model.modules():
            if hasattr(type(module), "export"):
                module.export = True
        size, assumed = SIZE, USUAL
        drawn: tuple[str, ...] = ()
        if pickled is not None:
            trained_on = pickled.settings.get("imgsz")
            if type(trained_on) is int and 0 < trained_on <= LARGEST:
                size, assumed = trained_on, ""
            if len(pickled.names) == getattr(model.model[-1], "nc", None):
                model.names = pickled.names
            if stored:
                drawn = self.fit_(model, pickled.state, where=self.name)
        detector = None
        if kind == "DetectionModel":
            model.args = default_settings(pickled.settings if pickled is not None else {})
            detector = UltralyticsDetector(model.model[-1].nc, pattern_of(model))
        usual = (channels, *IMAGENET_SHAPE[1:]) if task == "classify" else (channels, size, size)
        return Built(
            model,
            torch.zeros(1, *(self.shape or usual)),
            ((0.0,) * channels, (1.0,) * channels),  # pixels from 0 to 1, as they are
            stored=stored and pickled is not None,
            assumed="" if self.shape else assumed,
            detector=detector,
            protect=bins_of_distance(model),
            drawn=drawn,
        )

    def alike(self) -> nn.Module:
        """As `build` makes it; the package says nothing of it."""
        package()  # which sets its own level when it is imported
        said = logging.getLogger("ultralytics")
        before = said.level
        said.setLevel(logging.ERROR)
        try:
            return super().alike()
        finally:
            said.setLevel(before)

    def read(self, model: nn.Module, file: str | Path) -> dict[str, Tensor]:
        try:
            return super().read(model, file)
        except FileDamagedError:
            if Path(file).suffix != ".pt":
                raise
            return read_pickled(file).state

    def advice(self, model: nn.Module, state: dict[str, Tensor]) -> str:
        if any(".bn." in name for name in model.state_dict()) and not any(".bn." in name for name in state):
            return "save it before the package fuses it (after val, predict and export it is)"
        if Path(self.name).suffix != ".pt":
            of_yaml = "give the yaml of these weights, with their size and task (yolov8s-seg)"
            return f"{of_yaml}, or open the file itself: ultralytics:FILE.pt"
        return "widths that are not those of its structure were cut: open the run that cut it, or a factory"

    def _settings(self, folder: Path) -> dict[str, Any]:
        """What the named yaml says, with its size."""
        import yaml

        known = {path.stem: path for path in sorted(folder.rglob("*.yaml"))}
        place = Path(self.name)
        if place.suffix not in ("", ".yaml", ".yml"):
            raise InputError(
                f"model ultralytics:{self.name}",
                found=f"a file of kind {place.suffix}",
                do="name a yaml of the package (ultralytics:yolo11n.yaml) or a .pt that it saved",
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


def package() -> tuple[Any, Path]:
    """The package's builders, and the folder of its yaml files.

    Raises:
        MissingExtraError: ultralytics is not installed.
    """
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


def default_settings(trained_with: dict[str, Any]) -> Any:
    """The package's own, with the gains of the losses that a network was trained with."""
    from ultralytics.cfg import get_cfg

    gains = {name: trained_with[name] for name in GAINS if isinstance(trained_with.get(name), (int, float))}
    return get_cfg(overrides=gains)


def bins_of_distance(model: nn.Module) -> tuple[str, ...]:
    """The convolutions whose channels are bins of distance: the decoding and the loss count on all of them."""
    head = f"model.{len(model.model) - 1}"  # type: ignore[arg-type]  # a Sequential
    parts = dict(model.named_modules())
    if not isinstance(getattr(parts[head], "dfl", None), nn.Module) or isinstance(parts[f"{head}.dfl"], nn.Identity):
        return ()
    branches = [name for name in ("cv2", "one2one_cv2") if f"{head}.{name}" in parts]
    return tuple(
        Needed(f"{head}.{name}.{i}.{len(branch) - 1}", COUNTED)
        for name in branches
        for i, branch in enumerate(parts[f"{head}.{name}"])  # type: ignore[arg-type]
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
