"""`niwaki methods`: what can be asked of `compress --method`, read from the source without importing it."""

import ast
from dataclasses import asdict, dataclass
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


def known() -> tuple[Method, ...]:
    """All methods by name."""
    import niwaki

    folder = Path(niwaki.__file__).parent / "methods"
    found = [_method(path) for path in sorted(folder.glob("[a-z]*.py"))]
    return tuple(method for method in found if method is not None)


def method_named(name: str) -> Method:
    """The method of that name; the file's or the class's, in any case.

    Raises:
        UnknownNameError: there is none; the message lists all.
    """
    listed = known()
    wanted = name.lower().replace("-", "_")
    for method in listed:
        if wanted in (method.name, method.class_name.lower()):
            return method
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
        listed = known()
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


def _method(path: Path) -> Method | None:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        stem = isinstance(node, ast.ClassDef) and node.name.lower() == path.stem.replace("_", "")
        if isinstance(node, ast.ClassDef) and stem and "Method" in map(ast.unparse, node.bases):
            text = ast.get_docstring(node) or ""
            return Method(path.stem, node.name, text.split("\n", 1)[0], text, _fields(node))
    return None


def _fields(node: ast.ClassDef) -> tuple[Field, ...]:
    found = []
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
            found.append(Field(item.target.id, ast.unparse(item.annotation), default, help))
    return tuple(found)
