"""What goes on in a forward that no longer does what was traced: it is followed to see whether it fails by itself."""

import sys
from collections import Counter
from collections.abc import Sequence
from types import FrameType
from typing import Any

from torch import Tensor, nn

from niwaki.graph.constants import computed, countable, memory_of, tensors_of
from niwaki.graph.kernels import Kernels
from niwaki.graph.recorder import Record
from niwaki.graph.skeleton import is_parameter
from niwaki.surgery.evidence import Sizes

CALLS = nn.Module._wrapped_call_impl.__code__
"""What runs where a module is called."""


class Astray:
    """Makes calls on stand-ins, and computes along what they make of the model's own constants.

    The full check makes the same calls and knows the same numbers, so where this forward fails, it fails there too.
    """

    def __init__(self, kernels: Kernels, real: dict[int, Tensor]) -> None:
        self.kernels = kernels
        self.real = real
        """Stand-ins by their ids, and the model's tensors that they stand for."""
        self.held: dict[int, tuple[Tensor, Tensor]] = {}
        """Tensors by their ids, and what they hold."""
        self.written: set[int] = set()
        """Memory that was written to."""

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = self.kernels(func, args, kwargs)
        known: list[Tensor] = []
        for tensor in (*tensors_of(args), *tensors_of(list(kwargs.values()))):
            numbers = self.of(tensor)
            if numbers is None:
                return result
            known.append(numbers)
        outputs = tensors_of(result)
        found = computed(func.overloadpacket.__name__, func, args, kwargs, outputs, known) if outputs else None
        self.held.update({id(tensor): (tensor, numbers) for tensor, numbers in zip(outputs, found or (), strict=False)})
        return result

    def write(self, tensors: list[Tensor]) -> None:
        """What these and all views of them hold is not known any more."""
        self.written.update(map(memory_of, tensors))

    def is_written(self, tensor: Tensor) -> bool:
        """Whether something was written where a tensor lies."""
        return memory_of(tensor) in self.written

    def of(self, tensor: Tensor) -> Tensor | None:
        """What a tensor holds, where that is known."""
        if self.is_written(tensor):
            return None
        if id(tensor) in self.held:
            return self.held[id(tensor)][1]
        real = self.real.get(id(tensor), tensor)
        return None if real.is_meta or is_parameter(real) or not countable(real) else real.detach().cpu()


class Tally:
    """Counts what a forward that strayed still does as it was traced: in each module the calls up to the first that is
    another one or gives another shape."""

    def __init__(self, records: Sequence[Record], sizes: Sizes, modules: Sequence[tuple[str, nn.Module]]) -> None:
        self.records = records
        self.sizes = sizes
        self.modules = modules
        self.agreed = 0
        self.off: set[str] = set()
        """Modules that made a call that is not."""

    def begin(self, done: int, off: str | None = None) -> None:
        """So many calls were the traced ones; the next was not, of the module `off` if that is known."""
        self.paths = {id(module): path for path, module in self.modules}
        self.made = Counter(record.module for record in self.records[:done])
        self.expected: dict[str, list[Record]] = {}
        for record in self.records:
            self.expected.setdefault(record.module, []).append(record)
        if off is not None:
            self.off.add(off)

    def __call__(self, func: Any, result: Any) -> None:
        path = self.running()
        if path in self.off:
            return
        listed, place = self.expected.get(path, ()), self.made[path]
        if place < len(listed) and listed[place].func is func:
            pairs = zip(listed[place].outputs, tensors_of(result), strict=False)
            if all(self.sizes.of(value) == tensor.shape for value, tensor in pairs):
                self.made[path] += 1
                self.agreed += 1
                return
        self.off.add(path)

    def running(self) -> str:
        """The module that makes the call at hand, by Python's frames: nobody noted the calls of modules so far."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame.f_code is CALLS:
                return self.paths.get(id(frame.f_locals["self"]), "")
            frame = frame.f_back
        return ""


def calling(error: Exception) -> list[int]:
    """The ids of the modules whose calls an error passed through, the outermost first; with those of the error that it
    took the place of, if that passed through any."""
    found = []
    for raised in (error, error.__context__):
        trace = None if raised is None else raised.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code is CALLS:
                found.append(id(trace.tb_frame.f_locals["self"]))
            trace = trace.tb_next
    return found
