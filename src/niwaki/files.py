"""Files and folders that are there whole or not at all, and who of several processes writes them."""

import difflib
import errno
import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from niwaki.errors import InputError, RunExistsError, Setting, making

REPORT, SETTINGS, SURGERY = "report.json", "settings.json", "surgery.json"
"""What a run leaves: settings, where it can be resumed from its beginning on; a report at its end; what it cut."""
SEARCH = "search.json"
"""What a search found so far, in the folder of a run under way."""
PICTURES = "pictures"
"""The folder of a run that holds what its task has to show."""
PLAN, WEIGHTS = "plan.json", "model.safetensors"
"""And the plan, and the network's tensors."""
TRAINED = "train"
"""What the report of a training calls its method."""
PARTIAL = ".partial"
UNENDED = "a run that did not end"


def write_folder(folder: Path, write: Callable[[Path], None], *, force: bool) -> Path:
    """Make `folder` by `write` under a temporary name beside it, then rename: it is there whole or not at all.

    Raises:
        RunExistsError: it exists and `force` is False.
        InputError: no folder can be made there.
    """
    with making(folder):
        if folder.exists() and not force:
            raise RunExistsError(
                f"write a run to {folder}",
                found="it exists",
                do=("choose another folder, or give ", Setting("force", True)),
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        os.chmod(aside, 0o755)
    try:
        write(aside)
        take_place(aside, folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return folder


def take_place(made: Path, folder: Path) -> None:
    """Rename `made` to `folder`; what was there goes last, and comes back if anything fails."""
    if not folder.exists():
        os.rename(made, folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    try:
        os.rename(folder, old / "run")
    except BaseException:
        old.rmdir()
        raise
    try:
        os.rename(made, folder)
    except BaseException:
        os.rename(old / "run", folder)
        old.rmdir()
        raise
    shutil.rmtree(old)


def write_text(file: Path, text: str) -> Path:
    """Write `text` to `file` in one step: under a temporary name beside it, fsynced, then renamed.

    Raises:
        InputError: the place cannot be written to; what was there is still there.
    """
    try:
        number, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        try:
            with open(number, "w", encoding="utf-8") as made:
                made.write(text)
            os.chmod(name, 0o666 & ~_mask())  # mkstemp makes files that only their owner may read
            synced(Path(name))
            os.replace(name, file)
        except OSError:
            os.unlink(name)
            raise
    except OSError as error:
        raise InputError(f"write {file}", found=str(error), do="give a file in a folder you may write to") from error
    return file


def refuse_unwritable(file: Path) -> None:
    """Refuse a place where no file can be written, before anything is worked out; nothing is left there.

    Raises:
        InputError: a folder is there, or the system says no.
    """
    try:
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        there = next(folder for folder in file.absolute().parents if folder.exists())
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        found = error.strerror or type(error).__name__
        raise InputError(f"write {file}", found=found, do="choose a place where files can be made") from error


def _mask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(file: Path, value: Any) -> None:
    """A JSON file, whole or not at all."""
    write_text(file, json.dumps(value, indent=1) + "\n")


def synced(path: Path) -> None:
    """Have the system write a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def partial_of(folder: Path) -> Path:
    """Where a run that is written whole at its end keeps what it needs until then."""
    place = folder.absolute()
    return place.parent / (place.name + PARTIAL)


def unended(folder: Path) -> Path | None:
    """Where the run of `folder` is under way if it did not end: the folder itself, or the partial one beside it."""
    return next((place for place in (folder, partial_of(folder)) if _under_way(place)), None)


def _under_way(folder: Path) -> bool:
    if (folder / REPORT).is_file() or not (folder / SETTINGS).is_file():
        return False
    try:
        return "arguments" in json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def resume_words(place: Path) -> str:
    """What goes on with the run that is under way at a place."""
    return f"niwaki resume {shlex.quote(str(place).removesuffix(PARTIAL))}"


def refuse_unended(folder: Path, asked: str) -> None:
    """Refuse a folder without a report whose run was killed, or is still at work.

    Raises:
        InputError: names how to go on with it.
    """
    place = unended(folder)
    if place is not None and not (folder / REPORT).is_file():
        do = f"{resume_words(folder)} goes on with it, if it is not at work still"
        raise InputError(asked, found=UNENDED, where=str(place), do=do)


def nearest(path: Path) -> list[str]:
    """Places beside a path that is not there whose names are much like its own, the nearest first."""
    parent = path.parent
    there = sorted(place.name for place in parent.iterdir()) if parent.is_dir() else []
    return [str(parent / name) for name in difflib.get_close_matches(path.name, there, n=3)]


def first_process() -> bool:
    """Whether this is the only process, or the one of several that writes and speaks: as their launcher says."""
    return os.environ.get("RANK", "0") == "0"
