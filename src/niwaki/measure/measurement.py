"""A number that carries what it means, and the abstract meter that gives one."""

import platform
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, final

import torch
from torch import Tensor, nn

from niwaki.errors import InputError


def versions() -> dict[str, str]:
    """Versions of what a measurement rests on."""
    try:
        own = version("niwaki")
    except PackageNotFoundError:  # run from a source tree that was never installed
        own = "source"
    return {"niwaki": own, "torch": str(torch.__version__), "python": platform.python_version()}


@final
@dataclass(frozen=True)
class Measurement:
    """One measured number: what it is, its unit, how far it spreads, where it was taken and what it leaves out.

    Examples:
        >>> str(Measurement("params", 12.0, "parameters", "elements of all parameters"))
        'params 12 parameters'
    """

    name: str
    """What was measured; the key in reports."""
    value: float
    """The number, in `unit`."""
    unit: str
    """Unit of `value` and `spread`."""
    definition: str = field(repr=False)
    """One sentence that lets a stranger measure the same."""
    spread: float | None = None
    """How far repeated measurements lie apart (the definition says in which sense); None where nothing was repeated."""
    device: str = field(default="cpu", repr=False)
    """Where it was measured."""
    versions: dict[str, str] = field(default_factory=versions, repr=False)
    """Versions of the software it rests on."""
    uncounted: tuple[str, ...] = ()
    """What was seen and not counted."""

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values; `uncounted` as a list."""
        return {**asdict(self), "uncounted": list(self.uncounted)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Measurement":
        """The measurement that `to_json` wrote.

        Raises:
            InputError: a field is missing, unknown or of another type.
        """
        try:
            made = cls(**{**data, "uncounted": tuple(data.get("uncounted", ()))})
            float(made.value)
            return made
        except (TypeError, ValueError, AttributeError) as error:
            raise InputError("a measurement from JSON", found=str(error), do="use the output of to_json()") from error

    def __str__(self) -> str:
        number = f"{self.value:,.0f}" if float(self.value).is_integer() else f"{self.value:.4g}"
        spread = "" if self.spread is None else f" ± {self.spread:.2g}"
        return f"{self.name} {number}{spread} {self.unit}"


class Meter(ABC):
    """Measures one thing about a model on one example, and leaves the model as it was."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Name of the measurement; no two meters of one `measure` call may share it."""

    @abstractmethod
    def __call__(self, model: nn.Module, example: Any) -> Measurement:
        """Measure `model` called on `example`."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, `model` is in evaluation mode without gradients; afterwards modes and random state are as before."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.random.fork_rng(), torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def device_name(device: torch.device) -> str:
    """The device in words: its torch name and, where the system tells, the product's."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type != "cpu":
        return str(device)
    product = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            product = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration, IndexError):
        pass
    return f"cpu ({product})"


def storage_of(tensor: Tensor) -> int:
    """Identity of the memory behind `tensor`, also where it has no address (meta tensors)."""
    return tensor.untyped_storage()._cdata
