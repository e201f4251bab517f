"""What README.md and docs/ show runs as it stands, and what is generated is up to date."""

import importlib.util
import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import typer
from torch import nn

import niwaki
from laws.common import plans, tensors_of, trace
from niwaki.surgery.cut import sliced
from zoo import ZOO

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PLAN_FORMAT = (ROOT / "docs" / "plan-format.md").read_text(encoding="utf-8")
PAGES = sorted(path for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")))


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "tools" / "tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- code ------------------------------------------------------------------------------------------------------


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    space: dict = {"__name__": "readme"}
    for block in blocks(README, "python"):
        exec(compile(block, "README.md", "exec"), space)
    assert "passed" not in capsys.readouterr().err
    result, byhand, inputs = space["result"], space["byhand"], space["inputs"]
    assert result.after["macs"].value <= 0.5 * result.before["macs"].value
    cut = niwaki.cut(space["model"], result.plan).eval()
    assert torch.equal(cut(inputs), byhand.eval()(inputs)), "the plan by hand is not what niwaki cuts"


def test_the_library_code_is_the_quickstart():
    script = (ROOT / "examples" / "quickstart.py").read_text(encoding="utf-8")
    assert script.split('"""\n\n', 1)[1] == blocks(README, "python")[0]


def test_every_shell_line_exists():
    commands = typer.main.get_command(niwaki_app()).commands
    seen = set()
    for line in "\n".join(blocks(README, "sh")).splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), line
        elif words[0] == "niwaki":
            commands[words[1]].make_context(words[1], words[2:])  # parses, and refuses unknown options
            seen.add(words[1])
        else:
            assert words[:2] == ["pip", "install"], line
    assert seen == set(commands), f"commands that the README does not show: {set(commands) - seen}"


def test_an_unknown_option_would_be_noticed():
    trace = typer.main.get_command(niwaki_app()).commands["trace"]
    with pytest.raises(Exception, match="No such option"):
        trace.make_context("trace", ["torchvision:resnet18", "--colour"])


def niwaki_app() -> typer.Typer:
    from niwaki.cli import app

    return app


@pytest.mark.parametrize("name", ["user_factory", "digits_resnet", "cifar_resnet"])
def test_the_examples_run(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name])
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().out


# -- the plan without niwaki -----------------------------------------------------------------------------------


class Grouped(nn.Module):
    """A grouped convolution between plain ones, heads, and a tied weight: blocks, grids and second names."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3)
        self.b = nn.Conv2d(16, 24, 3, groups=4)
        self.c = nn.Conv2d(24, 6, 1)
        self.d = nn.Conv2d(6, 6, 1)
        self.e = nn.Conv2d(6, 6, 1)
        self.e.weight = self.d.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.c(torch.relu(self.b(torch.relu(self.a(x)))))
        return self.e(torch.relu(self.d(x))).mean((2, 3)) @ torch.ones(6, 2)


@pytest.mark.parametrize("grids", ["rows", "columns"])
def test_the_full_code_of_the_plan_format_cuts_as_niwaki_does(grids):
    space: dict = {}
    exec(compile(blocks(PLAN_FORMAT, "python")[0], "plan-format.md", "exec"), space)
    model, example = Grouped(), torch.rand(1, 3, 9, 9)
    graph = niwaki.trace(model, example)
    scores = niwaki.score(graph, niwaki.collect(model, graph, frozenset()), how=niwaki.scores.Random())
    plan = niwaki.choose(graph, scores, niwaki.Budget(keep=0.7, of="units"), how=niwaki.budgets.Uniform(), grids=grids)
    cuts = json.loads(plan.to_json())["cuts"]
    assert any("blocks" in cut for cut in cuts)
    ours, theirs = niwaki.cut(model, plan).state_dict(), space["cut_tensors"](model.state_dict(), cuts)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


class Shuffled(nn.Module):
    """Channels in a fixed order, which a buffer of whole numbers holds: a cut renumbers it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 3)
        self.register_buffer("order", torch.tensor([3, 1, 7, 0, 5, 2, 6, 4]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)).index_select(1, self.order))


def shuffled() -> tuple[nn.Module, niwaki.Plan]:
    model = Shuffled()
    graph = niwaki.trace(model, torch.rand(1, 3, 9, 9))
    scores = niwaki.score(graph, niwaki.collect(model, graph, frozenset()), how=niwaki.scores.Random())
    plan = niwaki.choose(graph, scores, niwaki.Budget(keep=0.5, of="units"))
    assert any("values" in cut for cut in plan.cuts)
    return model, plan


def test_the_code_of_the_plan_format_renumbers_tables():
    space: dict = {}
    exec(compile(blocks(PLAN_FORMAT, "python")[0], "plan-format.md", "exec"), space)
    model, plan = shuffled()
    ours = niwaki.cut(model, plan).state_dict()
    theirs = space["cut_tensors"](model.state_dict(), json.loads(plan.to_json())["cuts"])
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)


