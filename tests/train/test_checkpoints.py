"""Checkpoints: what is in them, that the damaged are told from the whole, and that going on changes no bit."""

import json
import random

import numpy as np
import pytest
import torch
from lines import Line, Noise, Squares, network
from torch import nn

from niwaki.errors import FileDamagedError, InputError, NotFiniteError, RunExistsError
from niwaki.train import Checkpoints, Ema, Mix, Recovery, Speed, Validation
from niwaki.train.checkpoints import listed, newest, prune, read_checkpoint, write_checkpoint
from niwaki.train.loop import _position
from niwaki.train.state import random_state, set_random_state


class Killed(BaseException):
    """Stands for a kill in tests of one process; see tests/cli/test_kills.py for real ones."""


def stop_at(batch):
    def progress(done, total, text):
        if done == batch:
            raise Killed

    return progress


def bits(*modules):
    return {f"{i}.{name}": t.clone() for i, m in enumerate(modules) for name, t in m.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def trained(how, *, stops=(), make=network):
    """Bits of model and task after a training that was stopped at these batches, each time in a fresh model."""
    for stop in (*stops, None):
        torch.manual_seed(1)
        model, task = make(), Noise()
        torch.manual_seed(100 + len(stops))  # nothing outside may matter
        np.random.seed(stop or 0)
        random.seed(stop)
        if stop is None:
            history = how(model, task, resume=bool(stops))
            return bits(model, task.extra), history
        with pytest.raises(Killed):
            how(model, task, progress=stop_at(stop), resume=stop != stops[0])
    raise AssertionError


SETTINGS = {
    "plain": {},
    "adamw": {"optimizer": "adamw", "lr": 0.01},
    "average": {"ema": Ema(0.9), "validation": Validation()},
    "mixed": {"mix": Mix(0.5, 1.0), "clip": 1.0},
    "accumulated": {"accumulate": 2},
    "bf16": {"speed": Speed("bf16", channels_last=True)},
    "fp16": {"speed": Speed("fp16"), "schedule": "step"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_going_on_changes_no_bit(tmp_path, name):
    """21 batches; checkpoints every 2 steps; stopped in the first, second and third epoch, in and between steps."""
    stops = (5, 8, 15, 21) if name == "plain" else (5, 16)
    settings = {"epochs": 3, "lr": 0.05, "seed": 3, "checkpoints": Checkpoints(every_steps=2), **SETTINGS[name]}
    whole, history = trained(Recovery(folder=str(tmp_path / "whole"), **settings))
    broken, again = trained(Recovery(folder=str(tmp_path / "broken"), **settings), stops=stops)
    assert same(whole, broken)
    for one, other in zip(history.epochs, again.epochs, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    lines = [
        [{**json.loads(line), "seconds": 0} for line in (tmp_path / where / "history.jsonl").read_text().splitlines()]
        for where in ("whole", "broken")
    ]
    assert lines[0] == lines[1]


def test_without_a_break_checkpoints_change_nothing(tmp_path):
    plain, _ = trained(Recovery(epochs=2, lr=0.05))
    kept, _ = trained(Recovery(epochs=2, lr=0.05, folder=str(tmp_path), checkpoints=Checkpoints(every_steps=3)))
    assert same(plain, kept)


def test_a_finished_training_goes_on_to_itself(tmp_path):
    how = Recovery(epochs=2, lr=0.05, folder=str(tmp_path), checkpoints=Checkpoints())
    first, history = trained(how)
    model, task = network(), Noise()
    told = []
    again = how(model, task, resume=True, progress=lambda *what: told.append(what))
    assert same(bits(model, task.extra), first) and not told and again.losses == history.losses


def test_resume_without_a_checkpoint_starts(tmp_path):
    how = Recovery(epochs=1, lr=0.05, folder=str(tmp_path), checkpoints=Checkpoints())
    broken, _ = trained(how, stops=(3,))
    whole, _ = trained(Recovery(epochs=1, lr=0.05))
    assert same(broken, whole)


def test_after_an_error_the_weights_are_of_before_and_the_checkpoints_stay(tmp_path):
    how = Recovery(epochs=1, lr=1e-3, folder=str(tmp_path), checkpoints=Checkpoints(every_steps=1))
    model = Line()
    with pytest.raises(NotFiniteError):
        how(model, Squares([(1.0,), (2.0,), (float("nan"),)]))
    assert model.weight.item() == 2.0
    found = newest(tmp_path / "checkpoints")
    assert found.state["position"]["step"] == 2 and found.model["weight"].isfinite().all()  # none of the third


def test_a_checkpoint_holds_what_it_says(tmp_path):
    how = Recovery(
        epochs=2,
        lr=0.05,
        folder=str(tmp_path),
        ema=Ema(0.5),
        optimizer="adamw",
        checkpoints=Checkpoints(3, keep_last=9),
    )
    model, task = network(), Noise()
    how(model, task)
    assert [path.name for path in listed(tmp_path / "checkpoints")] == [f"step-{n:09d}" for n in (3, 6, 9, 12, 14)]
    middle, last = (read_checkpoint(listed(tmp_path / "checkpoints")[i]) for i in (2, -1))
    assert (middle.state["position"]["epoch"], middle.state["position"]["batch"]) == (1, 2)
    assert middle.training["losses"].shape == (1, 2) and "random_at_start_of_epoch" in middle.training
    assert last.state["position"]["epoch"] == 2 and "losses" not in last.training
    assert set(last.model) == set(model.state_dict())
    assert {"extra.weight", "ema.0.weight", "optimizer.model.0.weight.exp_avg", "random"} <= set(last.training)
    assert same(bits(model), {f"0.{k[4:]}": v for k, v in last.training.items() if k[:4] == "ema."})
    assert Recovery.from_json(last.state["settings"]) == how


def test_the_last_and_the_best_stay(tmp_path):
    task = Squares(values=[1.0, 7.0, 3.0, 4.0, 5.0])
    how = Recovery(epochs=5, lr=1e-4, folder=str(tmp_path), validation=Validation(), checkpoints=Checkpoints())
    how(Line(), task)
    assert [path.name[-1] for path in listed(tmp_path / "checkpoints")] == ["2", "4", "5"]
    other = Recovery(epochs=3, lr=1e-4, folder=str(tmp_path / "x"), checkpoints=Checkpoints(keep_last=1))
    other(Line(), Squares())
    assert [path.name[-1] for path in listed(tmp_path / "x" / "checkpoints")] == ["3"]


def kept(folder):
    return [int(path.name.removeprefix("step-")) for path in listed(folder / "checkpoints")]


VALUES = [3.0, 9.0, 1.0, 8.0, 7.0, 2.0, 8.0, 0.0]


@pytest.mark.parametrize(
    ("count", "lower", "stays"),
    [
        (0, False, [7, 8]),
        (1, False, [2, 7, 8]),
        (3, False, [2, 4, 7, 8]),
        (2, True, [3, 7, 8]),
        (9, False, [*range(1, 9)]),
    ],
)
def test_the_best_n_stay(tmp_path, count, lower, stays):
    """One step an epoch. Of the two looks at 8 the earlier ranks first; the last two steps stay in any case."""
    checkpoints = Checkpoints(keep_best=count)
    how = Recovery(epochs=8, lr=1e-4, folder=str(tmp_path), validation=Validation(lower=lower), checkpoints=checkpoints)
    how(Line(), Squares(values=list(VALUES)))
    assert kept(tmp_path) == stays
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if not path.name.startswith("step-")]


def test_going_on_knows_the_best(tmp_path):
    """Killed in the fifth epoch; the second and the fourth are among the best three for good."""
    how = Recovery(
        epochs=8,
        lr=1e-4,
        folder=str(tmp_path),
        validation=Validation(),
        checkpoints=Checkpoints(keep_last=1, keep_best=3),
    )
    with pytest.raises(Killed):
        how(Line(), Squares(values=VALUES[:4]), progress=stop_at(5))
    assert kept(tmp_path) == [1, 2, 4]
    how(Line(), Squares(values=VALUES[4:]), resume=True)
    assert kept(tmp_path) == [2, 4, 7, 8]


def test_a_checkpoint_is_written_where_it_ranks(tmp_path):
    """Every 100 steps there would be none but the last; each look that ranks among the best two has one."""
    checkpoints = Checkpoints(every_steps=100, keep_last=1, keep_best=2)
    how = Recovery(epochs=5, lr=1e-4, folder=str(tmp_path), validation=Validation(), checkpoints=checkpoints)
    how(Line(), Squares(values=[1.0, 5.0, 3.0, 4.0, 0.0]))
    assert kept(tmp_path) == [2, 4, 5]


def test_a_kill_while_one_is_removed_leaves_no_damaged_one(tmp_path, monkeypatch, caplog):
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, step, {"model": {}, "training": {}}, {})

    def killed(path, **_):
        raise Killed

    with monkeypatch.context() as inside:
        inside.setattr(
            "niwaki.train.checkpoints.shutil.rmtree", lambda path, **_: killed(path) if path.exists() else None
        )
        with pytest.raises(Killed):
            prune(tmp_path, last=1, best={2})
    assert [path.name[-1] for path in listed(tmp_path)] == ["2", "3"] and len(list(tmp_path.iterdir())) == 3
    assert newest(tmp_path).path.name.endswith("3") and not caplog.records
    write_checkpoint(tmp_path, 4, {"model": {}, "training": {}}, {})  # clears up
    assert len(list(tmp_path.iterdir())) == 3


def test_checkpoints_of_before_know_their_best(tmp_path):
    how = Recovery(epochs=2, lr=1e-4, folder=str(tmp_path), validation=Validation(), checkpoints=Checkpoints())
    how(Line(), Squares(values=[5.0, 1.0]))
    saved = newest(tmp_path / "checkpoints")
    assert saved.state["position"]["looks"] == [[5.0, 1], [1.0, 2]]
    old = {**saved.state["position"], "best_step": 1}
    del old["looks"]
    assert _position(old)["looks"] == [[5.0, 1]] and "best_step" not in _position(old)
    assert "looks" not in _position({"epoch": 1, "best_step": None})


@pytest.mark.parametrize("wrong", [-1, True, 1.5])
def test_no_count_of_best_ones(wrong):
    with pytest.raises(InputError, match="keep_best"):
        Checkpoints(keep_best=wrong)


@pytest.mark.parametrize(("said", "count"), [(True, 1), (False, 0)])
def test_settings_that_said_whether_and_not_how_many(said, count):
    old = {"epochs": 2, "checkpoints": {"every_steps": None, "keep_last": 3, "keep_best": said}}
    assert Recovery.from_json(old).checkpoints == Checkpoints(keep_last=3, keep_best=count)
    assert old["checkpoints"]["keep_best"] is said


def damage(path, how):
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-7])
    elif how == "changed":
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(bytes(raw))
    elif how == "missing":
        path.unlink()
    else:
        path.write_bytes(b"")


