"""Law: imports point down only, files of one role never import each other, and the front door is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "niwaki"
LEVELS = (
    {"errors", "verbs", "units", "boxes", "plan", "find", "files", "stored"},
    {"graph"},
    {"evidence", "surgery", "measure"},
    {"scores", "budgets", "pressure", "repair", "quantize", "distill"},
    {"search", "train", "sparse", "dynamic", "kv", "sidechannel", "tasks", "data", "models", "sensitivity"},
    {"methods"},
    {"sweep"},
    {"export", "report", "bench", "opening"},
    {"cli"},
)
"""From the bottom up; a file may import from lower levels, from its own folder's type, and from its own level."""
ROLES = {
    "scores",
    "budgets",
    "pressure",
    "repair",
    "quantize",
    "distill",
    "methods",
    "measure",
    "tasks",
    "data",
    "models",
    "export",
    "kv",
    "search",
}
"""Folders whose files are blocks: one idea each, that know nothing of each other."""


LIGHT = {"niwaki", "niwaki.__version__"}
"""What any file may ask of the public face."""


def level(part: str) -> int:
    for number, names in enumerate(LEVELS):
        if part in names:
            return number
    raise AssertionError(f"niwaki.{part} has no place in the layering; add it where it belongs")


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, dotted name below niwaki) of every import of niwaki in a file; names from a package count as modules."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = path.relative_to(PACKAGE.parent).with_suffix("").parts
                base = ".".join((*here[: len(here) - node.level], *([node.module] if node.module else [])))
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return [
        (line, name.removeprefix("niwaki."))
        for line, name in found
        if name.split(".")[0] == "niwaki" and name not in LIGHT
    ]


def law(package: Path = PACKAGE) -> None:
    wrong = []
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        if parts in (("__init__",), ("__main__",)) or (parts[0] == "compress" and len(parts) == 1):
            continue  # the public face, the command, and the verb that joins all others
        for line, name in imports(path):
            target = name.split(".")
            if not (package / target[0]).exists() and not (package / f"{target[0]}.py").exists():
                if parts[0] not in ("cli", "report", "export"):
                    wrong.append(f"{'/'.join(parts)}:{line} imports the public face (niwaki.{name})")
                continue
            if target[0] in ("__init__", "compress"):
                continue
            if level(target[0]) > level(parts[0]):
                wrong.append(f"{'/'.join(parts)}:{line} imports upwards: niwaki.{name}")
    assert not wrong, "\n".join(wrong)


def test_imports_point_down() -> None:
    law()


def blocks(folder: Path) -> set[str]:
    """Stems of the files of a role folder that hold a block: those whose class the folder lists and cards describe."""
    cards = Path(__file__).parents[2] / "docs" / "cards" / folder.name
    return {path.stem for path in folder.glob("*.py") if (cards / f"{path.stem}.md").exists()}


def test_blocks_do_not_know_each_other() -> None:
    wrong = []
    for folder in sorted(p for p in PACKAGE.iterdir() if p.name in ROLES):
        stems = blocks(folder)
        for stem in stems:
            for line, name in imports(folder / f"{stem}.py"):
                target = name.split(".")
                if target[0] == folder.name and len(target) > 1 and target[1] in stems - {stem}:
                    wrong.append(f"{folder.name}/{stem}.py:{line} imports {target[1]}")
    assert not wrong, "\n".join(wrong)


LEAN = """
import sys
sys.argv = ['niwaki', *{argv!r}]
{body}
heavy = [m for m in {heavy!r} if m in sys.modules]
assert not heavy, heavy
"""
HEAVY = ("torch", "numpy", "scipy", "safetensors", "matplotlib", "torchvision", "timm", "transformers", "onnx")
RUN = """
from niwaki.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
"""


@pytest.mark.parametrize("argv", [None, ("--help",), ("methods",), ("compress", "--help"), ("--version",)], ids=str)
def test_the_front_door_is_light(argv: tuple[str, ...] | None) -> None:
    """`import niwaki`, help and listings load no torch."""
    body = "import niwaki" if argv is None else RUN
    code = LEAN.format(argv=list(argv or ()), body=body, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
