"""Exports of one model, several formats in a row: what `niwaki export` and `niwaki compress --export` share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from niwaki.cli.listing import split
from niwaki.cli.options import EXPORTS
from niwaki.cli.talk import say
from niwaki.errors import NiwakiError, UnknownNameError

FILES = {
    "onnx": "model.onnx",
    "openvino": "model.xml",
    "pt2": "model.pt2",
    "tensorrt": "model.engine",
    "executorch": "model.pte",
    "int8": "model.int8.onnx",
}
BESIDE = {"onnx": ("model.onnx.data",), "openvino": ("model.bin",)}
"""Where weights go that are not in the file itself: always, or above 2 GiB."""


def in_the_way(names: Sequence[str], folder: Path) -> list[str]:
    """Files that exports of these names would replace."""
    return [file for name in names for file in (FILES[name], *BESIDE.get(name, ())) if (folder / file).exists()]


def wanted(items: list[str] | None) -> list[str]:
    """Names of exports, checked.

    Raises:
        UnknownNameError: a name of none; the message lists all.
    """
    names = split(items)
    for name in names:
        if name not in EXPORTS:
            raise UnknownNameError.of("export target", name, EXPORTS)
    return names


def need(names: Sequence[str]) -> None:
    """Refuse, before anything is worked out, what a missing package would refuse at the end.

    Raises:
        MissingExtraError: names the package and what installs it.
    """
    from niwaki.export import TARGETS

    for name in names:
        TARGETS.get(name, TARGETS["onnx"])().need()


@final
@dataclass(frozen=True)
class Exporting:
    """One model, and how it is exported."""

    model: Any
    example: Any
    int8: Callable[[Path], Any]
    """Writes the INT8 file and gives its measurements: it needs ranges, which the other formats do not."""
    batch: Any = None
    """"dynamic", a number, or None: dynamic where possible."""
    runs: int = 10
    threads: int | None = None
    seed: int = 0

    def __call__(self, names: Sequence[str], folder: Path) -> tuple[dict[str, Any], list[NiwakiError]]:
        """Write one export after the other: what was measured, or why there is none, by name; and the errors."""
        told: dict[str, Any] = {}
        failed: list[NiwakiError] = []
        for name in names:
            try:
                told[name] = self._one(name, folder / FILES[name])
            except NiwakiError as error:
                failed.append(error)
                told[name] = {"failed": str(error)}
                say(f"{name}: failed: {error}")
        return told, failed

    def _one(self, name: str, file: Path) -> dict[str, Any]:
        from niwaki.export import TARGETS, make_artefact, time_beside, unsupported_by_tensorrt
        from niwaki.export.artefact import on_cpu

        if name == "int8":
            taken = self.int8(file)
            model, example = on_cpu(self.model, self.example)
            timed = time_beside(TARGETS["onnx"](), file, model, example, self.runs, self.threads)
            told = {one.name: one.to_json() for one in (*taken.values(), *timed.values())}
            told |= {"file": file.name, "files": [file.name], "batch": "dynamic", "note": ""}
            say(f"int8: {file}, {taken['difference'].value:.1e} from the simulated network{_speed(told)}")
            return told
        made = make_artefact(
            self.model,
            self.example,
            file,
            target=TARGETS[name](),
            batch=self.batch,
            runs=self.runs,
            threads=self.threads,
            seed=self.seed,
        )
        told = made.to_json()
        say(f"{name}: {file}, {made.measurements['difference'].value:.1e} from PyTorch{_speed(told)}")
        if made.note:
            say(f"{name}: batch {made.batch}: {made.note}")
        if name == "onnx":
            told["tensorrt_refuses"] = unsupported_by_tensorrt(file)
            if told["tensorrt_refuses"]:
                say(f"onnx: TensorRT would refuse {', '.join(told['tensorrt_refuses'])}")
        return told


def _speed(told: dict[str, Any]) -> str:
    if "latency" not in told:
        return ""
    return f"; {told['latency']['value']:.3g} ms, PyTorch {told['pytorch_latency']['value']:.3g} ms"
