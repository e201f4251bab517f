"""The cfg files of darknet: sections with options, one for each layer."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import final

from niwaki.errors import FileDamagedError, InputError

NAMES = {
    "network": "net",
    "conv": "convolutional",
    "max": "maxpool",
    "avg": "avgpool",
}
"""Other names of layers."""
READ = {
    "net": "width height channels letter_box",
    "convolutional": "filters size groups stride stride_x stride_y dilation pad padding batch_normalize activation "
    "binary xnor antialiasing share_index deform sway rotate stretch",
    "route": "layers groups group_id",
    "shortcut": "from activation weights_type",
    "sam": "from activation",
    "scale_channels": "from activation scale_wh",
    "maxpool": "size stride stride_x stride_y padding maxpool_depth antialiasing",
    "upsample": "stride scale",
    "dropout": "probability",
    "yolo": "mask anchors classes scale_x_y new_coords iou_loss iou_normalizer obj_normalizer cls_normalizer "
    "ignore_thresh iou_thresh label_smooth_eps",
}
"""What layers are built and trained by."""
ELSEWHERE = {
    "net": "batch subdivisions momentum decay angle saturation exposure hue flip jitter blur mosaic mosaic_bound mixup "
    "cutmix learning_rate burn_in max_batches policy power steps scales step gamma adam B1 B2 eps max_crop min_crop "
    "aspect dynamic_minibatch optimized_memory workspace_size_limit_MB ema_alpha",
    "yolo": "num jitter resize random beta_nms max show_details",
}
"""What training and reading settle here: batches, rates, changed pictures, suppression."""
NEUTRAL = {"truth_thresh": "1", "iou_thresh_kind": "iou", "nms_kind": "greedynms", "yolo_point": "center"}
"""Other values than 0 that change nothing."""


@final
@dataclass(frozen=True)
class Section:
    """One layer of a cfg."""

    kind: str
    options: dict[str, str]
    line: int
    """Where it begins in the file."""
    where: str = field(default="", compare=False)

    def refused(self, found: str, do: str) -> InputError:
        return InputError(f"build [{self.kind}]", found=found, where=f"{self.where}:{self.line}", do=do)

    def number(self, name: str, default: int) -> int:
        return int(self._of(name, default, int))

    def real(self, name: str, default: float) -> float:
        return float(self._of(name, default, float))

    def numbers(self, name: str) -> tuple[int, ...]:
        """A list of whole numbers, separated by commas; empty where there is none."""
        try:
            return tuple(int(float(item)) for item in self.options.get(name, "").split(",") if item.strip())
        except ValueError as cause:
            raise self._no_number(name) from cause

    def _of(self, name: str, default: float, kind: Callable[[str], float]) -> float:
        try:
            return kind(self.options[name]) if name in self.options else default
        except ValueError as cause:
            raise self._no_number(name) from cause

    def _no_number(self, name: str) -> InputError:
        return self.refused(f"{name}={self.options[name]}", "write a number")


def with_classes(sections: tuple[Section, ...], classes: int) -> tuple[Section, ...]:
    """The same network for another number of classes: so many in each [yolo], and the filters that each of them reads.

    Raises:
        InputError: no [yolo] section, or one after something else than a convolution.
    """
    if all(section.kind != "yolo" for section in sections):
        do = "leave classes out: the filters of the last layer say them"
        raise sections[0].refused("no [yolo] section that tells classes apart", do)
    changed = list(sections)
    for at, section in enumerate(sections):
        if section.kind != "yolo":
            continue
        if sections[at - 1].kind != "convolutional":
            do = "put the convolution with boxes * (5 + classes) filters before it"
            raise section.refused(f"a [{sections[at - 1].kind}] before it", do)
        boxes = len(section.numbers("mask")) or section.options.get("anchors", "").count(",") // 2 + 1
        filters = str(boxes * (5 + classes))
        changed[at] = replace(section, options={**section.options, "classes": str(classes)})
        changed[at - 1] = replace(sections[at - 1], options={**sections[at - 1].options, "filters": filters})
    return tuple(changed)


def unused(sections: tuple[Section, ...]) -> dict[str, list[int]]:
    """Settings that would change how the network computes or learns, and don't here -> the lines of their sections."""
    found: dict[str, list[int]] = {}
    for section in sections:
        known = f"{READ.get(section.kind, '')} {ELSEWHERE.get(section.kind, '')}".split()
        for name, value in section.options.items():
            if name not in known and value not in ("0", "0.0", NEUTRAL.get(name), f"{NEUTRAL.get(name)}.0"):
                found.setdefault(f"[{section.kind}] {name}={value}", []).append(section.line)
    return found


def parse(text: str, where: str) -> tuple[Section, ...]:
    """The sections of a cfg; the first is [net].

    Raises:
        FileDamagedError: a line that is neither a section, nor name=value, nor a comment, or no [net] at the start.
    """

    def damaged(line: int, found: str) -> FileDamagedError:
        do = "give a cfg as darknet reads it: [net] first, then a section a layer with name=value lines"
        return FileDamagedError("read a darknet cfg", found=found, where=f"{where}:{line}", do=do)

    sections: list[Section] = []
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.partition("#")[0].partition(";")[0].strip()
        if not line:
            continue
        if line.startswith("["):
            if not line.endswith("]") or len(line) < 3:
                raise damaged(number, f"{raw.strip()[:60]!r}")
            kind = line[1:-1].strip().lower()
            sections.append(Section(NAMES.get(kind, kind), {}, number, where))
            continue
        name, equals, value = line.partition("=")
        if not equals or not sections:
            raise damaged(number, f"{raw.strip()[:60]!r}")
        sections[-1].options[name.strip()] = value.strip()
    if not sections or sections[0].kind != "net":
        raise damaged(1, f"[{sections[0].kind}] first" if sections else "no section")
    if len(sections) == 1:
        raise damaged(sections[0].line, "a [net] without layers")
    return tuple(sections)
