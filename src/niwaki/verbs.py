"""Folders that share their name with a verb: `niwaki.measure(model)` is a call, `niwaki.measure.Params` a member."""

import sys
from types import ModuleType
from typing import Any


class VerbModule(ModuleType):
    """A module that can be called: the call goes to the function of its own name (`verb` where that differs)."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.__dict__.get("VERB", self.__name__.rpartition(".")[2]))(*args, **kwargs)


def callable_module(name: str) -> None:
    """Make the module `name` callable."""
    sys.modules[name].__class__ = VerbModule
