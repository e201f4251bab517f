"""A network of one weight, worked out by hand, and the promises about what training leaves behind."""

import json
import math
import sys

import accelerate
import pytest
import torch
from torch import nn

import niwaki.data
from niwaki.errors import (
    InputError,
    MissingExtraError,
    NotFiniteError,
    OutOfMemoryError,
    RunExistsError,
    UnknownNameError,
)
from niwaki.tasks import Classification
from niwaki.train import Recovery


class Line(nn.Module):
    """x * weight; dropout and batch norm on request, to have randomness and buffers."""

    def __init__(self, *, noisy=False):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0]))
        self.norm = nn.BatchNorm1d(1) if noisy else nn.Identity()
        self.drop = nn.Dropout(0.5 if noisy else 0.0)

    def forward(self, x):
        return self.drop(self.norm(x)) * self.weight


class Squares:
    """Loss (x * weight)^2, meaned; each epoch has the same batches unless told otherwise."""

    def __init__(self, batches=((1.0,),)):
        self.batches = [torch.tensor(batch).view(-1, 1) for batch in batches]
        self.seeds = []

    @property
    def steps(self):
        return len(self.batches)

    def train_batches(self, seed):
        self.seeds.append(seed)
        return iter(self.batches)

    def loss(self, model, batch):
        return model(batch.to(model.weight)).square().mean()


NOISY = ((1.0, 2.0, 3.0), (-1.0, 0.5, 2.0))


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def test_two_steps_of_sgd_by_hand():
    model = Line()
    how = Recovery(epochs=2, lr=0.1, momentum=0.5, weight_decay=0.5, schedule="constant", warmup=0.0)
    history = how(model, Squares())
    # gradient 2w + 0.5w; Nesterov: buffer b = g + 0.5 b, step 0.1 * (g + 0.5 b)
    weight = 2.0
    first = 2.5 * weight
    weight -= 0.1 * (first + 0.5 * first)
    second = 2.5 * weight
    weight -= 0.1 * (second + 0.5 * (0.5 * first + second))
    assert model.weight.item() == pytest.approx(weight, rel=1e-6)
    assert history.losses == pytest.approx([4.0, 1.25**2])
    assert [epoch["steps"] for epoch in history.epochs] == [1, 1]


def test_one_step_of_adamw_by_hand():
    model = Line()
    Recovery(epochs=1, lr=0.1, optimizer="adamw", weight_decay=0.5, schedule="constant", warmup=0.0)(model, Squares())
    assert model.weight.item() == pytest.approx(2.0 * (1 - 0.1 * 0.5) - 0.1, rel=1e-5)  # first step: the sign alone


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("step", [0.5, 1, 1, 0.1, 0.1, 0.01]),  # falls at steps 3 and 4.5
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
    ],
)
def test_rates_by_hand(schedule, rates):
    how = Recovery(lr=1.0, schedule=schedule, warmup=2 / 6)
    assert [how.rate(step, 6) for step in range(6)] == pytest.approx(rates)


def test_the_rate_falls_over_the_whole_training():
    history = Recovery(epochs=3, lr=1e-3, schedule="linear", warmup=0.0)(Line(), Squares())
    assert [epoch["lr"] for epoch in history.epochs] == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])


def test_training_repeats_itself_and_the_seed_decides():
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(results))
        model = Line(noisy=True)
        Recovery(epochs=2, seed=seed)(model, Squares(NOISY))
        results.append(snapshot(model))
    assert same(results[0], results[1]) and not same(results[0], results[2])


def test_every_epoch_and_every_seed_has_its_own_order():
    task = Squares()
    Recovery(epochs=2, seed=0)(Line(), task)
    Recovery(epochs=2, seed=1)(Line(), task)
    assert len(set(task.seeds)) == 4


def test_limit_is_per_epoch_and_progress_counts_steps():
    told = []
    history = Recovery(epochs=2, limit=1)(Line(), Squares(NOISY), progress=lambda *what: told.append(what))
    assert [epoch["steps"] for epoch in history.epochs] == [1, 1]
    assert told == [(1, 2, "epoch 1 of 2"), (2, 2, "epoch 2 of 2")]


