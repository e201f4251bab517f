"""What goes on in a forward that no longer does what was traced: it is followed to see whether it fails by itself."""

from typing import Any

from torch import Tensor, nn

from niwaki.graph.constants import computed, countable, memory_of, tensors_of
from niwaki.graph.kernels import Kernels
from niwaki.graph.skeleton import is_parameter


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


def calling(error: Exception) -> list[int]:
    """The ids of the modules whose calls an error passed through, the outermost first; with those of the error that it
    took the place of, if that passed through any."""
    found = []
    for raised in (error, error.__context__):
        trace = None if raised is None else raised.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code is nn.Module._wrapped_call_impl.__code__:
                found.append(id(trace.tb_frame.f_locals["self"]))
            trace = trace.tb_next
    return found
