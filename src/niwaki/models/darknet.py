"""Networks of darknet, from cfg files."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from niwaki.errors import FileDamagedError, InputError
from niwaki.models import Built, ModelSource
from niwaki.models.darknet_cfg import parse, unused, with_classes
from niwaki.models.darknet_detector import DarknetDetector
from niwaki.models.darknet_files import needed_bytes, read_weights, weights_bytes
from niwaki.models.darknet_net import Darknet as Network
from niwaki.models.darknet_net import heads_of
from niwaki.tasks.framing import Fit

log = logging.getLogger(__name__)


@final
@dataclass(frozen=True)
class Darknet(ModelSource):
    """`darknet:FILE.cfg`, untrained; darknet's own `.weights` are read as a checkpoint. One argument: `classes`, in
    place of the cfg's own number; weights for the cfg's own are then taken, but for those of the heads.

    Source: the format of cfg and weights files as https://github.com/AlexeyAB/darknet reads them.

    Raises:
        InputError: no such file, other arguments, or a layer or setting that is not known.
        FileDamagedError: a file that is no cfg; weights shorter or longer than the network.
    """

    counting: ClassVar[str] = "classes"

    def build(self, *, stored: bool) -> Built:
        model = self.alike()
        channels, rows, columns = self.shape or model.shape
        if self.shape and channels != model.shape[0]:
            found = f"{channels} channels, the cfg says {model.shape[0]}"
            raise InputError(f"an input for darknet:{self.name}", found=found, do="give a shape with its channels")
        model.shape = (channels, rows, columns)
        plain = ((0.0,) * channels, (1.0,) * channels)  # pixels from 0 to 1, as they are
        heads = heads_of(model.sections)
        fit: Fit = "letterbox" if model.sections[0].number("letter_box", 0) else "squash"
        detector = DarknetDetector(heads, fit) if len({head.classes for head in heads}) == 1 else None
        if left := unused(model.sections):
            listed = (f"{name} (line{'s' * (len(at) > 1)} {', '.join(map(str, at))})" for name, at in left.items())
            clip = "; clip gradients as a whole instead (clip=10)" if any("max_delta" in name for name in left) else ""
            log.warning("%s: read and not used: %s%s", Path(self.name).expanduser(), ", ".join(listed), clip)
        return Built(model, torch.zeros(1, channels, rows, columns), plain, detector=detector)

    def alike(self) -> Network:
        path = Path(self.name).expanduser()
        if unknown := sorted(set(self.arguments) - {"classes"}):
            found, do = ", ".join(unknown), "change the cfg; classes=N is all that is taken"
            raise InputError(f"arguments of darknet:{self.name}", found=found, do=do)
        if not path.is_file():
            raise InputError(f"model darknet:{self.name}", found="no such file", where=str(path), do="name a .cfg file")
        try:
            sections = parse(path.read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as cause:
            do = "give darknet's text file of layers"
            raise FileDamagedError("read a darknet cfg", found=str(cause), where=str(path), do=do) from cause
        classes = self.arguments.get("classes")
        if "classes" in self.arguments:
            if type(classes) is not int or classes < 1:
                found, do = f"classes={classes!r}", "give a whole number from 1 on"
                raise InputError(f"model darknet:{self.name}", found=found, do=do)
            sections = with_classes(sections, classes)
        return Network(sections).eval()

    def read(self, model: nn.Module, file: str | Path) -> dict[str, Tensor]:
        """Of darknet's own files, which have no names, what the network takes up, or the cfg's own where it was built
        for another number of classes.

        Raises:
            FileDamagedError: a file of another length than that of either.
        """
        if Path(file).suffix != ".weights" or not isinstance(model, Network):
            return super().read(model, file)
        there = weights_bytes(file)
        if there != needed_bytes(model) and self.arguments:
            own = replace(self, arguments={}).alike()
            if there == needed_bytes(own):
                return read_weights(own, file)
        try:
            return read_weights(model, file)
        except FileDamagedError as cause:
            if (classes := self._classes_of(there)) is None:
                raise
            found = f"{cause.found}; {classes} classes would be as long"
            do = (
                f"give the cfg that these weights were trained with, and ?classes=N after its name (darknet:{self.name}"
            )
            raise FileDamagedError(cause.asked, found=found, where=cause.where, do=f"{do}?classes=3)") from cause

    def _classes_of(self, length: int) -> int | None:
        """For how many classes weights of so many bytes would be, if there is such a number."""
        try:
            one, two = (needed_bytes(replace(self, arguments={"classes": n}).alike()) for n in (1, 2))
        except InputError:
            return None
        classes, rest = divmod(length - one, two - one)
        return classes + 1 if not rest and classes >= 0 else None
