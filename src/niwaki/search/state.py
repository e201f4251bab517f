"""What a search found so far, kept in a file, so that a killed one goes on; and what it has to say of itself."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from niwaki.errors import FileDamagedError, Setting
from niwaki.files import first_process, write_json
from niwaki.search.greedy import Found, Step

log = logging.getLogger(__name__)
Asked = Mapping[str, Any]


@final
class State:
    """Rounds of a search.

    Args:
        asked: what the search was asked for and is about, as plain data: `settings` by name, anything else by what it
            is.
        file: where it is kept; None: nowhere.

    Raises:
        FileDamagedError: the file is no search's, or that of a search of something else: it says what differs.
    """

    def __init__(self, asked: Asked, file: Path | None) -> None:
        self.asked: dict[str, Any] = json.loads(json.dumps(asked))
        self.file = file
        self.rounds: list[Found] = []
        self.more: list[dict[str, Any]] = []
        """What is told of each round beside what it found."""
        self.notes: list[str] = []
        """What is to be known of the search, in sentences."""
        if file is None or not file.is_file():
            return
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            apart = differences(data["asked"], self.asked)
            for one in () if apart else data["rounds"]:
                self.rounds.append(
                    Found(dict(one["base"]), tuple(Step.from_json(step) for step in one["steps"]), bool(one["reached"]))
                )
                self.more.append({k: v for k, v in one.items() if k not in ("base", "reached", "steps")})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            do = "start again in another folder, or delete the file"
            raise FileDamagedError("go on with a search", found=repr(error), where=str(file), do=do) from error
        if apart:
            do = "ask for the same as before, or start again in another folder"
            raise FileDamagedError("go on with a search", found=apart, where=str(file), do=do)
        log.info("going on with the search of %s", file)

    def found(self, number: int) -> Found | None:
        return self.rounds[number] if number < len(self.rounds) else None

    def note(self, number: int, found: Found, more: dict[str, Any]) -> None:
        """What a round found so far, and, when it is first heard of, `more` of it."""
        if number < len(self.rounds):
            self.rounds[number] = found
        else:
            self.rounds.append(found)
            self.more.append(more)
        self._write()

    def tell(self, number: int, **more: Any) -> None:
        """Something else of a round."""
        self.more[number].update(more)
        self._write()

    def say(self, sentence: str, *, level: int = logging.INFO) -> None:
        """Something to be known, once: a line of the log, and a part of the report."""
        if sentence not in self.notes:
            self.notes.append(sentence)
            log.log(level, "%s", sentence)

    def to_json(self) -> dict[str, Any]:
        """Plain data, a part of the report."""
        rounds = [
            {"base": one.base, "reached": one.reached, "steps": [step.to_json() for step in one.steps], **more}
            for one, more in zip(self.rounds, self.more, strict=True)
        ]
        return {"notes": list(self.notes), "rounds": rounds}

    def _write(self) -> None:
        if self.file is not None and first_process():
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.file, {"asked": self.asked, "rounds": self.to_json()["rounds"]})


def differences(before: Asked, now: Asked) -> tuple[str | Setting, ...]:
    """What a search was begun with and isn't asked for now, in words; nothing where all is the same."""
    words: list[str | Setting] = []
    old, new = (dict(one.get("settings") or {}) for one in (before, now))
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            words += ["; " if words else "it was begun with ", _setting(name, old), ", and is asked for with "]
            words.append(_setting(name, new))
    for what in sorted((before.keys() | now.keys()) - {"settings"}):
        if before.get(what) != now.get(what):
            words += ["; " if words else "it is a search of ", f"another {what}"]
    return tuple(words)


def _setting(name: str, values: Mapping[str, Any]) -> Setting | str:
    return Setting(name, values[name]) if values.get(name) is not None else f"no {name}"
