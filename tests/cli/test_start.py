"""Help and the list of methods come at once and without torch."""

import importlib
import pathlib
import resource
import subprocess
import sys

import pytest

CALL = (
    "import sys; from niwaki.cli import main; code = main(sys.argv[1:]);"
    "heavy = sorted({'torch', 'numpy', 'matplotlib', 'scipy'} & set(sys.modules));"
    "print('imported:', *heavy, file=sys.stderr); sys.exit(code)"
)


def start(*arguments: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """What was said, and the seconds of processor time it took: the clock on the wall counts other programs too."""
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", CALL, *arguments], capture_output=True, text=True, timeout=60)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime


@pytest.mark.parametrize(
    "arguments",
    [("--help",), ("methods",), ("methods", "--json"), ("methods", "taylor"), ("--version",), ("compress", "--help")],
    ids=" ".join,
)
def test_in_half_a_second_without_torch(arguments: tuple[str, ...]) -> None:
    tries = []
    for _ in range(3):  # the best of three: the first may have to write compiled files
        done, seconds = start(*arguments)
        assert done.returncode == 0, done.stderr
        assert done.stderr == "imported:\n"
        assert done.stdout
        tries.append(seconds)
    assert min(tries) < 0.5


def test_methods_are_read_without_the_bodies_of_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    listing = importlib.import_module("niwaki.cli.methods")
    quick = listing.known()
    text = (
        "@final\nclass A:\n    x: int = 1\n\n    async def f[T](\n        self,\n    ) -> T:\n        go\n\n    y = 2"
    )
    left = ["@final", "class A:", "    x: int = 1", "", "    async def f(): ...", "    y = 2"]
    assert list(listing._outside_functions(text.splitlines())) == left
    listing._tree.cache_clear()
    monkeypatch.setattr(listing, "_outside_functions", lambda lines: lines)
    try:
        assert len(quick) > 5 and listing.known() == quick
    finally:
        listing._tree.cache_clear()


def test_a_file_that_cannot_be_read_so_is_read_whole(tmp_path: pathlib.Path) -> None:
    listing = importlib.import_module("niwaki.cli.methods")
    file = tmp_path / "odd.py"
    file.write_text('def f():\n    return """\ntext )\n"""\nclass Odd:\n    x = 1\n')
    assert [type(node).__name__ for node in listing._tree(file).body] == ["FunctionDef", "ClassDef"]


def test_importing_niwaki_imports_no_torch() -> None:
    code = "import niwaki, niwaki.errors, sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_a_report_needs_no_torch(tmp_path: object) -> None:
    done, _ = start("report", str(tmp_path))
    assert done.returncode == 2
    assert "imported:\n" in done.stderr


def test_the_reader_may_go_away() -> None:
    code = f"{sys.executable} -c {CALL!r} --help | head -1"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("Usage: niwaki")
    assert "Traceback" not in done.stderr
