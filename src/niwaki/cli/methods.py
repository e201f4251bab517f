"""`niwaki methods`: what can be asked of `compress --method`, read from the source without importing it."""

import ast
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, final

import typer

from niwaki.cli.options import AsJson
from niwaki.cli.talk import show
from niwaki.errors import UnknownNameError


@final
@dataclass(frozen=True)
class Field:
    """One setting of a method."""

    name: str
    type: str
    """The choices with bars between them, or the type's name."""
    default: str | None
    help: str


@final
@dataclass(frozen=True)
class Method:
    """One method: a file of niwaki/methods and the class of the same stem in it."""

    name: str
    class_name: str
    summary: str
    text: str
    fields: tuple[Field, ...]


def known(*, settings: bool = True) -> tuple[Method, ...]:
    """All methods by name; without their settings where nobody asks, which takes half the time."""
    found = [_method(path, settings) for path in sorted((_package() / "methods").glob("[a-z]*.py"))]
    return tuple(method for method in found if method is not None)


def method_named(name: str) -> Method:
    """The method of that name; the file's or the class's, in any case.

    Raises:
        UnknownNameError: there is none; the message lists all.
    """
    listed = known(settings=False)
    wanted = name.lower().replace("-", "_")
    for method in listed:
        if wanted in (method.name, method.class_name.lower()):
            whole = _method(_package() / "methods" / f"{method.name}.py", True)
            assert whole is not None
            return whole
    raise UnknownNameError.of("method", name, [method.name for method in listed])


def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show this one with its settings.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the methods. With a name: that one with its settings."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    if name is None:
        listed = known(settings=False)
        table = Table("method", "what it does")
        for method in listed:
            table.add_row(method.name, escape(method.summary))
        show(table, data=[{"name": method.name, "summary": method.summary} for method in listed], as_json=as_json)
        return
    method = method_named(name)
    table = Table("setting", "type", "default", "meaning")
    for field in method.fields:
        table.add_row(field.name, escape(field.type), escape(field.default or "needed"), escape(field.help))
    show(Group(Text(f"{method.class_name}: {method.text}"), table), data=asdict(method), as_json=as_json)


def _method(path: Path, settings: bool) -> Method | None:
    if f"class {path.stem.replace('_', '')}" not in path.read_text(encoding="utf-8").lower():
        return None  # no need to parse it
    for node in _tree(path).body:
        stem = isinstance(node, ast.ClassDef) and node.name.lower() == path.stem.replace("_", "")
        if isinstance(node, ast.ClassDef) and stem and "final" in map(ast.unparse, node.decorator_list):
            line = _line(path, node)
            if line is not None:
                text = ast.get_docstring(node) or ""
                return Method(path.stem, node.name, text.split("\n", 1)[0], text, _fields(line) if settings else ())
    return None


@cache
def _tree(path: Path) -> ast.Module:
    """What a file says outside of its functions: most of the time of reading it would go into their bodies."""
    text = path.read_text(encoding="utf-8")
    try:
        return ast.parse("\n".join(_outside_functions(text.splitlines())))
    except SyntaxError:  # a line of a string that stands further left than the function it lies in
        return ast.parse(text)


def _outside_functions(lines: list[str]) -> Iterator[str]:
    """The lines, every function down to its first one."""
    inside: int | None = None
    for line in lines:
        word = line.lstrip()
        depth = len(line) - len(word)
        if inside is not None and (not word or depth > inside or word[0] in ")]#"):
            continue
        inside = None
        if word.startswith(("def ", "async def ")):
            inside = depth
            line = f"{line.split('(')[0].split('[')[0]}(): ..."
        yield line


def _line(path: Path, node: ast.ClassDef) -> list[tuple[Path, ast.ClassDef]] | None:
    """The class and what it inherits settings from, the oldest first; None where it is no method."""
    for base in node.bases:
        name = ast.unparse(base)
        if name == "Method":
            return [(path, node)]
        found = _defined(path, name)
        older = _line(*found) if found is not None and isinstance(found[1], ast.ClassDef) else None  # type: ignore[arg-type]
        if older is not None:
            return [*older, (path, node)]
    return None


def _defined(path: Path, name: str) -> tuple[Path, ast.AST] | None:
    """The class, or the value, that a file means by a name: its own, or that of the niwaki file it comes from."""
    for node in _tree(path).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return path, node
        if isinstance(node, ast.Assign) and name in map(ast.unparse, node.targets):
            return path, node.value
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("niwaki."):
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    place = _package().joinpath(*str(node.module).split(".")[1:])
                    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
                    return _defined(file, alias.name) if file.is_file() else None
    return None


def _package() -> Path:
    import niwaki

    return Path(niwaki.__file__).parent


def _fields(line: list[tuple[Path, ast.ClassDef]]) -> tuple[Field, ...]:
    """Settings of a class and of those it inherits from; one that is set again keeps its place, as in a dataclass."""
    found: dict[str, Field] = {}
    for path, node in line:
        for item, after in zip(node.body, [*node.body[1:], None], strict=True):
            if (
                isinstance(item, ast.AnnAssign)
                and isinstance(item.target, ast.Name)
                and "ClassVar" not in ast.dump(item.annotation)
            ):
                said = (
                    isinstance(after, ast.Expr)
                    and isinstance(after.value, ast.Constant)
                    and isinstance(after.value.value, str)
                )
                help = " ".join(str(after.value.value).split()) if said else ""  # type: ignore[union-attr]
                default = None if item.value is None else ast.unparse(item.value)
                found[item.target.id] = Field(item.target.id, _shown(path, item.annotation), default, help)
    return tuple(found.values())


def _shown(path: Path, hint: ast.AST) -> str:
    """A type as its choices where it has some; an alias is looked up where it is defined."""
    if isinstance(hint, ast.Name):
        found = _defined(path, hint.id)
        return _shown(*found) if found is not None and not isinstance(found[1], ast.ClassDef) else hint.id
    if isinstance(hint, ast.Subscript) and ast.unparse(hint.value) == "Literal":
        listed = hint.slice.elts if isinstance(hint.slice, ast.Tuple) else [hint.slice]
        return " | ".join(str(choice.value) if isinstance(choice, ast.Constant) else "?" for choice in listed)
    return ast.unparse(hint)
