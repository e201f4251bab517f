"""What a network of the zoo is, and how it gets into the list."""

import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

FACTS = {
    "tokens": "the example holds token numbers, not real values",
    "attention": "heads are a grid",
    "grid": "an axis of the network is viewed as rows x columns (heads, convolution groups)",
    "recurrent": "has a fused recurrent layer",
    "shared": "one parameter has two names, or one module is called twice",
    "inexact": "has a group whose removal changes values beyond zeroing (a statistic runs across it)",
    "rigid": "nothing in it can be removed",
    "unknown": "calls an operation that the graph has no rule for",
    "inference": "cannot be differentiated",
    "data_dependent": "control flow or indices depend on the values of the input",
    "ordered": "what a unit computes depends on its place among the others",
    "integers": "keeps sizes of its axes as integers that the forward uses",
}


@dataclass(frozen=True)
class Case:
    """One tiny network: how to build it (seeded, evaluation mode), what to call it with, what is known about it."""

    name: str
    make: Callable[[], nn.Module]
    example: Callable[[], Any]
    facts: frozenset[str] = frozenset()
    free: Mapping[str, int] = field(default_factory=dict)
    """Axes ("tensor:axis") that must be removable, with the number of units of their group (0 = any)."""
    fixed: tuple[str, ...] = ()
    """Axes that must not be removable (inputs and outputs of the model, for instance)."""

    def __str__(self) -> str:
        return self.name


ZOO: list[Case] = []
Module = TypeVar("Module", bound=type[nn.Module])


def case(
    example: Callable[[], Any],
    *facts: str,
    free: Mapping[str, int] | None = None,
    fixed: Iterable[str] = (),
    prepare: bool = True,
) -> Callable[[Module], Module]:
    """Class decorator: lists a network under its class name in snake case."""
    assert set(facts) <= set(FACTS), f"unknown facts {set(facts) - set(FACTS)}"

    def register(cls: Module) -> Module:
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()
        assert name not in {known.name for known in ZOO}, f"two networks named {name}"
        seed = zlib.crc32(name.encode())

        def make() -> nn.Module:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = cls()
            return randomize_(model, seed=seed).eval() if prepare else model.eval()

        ZOO.append(Case(name, make, example, frozenset(facts), dict(free or {}), tuple(fixed)))
        return cls

    return register


def randomize_(model: nn.Module, *, seed: int) -> nn.Module:
    """Give every parameter non-zero random values, and every batch norm real running statistics, in place.

    Fresh networks have zero biases, unit scales and zero means, behind which many faults hide.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float32).to(tensor.dtype)

    def positive(tensor: Tensor) -> Tensor:
        return (0.5 + torch.rand(tensor.shape, generator=generator, dtype=torch.float32)).to(tensor.dtype)

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() <= 1:  # biases and scales alike: around one half, both signs, never zero
                sign = torch.where(normal(parameter) > -0.7, 1.0, -1.0).to(parameter.dtype)
                parameter.copy_(sign * positive(parameter) * 0.6)
            else:
                fan_in = max(parameter[0].numel(), 1)
                parameter.copy_(normal(parameter) * (1.5 / fan_in**0.5))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(normal(buffer) * 0.5)
            elif name.endswith("running_var"):
                buffer.copy_(positive(buffer))
    return model


def reals(*shape: int, seed: int = 7) -> Callable[[], Tensor]:
    """A factory of one fixed normal tensor of this shape."""
    return lambda: torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def numbers(high: int, *shape: int, seed: int = 7) -> Callable[[], Tensor]:
    """A factory of one fixed tensor of token numbers below `high`."""
    return lambda: torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))