@pytest.mark.parametrize("kind", ["truncated", "changed", "missing", "empty"])
@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, caplog, name, kind):
    how = Recovery(epochs=2, lr=0.05, folder=str(tmp_path), checkpoints=Checkpoints())
    first, _ = trained(how)
    folder = tmp_path / "checkpoints"
    damage(listed(folder)[-1] / name, kind)
    found = newest(folder)
    assert found.path == listed(folder)[0] and "the checkpoint before it is used" in caplog.text
    model, task = network(), Noise()
    how(model, task, resume=True)
    assert same(bits(model, task.extra), first)


def test_where_none_is_whole_it_is_said(tmp_path):
    how = Recovery(epochs=2, lr=0.05, folder=str(tmp_path), checkpoints=Checkpoints())
    trained(how)
    for path in listed(tmp_path / "checkpoints"):
        damage(path / "state.json", "changed")
    model = network()
    before = bits(model)
    with pytest.raises(FileDamagedError, match="2, none of them whole") as caught:
        how(model, Noise(), resume=True)
    assert same(bits(model), before) and caught.value.where


def test_numbers_in_the_state_cannot_be_changed_unseen(tmp_path):
    path = write_checkpoint(tmp_path, 1, {"model": {"w": torch.ones(1)}, "training": {"r": torch.ones(1)}}, {"x": 1.5})
    assert read_checkpoint(path).state == {"x": 1.5}
    (path / "state.json").write_text((path / "state.json").read_text().replace("1.5", "2.5"))
    with pytest.raises(FileDamagedError, match="not as it was written"):
        read_checkpoint(path)