def test_modes_gradients_random_state_and_the_objects_attributes_are_as_before():
    model = Line(noisy=True).eval()
    model.drop.train()
    model.weight.grad = torch.tensor([7.0])
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    before = torch.get_rng_state()
    Recovery(epochs=1)(model, Squares(NOISY))
    assert not model.training and not model.norm.training and model.drop.training
    assert model.weight.grad.item() == 7.0
    assert torch.get_rng_state().equal(before)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes


def test_a_gradient_that_lay_around_does_not_enter():
    one, other = Line(), Line()
    other.weight.grad = torch.tensor([100.0])
    for model in (one, other):
        Recovery(epochs=1)(model, Squares())
    assert one.weight.equal(other.weight)


def test_only_parameters_that_want_gradients_are_trained():
    model = Line(noisy=True)
    model.norm.weight.requires_grad_(False)
    Recovery(epochs=1, lr=0.1)(model, Squares(NOISY))
    assert model.norm.weight.item() == 1.0 and model.weight.item() != 2.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 20])
def test_a_loss_that_is_not_finite_is_refused_and_the_model_is_as_before(bad, at):
    model = Line(noisy=True).eval()
    before = snapshot(model)
    batches = [NOISY[0]] * at + [(bad, 1.0, 2.0)]
    with pytest.raises(NotFiniteError, match=f"in epoch 1, step {at + 1}") as caught:
        Recovery(epochs=1)(model, Squares(batches))
    assert caught.value.exit_code == 2
    assert same(snapshot(model), before) and not model.training and model.weight.grad is None


def test_an_error_or_an_interruption_leaves_the_model_as_before():
    for error in (RuntimeError, KeyboardInterrupt):

        def stop(done, total, text, error=error):
            if done == 2:
                raise error("stop")

        model = Line(noisy=True)
        before = snapshot(model)
        with pytest.raises(error, match="stop"):
            Recovery(epochs=2)(model, Squares(NOISY), progress=stop)
        assert same(snapshot(model), before)


def test_a_full_device_is_an_error_of_ours():
    class Full(Squares):
        def loss(self, model, batch):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(OutOfMemoryError, match="use smaller batches"):
        Recovery()(Line(), Full())


def test_the_folder_gets_the_whole_history_and_is_never_overwritten(tmp_path):
    folder = tmp_path / "run" / "recovery"
    history = Recovery(epochs=2, folder=str(folder))(Line(), Squares())
    assert json.loads((folder / "history.json").read_text()) == json.loads(json.dumps(history.to_json()))
    assert any(file.name.startswith("events.out.tfevents") for file in folder.iterdir())
    assert not list(folder.glob("*.partial"))
    model = Line()
    with pytest.raises(RunExistsError, match="it holds a history already") as caught:
        Recovery(folder=str(folder))(model, Squares())
    assert caught.value.exit_code == 2 and model.weight.item() == 2.0


