"""Groups cut one at a time, by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import niwaki
from niwaki.cli import main
from niwaki.errors import FileDamagedError, InputError
from niwaki.report.sensitivities import table_of
from niwaki.sensitivity import Row

X = torch.zeros(1, 2)


class Judged(niwaki.tasks.Task):
    """A metric that anybody can work out: 10 for every hidden unit that is left."""

    steps = 1
    asked: list[str]

    def __init__(self) -> None:
        self.asked = []

    def train_batches(self, seed: int) -> Any:
        return iter([X])

    def calibration(self, n_batches: int, seed: int) -> list[Any]:
        return [X]

    def inputs(self, batch: Any) -> Any:
        return batch

    def example(self) -> Any:
        return X

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return model(batch).sum()

    def evaluate(self, model: nn.Module, *, split: str = "test", limit: int | None = None) -> Any:
        self.asked.append(split)
        hidden = sum(one.out_features for one in list(model)[:-1])  # type: ignore[call-overload]
        return niwaki.Measurement("score", 10.0 * hidden, "points", "ten for every hidden unit")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.Linear(8, 4), nn.Linear(4, 2))


def test_every_group_alone_on_the_validation_split() -> None:
    task = Judged()
    found = niwaki.sensitivity(net(), X, task=task, shares=(0.5, 0.25))
    rows = {(row.units, row.kept): (row.value, round(row.macs * 56)) for row in found.rows}
    # 2 x 8 + 8 x 4 + 4 x 2 = 56; with 4 of 8: 8 + 16 + 8; with 2 of 8: 4 + 8 + 8; with 2 of 4: 16 + 16 + 4; 1 of 4: 26
    assert rows == {(8, 4): (80.0, 32), (8, 2): (60.0, 20), (4, 2): (100.0, 36), (4, 1): (90.0, 26)}
    assert found.before == 120.0 and found.metric == "score" and set(task.asked) == {"val"}
    assert [rows[0].units for _, rows in found.worst_first()] == [8, 4]


def test_without_data_by_how_far_outputs_move() -> None:
    """A unit that nothing reads moves nothing; half of two equal ones moves half of the output."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 1.0], [1.0, 1.0]]))
        model[1].weight.fill_(1.0)
    (row,) = niwaki.sensitivity(model, X, shares=(0.5,)).rows
    assert row.value == pytest.approx(0.5) and row.kept == 1
    with torch.no_grad():
        model[1].weight[0, 0] = 0.0
        model[0].weight[0] = 1e-3
    (row,) = niwaki.sensitivity(model, X, shares=(0.5,)).rows
    assert row.value == 0.0


def test_what_was_measured_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    first, heard = Judged(), []
    found = niwaki.sensitivity(net(), X, task=first, shares=(0.5, 0.25), file=file)
    content = file.read_text()
    assert len(first.asked) == len(content.splitlines()) == 5
    lines = content.splitlines(keepends=True)
    file.write_text("".join(lines[:3]) + lines[3][:20])  # killed in the middle of a line
    again = Judged()
    resumed = niwaki.sensitivity(
        net(), X, task=again, shares=(0.5, 0.25), file=file, progress=lambda *it: heard.append(it)
    )
    assert resumed.rows == found.rows and len(again.asked) == len(heard) == 2
    assert sorted(file.read_text().splitlines()) == sorted(content.splitlines())
    idle = Judged()
    whole = niwaki.sensitivity(net(), X, task=idle, shares=(0.5, 0.25), file=file)
    assert not idle.asked and (whole.metric, whole.unit, whole.before) == ("score", "points", 120.0)
    other = net()
    with torch.no_grad():
        other[0].weight.mul_(2)
    third = Judged()
    niwaki.sensitivity(other, X, task=third, shares=(0.5, 0.25), file=file)
    assert len(third.asked) == 5  # other weights are other settings
    file.write_text("{}\n")
    with pytest.raises(FileDamagedError, match="file of sensitivities"):
        niwaki.sensitivity(net(), X, file=file)


@pytest.mark.parametrize("shares", [(), (1.0,), (0.0,), (50,), (0.5, 1.5)], ids=str)
def test_shares(shares: Any) -> None:
    with pytest.raises(InputError, match="not between 0 and 1"):
        niwaki.sensitivity(net(), X, shares=shares)


def test_bad_input() -> None:
    with pytest.raises(InputError, match="no group can be cut"):
        niwaki.sensitivity(nn.Sequential(nn.Linear(2, 2)), X)
    with pytest.raises(InputError, match="needs gradients"):
        niwaki.sensitivity(net(), X, how=niwaki.scores.Taylor())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "user.py"
    file.write_text(
        "import torch\nfrom torch import nn\n"
        "def make():\n    return nn.Sequential(nn.Linear(2, 8), nn.Linear(8, 2)), torch.zeros(1, 2)\n"
    )
    words = ["sensitivity", f"python:{file}:make", "--shares", "0.5", "--json", "--plot"]
    assert main([*words, str(tmp_path / "page.html")]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["metric"] == "output change" and [row["kept"] for row in data["rows"]] == [4]
    page = (tmp_path / "page.html").read_text()
    assert page.startswith("<!doctype html>") and "<polyline" in page and "http" not in page.replace("http-equiv", "")
    assert main([*words, str(tmp_path / "plot.svg")]) == 0
    capsys.readouterr()
    picture = (tmp_path / "plot.svg").read_text()
    assert picture.startswith("<svg xmlns=") and picture.endswith("</svg>")
    assert main([*words, str(tmp_path / "plot.png")]) == 2
    assert "end it with .html or .svg" in capsys.readouterr().out
    for more in (["--limit", "3"], ["--score", "worst"], ["--shares", "half"]):
        assert main(["sensitivity", f"python:{file}:make", *more]) == 2
        capsys.readouterr()


def test_random_scores_follow_the_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "user.py"
    file.write_text(
        "import torch\nfrom torch import nn\n"
        "def make():\n    return nn.Sequential(nn.Linear(2, 64), nn.Linear(64, 2)), torch.zeros(1, 2)\n"
    )
    found = []
    for seed in ("0", "7"):
        words = ["sensitivity", f"python:{file}:make", "--shares", "0.5", "--json", "--score", "random"]
        assert main([*words, "--seed", seed]) == 0
        found.append(json.loads(capsys.readouterr().out)["settings"]["score"]["seed"])
    assert found == [0, 7]


def test_every_width_stands_below_the_share_that_was_asked_for():
    wide = [Row("a", 8, kept, kept / 8, 0.5) for kept in (6, 4, 2)]
    narrow = [Row("b", 2, 1, 0.25, 0.5)]  # three quarters are all of it, a quarter is one of two, as a half is
    table = table_of([("a", wide), ("b", narrow)], before=1.0, metric="accuracy", unit="", shares=(0.25, 0.75, 0.5))
    assert table.heads == ("group", "units", "75 % kept", "50 % kept", "25 % kept")
    assert [row[2:] for row in table.rows] == [("0.75 (6)", "0.5 (4)", "0.25 (2)"), ("", "0.25 (1)", "")]
