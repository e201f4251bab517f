"""The TOML file of a sweep: options of `niwaki compress` by name, lists where several values are tried."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import typer

from niwaki.cli.compress import compress, fields_of, method_made
from niwaki.cli.methods import method_named
from niwaki.cli.options import budgets_of
from niwaki.cli.talk import Usage
from niwaki.errors import InputError, NiwakiError, UnknownNameError
from niwaki.sweep import Timing, Trial, Workers, grid

TABLES = ("settings", "sweep")
SWEEP = {"cpus": int, "gpus": (int, float), "tries": int, "latency_runs": int, "latency_batch": int}
ELSEWHERE = {
    "out": "say --out to `niwaki sweep`",
    "force": "a sweep goes on where it was, and overwrites nothing",
    "json": "say --json to `niwaki sweep`",
    "set": "write a table [settings.METHOD]",
    "threads": "say cpus under [sweep]",
    "runs": "say latency_runs under [sweep]",
    "low_memory": "such runs are not measured, and can't be compared",
}
"""Options of `niwaki compress` that a sweep says itself, and what to do instead."""


@final
@dataclass(frozen=True)
class Asked:
    """What the file says."""

    trials: tuple[Trial, ...]
    workers: Workers
    timing: Timing | None


def command() -> Any:
    """`niwaki compress` as click knows it: its parameters, and a parser."""
    app = typer.Typer(add_completion=False)
    app.command()(compress)
    return typer.main.get_command(app)


def known_options() -> tuple[str, ...]:
    """Options of `niwaki compress` that a sweep may set, as the file writes them."""
    names = (max(parameter.opts, key=len).lstrip("-").replace("-", "_") for parameter in command().params)
    return tuple(name for name in names if name not in ELSEWHERE and name != "help")


def read(path: Path, *, address: str) -> Asked:
    """The trials of a file, each checked as the command line would check it.

    Raises:
        InputError: no readable TOML, a value of the wrong kind, an option that a sweep says itself, ...
        UnknownNameError: a key that is none; the message lists the known ones.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        found = error.strerror or type(error).__name__
        raise InputError(f"sweep {path}", found=found, where=str(path.absolute()), do="give a TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"sweep {path}", found=f"no TOML: {error}", do="mend the file at that place") from error
    options = known_options()
    _keys(path, "", data, (*options, *TABLES))
    tables = {name: data.get(name, {}) for name in TABLES}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise InputError(f"{path}: {name}", found=type(table).__name__, do=f"write a table: [{name}]")
    _keys(path, "[sweep] ", tables["sweep"], SWEEP)
    for name, value in tables["sweep"].items():
        if isinstance(value, bool) or not isinstance(value, SWEEP[name]):  # type: ignore[arg-type]
            raise InputError(f"{path}: [sweep] {name} = {value!r}", found="not a number", do="give a number")
    for name, value in tables["settings"].items():
        if not isinstance(value, dict):
            do = f"name the method: [settings.taylor] and {name} = ... below it"
            raise InputError(f"{path}: settings.{name}", found="no table", do=do)
        known = [field.name for field in method_named(name).fields]
        _keys(path, f"[settings.{name}] ", value, known)
    chosen = {name: value for name, value in data.items() if name not in TABLES}
    for name, value in chosen.items():
        if isinstance(value, dict):
            raise InputError(f"{path}: {name}", found="a table", do="give a value, or a list of values")
    said = tables["sweep"]
    try:
        workers = Workers(address, **{name: said[name] for name in ("cpus", "gpus", "tries") if name in said})
        runs = said.get("latency_runs", Timing().runs)
        timing = Timing(runs, said.get("latency_batch")) if runs else None
        trials = grid(chosen, settings=tables["settings"])
    except InputError as error:
        raise InputError(error.asked, found=error.found, where=str(path), do=error.do) from error
    for trial in trials:
        _check(path, trial)
    return Asked(trials, workers, timing)


def _keys(path: Path, place: str, table: Mapping[str, Any], known: Any) -> None:
    for key in table:
        if not place and key in ELSEWHERE:
            raise InputError(f"{path}: {key}", found="a sweep says that itself", do=ELSEWHERE[key])
        if key not in known:
            raise UnknownNameError(
                f"{path}: unknown key {place}{key}",
                found=f"known: {', '.join(known) or 'none'}",
                do="use one of the known keys",
            )


def _check(path: Path, trial: Trial) -> None:
    """Refuse what `niwaki compress` would refuse before it reads a model."""
    from niwaki.methods.job import Request

    try:
        given = command().make_context("compress", [*trial.arguments[1:], "--out=x"]).params
        method = method_named(given["method"])
        shortcuts = {name: given[name] for name in ("rule", "grids", "bits") if given.get(name) is not None}
        made = method_made(method, fields_of(method, given["settings"], shortcuts))
        budgets = budgets_of(given["budget"], **{name: given[name] for name in ("keep", "of", "floor", "multiple")})
        data, recovery, distill = (bool(given[name]) for name in ("data", "recover", "distill"))
        made.refuse(Request(budgets, data=data, recovery=recovery, distill=distill))
    except Usage as error:
        raise InputError(
            f"trial {trial.name}", found=error.format_message(), where=str(path), do="see niwaki compress --help"
        ) from error
    except NiwakiError as error:
        raise InputError(error.asked, found=error.found, where=str(path), do=error.do) from error
