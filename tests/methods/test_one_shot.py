"""What one-shot methods share: settings reach the blocks they are for, and constants are folded where asked."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import niwaki
from laws.common import AnyTask, block_classes
from niwaki.methods import Magnitude, NormScale, OptimalBrainSurgeon, Random, Taylor
from niwaki.methods.one_shot import OneShot

EXAMPLE = torch.zeros(4, 3)


def plain() -> nn.Sequential:
    """No batch norm, and a last layer without bias: 3 -> 8 -> 8 -> 2."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 8), nn.Sigmoid(), nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 2, bias=False)
    ).eval()


def normed() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).eval()


def small_by(method: Any, model: nn.Module | None = None, **settings: Any) -> niwaki.Outcome:
    model, budget = model or normed(), niwaki.Budget(keep=0.5)
    task = settings.pop("task", AnyTask(torch.randn(16, 3)))
    return niwaki.compress(model, EXAMPLE, method=method, budget=budget, task=task, **settings)


@pytest.mark.parametrize(
    ("method", "part", "setting"),
    [
        (Magnitude(merge="max"), "score", {"merge": "max"}),
        (Magnitude(over="out", p=1), "score", {"over": "out", "p": 1}),
        (NormScale(merge="max"), "score", {"merge": "max"}),
        (Taylor(over="out", merge="joint"), "score", {"over": "out", "merge": "joint"}),
        (Magnitude(per="macs", normalise="sum"), "rule", {"per": "macs", "normalise": "sum"}),
        (NormScale(per="params", normalise="mean"), "rule", {"per": "params", "normalise": "mean"}),
        (Taylor(per="macs"), "rule", {"per": "macs", "normalise": "none"}),
        (OptimalBrainSurgeon(ridge=0.5, rounds=3), "score", {"ridge": 0.5, "rounds": 3}),
        (OptimalBrainSurgeon(), "rule", {"per": "macs", "normalise": "none"}),
        (Random(rule="global_rank", per="params"), "rule", {"name": "GlobalRank", "per": "params"}),
        (Random(), "rule", {"name": "Uniform"}),
    ],
    ids=str,
)
def test_settings_reach_their_block(method: Any, part: str, setting: dict[str, Any]) -> None:
    outcome = small_by(method)
    assert outcome.plan.decided_by[part].items() >= setting.items()
    assert outcome.method == {"name": type(method).__name__, **vars(method)}


def test_bundle_reaches_choose() -> None:
    assert small_by(Magnitude(bundle="max")).plan.decided_by["bundle"] == "max"
    assert small_by(Taylor()).plan.decided_by["bundle"] == "sum"


def test_defaults_are_those_of_the_papers() -> None:
    listed = [cls for cls in block_classes("methods") if issubclass(cls, OneShot)]
    found = {cls.__name__: (cls().rule, cls().normalise, cls().bundle) for cls in listed}
    assert found == {
        "Magnitude": ("global_rank", "max", "mean"),
        "NormScale": ("global_rank", "none", "mean"),
        "OptimalBrainSurgeon": ("global_rank", "none", "sum"),
        "Taylor": ("global_rank", "none", "sum"),
        "Random": ("uniform", "max", "mean"),
    }