def test_a_checkpoint_half_written_is_none(tmp_path, monkeypatch):
    """Whatever call a kill falls into, what was there is still there, and nothing half-written counts."""
    import niwaki.train.checkpoints as module

    parts = {"model": {"w": torch.ones(1)}, "training": {"r": torch.ones(1)}}
    write_checkpoint(tmp_path, 1, parts, {})
    calls = [("synced", 4), ("_digest", 2)]
    for name, count in calls:
        for at in range(count):
            left, real = [at], getattr(module, name)

            def dying(*arguments, left=left, real=real):
                if left[0] == 0:
                    raise Killed
                left[0] -= 1
                return real(*arguments)

            monkeypatch.setattr(module, name, dying)
            with pytest.raises(Killed):
                write_checkpoint(tmp_path, 2, parts, {})
            monkeypatch.undo()
            assert newest(tmp_path).path.name == "step-000000001"
    write_checkpoint(tmp_path, 2, parts, {})
    assert newest(tmp_path).path.name == "step-000000002"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000001", "step-000000002"]


def test_shared_and_sliced_tensors_are_saved_once_and_alone(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(3, 3, bias=False)
            self.other = nn.Linear(3, 3, bias=False)
            self.other.weight = self.one.weight
            self.register_buffer("view", torch.arange(10.0)[2:4])

        def forward(self, x):
            return self.other(torch.relu(self.one(x)))

    class Cubes(Squares):
        def loss(self, model, batch):
            return model(batch.expand(1, 3)).square().mean()

    how = Recovery(epochs=1, lr=0.01, folder=str(tmp_path), checkpoints=Checkpoints(), ema=Ema(0.5))
    model = Tied()
    how(model, Cubes())
    found = newest(tmp_path / "checkpoints")
    assert set(found.model) == {"one.weight", "view"} and found.model["view"].tolist() == [2.0, 3.0]
    again = Tied()
    how(again, Cubes(), resume=True)
    assert same(bits(model), bits(again)) and again.one.weight is again.other.weight


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lr": 0.06}, "lr was 0.05, is 0.06"),
        ({"ema": Ema(0.9)}, "ema was None"),
        ({"limit": 3}, "batches_an_epoch was 7, is 3"),
    ],
)
def test_another_training_is_refused(tmp_path, changes, says):
    same_place = {"epochs": 2, "lr": 0.05, "folder": str(tmp_path), "checkpoints": Checkpoints()}
    trained(Recovery(**same_place))
    with pytest.raises(InputError, match=says):
        Recovery(**{**same_place, **changes})(network(), Noise(), resume=True)