def test_the_code_of_the_plan_format_grows():
    space: dict = {}
    exec(compile(blocks(PLAN_FORMAT, "python")[0], "plan-format.md", "exec"), space)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 9, 2))
    graph = niwaki.trace(model, torch.rand(1, 3, 5, 5))
    times = np.ones(graph.units.count, np.int64)
    times[next(g.ids for g in graph.groups if g.fixed is None)[:2]] = (3, 2)
    plan = niwaki.graph.plans.plan_of(graph, times)
    ours = niwaki.cut(model, plan).state_dict()
    theirs = space["cut_tensors"](model.state_dict(), json.loads(plan.to_json())["cuts"])
    assert ours["2.weight"].shape == (2, 7 * 9)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_code_of_the_plan_format_does_every_network_of_the_zoo():
    """Blocks, tables, tied names and all that comes together, by rows and by columns."""
    space: dict = {}
    exec(compile(blocks(PLAN_FORMAT, "python")[0], "plan-format.md", "exec"), space)
    kinds: set[str] = set()
    for case in ZOO:
        model, _, graph = trace(case)
        tensors = {name: tensor.detach() for name, tensor in tensors_of(model).items()}
        for label, plan in plans(model, graph, kinds=2):
            cuts = json.loads(plan.to_json())["cuts"]
            kinds.update(key for cut in cuts for key in cut)
            ours, theirs = tensors_of(sliced(model, plan)), space["cut_tensors"](tensors, cuts)
            odd = [name for name in ours if not torch.equal(ours[name], theirs[name])]
            assert not odd, f"{case.name}, {label}: {odd}"
    assert {"blocks", "values", "mask"} <= kinds


def test_the_loop_of_the_readme_renumbers_tables(tmp_path, monkeypatch):
    model, plan = shuffled()
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    (tmp_path / "runs" / "quickstart" / "plan.json").write_text(plan.to_json())
    monkeypatch.chdir(tmp_path)
    space: dict = {"torch": torch, "model": model}
    (loop,) = [block for block in blocks(README, "python") if "plan.json" in block and "byhand" in block]
    exec(compile(loop, "README.md", "exec"), space)
    ours, theirs = niwaki.cut(model, plan).state_dict(), space["byhand"].state_dict()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)


def test_the_fingerprint_covers_what_the_format_says():
    """The class, names and shapes; neither types nor values."""
    found = [niwaki.trace(net, torch.zeros(1, 2, dtype=kind)).fingerprint for net, kind in (
        (nn.Linear(2, 3), torch.float32), (nn.Linear(2, 3).double(), torch.float64), (nn.Linear(2, 4), torch.float32)
    )]  # fmt: skip
    assert found[0] == found[1] != found[2]
    (line,) = [line for line in PLAN_FORMAT.splitlines() if line.startswith("| `model` |")]
    assert "names and shapes of all parameters and buffers; types and values do not count" in line


def test_the_format_lists_what_a_plan_has():
    shown = json.loads(blocks(PLAN_FORMAT, "json")[0])
    model, example = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.zeros(1, 4)
    method, budget = niwaki.methods.Magnitude(), niwaki.Budget(keep=0.5)
    plan = niwaki.compress(model, example, method=method, budget=budget).plan
    found = json.loads(plan.to_json())
    assert list(shown) == list(found)
    assert set(shown["promised"]) == set(found["promised"]) and set(shown["model"]) == set(found["model"])
    assert set(shown["decided_by"]) <= set(found["decided_by"]) and set(shown["budget"][0]) == set(found["budget"][0])
    assert all(f"`{key}`" in PLAN_FORMAT for key in found)


# -- tables, links ---------------------------------------------------------------------------------------------


def test_generated_tables_are_up_to_date(tables):
    stale = [str(path.relative_to(ROOT)) for path in tables.out_of_date(ROOT)]
    assert not stale, f"run `python tools/tables.py`: {', '.join(stale)}"


def test_tables_show_what_rows_say_and_dashes_for_the_rest(tables, tmp_path):
    cards = tmp_path / "docs" / "cards" / "methods"
    cards.mkdir(parents=True)
    for title in ("Random", "Taylor"):
        matter = f"title: {title}\nsource: s\nneeds: n\npasses over data: 0\nexact: yes\nstatus: trial\n"
        (cards / f"{title.lower()}.md").write_text(f"---\n{matter}---\n")
    assert "Not measured yet" in tables.overview(tmp_path) and "| - | - | - |" in tables.overview(tmp_path)
    assert tables.card_table(tmp_path, "Random") == "Not yet measured."
    taylor = cards / "taylor.md"
    taylor.write_text(taylor.read_text().replace("status: trial\n", "status: trial\nbenchmark: pagcp\n"))
    assert "| s | trial | - | - | [elsewhere](docs/benchmarks/pagcp.md) |" in tables.overview(tmp_path)
    assert "(../../benchmarks/pagcp.md)" in tables.card_table(tmp_path, "Taylor", "pagcp")
    same = {"network": "resnet20", "command": "python benchmarks/cifar.py", "commit": "abc"}
    cut = {
        **same,
        "what": "cut",
        "settings": {"score": {"name": "Random"}, "rule": {"name": "Uniform"}},
        "batch_norm": 80.0,
        "difference": 1e-15,
    }
    macs = {"macs_before": 100, "macs_promised": 50, "macs_counted": 50}
    rows = [{**cut, **macs, "method": f"Random, seed {seed}", "cut": 10.0 + seed} for seed in (0, 2)]
    rows.append({**same, "what": "recovery", "method": "Random, seed 0", "recovered": 90.0, "steps": 7, "epochs": 3})
    rows.append({**same, "what": "dense", "accuracy": 91.0})
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / tables.RESULTS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (line,) = [line for line in tables.overview(tmp_path).splitlines() if "random.md" in line]
    assert line.startswith("| [Random](docs/cards/methods/random.md), 2 seeds | s | trial | 11.0 (10.0..12.0) |")
    assert line.endswith("| 90.0, 21 steps, 1 seed |")
    assert "| resnet20 | Random | 91.0 | 11.0 (10.0..12.0) |" in tables.card_table(tmp_path, "Random")
    assert "0.5000, promised = counted" in tables.card_table(tmp_path, "Random")
    rows[0]["macs_counted"] = 51
    (tmp_path / tables.RESULTS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "promised IS NOT counted" in tables.card_table(tmp_path, "Random")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_inside_the_repository_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