@pytest.mark.parametrize("method", [Magnitude, NormScale, OptimalBrainSurgeon, Taylor, Random])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "median"}, r"rule='median'\); found: known: global_rank, uniform"),
        ({"normalise": True}, r"normalise=True\); found: known: none, mean, max, sum, lamp"),
        ({"per": "joules"}, r"per='joules'\); found: known: unit, macs, params"),
        ({"grids": "cells"}, r"grids='cells'\); found: known: rows, columns"),
        ({"bundle": "median"}, r"bundle='median'\); found: known: sum, mean, max"),
        ({"rule": "uniform", "per": "macs"}, r"uniform compares no groups"),
    ],
    ids=str,
)
def test_unknown_choices_are_refused(method: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(niwaki.errors.InputError, match=message):
        method(**settings)


def test_folding_needs_data() -> None:
    with pytest.raises(niwaki.errors.InputError, match=r"Magnitude with fold=True without data.*give a task"):
        small_by(Magnitude(fold=True), task=None)


def test_refitting_needs_data_and_takes_the_place_of_folding() -> None:
    with pytest.raises(niwaki.errors.InputError, match=r"Magnitude with refit=True without data.*give a task"):
        small_by(Magnitude(refit=True), task=None)
    with pytest.raises(niwaki.errors.InputError, match=r"Taylor with fold=True and refit=True.*leave fold out"):
        Taylor(fold=True, refit=True)
    with pytest.raises(niwaki.errors.InputError, match=r"refit_inputs='cut'; found: nothing is refitted.*refit=True"):
        Magnitude(refit_inputs="cut")
    with pytest.raises(niwaki.errors.InputError, match=r"refit_inputs.*known: whole, cut"):
        Magnitude(refit=True, refit_inputs="small")  # type: ignore[arg-type]


def test_a_surgeon_needs_data_and_leaves_no_blocks_out() -> None:
    with pytest.raises(niwaki.errors.InputError, match=r"OptimalBrainSurgeon without data; found: its score needs"):
        small_by(OptimalBrainSurgeon(refit=False), task=None)
    for blocks in ("also", "only"):
        with pytest.raises(niwaki.errors.InputError, match=rf"blocks='{blocks}'.*can't judge whole blocks"):
            OptimalBrainSurgeon(blocks=blocks)


def test_a_surgeon_cuts_copies_for_nothing() -> None:
    """Units 4 to 7 are units 0 to 3 once more: half of them go, and what stays, refitted, puts out the same."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 8), nn.Sigmoid(), nn.Linear(8, 2)).eval()
    with torch.no_grad():
        for tensor in (model[0].weight, model[0].bias):
            tensor[4:] = tensor[:4]
    x = torch.randn(64, 3)
    budget = niwaki.Budget(keep=4, of="units")
    methods = OptimalBrainSurgeon(ridge=1e-6), OptimalBrainSurgeon(ridge=1e-6, refit=False)
    found, apart = (niwaki.compress(model, x, method=how, budget=budget, task=AnyTask(x)) for how in methods)
    assert sorted(unit % 4 for unit in next(iter(found.plan.kept.values()))) == [0, 1, 2, 3]
    assert torch.allclose(found.model(x), model(x), atol=0.01)
    assert not torch.allclose(apart.model(x), model(x), atol=0.1)  # nobody took over


class Narrowed(nn.Module):
    """Its width is written into the forward, so that it is cut as a rewritten graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.first(x).view(-1, 8)
        return self.last(hidden.relu())  # type: ignore[no-any-return]


@pytest.mark.parametrize("setting", ["fold", "refit"])
def test_other_modules_are_refused_before_anything_is_measured(setting: str) -> None:
    heard: list[str] = []
    with pytest.raises(niwaki.errors.InputError, match="cut through the exported door"):
        small_by(Magnitude(**{setting: True}), Narrowed(), progress=lambda step, seconds: heard.append(step))
    assert "cut" in heard and "measure cut" not in heard


def test_a_refit_is_nearer_to_the_uncut_network() -> None:
    """The same plan; without batch norm nothing else repairs it."""
    model, x = plain(), torch.randn(256, 3)
    apart = {}
    choices: tuple[dict[str, Any], ...] = ({}, {"fold": True}, {"refit": True}, {"refit": True, "refit_inputs": "cut"})
    for settings in choices:
        outcome = small_by(Magnitude(**settings), model, task=AnyTask(x))
        with torch.no_grad():
            apart[str(settings)] = float((outcome.model(x) - model(x)).square().mean())
        stages = [stage.stage for stage in outcome.stages]
    assert stages == ["cut", "refitted layers"]
    bare, folded, refitted, in_turn = apart.values()
    assert in_turn < 0.9 * refitted < 0.45 * folded < 0.225 * bare
    assert outcome.method["refit"] is True


def test_a_dead_channel_is_folded_as_by_hand() -> None:
    """gamma = 0 and beta = 0.5 in the last half: relu(beta) x their weights goes into the bias."""
    model = normed()
    with torch.no_grad():
        model[1].weight[4:], model[1].bias[4:] = 0.0, 0.5
    outcome = small_by(NormScale(fold=True), model, repair=False)
    assert outcome.plan.kept == {"0": (0, 1, 2, 3)}
    wanted = model[3].bias + model[3].weight[:, 4:].sum(1) * 0.5
    assert torch.allclose(outcome.model[3].bias, wanted, atol=1e-6)
    x = torch.randn(5, 3)
    with torch.no_grad():
        assert torch.allclose(outcome.model(x), model(x), atol=1e-6)
    assert [stage.stage for stage in outcome.stages] == ["cut", "folded constants"]
    assert outcome.unfolded == () and outcome.receipt.passed


def test_folding_comes_before_batch_norm() -> None:
    stages = [stage.stage for stage in small_by(Magnitude(fold=True)).stages]
    assert stages == ["cut", "folded constants", "batch-norm"]
    assert "folded constants" not in [stage.stage for stage in small_by(Magnitude()).stages]


def test_folding_saves_a_network_without_batch_norm() -> None:
    model, task = plain(), AnyTask(torch.randn(64, 3))
    x = torch.cat([task.inputs(batch) for batch in task.calibration(3, 0)])
    gaps = []
    for fold in (False, True):
        small = small_by(Magnitude(fold=fold), model, task=task).model
        with torch.no_grad():
            gaps.append(float((small(x) - model(x)).pow(2).mean()))
    assert gaps[1] < 0.25 * gaps[0]


def test_an_added_bias_is_trained_saved_and_loaded(tmp_path: Path) -> None:
    alone = small_by(Magnitude(fold=True), plain()).model[4].bias
    outcome = small_by(Magnitude(fold=True), plain(), recovery=niwaki.train.Recovery(epochs=1, lr=0.05))
    assert not torch.equal(outcome.model[4].bias, alone), "the recovery did not train it"
    outcome.save(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "report.json").read_text())["unfolded"] == []
    loaded = niwaki.load(tmp_path / "run", plain)
    assert set(loaded.state_dict()) == set(outcome.model.state_dict()) > set(plain().state_dict())
    x = torch.randn(5, 3)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(x), outcome.model.eval()(x))


def test_what_could_not_be_folded_is_in_the_report(tmp_path: Path) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.cell, self.b = nn.Linear(3, 8), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.cell(torch.sigmoid(self.a(x)))[0])

    outcome = niwaki.compress(
        Recurrent(),
        torch.randn(2, 4, 3),
        method=Random(fold=True),
        budget=niwaki.Budget(keep=0.5),
        task=AnyTask(torch.randn(2, 4, 3)),
    )
    assert outcome.unfolded == ("cell.weight_ih_l0", "cell.weight_hh_l0")
    assert outcome.report()["unfolded"] == list(outcome.unfolded)


def test_norms_are_settled_where_no_training_follows() -> None:
    """Refitted in turn they take over new statistics and scales; a recovery starts from those that they had."""
    method = Magnitude(refit=True, refit_inputs="cut")
    for recovery, settled in ((None, True), (niwaki.train.Recovery(epochs=1, lr=1e-9), False)):
        outcome = small_by(method, repair=False, recovery=recovery)
        norm: Any = outcome.model[1]
        assert bool((norm.weight - 1).abs().max() > 0.05) is settled
