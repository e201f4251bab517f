"""What a run leaves while it is under way, so that `niwaki resume` can go on with it."""

import contextlib
import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from niwaki.errors import FileDamagedError, InputError, RunExistsError, making
from niwaki.files import SEARCH, SETTINGS, first_process, nearest, partial_of, write_json


@final
@dataclass(frozen=True)
class Record:
    """A run under way, as its folder tells it."""

    folder: Path
    """Where it is under way."""
    arguments: tuple[str, ...]
    """The command line, without `niwaki`."""
    cwd: Path
    """Where it was typed: relative places are meant from there."""
    threads: int | None
    """CPU threads inside an operation: sums of another number of threads have other bits."""


resumed: ContextVar[Record | None] = ContextVar("resumed", default=None)
"""The run that the command at work goes on with; None for a new one."""


def refuse_under_way(out: Path, *, force: bool) -> None:
    """Refuse a place whose run did not end, unless it is being resumed or may be replaced.

    Raises:
        RunExistsError: names what to do with it.
    """
    with making(out):
        there = partial_of(out).exists()
    if there and resumed.get() is None and not force and first_process():
        do = f"niwaki resume {shlex.quote(str(out))} goes on with it; --force starts again"
        raise RunExistsError(f"write a run to {out}", found="one that did not end", where=str(partial_of(out)), do=do)


def refuse_itself(model: str, out: Path) -> None:
    """Refuse to replace the run that the new one is made from.

    Raises:
        InputError: the model is what lies at `out`.
    """
    same = False
    with contextlib.suppress(OSError):  # no such places, or names that are none
        same = out.samefile(model)
    if same:
        do = "choose another --out: the run that it is made from has to stay"
        raise InputError(f"write a run to {out}", found=f"the model {model} is that folder", do=do)


def begin(folder: Path, spoken: str | None, **more: Any) -> None:
    """Make the folder of a run and write down what was typed; one that is resumed has it already."""
    import torch

    from niwaki import __version__

    if not first_process():
        return
    if (record := resumed.get()) is not None:
        if record.threads is not None:
            torch.set_num_threads(record.threads)
        return
    with making(folder):
        folder.mkdir(parents=True)
    arguments = shlex.split(spoken or "")[1:]
    settings = {"command": spoken, "arguments": arguments, "cwd": os.getcwd(), "threads": torch.get_num_threads()}
    versions = {"niwaki": __version__, "torch": torch.__version__}
    write_json(folder / SETTINGS, {**settings, **more, "versions": versions})


def clear(folder: Path) -> None:
    """Take a folder away at once, then remove it."""
    if folder.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
        os.rename(folder, old / "run")
        shutil.rmtree(old, ignore_errors=True)


def keep_recovery(partial: Path, out: Path) -> None:
    """Copy what the recovery, or each training of the method, said of itself to the run that ended."""
    trainings = {file.parent for file in partial.glob("*/history.json")}
    for file in sorted(file for folder in trainings for file in folder.iterdir()):
        if file.is_file():
            (out / file.parent.name).mkdir(exist_ok=True)
            shutil.copy2(file, out / file.parent.name / file.name)


@contextmanager
def cleared_unless_begun(folder: Path) -> Iterator[None]:
    """Where an error comes before the first checkpoint or finding, there is nothing to go on with: the folder goes."""
    try:
        yield
    except BaseException:
        begun = any(folder.rglob("step-*")) or (folder / SEARCH).is_file()
        if first_process() and resumed.get() is None and not begun:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def read_record(folder: Path) -> Record:
    """The run under way in `folder`, or in the partial folder beside it.

    Raises:
        InputError: there is none.
        FileDamagedError: what was written down of it is not readable.
    """
    places = [partial_of(folder), folder]
    place = next((p for p in places if (p / SETTINGS).is_file()), None)
    if place is None:
        near = nearest(folder)
        found = "no run" if folder.exists() else "no such folder" + (f"; near: {', '.join(near)}" if near else "")
        do = "give the --out of `niwaki train`, or of a `niwaki compress` that trains or searches"
        raise InputError(f"resume {folder}", found=found, where=str(folder), do=do)
    try:
        data = json.loads((place / SETTINGS).read_text(encoding="utf-8"))
        arguments, cwd, threads = data.get("arguments"), data.get("cwd"), data.get("threads")
    except (OSError, ValueError, AttributeError) as cause:
        found, do = f"{SETTINGS}: {cause}", "start again in another folder"
        raise FileDamagedError(f"resume {folder}", found=found, where=str(place), do=do) from cause
    listed = isinstance(arguments, list) and all(isinstance(part, str) for part in arguments)
    if not listed or not isinstance(cwd, str) or not isinstance(threads, (int, type(None))):
        found, do = f"{SETTINGS} without what was typed", "start again in another folder"
        raise FileDamagedError(f"resume {folder}", found=found, where=str(place), do=do)
    if not Path(cwd).is_dir():
        found = "the folder it was started in is gone"
        raise InputError(f"resume {folder}", found=found, where=cwd, do="bring it back: places are meant from there")
    return Record(place.resolve(), tuple(arguments), Path(cwd), threads)


@contextmanager
def going_on(record: Record) -> Iterator[None]:
    """Inside, commands go on with this run, where it was started."""
    token = resumed.set(record)
    try:
        with contextlib.chdir(record.cwd):
            yield
    finally:
        resumed.reset(token)


def same_place(folder: Path) -> None:
    """Refuse to go on with a run that was moved.

    Raises:
        InputError: what was typed names another place.
    """
    record = resumed.get()
    if record is not None and record.folder != folder.resolve():
        found = f"it was started as {folder.resolve()}"
        raise InputError(f"resume {record.folder}", found=found, do="move it back there")
