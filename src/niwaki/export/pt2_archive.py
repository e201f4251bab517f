"""Reading `.pt2` archives without executing what they might hold."""

import ast
import io
import json
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from niwaki.errors import FileDamagedError

SYMBOL = re.compile(r"[a-z]{1,2}\d+$")
FUNCTIONS = """
Symbol Integer Rational Float Add Mul Pow Max Min Mod PythonMod FloorDiv CleanDiv ModularIndexing Where CeilToInt
FloorToInt TruncToInt RoundToInt IntTrueDiv FloatTrueDiv ToFloat Identity OpaqueUnaryFn_sqrt Equality Unequality
LessThan StrictLessThan GreaterThan StrictGreaterThan Eq Ne Lt Le Gt Ge And Or Not
"""
ARITHMETIC = frozenset(FUNCTIONS.split())
"""Functions that sizes are made of in graphs of torch.export, as sympy prints them."""
WORD = re.compile(r"[\w.-]*$")
OPERATOR = re.compile(r"torch\.ops\.(aten|prims|higher_order|torchvision)\.[a-z_]\w*(\.[a-zA-Z]\w*)?$")
PLAIN = re.compile(r"(torch\.sym_\w+|math\.[a-z]\w*)$")
PYTHON = "add sub mul truediv floordiv mod pow neg pos abs eq ne lt le gt ge and_ or_ xor not_ getitem"
OPERATIONS = frozenset(f"_operator.{name}" for name in PYTHON.split())


def read_pt2(file: Path) -> torch.export.ExportedProgram:
    """The program in a `.pt2` archive; `module()` of it can be called.

    Raises:
        FileDamagedError: no archive, one that would execute code when loaded, or one that torch can't read.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            found = next(_suspicious(archive), None)
    except (OSError, zipfile.BadZipFile, ValueError, KeyError) as error:
        raise _refused(file, f"no archive of torch.export: {error}") from error
    if found is not None:
        raise _refused(file, found)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about its own format
            return torch.export.load(str(file))
    except Exception as error:  # whatever any part of torch makes of it
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise _refused(file, f"torch {torch.__version__} can't read it: {lines[0][:300]}") from error


def _suspicious(archive: zipfile.ZipFile) -> Iterator[str]:
    """What loading would execute, one sentence each."""
    names = archive.namelist()
    if not any(re.search(r"/models/[^/]+\.json$", name) for name in names):
        raise ValueError("no graph in it")
    for name in names:
        if re.search(r"/data/(weights|constants)/[^/]*_config\.json$", name):
            for key, entry in json.loads(archive.read(name)).get("config", {}).items():
                if entry.get("use_pickle") or not re.match(r"(weight|tensor)_\d+$", str(entry.get("path_name"))):
                    yield f"{key} is pickled: loading it could run any code"
        elif re.search(r"/data/(weights|constants)/[^/]+\.(pt|pkl)$", name) or "/aotinductor/" in name:
            yield f"{name} is no plain data: loading it could run any code"
        elif "/data/sample_inputs/" in name:
            try:
                torch.load(io.BytesIO(archive.read(name)), weights_only=True)
            except Exception:
                yield "its example is pickled: loading it could run any code"
        elif re.search(r"/models/[^/]+\.json$", name):
            graph = json.loads(archive.read(name))
            for key, value in _texts(graph):
                if key == "expr_str" and not _arithmetic(value):
                    yield f"a size that is no plain arithmetic: {value[:80]}"
                called = key == "target" and value.startswith(("torch.", "_operator", "math.", "#"))
                if called and not (OPERATOR.match(value) or PLAIN.match(value) or value in OPERATIONS):
                    yield f"a call that is no operator: {value[:80]}"


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in nested JSON, with the key it stands under."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _texts(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, key)


def _arithmetic(text: str) -> bool:
    """Whether a size is made of symbols, numbers and the functions of sizes only."""
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError):
        return False
    calls = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            if not (node.id in ARITHMETIC if id(node) in calls else SYMBOL.match(node.id)):
                return False
        elif isinstance(node, ast.Constant):
            if not (isinstance(node.value, (int, float)) or WORD.match(str(node.value))):
                return False
        elif not isinstance(
            node,
            (ast.Expression, ast.BinOp, ast.UnaryOp, ast.Compare, ast.Call, ast.keyword, ast.operator, ast.unaryop,
             ast.cmpop, ast.expr_context),
        ):  # fmt: skip
            return False
    return True


def _refused(file: Path, found: str) -> FileDamagedError:
    found = "no such file" if not file.exists() else found
    return FileDamagedError(f"load {file.name}", found=found, where=str(file), do="give a file of export --to pt2")
