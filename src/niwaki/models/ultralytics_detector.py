"""How detectors of ultralytics are trained and read: by the package's own loss and decoding."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from niwaki.boxes import Boxes, Found
from niwaki.errors import InputError
from niwaki.models.suppression import box_operations, suppressed
from niwaki.models.targets import refuse_targets
from niwaki.units import tensors_in

WRAPPED = ("module", "_orig_mod")  # by data-parallel wrappers and by torch.compile
CALLED = {"cls": "class"}


@final
@dataclass(frozen=True)
class UltralyticsDetector:
    """YOLOv5u, v8, v9, v10, 11, 12, 26 and all else that ends in the package's `Detect`.

    `losses` calls the loss that the network names (`init_criterion`), with the gains in its `args`, anew for each
    batch: what a loss of two heads (v10, 26) shifts from one to the other as epochs go by stays where it starts.
    """

    classes: int
    """Of the head."""

    def losses(self, model: nn.Module, pictures: Tensor, targets: Sequence[Boxes]) -> dict[str, Tensor]:
        """`box`, `class` and `dfl` (26: `l1`) of `[batch, 3, rows, columns]` pictures from 0 to 1, with their gains.

        Raises:
            InputError: another network, labels out of range, or as many targets as pictures are not there.
        """
        network, head = self._network(model)
        batch = _batch(targets, pictures, self.classes)
        with _raw(head):
            predictions = model(pictures)
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
        self._network(model)
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

    def _network(self, model: nn.Module) -> tuple[Any, Any]:
        """The package's network inside wrappers, and its head."""
        network: Any = model
        while not hasattr(network, "init_criterion"):
            inside = next((getattr(network, name) for name in WRAPPED if hasattr(network, name)), None)
            if inside is None:
                found = f"a {type(model).__name__}, which has no loss of the package"
                do = "give the network itself; one that was cut by `torch.export` is only run"
                raise InputError("a detector of ultralytics", found=found, do=do)
            network = inside
        head = network.model[-1]
        if getattr(head, "nc", None) != self.classes:
            found = f"a head of {getattr(head, 'nc', 'no')} classes, where {self.classes} are meant"
            raise InputError("a detector of ultralytics", found=found, do="give the detector of this network")
        bins = getattr(getattr(head, "dfl", None), "conv", None)
        if bins is not None and not bins.weight.flatten().equal(torch.arange(len(bins.weight[0])).to(bins.weight)):
            found = "a head without some of its bins of distance, which the loss counts on"
            do = "cut it again with protect=loaded.protect"
            raise InputError("a detector of ultralytics", found=found, do=do)
        return network, head


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