def test_another_model_is_refused(tmp_path):
    how = Recovery(epochs=1, lr=0.05, folder=str(tmp_path), checkpoints=Checkpoints())
    trained(how)
    wider = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(48, 5)
    )
    wider.append(nn.Linear(5, 4))
    before = bits(wider)
    with pytest.raises(InputError, match=r"another model: 5\.bias, 5\.weight, 6\.bias, 6\.weight"):
        how(wider, Noise(), resume=True)
    assert same(bits(wider), before)


def test_checkpoints_are_not_trained_over(tmp_path):
    how = Recovery(epochs=1, lr=0.05, folder=str(tmp_path), checkpoints=Checkpoints(every_steps=1))
    with pytest.raises(Killed):
        how(network(), Noise(), progress=stop_at(3))
    with pytest.raises(RunExistsError, match="checkpoints of a training that did not end"):
        how(network(), Noise())
    with pytest.raises(InputError, match="checkpoints=None"):
        Recovery(folder=str(tmp_path))(network(), Noise(), resume=True)


def test_random_states_travel():
    device = torch.device("cpu")
    state = random_state(device)
    drawn = [(torch.rand(3).tolist(), np.random.rand(), np.random.randn(), random.random(), random.gauss(0, 1))]
    kept = random_state(device)  # in the middle of a pair of normal numbers
    drawn.append((np.random.randn(), random.gauss(0, 1)))
    set_random_state(state, device)
    assert (torch.rand(3).tolist(), np.random.rand(), np.random.randn(), random.random(), random.gauss(0, 1)) == drawn[
        0
    ]
    set_random_state(kept, device)
    assert (np.random.randn(), random.gauss(0, 1)) == drawn[1]


def test_pruning_keeps_what_it_is_told(tmp_path):
    for step in (1, 2, 3, 10):
        (tmp_path / f"step-{step:09d}").mkdir()
    (tmp_path / "step-notes").mkdir()
    prune(tmp_path, last=1, best=[2])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000002", "step-000000010", "step-notes"]


def test_the_scale_of_the_loss_goes_on_where_it_was(tmp_path):
    """The gradient 4 overflows float16 until the scale has been halved three times; a break changes nothing."""

    class Half(Squares):
        def loss(self, model, batch):
            return model(batch).float().square().mean()

    how = Recovery(
        epochs=5, lr=0.1, momentum=0.0, weight_decay=0.0, schedule="constant", warmup=0.0, speed=Speed("fp16"),
        folder=str(tmp_path), checkpoints=Checkpoints(),
    )  # fmt: skip
    start = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        start.weight.fill_(2.0)
    with pytest.raises(Killed):
        how(start, Half(), progress=stop_at(4))
    assert how(nn.Linear(1, 1, bias=False), Half(), resume=True).losses == pytest.approx([4, 4, 4, 4, 2.56], rel=1e-3)
