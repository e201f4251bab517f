"""Networks of darknet, from cfg files."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import nn

from niwaki.errors import FileDamagedError, InputError
from niwaki.models import Built, ModelSource
from niwaki.models.darknet_cfg import parse, unused
from niwaki.models.darknet_detector import DarknetDetector
from niwaki.models.darknet_files import load_weights_
from niwaki.models.darknet_net import Darknet as Network
from niwaki.models.darknet_net import heads_of
from niwaki.tasks.framing import Fit

log = logging.getLogger(__name__)


@final
@dataclass(frozen=True)
class Darknet(ModelSource):
    """`darknet:FILE.cfg`, untrained; darknet's own `.weights` are read as a checkpoint. Takes no arguments.

    Source: the format of cfg and weights files as https://github.com/AlexeyAB/darknet reads them.

    Raises:
        InputError: no such file, arguments, or a layer or setting that is not known.
        FileDamagedError: a file that is no cfg; weights shorter or longer than the network.
    """

    def build(self, *, stored: bool) -> Built:
        path = Path(self.name).expanduser()
        if self.arguments:
            found, do = ", ".join(sorted(self.arguments)), "change the cfg"
            raise InputError(f"arguments of darknet:{self.name}", found=found, do=do)
        if not path.is_file():
            raise InputError(f"model darknet:{self.name}", found="no such file", where=str(path), do="name a .cfg file")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as cause:
            do = "give darknet's text file of layers"
            raise FileDamagedError("read a darknet cfg", found=str(cause), where=str(path), do=do) from cause
        model = Network(parse(text, str(path))).eval()
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
            log.warning("%s: read and not used: %s%s", path, ", ".join(listed), clip)
        return Built(model, torch.zeros(1, channels, rows, columns), plain, detector=detector)

    def fill_(self, model: nn.Module, file: str | Path) -> None:
        if Path(file).suffix == ".weights":
            load_weights_(model, file)
        else:
            super().fill_(model, file)
