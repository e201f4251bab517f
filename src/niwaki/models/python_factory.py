"""Networks from the user's own Python code."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, final

import torch
from torch import nn

from niwaki.errors import InputError, UnknownNameError
from niwaki.models import IMAGENET_SHAPE, Built, ModelSource, call_builder


@final
@dataclass(frozen=True)
class PythonFactory(ModelSource):
    """`python:package.module:factory` or `python:path/to/file.py:factory`, called with the arguments.

    The factory returns a module, or a pair (module, example). An example of a given shape has the type of the
    factory's own, or else of the module's first floating parameter. The current folder is importable while it runs,
    and only then. This runs the user's own code, because it is named on purpose; nothing else niwaki reads is ever
    executed.

    Raises:
        InputError: no such module or file, the code fails, or what comes back is no network.
        UnknownNameError: the module has no such factory; its public functions and classes are listed.
    """

    def build(self, *, stored: bool) -> Built:
        module_name, _, factory_name = self.name.rpartition(":")
        if not module_name or not factory_name:
            found, do = f"python:{self.name}", "write python:package.module:factory or python:file.py:factory"
            raise InputError("a model from Python", found=found, do=do)
        with current_folder_importable():
            module = self._module(module_name)
            if not callable(factory := getattr(module, factory_name, None)):
                homes = {name: getattr(value, "__module__", "") for name, value in vars(module).items()}
                known = [name for name, home in homes.items() if home == module.__name__]
                raise UnknownNameError.of(f"factory in {module_name}", factory_name, known)
            try:
                made = call_builder(self, factory)
            except InputError:
                raise
            except Exception as cause:
                raise self._failed(f"{factory_name} failed with {type(cause).__name__}: {cause}") from cause
        example = None
        if isinstance(made, tuple) and len(made) == 2:
            made, example = made
        if not isinstance(made, nn.Module):
            raise self._failed(f"{factory_name} returned a {type(made).__name__}")
        assumed = "a guess, since the factory gives no example" if example is None and not self.shape else ""
        if example is None or self.shape:
            example = torch.zeros(1, *(self.shape or IMAGENET_SHAPE), dtype=_type_of(example, made))
        return Built(made.eval(), example, assumed=assumed)

    def _module(self, name: str) -> ModuleType:
        try:
            return _module_of_file(Path(name)) if name.endswith(".py") else importlib.import_module(name)
        except Exception as cause:
            raise self._failed(f"{name} cannot be imported, {type(cause).__name__}: {cause}") from cause

    def _failed(self, found: str) -> InputError:
        do = "name a function that returns an nn.Module, or a pair of one and an example"
        return InputError(f"a model from python:{self.name}", found=found, where=os.getcwd(), do=do)


def _type_of(example: Any, model: nn.Module) -> torch.dtype:
    """The type of an input: that of the example where it is one tensor, else that of what the model computes with."""
    if isinstance(example, torch.Tensor):
        return example.dtype
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


@contextmanager
def current_folder_importable() -> Iterator[None]:
    """Inside, modules of the current folder can be imported, as with `python -m`."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _module_of_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no such file {path}")
    name = f"niwaki_models_from_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look their module up
    spec.loader.exec_module(module)
    return module
