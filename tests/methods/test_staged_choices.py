"""What methods of several trainings make of what they are given: rises of a loss, validation, batches to fold by."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_staged import METHODS, choosing, made, net, task  # noqa: F401  # a fixture

import niwaki
from niwaki.errors import BudgetError, InputError
from niwaki.methods import GroupChannelPruning, YOLOv8CWD, staged
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


def test_without_a_weight_the_last_training_is_plain_tuning(task):  # noqa: F811
    """The same bits, of the weights and of what the report measures."""
    bare = replace(METHODS[1], dense_epochs=0, sparse_epochs=0, alpha=0.0)
    taught = made(replace(bare, tune_epochs=0), task)
    tuned = made(replace(bare, distil_epochs=0), task)
    assert [found.stages[-1].stage for found in (taught, tuned)] == ["distillation", "fine-tuning"]
    state = tuned.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in taught.model.state_dict().items())
    assert taught.details["trainings"]["distil"]["epochs"][0]["loss"] == tuned.history["epochs"][0]["loss"]
    other = made(replace(bare, tune_epochs=0, alpha=5.0), task)  # with one it is another training
    assert any(not torch.equal(tensor, state[name]) for name, tensor in other.model.state_dict().items())


def test_a_group_whose_fraction_is_zero_loses_nothing(task):  # noqa: F811
    """However the others are cut; where all are zero nothing is, and a budget that asks for more can't be met."""
    model = net()
    for layer in (model.a, model.b, model.c, model.d):
        layer[1].weight.data = torch.linspace(0.1, 1, layer[1].num_features)
    everything, names = niwaki.Budget(keep=1.0), ("a.0", "c.0", "d.0")
    for zero in range(3):
        fractions = tuple(0.0 if group == zero else 0.5 for group in range(3))
        literal = GroupChannelPruning(fractions=fractions, literal=True)
        assert set(choosing(literal, model, everything)) == set(names) - {names[zero]}
        scaled = choosing(GroupChannelPruning(fractions=fractions), model, niwaki.Budget(keep=0.4, of="params"))
        assert scaled and names[zero] not in scaled
    nothing = GroupChannelPruning(fractions=(0.0,) * 3, literal=True)
    assert choosing(nothing, model, everything) == {}
    with pytest.raises(BudgetError):
        choosing(GroupChannelPruning(fractions=(0.0,) * 3), model, niwaki.Budget(keep=0.9, of="params"))


@pytest.mark.parametrize(
    ("method", "defaults"),
    [
        (
            GroupChannelPruning(),  # page of Chu et al.: sections 3.2, 3.3, 3.6 and 6
            {"dense_epochs": 100, "sparse_epochs": 200, "tune_epochs": 50, "distil_epochs": 50, "rate": 1e-3,
             "pressing": "local", "switch": 0.4, "quantile": 0.65, "protected": 0.01, "groups": (), "fractions": (),
             "literal": False, "meet": "majority", "floor": 0.01, "least": 1, "backbone": 1e6, "coarsest": 1e3,
             "pyramid": 1e4, "backbone_places": (), "coarsest_places": (), "pyramid_places": (), "things": False,
             "outputs": 0.0, "temperature": 3.0, "resolution_free": True, "fold": "shift", "refit_inputs": "whole",
             "grids": "rows", "exact_only": False},
        ),
        (
            YOLOv8CWD(),  # of Sabaghian et al.: sections 3.2 to 3.4 and 6
            {"dense_epochs": 100, "sparse_epochs": 100, "tune_epochs": 100, "distil_epochs": 100, "rate": 1e-4,
             "schedule": "decreasing", "shifts": 0.0, "share": 0.0, "multiple": 8, "temperature": 4.0, "alpha": 5.0,
             "places": (), "fold": "shift", "refit_inputs": "whole", "grids": "rows", "exact_only": False},
        ),
    ],
    ids=["group_channel_pruning", "yolov8_cwd"],
)  # fmt: skip
def test_defaults_are_those_of_the_pages(method, defaults):
    assert vars(method) == defaults


def test_a_refit_is_nearer_to_the_dense_network_than_means(task):  # noqa: F811
    """The same cut; its scores on test pictures, before any training."""
    model, apart, told = net(), {}, {}
    pictures = next(iter(task.splits.test.batches(200)))[0]
    for batch in task.calibration(3, 0):
        model.train()(task.inputs(batch))
    none = replace(METHODS[1], dense_epochs=0, sparse_epochs=0, tune_epochs=0, distil_epochs=0)
    for fold, inputs in (("mean", "whole"), ("refit", "whole"), ("refit", "cut")):
        bare = replace(none, fold=fold, refit_inputs=inputs)
        found = made(bare, task, model=model.eval(), recovery=None, repair=False)
        with torch.no_grad():
            apart[fold, inputs] = float((found.model.eval()(pictures) - model(pictures)).square().mean())
        told[fold] = [stage.stage for stage in found.stages]
    assert told == {"mean": ["cut", "folded constants"], "refit": ["cut", "refitted layers"]}
    mean, whole, cut = apart.values()
    assert cut < 0.95 * whole < 0.76 * mean
    with pytest.raises(InputError, match=r"refit_inputs='cut'; found: nothing is refitted.*fold='refit'"):
        replace(none, refit_inputs="cut")
