"""What methods of several trainings make of what they are given: rises of a loss, validation, batches to fold by."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_staged import METHODS, choosing, made, net, task  # noqa: F401  # a fixture

import niwaki
from niwaki.methods import GroupChannelPruning, staged
from niwaki.methods.group_channel_pruning import BATCHES
from niwaki.train import Recovery, Validation


@pytest.mark.parametrize(("dear", "name"), [("ab", "a.0"), ("c", "c.0"), ("d", "d.0")])
def test_groups_whose_loss_rises_stay(dear, name):
    """Of each group of layers in turn every masked scale costs 1, and those of the others nothing: these go first, and
    are enough for the budget."""
    model, heard = net(), []
    for layer in (model.a, model.b, model.c, model.d):
        layer[1].weight.data = torch.linspace(0.1, 1, layer[1].num_features)

    def loss(model, batch):
        return 1 + sum((getattr(model, layer)[1].weight == 0).sum() for layer in dear)

    def calibration(number, seed):
        heard.append((number, seed))
        return [None]

    given = SimpleNamespace(calibration=calibration, loss=loss)
    kept = choosing(GroupChannelPruning(), model, niwaki.Budget(keep=0.6, of="params"), task=given)
    assert kept and name not in kept and heard == [(BATCHES, 0)]


def test_no_training_under_pressure_ends_early(task):  # noqa: F811
    """The schedule of the pressure has an end; the others stop as the recovery says."""
    watch = Validation(patience=1, limit=20)
    method = replace(METHODS[1], dense_epochs=0, sparse_epochs=2)
    found = made(method, task, recovery=Recovery(epochs=1, limit=1, validation=watch))
    settings = {stage: told["settings"]["validation"] for stage, told in found.details["trainings"].items()}
    assert {stage: one["patience"] for stage, one in settings.items()} == {"sparse": None, "tune": 1, "distil": 1}
    assert {one["limit"] for one in settings.values()} == {20}  # it is looked at all the same
    assert len(found.details["trainings"]["sparse"]["epochs"]) == 2


@pytest.mark.parametrize(("fold", "batches"), [("shift", 1), ("mean", 3)])
def test_constants_by_shift_need_one_batch(task, fold, batches, monkeypatch):  # noqa: F811
    """What a scale of zero leaves does not depend on the data; a mean does."""
    heard, plain = [], staged.repair

    def repair(small, inputs, **more):
        heard.append([tuple(one.shape) for one in inputs])
        return plain(small, inputs, **more)

    monkeypatch.setattr(staged, "repair", repair)
    method = replace(METHODS[1], dense_epochs=0, sparse_epochs=0, tune_epochs=0, distil_epochs=0, fold=fold)
    found = made(method, task, recovery=None, calibration=3)
    assert heard == [[(32, 1, 8, 8)] * batches] and found.stages[1].stage == "folded constants"


def test_a_refit_is_nearer_to_the_dense_network_than_means(task):  # noqa: F811
    """The same cut; its scores on test pictures, before any training."""
    model, apart, told = net(), {}, {}
    pictures = next(iter(task.splits.test.batches(200)))[0]
    for batch in task.calibration(3, 0):
        model.train()(task.inputs(batch))
    for fold in ("mean", "refit"):
        bare = replace(METHODS[1], dense_epochs=0, sparse_epochs=0, tune_epochs=0, distil_epochs=0, fold=fold)
        found = made(bare, task, model=model.eval(), recovery=None, repair=False)
        with torch.no_grad():
            apart[fold] = float((found.model.eval()(pictures) - model(pictures)).square().mean())
        told[fold] = [stage.stage for stage in found.stages]
    assert told == {"mean": ["cut", "folded constants"], "refit": ["cut", "refitted layers"]}
    assert apart["refit"] < 0.8 * apart["mean"]
