"""What a sweep is made of: every combination of options is one run of `niwaki compress`."""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from niwaki.errors import InputError
from niwaki.files import WEIGHTS

REPEATED = ("budget", "protect", "recovery_set", "distill", "export")
"""Options that one run may be given several times: a list is one value of theirs, a list of lists several."""
METHOD = "magnitude"
"""What `niwaki compress` takes where nothing is said."""
NAMED = ("method", "keep", "of", "seed")
"""Options that a trial's folder is called by; the rest is in its digest."""


@final
@dataclass(frozen=True)
class Trial:
    """One run of `niwaki compress`."""

    name: str
    """Of its folder: readable, with the beginning of the digest, so that no two trials share it."""
    digest: str
    """SHA-256 of the options and of what the checkpoint and a model's Python file hold."""
    options: Mapping[str, Any] = field(repr=False)
    """Options of `niwaki compress` by name; the method's own under "settings"."""

    @property
    def arguments(self) -> tuple[str, ...]:
        """The command line behind `niwaki`, without what the sweep says itself: place, threads, timing."""
        words: list[str] = []
        for name, value in self.options.items():
            if name not in ("model", "settings"):
                words += _words(name, value)
        words += [f"--set={name}={_text(value)}" for name, value in self.options.get("settings", {}).items()]
        return ("compress", str(self.options["model"]), *words)


def grid(options: Mapping[str, Any], *, settings: Mapping[str, Mapping[str, Any]] | None = None) -> tuple[Trial, ...]:
    """One trial for every combination: a list is tried value by value, in the order of the options, the last fastest.

    Args:
        options: of `niwaki compress` by name (`exact_only` for --exact-only), with `model`; of those in `REPEATED` a
            list is one value, a list of lists several.
        settings: of methods, by the method's name; they count for its trials only.

    Raises:
        InputError: no model, an empty list, a checkpoint that is not there, settings of a method that is not tried, or
            nothing but the same trial twice.

    Examples:
        >>> trials = grid({"model": "torchvision:resnet18", "keep": [0.7, 0.5], "seed": [0, 1]})
        >>> len(trials), trials[1].arguments
        (4, ('compress', 'torchvision:resnet18', '--keep=0.7', '--seed=1'))
    """
    if not options.get("model"):
        raise InputError("a sweep", found="no model", do='say which: model = "torchvision:resnet50"')
    own = {_method(name): dict(values) for name, values in (settings or {}).items()}
    tried = {_method(value) for value in _values("method", options.get("method", METHOD))}
    for name in own:
        if name not in tried:
            found = f"methods: {', '.join(sorted(tried))}"
            raise InputError(f"settings of {name}", found=found, do="add it to the methods, or leave its settings out")
    trials: dict[str, Trial] = {}
    for chosen in _combinations(options):
        for values in _combinations(own.get(_method(chosen.get("method", METHOD)), {})):
            trial = _trial({**chosen, **({"settings": values} if values else {})})
            if trial.digest in trials:
                raise InputError(f"trial {trial.name}", found="the same trial twice", do="say every value once")
            trials[trial.digest] = trial
    return tuple(trials.values())


def _method(name: Any) -> str:
    return str(name).lower().replace("-", "_")


def _values(name: str, value: Any) -> list[Any]:
    """What is tried of one option."""
    several = isinstance(value, (list, tuple))
    if name in REPEATED:
        several = several and bool(value) and all(isinstance(inner, (list, tuple)) for inner in value)
    if not several:
        return [value]
    if not value:
        raise InputError(f"{name} of a sweep", found="an empty list", do="give at least one value, or leave it out")
    return list(value)


def _combinations(options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    tried = [_values(name, value) for name, value in options.items()]
    for values in itertools.product(*tried):
        yield dict(zip(options, values, strict=True))


def _words(name: str, value: Any) -> list[str]:
    """An option as the command line takes it; a switch that is off is left out."""
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag] if value else []
    if isinstance(value, (list, tuple)):
        return [f"{flag}={item}" for item in value]
    return [f"{flag}={value}"]


def _text(value: Any) -> str:
    """A setting's value as `--set` reads it back: JSON, or text that is none."""
    if isinstance(value, str):
        try:
            json.loads(value)
        except ValueError:
            return value
    return json.dumps(value)


def _trial(options: dict[str, Any]) -> Trial:
    digest = hashlib.sha256(json.dumps([options, _contents(options)], sort_keys=True).encode()).hexdigest()
    said = {"method": METHOD, **options}
    words = []
    for name in NAMED:
        if name in said:
            words.append(f"seed{said[name]}" if name == "seed" else str(said[name]))
    words.append(digest[:8])
    return Trial(re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join(words)).lstrip("."), digest, options)


def _contents(options: Mapping[str, Any]) -> dict[str, str]:
    """Digests of the files that decide what a trial computes, as far as they are single files."""
    found = {}
    checkpoint = options.get("checkpoint")
    if checkpoint:
        path = Path(str(checkpoint))
        if not path.exists():
            raise InputError(f"checkpoint {checkpoint}", found="no such file", do="check the path")
        if path.is_file():
            found["checkpoint"] = _sum(path)
    kind, _, rest = str(options["model"]).partition(":")
    code = Path(rest.partition(":")[0])
    weights = Path(str(options["model"])) / WEIGHTS
    if not rest and weights.is_file():  # the folder of a run
        found["run"] = _sum(weights)
    if kind == "python" and code.suffix == ".py" and code.is_file():
        found["model"] = _sum(code)
    return found


_SUMS: dict[tuple[str, int, int], str] = {}  # a checkpoint of many trials is read once


def _sum(path: Path) -> str:
    state = path.stat()
    key = (str(path.resolve()), state.st_size, state.st_mtime_ns)
    if key not in _SUMS:
        with path.open("rb") as file:
            _SUMS[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _SUMS[key]
