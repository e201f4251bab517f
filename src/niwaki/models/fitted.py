"""Configurations of transformers that fit a cut model, and the folders that transformers itself writes and reads."""

import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from niwaki.errors import CannotCutError, InputError, MissingExtraError
from niwaki.files import write_folder
from niwaki.units import run, tensors_in

log = logging.getLogger(__name__)

MOST_BUILDS = 600
"""Configurations that are tried, each built without memory."""
BEAM = 5
"""How many of the best are gone on from: heads and key/value heads must both change before either seems right."""
PATIENCE = 2
"""Changes that may bring nothing before the search ends."""

Place = tuple[str | int, ...]
"""Where a number stands in a configuration: names of sub-configurations and settings, places in lists."""
Key = tuple[tuple[Place, int], ...]


def write_pretrained(model: nn.Module, folder: str | Path, example: Any, *, force: bool = False) -> nn.Module:
    """Write a cut model of transformers as a folder of its own, and read it back: see `export.export_pretrained`."""
    try:
        import transformers
    except ImportError as cause:
        do = 'pip install "niwaki[llm]"'
        raise MissingExtraError("models of transformers need transformers", do=do) from cause
    if not isinstance(model, transformers.PreTrainedModel):
        found = f"a {type(model).__name__}, not a PreTrainedModel"
        raise InputError("save as transformers do", found=found, do="save the run: Outcome.save takes any cut model")
    config = fitted_config(model)
    read: list[nn.Module] = []

    def write(place: Path) -> None:
        own = model.config
        try:
            model.config = config
            model.save_pretrained(place)
        finally:
            model.config = own
        again = type(model).from_pretrained(place, local_files_only=True).eval()
        _same(model, again, example)
        read.append(again)

    write_folder(Path(folder), write, force=force)
    return read[0]


def fitted_config(model: Any) -> Any:
    """A copy of the model's configuration from which its class is built with the model's tensors.

    Raises:
        CannotCutError: there is none.
    """
    search = _Search(model)
    best = search.best()
    if best.wrong:
        name, shape, built = best.wrong[0]
        raise CannotCutError(
            f"a configuration for this {type(model).__name__}",
            found=f"none says its sizes: {len(best.wrong)} tensors differ, such as {name} {shape}, built as {built}",
            where="layers of different widths, as a rule: a configuration has one number for all of them",
            do="cut with budgets.Uniform(), which keeps the same share of every layer, or save the run: Outcome.save",
        )
    return best.config


class _Built:
    """What a configuration comes to, next to the cut model."""

    def __init__(self, config: Any, wrong: list[tuple[str, Any, Any]], odd: int) -> None:
        self.config, self.wrong, self.odd = config, wrong, odd
        self.rank = (len(wrong), odd)
        """Tensors of another shape, then numbers that modules keep which are others."""


class _Search:
    """From the old configuration, one number more at a time, to what fits best."""

    def __init__(self, model: Any) -> None:
        self.model, self.kind = model, type(model)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self.facts = _facts(model)
        self.built: dict[Key, _Built] = {}

    def best(self) -> _Built:
        """Breadth first from the old configuration, the best few of every number of changes."""
        old = self._try({})
        best, patience = old, PATIENCE
        changes = _changes(old)
        options = [(place, to) for place, value in _numbers(old.config) for to in _choices(value, changes)]
        beam: list[dict[Place, int]] = [{}]
        while best.rank > (0, 0) and patience and beam and len(self.built) < MOST_BUILDS:
            ways = {_key(way | {place: to}): way | {place: to} for way in beam for place, to in options}
            ranked = sorted(((self._try(way), way) for way in ways.values()), key=lambda pair: pair[0].rank)
            beam = [way for _, way in ranked[:BEAM]]
            better = bool(ranked) and ranked[0][0].rank < best.rank
            best = ranked[0][0] if better else best
            patience = PATIENCE if better else patience - (1 if best.wrong else PATIENCE)
        return best

    def _try(self, way: dict[Place, int]) -> _Built:
        key = _key(way)
        if key not in self.built:
            config = copy.deepcopy(self.model.config)
            for place, value in way.items():
                _set(config, place, value)
            self.built[key] = self._build(config)
        return self.built[key]

    def _build(self, config: Any) -> _Built:
        try:
            with torch.device("meta"):
                built = self.kind(copy.deepcopy(config))
        except Exception as error:  # sizes that contradict each other
            log.debug("no model of these sizes: %s", error)
            return _Built(config, [(name, shape, None) for name, shape in self.shapes.items()], len(self.facts))
        shapes = {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}
        names = dict.fromkeys((*self.shapes, *shapes))
        wrong = [(n, self.shapes.get(n), shapes.get(n)) for n in names if self.shapes.get(n) != shapes.get(n)]
        facts = _facts(built)
        return _Built(config, wrong, sum(facts.get(key) != value for key, value in self.facts.items()))


def _key(way: dict[Place, int]) -> Key:
    return tuple(sorted(way.items(), key=repr))


def _facts(model: nn.Module) -> dict[tuple[str, str], Any]:
    """Every plain number that a module keeps."""
    return {
        (path, name): value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if type(value) in (int, float)
    }


def _changes(old: _Built) -> set[tuple[int, int]]:
    """Sizes of axes before and after."""
    return {
        (was, now)
        for _, new, before in old.wrong
        if new is not None and before is not None and len(new) == len(before)
        for was, now in zip(before, new, strict=True)
        if was != now
    }


def _choices(value: int, changes: set[tuple[int, int]]) -> list[int]:
    """What a number may become: what an axis of that size became, or the same share of it (heads of a width)."""
    shares = {value * now // was for was, now in changes if value * now % was == 0}
    same = {now for was, now in changes if was == value}
    return sorted((shares | same) - {value, 0})


def _numbers(config: Any, base: Place = ()) -> Iterator[tuple[Place, int]]:
    """Every whole number above 1 in a configuration, with its place."""
    inside = set(getattr(config, "sub_configs", {}))
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        if name in inside and value is not None:
            yield from _numbers(value, (*base, name))
        elif type(value) is int and value > 1:
            yield (*base, name), value
        elif isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                if type(item) is int and item > 1:
                    yield (*base, name, i), item


def _set(config: Any, place: Place, value: int) -> None:
    *path, last = place
    for name in path[:-1] if isinstance(last, int) else path:
        config = getattr(config, str(name))
    if isinstance(last, int):
        listed = list(getattr(config, str(path[-1])))
        listed[last] = value
        setattr(config, str(path[-1]), listed)
    else:
        setattr(config, last, value)


def _same(model: nn.Module, again: nn.Module, example: Any) -> None:
    """Refuse a model that computes something else than the one that was saved."""
    training = model.training
    try:
        model.eval()
        with torch.no_grad():
            left, right = tensors_in(run(model, example)), tensors_in(run(again, example))
    finally:
        model.train(training)
    if len(left) != len(right) or any(
        a.shape != b.shape or not torch.equal(a, b) for a, b in zip(left, right, strict=True)
    ):
        raise CannotCutError(
            f"read back this {type(model).__name__}",
            found="a model of its class, built by the new configuration, puts out other numbers",
            where="something that depends on a width kept its old value in the cut (the scale of attention heads)",
            do="keep whole heads (grids='rows'), or save the run: Outcome.save takes any cut model",
        )
