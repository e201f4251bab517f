"""What happened while training: in memory, as lines of JSON, and as TensorBoard files."""

import importlib.util
import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, final

from niwaki.files import write_text

log = logging.getLogger(__name__)

HISTORY, LINES = "history.json", "history.jsonl"


@final
@dataclass(frozen=True)
class History:
    """What happened: one entry per epoch, with the settings and the device.

    Examples:
        >>> History(epochs=({"epoch": 1, "loss": 0.5, "lr": 0.0, "steps": 10, "seconds": 2.0},)).losses
        [0.5]
    """

    epochs: tuple[dict[str, float], ...]
    """Per epoch: `epoch`, mean training `loss`, last learning rate `lr`, `steps`, `seconds`; `validation` where the
    metric was looked at. Of an epoch that a kill fell into, `seconds` counts from the checkpoint gone on from.
    """
    settings: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    processes: int = 1
    stopped: bool = False
    """Whether validation ended it before its last epoch."""

    @property
    def losses(self) -> list[float]:
        return [epoch["loss"] for epoch in self.epochs]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "epochs": list(self.epochs)}


@final
class Log:
    """Lines and TensorBoard files in a folder; of none, nothing is written.

    `step` is where training goes on: what an earlier run wrote beyond it is taken back.
    """

    def __init__(self, folder: Path | None, *, step: int) -> None:
        self.file = None if folder is None else folder / LINES
        self.board: Any = None
        if folder is None or self.file is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        kept = [] if step == 0 or not self.file.is_file() else _until(self.file, step)
        write_text(self.file, "".join(line + "\n" for line in kept))
        if not importlib.util.find_spec("tensorboard"):
            log.warning("no TensorBoard files: tensorboard is not installed")
            return
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, entry: dict[str, Any]) -> None:
        """A line with `step`, and its numbers on the board."""
        if self.file is None:
            return
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")
        if self.board is not None:
            kind = "train" if "epoch_loss" not in entry else "epoch"
            for name, value in entry.items():
                if name not in ("step", "epoch") and isinstance(value, (int, float)):
                    self.board.add_scalar(f"{kind}/{name}", value, int(entry["step"]))

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def _until(file: Path, step: int) -> list[str]:
    """Lines up to a step; a last one that a kill tore is none."""
    kept = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int) and entry["step"] <= step:
            kept.append(line)
    return kept
