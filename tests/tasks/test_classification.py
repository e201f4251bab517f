"""Loss and accuracy worked out by hand on six pictures of one pixel."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import niwaki.data
from niwaki.data import Images, Normalisation, Part, Source
from niwaki.data.splits import assemble
from niwaki.errors import InputError, NotFiniteError, OutOfMemoryError, UnknownNameError
from niwaki.tasks import Classification
from niwaki.tasks.classification import logits_of


def splits_of(values, labels, classes=("low", "high")):
    """Every split has the same pictures of one pixel."""
    pixels = torch.tensor(values).float().view(-1, 1, 1, 1)
    images = Images(pixels, torch.tensor(labels), Normalisation.of("none"), 1, 1)
    return SimpleNamespace(train=images, val=images, test=images, classes=classes)


class Threshold(nn.Module):
    """Scores (0, scale * pixel): high if the pixel is positive."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.0, scale]))
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(x.flatten(1)) * self.scale


TASK = Classification(splits_of([-1, -2, 3, 4, 5, -6], [0, 0, 1, 1, 0, 1]), batch=4)


def test_accuracy_by_hand():
    found = TASK.evaluate(Threshold())
    assert found.value == pytest.approx(100 * 4 / 6) and found.unit == "%" and found.name == "accuracy"
    assert found.spread == pytest.approx(100 * math.sqrt(4 / 6 * 2 / 6 / 6))
    assert "6 of 6 pictures of the test split" in found.definition


def test_a_limit_takes_the_first_pictures_across_batches():
    assert TASK.evaluate(Threshold(), limit=5).value == pytest.approx(80)
    assert TASK.evaluate(Threshold(), limit=2, split="val").value == 100
    assert TASK.evaluate(Threshold(), limit=100).value == pytest.approx(100 * 4 / 6)


def test_loss_by_hand_plain_and_smoothed():
    model = Threshold().eval()
    batch = (torch.tensor([2.0, 2.0]).view(2, 1, 1, 1), torch.tensor([1, 0]))
    right, wrong = math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))
    assert TASK.loss(model, batch).item() == pytest.approx((right + wrong) / 2)
    assert {name: loss.item() for name, loss in TASK.losses(model, batch).items()} == {
        "loss": pytest.approx((right + wrong) / 2)
    }
    smooth = Classification(TASK.splits, label_smoothing=0.2)
    first = (batch[0][:1], batch[1][:1])
    assert smooth.loss(model, first).item() == pytest.approx(0.9 * right + 0.1 * wrong)


def test_the_loss_reaches_the_weights():
    model = Threshold()
    TASK.loss(model, next(TASK.train_batches(0))).backward()
    assert model.scale.grad is not None


def test_evaluation_leaves_modes_gradients_and_random_state_alone():
    model = Threshold().train()
    model.drop.eval()
    before, grad = torch.get_rng_state(), torch.is_grad_enabled()
    TASK.evaluate(model)
    assert model.training and not model.drop.training and model.scale.grad is None
    assert torch.get_rng_state().equal(before) and torch.is_grad_enabled() == grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_batches_follow_the_precision_of_the_model(dtype):
    model = Threshold().to(dtype).eval()
    assert TASK.evaluate(model).value == pytest.approx(100 * 4 / 6)
    assert TASK.loss(model, next(TASK.train_batches(0))).dtype == torch.float32


def test_training_batches_are_whole_counted_and_decided_by_the_seed():
    assert TASK.steps == len(list(TASK.train_batches(0))) == 1
    assert [len(y) for _, y in TASK.train_batches(0)] == [4]
    orders = [next(TASK.train_batches(seed))[0].flatten().tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    small = Classification(TASK.splits, batch=50)
    assert small.steps == len(list(small.train_batches(0))) == 1


def test_calibration_is_not_augmented_and_gives_what_there_is():
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (40, 1, 8, 8), dtype=torch.uint8, generator=rng)
    source = Source(("a", "b"), "none", Part(pixels, torch.arange(40) % 2))
    splits = assemble(source, name="x", size=None, channels=None, normalisation=None, seed=0, val=0.1, test=0.2)
    task = Classification(splits, batch=10, augment="flip_crop")
    plain = {tuple(picture.flatten().tolist()) for inputs, _ in splits.train.batches(40) for picture in inputs}
    batches = task.calibration(2, seed=4)
    assert len(batches) == 2 and len(task.calibration(9, seed=4)) == 2
    assert all(tuple(picture.flatten().tolist()) in plain for inputs, _ in batches for picture in inputs)
    augmented = next(task.train_batches(4))[0]
    assert not all(tuple(picture.flatten().tolist()) in plain for picture in augmented)
    assert batches[0][0].equal(task.calibration(1, seed=4)[0][0])
    assert not batches[0][0].equal(task.calibration(1, seed=5)[0][0])


def test_inputs_and_example_have_the_shape_of_the_data():
    task = Classification(niwaki.data.open("digits", size=16, channels=3))
    assert task.example().shape == (1, 3, 16, 16)
    assert task.inputs(task.calibration(1, 0)[0]).shape == (128, 3, 16, 16)


def test_scores_are_found_in_what_networks_put_out():
    scores = torch.zeros(2, 3)
    named = SimpleNamespace(logits=scores)
    for output in (scores, named, {"logits": scores}, (scores, None), [scores]):
        assert logits_of(output) is scores
    for output in (None, {"scores": scores}, (), ("x",)):
        with pytest.raises(InputError, match="class scores from the model"):
            logits_of(output)


def test_a_model_with_other_classes_is_refused():
    with pytest.raises(InputError, match=r"shape \(4, 2\); found: output of shape \(4, 3\)") as caught:
        TASK.evaluate(nn.Sequential(nn.Flatten(), nn.Linear(1, 3)))
    assert caught.value.exit_code == 2


def test_nan_outputs_are_refused():
    with pytest.raises(NotFiniteError, match="NaN or infinite outputs"):
        TASK.evaluate(Threshold(scale=math.nan))


def test_a_full_device_is_an_error_of_ours():
    class Full(nn.Linear):
        def forward(self, x):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(OutOfMemoryError, match="use a smaller batch"):
        TASK.evaluate(Full(1, 2))


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"batch": 0}, InputError, "batch of at least 1"),
        ({"label_smoothing": 1.0}, InputError, r"share in \[0, 1\)"),
        ({"augment": "mixup"}, UnknownNameError, "none, flip_crop"),
    ],
)
def test_settings_out_of_range_are_refused(changes, error, says):
    with pytest.raises(error, match=says):
        Classification(TASK.splits, **changes)


def test_empty_and_unknown_splits_are_refused():
    empty = SimpleNamespace(train=[], val=[], test=[], classes=("a", "b"))
    with pytest.raises(InputError, match="empty training split"):
        Classification(empty)
    with pytest.raises(UnknownNameError, match="train, val, test"):
        TASK.evaluate(Threshold(), split="dev")
    with pytest.raises(InputError, match="limit 0"):
        TASK.evaluate(Threshold(), limit=0)
    without_val = niwaki.data.open("digits", val=0.0)
    with pytest.raises(InputError, match="evaluate on the val split; found: 0 pictures"):
        Classification(without_val).evaluate(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), split="val")
    with pytest.raises(InputError, match="at least 1"):
        TASK.calibration(0, 0)
