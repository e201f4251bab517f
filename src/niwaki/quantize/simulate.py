"""The network on its grids, computed in floating point: what the integer network is checked against."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import nn

from niwaki.errors import InputError
from niwaki.quantize.quantised import Quantised
from niwaki.quantize.range_table import Grid, Ranges
from niwaki.units import need_module


@final
class Simulated(nn.Module):
    """A network whose layers are given activations on their grids. Simulated: nothing is smaller or faster."""

    def __init__(self, network: nn.Module, inputs: Mapping[str, Grid], outputs: Mapping[str, Grid]) -> None:
        super().__init__()
        self.network = network
        """The copy, its weights on their grids."""
        self.inputs = dict(inputs)
        """Module path -> grid of its input."""
        self.outputs = dict(outputs)
        """Module path -> grid of its output, where others than layers read it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._on_grids():
            return self.network(*args, **kwargs)

    @contextmanager
    def _on_grids(self) -> Iterator[None]:
        modules, handles = dict(self.network.named_modules()), []

        def before(grid: Grid) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                if args:
                    return (grid.rounded(args[0]), *args[1:]), kwargs
                return args, {**kwargs, "input": grid.rounded(kwargs["input"])}

            return hook

        def after(grid: Grid) -> Any:
            return lambda module, args, output: grid.rounded(output)

        try:
            for path, grid in self.inputs.items():
                handles.append(modules[path].register_forward_pre_hook(before(grid), with_kwargs=True))
            for path, grid in self.outputs.items():
                handles.append(modules[path].register_forward_hook(after(grid)))
            yield
        finally:
            for handle in handles:
                handle.remove()


def simulated(
    model: nn.Module, weights: Mapping[str, Quantised], activations: Ranges | None = None, *, bits: int = 8
) -> Simulated:
    """A copy of `model` in evaluation mode with these weights, and activations rounded where layers read them.

    Without `activations` only the weights are on a grid. Layers whose input has no range get it as it is.

    Args:
        weights: by their names in the state dict ("features.0.weight"); others stay as they are.
        bits: of activations, asymmetric with an exact 0; 8 is what integer kernels take.

    Raises:
        InputError: a name that is no parameter of the model, another shape, a path that is no module, or a width of
            activations that is not 2 to 8.
    """
    need_module(model, "simulate a quantised network")
    if isinstance(bits, bool) or bits not in range(2, 9):
        raise InputError(f"activations of {bits!r} bits", found="not a width of 2 to 8", do="give 2 to 8")
    network = copy.deepcopy(model).eval()
    parameters = dict(network.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, one in weights.items():
            found = tuple(parameters[name].shape) if name in parameters else "no parameter of that name"
            if found != tuple(one.shape):
                raise InputError(
                    f"simulate {name} {tuple(one.shape)}", found=str(found), do="give the model that was quantised"
                )
            parameters[name].copy_(one.values())
    ranges = activations if activations is not None else Ranges({})
    modules = dict(network.named_modules())
    unknown = [path for path in (*ranges.inputs, *ranges.outputs) if path not in modules]
    if unknown:
        raise InputError(
            f"activations at {unknown[0]}", found="no module of that path", do="find the ranges of this model"
        )
    return Simulated(
        network,
        {path: Grid.of(span, bits) for path, span in ranges.inputs.items()},
        {path: Grid.of(span, bits) for path, span in ranges.outputs.items()},
    ).eval()
