"""What modules put out during one call of a network, heard by hooks that are gone afterwards."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from niwaki.errors import InputError, UnknownNameError
from niwaki.units import tensors_in

OUTPUT = ""
"""The path of the network itself: its output."""
SHOWN = 12
"""Known paths named in an error."""
WRAPPED = ("_orig_mod", "_fsdp_wrapped_module")
"""Under which names torch.compile and FSDP keep what they wrap."""


@final
@dataclass(eq=False)
class Heard:
    """What was heard inside a `tapped`."""

    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    """Arguments of each call of the network."""
    features: dict[str, list[Tensor]] = field(default_factory=dict)
    """Path -> the first tensor of what the module put out, for each of its calls."""

    def feature(self, path: str, whose: str) -> Tensor:
        """What the module at `path` put out.

        Raises:
            InputError: it was not called, or more than once.
        """
        found = self.features.get(path, [])
        if len(found) == 1:
            return found[0]
        said = (
            f"the {whose}'s forward calls it {len(found)} times" if found else f"the {whose}'s forward never reaches it"
        )
        raise InputError(f"tap {path or 'the output'}", found=said, do="tap a module that each forward calls once")


@contextmanager
def tapped(model: nn.Module, paths: Collection[str]) -> Iterator[Heard]:
    """Inside, calls of `model` are heard: their arguments, and what the modules at `paths` put out.

    `model` may be wrapped (DistributedDataParallel, FSDP, torch.compile); paths are those of what is wrapped. What
    torch.compile made runs uncompiled inside where more than the output is tapped, since it knows of no later hooks.

    Raises:
        UnknownNameError: the network has no such module.
    """
    heard, inner = Heard(), unwrapped(model)
    modules = {path: module_at(inner, path) for path in paths if path != OUTPUT}
    with ExitStack() as stack:
        if modules and any(_compiled(module) for module in model.modules()):
            stack.enter_context(torch.compiler.set_stance("force_eager"))

        def root(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            heard.calls.append((args, kwargs))
            if OUTPUT in paths:
                hear(OUTPUT, output, copy=False)

        def hear(path: str, output: Any, *, copy: bool) -> None:
            found = scores_of(output) if path == OUTPUT else next(iter(tensors_in(output)), None)
            if found is None:
                kind = type(output).__name__
                raise InputError(
                    f"tap {path or 'the output'}", found=f"a {kind} without tensors", do="tap another module"
                )
            # the next module may write where this one wrote (an in-place activation)
            heard.features.setdefault(path, []).append(found.clone() if copy else found)

        def listener(path: str) -> Any:
            return lambda module, args, output: hear(path, output, copy=True)

        stack.callback(model.register_forward_hook(root, with_kwargs=True).remove)
        for path, module in modules.items():
            stack.callback(module.register_forward_hook(listener(path)).remove)
        yield heard


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside the wrappers of torch."""
    while True:
        name = next((name for name in WRAPPED if name in model._modules), None)
        if name is None and isinstance(model, (DataParallel, DistributedDataParallel)):
            name = "module"
        if name is None:
            return model
        model = getattr(model, name)


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module of this path.

    Raises:
        UnknownNameError: there is none; the message names some that are near.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if path in modules:
        return modules[path]
    outer = path
    while outer and outer not in modules:
        outer = outer.rpartition(".")[0]
    near = [name for name in modules if name and name.rpartition(".")[0] == outer]
    more = [f"and {len(near) - SHOWN} more"] if len(near) > SHOWN else []
    raise UnknownNameError.of("module to tap", path, [*near[:SHOWN], *more])


def scores_of(output: Any) -> Tensor:
    """The scores in a network's output: itself, its `logits`, or the first of a tuple.

    Raises:
        InputError: several tensors by name, none of them `logits`, or no tensor at all.
    """
    if isinstance(output, Tensor):
        return output
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return named
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    found = tensors_in(output)
    if len(found) == 1:
        return found[0]
    kind = f"a {type(output).__name__} of {len(found)} tensors, none of them `logits`"
    raise InputError("distil the output", found=kind, do="tap the module that puts out the scores")


def _compiled(module: nn.Module) -> bool:
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None
