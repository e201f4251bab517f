"""Results of the benchmarks as JSON rows, one a line, and tables made from them.

A row is found again by its `key`, so that a run that was interrupted goes on where it stopped.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SECONDS = "%.2f s"
LONGEST = 600
"""Most characters of a command that are told."""
NAMED = 6
"""Rows of one command that are listed by name."""


class Rows:
    """The rows of one benchmark: benchmarks/results/NAME.jsonl, and docs/benchmarks/NAME.md; drafts lie in runs/."""

    def __init__(self, name: str, *, fresh: bool = False, packages: Sequence[str] = (), draft: bool = False) -> None:
        self.path = (ROOT / "runs" if draft else ROOT / "benchmarks" / "results") / f"{name}.jsonl"
        self.page = ROOT / "docs" / "benchmarks" / f"{name}.md"
        self.fresh = fresh
        self.packages = ("torch", "numpy", *packages)
        self.rows: list[dict[str, Any]] = []
        if self.path.exists():
            self.rows = [
                json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines() if line.strip()
            ]
        for row in self.rows:
            row.setdefault("dirty", row.pop("changed", False))
        self.made: set[str] = set()
        self.commit = commit()  # of the code this process has loaded, whatever happens to the files meanwhile

    def wanted(self, key: str) -> bool:
        """Whether this result has still to be made."""
        return key not in self.made and (self.fresh or all(row["key"] != key for row in self.rows))

    def get(self, key: str) -> dict[str, Any] | None:
        return next((row for row in self.rows if row["key"] == key), None)

    def add(self, key: str, values: Mapping[str, Any], *, seed: int, threads: int) -> None:
        """Write a row (replacing an older one of the same key) with all that is needed to make it again."""
        row = {
            "key": key,
            **values,
            "seed": seed,
            "threads": threads,
            "command": command(),
            **self.commit,
            "versions": {
                "niwaki": _version("niwaki"),
                "python": platform.python_version(),
                **{p: _version(p) for p in self.packages},
            },
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        }
        self.rows = [old for old in self.rows if old["key"] != key] + [row]
        self.made.add(key)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_suffix(".part")
        aside.write_text("".join(json.dumps(r) + "\n" for r in self.rows), encoding="utf-8")
        aside.replace(self.path)
        print(key, {k: v for k, v in values.items() if k not in ("profile", "groups")}, flush=True)

    def write(self, text: str) -> None:
        """The page, with the provenance of its rows at the end."""
        self.page.parent.mkdir(parents=True, exist_ok=True)
        self.page.write_text(text.rstrip() + "\n\n" + self._provenance(), encoding="utf-8")
        print(f"wrote {self.page.relative_to(ROOT)}", flush=True)

    def _provenance(self) -> str:
        """Which command, seed, versions and commit made which rows."""
        listed: dict[str, list[str]] = {}
        for row in self.rows:
            versions = ", ".join(f"{name} {number}" for name, number in row["versions"].items())
            origin = (
                f"`{_short(row['command'])}`, seed {row['seed']}, {row['threads']} threads, commit {row['commit']}"
                f"{' with uncommitted changes in src' if row['dirty'] else ''}; {versions}; {row['machine']}"
            )
            listed.setdefault(origin, []).append(row["key"])
        lines = ["## Where the rows come from", "", f"Raw rows: `benchmarks/results/{self.path.name}`.", ""]
        told = [f"- {origin}: {_told(keys)}" for origin, keys in listed.items()]
        return "\n".join(lines + told) + "\n"


def _short(command: str) -> str:
    """A command; of one that names hundreds of models the beginning, as the rows have it whole."""
    return command if len(command) <= LONGEST else f"{command[:LONGEST].rpartition(' ')[0]} ..."


def _told(keys: Sequence[str]) -> str:
    """The keys of a command's rows, or how many where they are many."""
    return ", ".join(keys) if len(keys) <= NAMED else f"{len(keys)} rows, from *{keys[0]}* to *{keys[-1]}*"


def table(heads: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    cells = [[str(cell) for cell in line] for line in lines]
    return "\n".join(
        [
            "| " + " | ".join(heads) + " |",
            "|" + "---|" * len(heads),
            *("| " + " | ".join(line) + " |" for line in cells),
        ]
    )


def svg(body: list[str], wide: int, high: int) -> str:
    """A picture of these parts on white."""
    style = ".head{font-weight:600}.frame{fill:none;stroke:#8d9791}.grid{stroke:#dfe4e1}text{font:12px sans-serif}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide}" height="{high}"><style>{style}</style>'
        '<rect width="100%" height="100%" fill="#fff"/>' + "\n".join(body) + "</svg>\n"
    )


def prose(text: str) -> str:
    """Paragraphs of a page: lines joined, blank lines kept."""
    return "\n\n".join(" ".join(part.split()) for part in text.strip().split("\n\n")) + "\n\n"


def command() -> str:
    """What was typed, without the interpreter's place; `--fresh` left out, since it changes no result."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--fresh"]
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments])


def commit() -> dict[str, Any]:
    """The commit the code is at, and whether the library differs from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    return {
        "commit": git("rev-parse", "--short", "HEAD") or "none",
        "dirty": bool(git("status", "--short", "--", "src")),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def arguments(
    description: str,
    *,
    cases: Sequence[str],
    threads: int = 2,
    more: Callable[[argparse.ArgumentParser], None] | None = None,
) -> argparse.Namespace:
    """The options all benchmarks have."""
    parser = argparse.ArgumentParser(description=description, epilog="cases: " + ", ".join(cases))
    parser.add_argument("--only", nargs="+", metavar="CASE", choices=cases, help="these cases and no others")
    parser.add_argument("--fresh", action="store_true", help="make rows again that exist")
    parser.add_argument("--table", action="store_true", help="only write the page in docs/benchmarks from the rows")
    parser.add_argument("--threads", type=int, default=threads, help="threads of torch (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs (default: %(default)s)")
    if more is not None:
        more(parser)
    return parser.parse_args()
