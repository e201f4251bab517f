"""How detectors of ultralytics are trained and read: by the package's own loss and decoding."""

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from niwaki.boxes import Boxes, Found
from niwaki.distill import HeadOutputs
from niwaki.errors import InputError
from niwaki.models.suppression import box_operations, suppressed
from niwaki.models.targets import refuse_targets
from niwaki.tasks.framing import Fit
from niwaki.units import tensors_in

WRAPPED = ("module", "_orig_mod")  # by data-parallel wrappers and by torch.compile
CALLED = {"cls": "class"}
BINS = "dfl.conv.weight"  # of every head but those of 26


@final
@dataclass(frozen=True)
class UltralyticsDetector:
    """YOLOv5u, v8, v9, v10, 11, 12, 26 and all else that ends in the package's `Detect`.

    `losses` calls the loss that the network names (`init_criterion`), with the gains in its `args`, anew for each
    batch: what a loss of two heads (v10, 26) shifts from one to the other as epochs go by stays where it starts.
    """

    classes: int
    """Of the head."""
    pattern: Any = field(default=None, compare=False, repr=False)
    """A network without layers (see `pattern_of`), whose loss serves what `torch.export` wrote when it cut."""

    @property
    def fit(self) -> Fit:
        return "letterbox"

    def losses(self, model: nn.Module, pictures: Tensor, targets: Sequence[Boxes]) -> dict[str, Tensor]:
        """`box`, `class` and `dfl` (26: `l1`) of `[batch, 3, rows, columns]` pictures from 0 to 1, with their gains.

        A network that `torch.export` wrote takes the loss while training only: in evaluation it has no raw outputs.

        Raises:
            InputError: another network, labels out of range, or as many targets as pictures are not there.
        """
        network = self._network(model)
        batch = _batch(targets, pictures, self.classes)
        with _raw(network.model[-1]):
            predictions = model(pictures)
        if not isinstance(predictions, (dict, tuple)):
            found = "decoded boxes, where the loss reads what was not decoded yet"
            raise InputError("the loss of a detector of ultralytics", found=found, do="call model.train() first")
        with _arguments(network):
            weighted, told = network.init_criterion()(predictions, {"img": pictures, **batch})
        if weighted.dim() == 0:  # of packages that give the sum alone
            return {"detection": weighted / len(pictures)}
        names = list(told) if isinstance(told, Mapping) else ["box_loss", "cls_loss", "dfl_loss"]
        short = [name.removesuffix("_loss") for name in names]
        return {CALLED.get(name, name): part / len(pictures) for name, part in zip(short, weighted, strict=True)}

    @torch.no_grad()
    def found(self, model: nn.Module, pictures: Tensor, *, confidence: float, overlap: float, most: int) -> list[Found]:
        """Boxes as the head decodes them, each class that is at least `confidence` a box of its own."""
        with _evaluating(model):
            decoded = tensors_in(model(pictures))[0]  # [batch, 4 + classes, boxes]
        if decoded.dim() != 3 or decoded.shape[1] != 4 + self.classes:
            found = f"an output {tuple(decoded.shape)}, where boxes are [batch, 4 + {self.classes}, boxes]"
            do = "set its end2end to False, where it has one"
            raise InputError("read a detector of ultralytics", found=found, do=do)
        convert, size = box_operations().box_convert, (pictures.shape[2], pictures.shape[3])
        return [
            suppressed(
                convert(one[:, :4], "cxcywh", "xyxy"),
                one[:, 4:],
                size,
                confidence=confidence,
                overlap=overlap,
                most=most,
            )
            for one in decoded.float().transpose(1, 2)
        ]

    def head_places(self, model: nn.Module) -> tuple[str, ...]:
        """The convolutions that put out distances, then those that put out classes, of the branch for many boxes.

        Raises:
            InputError: a network without them, as one that was cut by `torch.export`.
        """
        layers = getattr(model, "model", None)
        head = layers[-1] if isinstance(layers, nn.Sequential) else None
        branches = [getattr(head, name, None) for name in ("cv2", "cv3")]
        if not isinstance(layers, nn.Sequential) or not all(isinstance(one, nn.ModuleList) for one in branches):
            found, do = f"a {type(model).__name__} without the package's head", "give a network of ultralytics:NAME"
            raise InputError("the heads of a detector of ultralytics", found=found, do=do)
        at = f"model.{len(layers) - 1}"
        return tuple(f"{at}.{name}.{i}" for name in ("cv2", "cv3") for i in range(len(head.cv2)))  # type: ignore[union-attr, arg-type]

    def head_outputs(self, features: Sequence[Tensor], size: tuple[int, int]) -> list[HeadOutputs]:
        """ "Nothing" and classes; distances of the four sides from the cell's centre, in cells."""
        half = len(features) // 2
        found = []
        for distances, logits in zip(features[:half], features[half:], strict=True):
            far = distances.flatten(2).unflatten(1, (4, -1))  # [batch, 4, bins, n]
            bins = torch.arange(far.shape[2], device=far.device, dtype=far.dtype).view(1, 1, -1, 1)
            sides = (far.softmax(2) * bins).sum(2) if far.shape[2] > 1 else far.squeeze(2)
            scores = functional.pad(logits.flatten(2).transpose(1, 2), (1, 0))  # [batch, n, 1 + classes]
            found.append(HeadOutputs(scores, sides.transpose(1, 2)))
        return found

    def matched(self, features: Sequence[Tensor], targets: Sequence[Boxes], size: tuple[int, int]) -> list[Tensor]:
        """The cells whose centre lies in a thing all sides of which are within reach of the bins."""
        refuse_targets(targets, pictures=len(features[0]), classes=self.classes)
        found = []
        for distances in features[: len(features) // 2]:
            h, w = distances.shape[-2:]
            cell = distances.new_tensor((size[1] / w, size[0] / h)).float()
            rows, columns = torch.meshgrid(torch.arange(h).to(cell), torch.arange(w).to(cell), indexing="ij")
            centres = torch.stack((columns, rows), -1).flatten(0, 1) + 0.5  # [n, 2] in cells
            reach = distances.shape[1] // 4 - 1 or float("inf")
            mine = torch.zeros(len(distances), h * w, dtype=torch.bool, device=distances.device)
            for number, boxes in enumerate(targets):
                first, last = (boxes.corners.to(cell) / cell.repeat(2)).split(2, 1)
                sides = torch.cat((centres[:, None] - first, last - centres[:, None]), 2)  # [n, things, 4]
                mine[number] = ((sides > 0) & (sides < reach)).all(2).any(1)
            found.append(mine)
        return found

    def _network(self, model: nn.Module) -> Any:
        """The package's network inside wrappers, or the pattern with the parameters of this one."""
        if any(
            not weight.flatten().equal(torch.arange(weight.numel()).to(weight))
            for name, weight in model.named_parameters()
            if name.endswith(BINS)
        ):
            found = "a head without some of its bins of distance, which the loss counts on"
            do = "cut it again with protect=loaded.protect"
            raise InputError("a detector of ultralytics", found=found, do=do)
        network: Any = model
        while not hasattr(network, "init_criterion"):
            inside = next((getattr(network, name) for name in WRAPPED if hasattr(network, name)), None)
            if inside is not None:
                network = inside
            elif self.pattern is not None and all(name.startswith("model.") for name, _ in network.named_parameters()):
                given, network = network, copy.copy(self.pattern)
                network.__dict__["parameters"] = given.parameters  # where the loss asks for the device
            else:
                found = f"a {type(model).__name__}, which has no loss of the package"
                raise InputError("a detector of ultralytics", found=found, do="give a network of ultralytics:NAME")
        classes = getattr(network.model[-1], "nc", None)
        if classes != self.classes:
            found = f"a head of {classes or 'no'} classes, where {self.classes} are meant"
            raise InputError("a detector of ultralytics", found=found, do="give the detector of this network")
        return network


def pattern_of(network: Any) -> Any:
    """`network` without its layers and tensors: what the package's loss asks of it besides what it puts out."""
    head, bare = copy.copy(network.model[-1]), copy.copy(network)
    for module in (head, bare):
        module.__dict__.update(_parameters={}, _buffers={}, _modules={})
    bare._modules["model"] = [head]
    return bare


def _batch(targets: Sequence[Boxes], pictures: Tensor, classes: int) -> dict[str, Tensor]:
    """Boxes as the package's loss reads them: centre, width and height as shares of the picture."""
    refuse_targets(targets, pictures=len(pictures), classes=classes)
    corners = torch.cat([t.corners.to(pictures.device).float() for t in targets])
    shares = corners / corners.new_tensor([pictures.shape[3], pictures.shape[2]] * 2)
    first, last = shares[:, :2], shares[:, 2:]
    return {
        "batch_idx": torch.cat([corners.new_full((len(t),), i) for i, t in enumerate(targets)]),
        "cls": torch.cat([t.labels.to(corners) for t in targets]).view(-1, 1),
        "bboxes": torch.cat(((first + last) / 2, last - first), 1),
    }


@contextlib.contextmanager
def _raw(head: Any) -> Iterator[None]:
    """Inside, the head gives what the loss reads while evaluating, too."""
    before = vars(head).get("export")
    head.export = False
    try:
        yield
    finally:
        if before is None:
            del head.export
        else:
            head.export = before


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    before = [module for module in model.modules() if module.training]
    for module in before:
        module.training = False
    try:
        yield
    finally:
        for module in before:
            module.training = True


@contextlib.contextmanager
def _arguments(network: Any) -> Iterator[None]:
    """Inside, the network has settings with the gains of its losses: its own, or the package's defaults."""
    there, own = "args" in vars(network), vars(network).get("args")
    if own is not None and not isinstance(own, dict):
        yield
        return
    from ultralytics.cfg import get_cfg

    network.args = get_cfg(overrides={k: own[k] for k in ("box", "cls", "dfl") if k in own} if own else {})
    try:
        yield
    finally:
        if there:
            network.args = own
        else:
            del network.args