def test_after_a_failure_the_same_folder_can_be_used_again(tmp_path):
    how = Recovery(epochs=1, folder=str(tmp_path))
    with pytest.raises(NotFiniteError):
        how(Line(), Squares([(math.nan,)]))
    assert not (tmp_path / "history.json").exists()
    assert how(Line(), Squares()).losses == [4.0]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"epochs": 0}, "at least 1"),
        ({"lr": 0.0}, "above 0"),
        ({"lr": math.nan}, "above 0"),
        ({"momentum": 1.0}, r"in \[0, 1\)"),
        ({"weight_decay": -1.0}, "0 or more"),
        ({"warmup": 1.0}, r"in \[0, 1\)"),
        ({"limit": 0}, "None or at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(changes, says):
    with pytest.raises(InputError, match=says):
        Recovery(**changes)


def test_unknown_names_list_the_known():
    with pytest.raises(UnknownNameError, match="cosine, linear, step, constant"):
        Recovery(schedule="exponential")
    with pytest.raises(UnknownNameError, match="sgd, adamw"):
        Recovery(optimizer="lion")


def test_models_that_cannot_learn_and_tasks_without_batches_are_refused():
    frozen = Line()
    frozen.weight.requires_grad_(False)
    with pytest.raises(InputError, match="no parameter that wants a gradient"):
        Recovery()(frozen, Squares())
    with pytest.raises(InputError, match="meta device"):
        Recovery()(Line().to("meta"), Squares())
    with pytest.raises(InputError, match="no training batches"):
        Recovery()(Line(), Squares(()))


@pytest.mark.parametrize("name", [None, "ACCELERATE_USE_CPU", "LOCAL_RANK", "WORLD_SIZE"])
def test_training_is_where_the_model_is_unless_launched(monkeypatch, name):
    """accelerate says the meta device here, as it would say CUDA on a machine that has it."""
    for known in ("ACCELERATE_USE_CPU", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(known, raising=False)
    made = []

    class Elsewhere(accelerate.Accelerator):
        def __init__(self, **settings):
            super().__init__(**settings)
            made.append(settings)

        device = torch.device("meta")

    monkeypatch.setattr(accelerate, "Accelerator", Elsewhere)
    model = Line()
    if name is None:
        history = Recovery(epochs=1)(model, Squares())
        assert history.device == "cpu" and model.weight.item() != 2.0
        return
    monkeypatch.setenv(name, "1")
    with pytest.raises(NotImplementedError, match="meta"):  # it went where accelerate said
        Recovery(epochs=1)(model, Squares())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_model_on_the_cpu_stays_there_and_one_on_the_gpu_too():
    for device in ("cpu", "cuda:0", "cpu"):
        model = Line().to(device)
        assert Recovery(epochs=1)(model, Squares()).device == str(model.weight.device) == device
        assert model.weight.item() != 2.0


def test_without_accelerate_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingExtraError, match=r"niwaki\[train\]"):
        Recovery()(Line(), Squares())


def test_a_small_network_learns_the_digits():
    task = Classification(niwaki.data.open("digits"), batch=64)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10))
    before = task.evaluate(model).value
    history = Recovery(epochs=3, lr=0.05)(model, task)
    assert history.losses[2] < history.losses[0] and len(history.epochs) == 3
    assert before < 30 and task.evaluate(model).value > 90


class Shifted(Squares):
    """(x * weight + shift)^2: the shift is the task's own."""

    def __init__(self, batches=((1.0,),)):
        super().__init__(batches)
        self.extra = nn.Module()
        self.extra.shift = nn.Parameter(torch.tensor([1.0]))

    def loss(self, model, batch):
        return (model(batch.to(model.weight)) + self.extra.shift).square().mean()


def test_what_the_task_brings_is_trained_with_the_model():
    model, task = Line(), Shifted()
    Recovery(epochs=1, lr=0.1, momentum=0.0, weight_decay=0.0, schedule="constant", warmup=0.0)(model, task)
    # both gradients are 2 (2 + 1) = 6
    assert model.weight.item() == pytest.approx(1.4) and task.extra.shift.item() == pytest.approx(0.4)
    assert task.extra.shift.grad is None


def test_all_or_nothing_holds_for_what_the_task_brings():
    model, task = Line(), Shifted([(1.0,)] * 3 + [(math.nan,)])
    with pytest.raises(NotFiniteError):
        Recovery(epochs=1, lr=0.01)(model, task)
    assert model.weight.item() == 2.0 and task.extra.shift.item() == 1.0


def test_a_compiler_is_asked_for_by_yes_or_by_name():
    assert Recovery.from_json({"speed": {"compile": True}}).speed.compile == "inductor"
    assert Recovery.from_json({"speed": {"compile": False}}).speed.compile is None
    with pytest.raises(UnknownNameError, match=r"'default'.*inductor") as caught:
        Recovery.from_json({"speed": {"compile": "default"}})
    assert "dynamo" not in str(caught.value) and "debug" not in str(caught.value)


def test_settings_out_of_range_or_of_another_type_say_what_was_found():
    with pytest.raises(InputError, match=r"Recovery\(lr=-1.0\); found: -1.0, .*do: give"):
        Recovery(lr=-1.0)
    with pytest.raises(InputError, match=r"give a value of .*\[0.3,0.6\]"):
        Recovery.from_json({"drops": {"at": "0.3,0.6"}})
