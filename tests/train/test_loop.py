"""The loop's settings, each worked out by hand."""

import json
import math

import pytest
import torch
from lines import Line, Squares, network
from torch import nn
from torch.nn import functional

from niwaki.errors import InputError, UnknownNameError
from niwaki.tasks import Classification
from niwaki.train import Checkpoints, Drops, Ema, Mix, Recovery, Speed, Validation
from niwaki.train.loop import clip_
from niwaki.train.mixing import mixed, pasted
from niwaki.train.settings import from_plain

PLAIN = {"momentum": 0.0, "weight_decay": 0.0, "schedule": "constant", "warmup": 0.0}


def test_accumulation_is_the_big_batch():
    """Four batches in pairs: the gradients 2 w x^2 of a pair are averaged, as over one batch of both."""
    one, other = Line(), Line()
    small = Squares(((1.0,), (2.0,), (3.0,), (0.5,)))
    big = Squares(((1.0, 2.0), (3.0, 0.5)))
    history = Recovery(epochs=1, lr=0.01, accumulate=2, **PLAIN)(one, small)
    Recovery(epochs=1, lr=0.01, **PLAIN)(other, big)
    weight = 2.0
    for pair in ((1, 4), (9, 0.25)):
        weight -= 0.01 * 2 * weight * sum(pair) / 2
    assert one.weight.item() == pytest.approx(weight, rel=1e-6) and one.weight.item() == pytest.approx(
        other.weight.item(), rel=1e-6
    )
    assert [epoch["steps"] for epoch in history.epochs] == [2]


def test_an_odd_rest_of_batches_is_a_step_of_its_own_size():
    model = Line()
    history = Recovery(epochs=1, lr=0.01, accumulate=2, **PLAIN)(model, Squares(((1.0,), (2.0,), (3.0,))))
    weight = 2.0 - 0.01 * 2 * 2.0 * 2.5
    assert model.weight.item() == pytest.approx(weight - 0.01 * 2 * weight * 9, rel=1e-6)
    assert history.epochs[0]["steps"] == 2


def test_rates_follow_steps_not_batches():
    how = Recovery(epochs=2, lr=1e-3, schedule="linear", warmup=0.0, accumulate=2)
    history = how(Line(), Squares(((1.0,), (2.0,), (3.0,), (0.5,))))
    assert [epoch["lr"] for epoch in history.epochs] == pytest.approx([0.75e-3, 0.25e-3])  # of steps 1 and 3 of 4


def test_a_long_gradient_is_scaled_down():
    model = Line()
    Recovery(epochs=1, lr=0.1, clip=1.0, **PLAIN)(model, Squares())
    assert model.weight.item() == pytest.approx(2.0 - 0.1, rel=1e-5)  # the gradient 4 became 1
    model = Line()
    Recovery(epochs=1, lr=0.1, clip=100.0, **PLAIN)(model, Squares())
    assert model.weight.item() == pytest.approx(2.0 - 0.4, rel=1e-6)


def test_the_average_of_two_steps_by_hand():
    model = Line()
    Recovery(epochs=2, lr=0.1, ema=Ema(0.75, ramp=False), **PLAIN)(model, Squares())
    first = 2.0 * 0.8
    second = first * 0.8
    average = 0.75 * (0.75 * 2.0 + 0.25 * first) + 0.25 * second
    assert model.weight.item() == pytest.approx(average, rel=1e-6)
    plain = Line()
    Recovery(epochs=2, lr=0.1, ema=Ema(0.75, ramp=False, returned=False), **PLAIN)(plain, Squares())
    assert plain.weight.item() == pytest.approx(second, rel=1e-6)


def test_a_rising_decay_forgets_the_start():
    model = Line()
    Recovery(epochs=2, lr=0.1, ema=Ema(0.999), **PLAIN)(model, Squares())
    first, second = 1.6, 1.28
    average = 0.1 * 2.0 + 0.9 * first
    average += (1 - 2 / 11) * (second - average)
    assert model.weight.item() == pytest.approx(average, rel=1e-6)


def test_counters_are_not_averaged():
    model = Line(noisy=True)
    Recovery(epochs=1, ema=Ema())(model, Squares(((1.0, 2.0), (3.0, 5.0))))
    assert model.norm.num_batches_tracked.item() == 2


def test_validation_looks_at_the_average_and_the_weights_train_on():
    task = Squares()
    history = Recovery(epochs=2, lr=0.1, ema=Ema(0.5, ramp=False), validation=Validation(), **PLAIN)(Line(), task)
    assert task.seen == pytest.approx([1.8, 0.5 * 1.8 + 0.5 * 1.28])
    assert history.losses == pytest.approx([4.0, 1.6**2])  # of the weights themselves
    assert [epoch["validation"] for epoch in history.epochs] == pytest.approx(task.seen)


def test_patience_ends_it(caplog):
    task = Squares(values=[1.0, 3.0, 3.0, 2.0, 9.0])
    history = Recovery(epochs=9, lr=1e-4, validation=Validation(patience=2))(Line(), task)
    assert len(history.epochs) == 4 and history.stopped  # the best was the second; an equal one is no better
    assert "stopped early after epoch 4 of 9: validation 2, the best was 3" in caplog.text
    caplog.clear()
    task = Squares(values=[3.0, 1.0, 2.0, 0.5])
    history = Recovery(epochs=4, lr=1e-4, validation=Validation(patience=2, lower=True))(Line(), task)
    assert len(history.epochs) == 4 and not history.stopped and "stopped early" not in caplog.text


def test_every_second_epoch_and_the_last_are_validated():
    history = Recovery(epochs=5, lr=1e-4, validation=Validation(every=2))(Line(), Squares())
    assert [epoch["epoch"] for epoch in history.epochs if "validation" in epoch] == [2, 4, 5]


def test_mixup_by_hand():
    """Labels 0 and 1, one picture each: whatever the share s, the loss of scores z is s CE(z, 0) + (1 - s) CE(z, 1)."""
    inputs, labels = torch.tensor([[1.0], [3.0]]).view(2, 1, 1, 1), torch.tensor([0, 1])
    for seed in range(20):
        pictures, shares = mixed((inputs, labels), Mix(mixup=1.0), 3, torch.Generator().manual_seed(seed))
        share = shares[0, 0].item()  # of the first picture in the first place: 1 where it was mixed with itself
        assert pictures[0].item() == pytest.approx(share * 1.0 + (1 - share) * 3.0, abs=1e-6)
        assert pictures[1].item() == pytest.approx(share * 3.0 + (1 - share) * 1.0, abs=1e-6)
        assert shares.tolist() == [
            pytest.approx([share, 1 - share, 0], abs=1e-6),
            pytest.approx([1 - share, share, 0], abs=1e-6),
        ]
        scores = torch.tensor([[0.3, -1.0, 2.0], [0.1, 0.2, 0.3]])
        swapped = share * functional.cross_entropy(scores, labels) + (1 - share) * functional.cross_entropy(
            scores, labels.flip(0)
        )
        assert functional.cross_entropy(scores, shares).item() == pytest.approx(swapped.item(), rel=1e-5)


def test_shares_are_beta_distributed():
    """Beta(1, 1) is uniform: mean 1/2, variance 1/12; Beta(0.2, 0.2): variance 1/4 / 1.4."""
    for parameter, variance in ((1.0, 1 / 12), (0.2, 0.25 / 1.4)):
        generator = torch.Generator().manual_seed(0)
        batch = torch.zeros(2, 1, 1, 1), torch.tensor([0, 1])
        found = torch.tensor([mixed(batch, Mix(parameter), 2, generator)[1][0].max() for _ in range(4000)])
        # half of the batches meet themselves (share 1); of the others max(s, 1 - s), which deviates from 1/2 alike
        apart = found[found < 1 - 1e-6]
        assert ((apart - 0.5) ** 2).mean().item() == pytest.approx(variance, rel=0.1)


def test_a_rectangle_is_pasted_and_counted():
    inputs, others = torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)
    for seed in range(30):
        picture, share = pasted(inputs, others, 0.75, torch.Generator().manual_seed(seed))
        assert share == pytest.approx(1 - picture.mean().item(), abs=1e-6)
        rows, columns = picture[0, 0].amax(dim=1).sum().item(), picture[0, 0].amax(dim=0).sum().item()
        assert rows * columns == picture.sum() and rows <= 4 and columns <= 4  # sides of at most half the picture's
    assert not inputs.any()


def test_some_batches_are_left_as_they_are():
    generator = torch.Generator().manual_seed(0)
    batch = torch.rand(4, 1, 2, 2), torch.tensor([0, 1, 2, 3])
    left = sum(mixed(batch, Mix(probability=0.25), 4, generator)[1].dim() == 1 for _ in range(1000))
    assert 700 < left < 800


def test_mixed_pictures_train_a_classifier_with_smoothing(tmp_path):
    import niwaki.data

    task = Classification(niwaki.data.open("digits"), batch=64, label_smoothing=0.1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    history = Recovery(epochs=2, lr=0.1, limit=10, mix=Mix(0.2, 1.0), ema=Ema())(model, task)
    assert history.losses[1] < history.losses[0]


def test_only_classifiers_can_be_mixed():
    with pytest.raises(InputError, match="names no number of classes"):
        Recovery(mix=Mix())(Line(), Squares())

    class Classes(Squares):
        classes = 3

    with pytest.raises(InputError, match="no pair of pictures"):
        Recovery(mix=Mix())(Line(), Classes())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_computes_in_half_and_keeps_the_weights(precision):
    kinds = []

    class Spy(Squares):
        def loss(self, model, batch):
            out = model(batch)
            kinds.append(out.dtype)
            return 1e-3 * out.float().square().mean()  # small enough for the first scale, 65536

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 4), nn.Linear(4, 1))
    full = nn.Sequential(nn.Linear(1, 4), nn.Linear(4, 1))
    full.load_state_dict(model.state_dict())
    Recovery(epochs=3, lr=50.0, speed=Speed(precision), **PLAIN)(model, Spy(((1.0, 2.0),)))
    Recovery(epochs=3, lr=50.0, **PLAIN)(full, Spy(((1.0, 2.0),)))
    half = torch.bfloat16 if precision == "bf16" else torch.float16
    assert kinds == [half] * 3 + [torch.float32] * 3
    for one, other in zip(model.parameters(), full.parameters(), strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, atol=0.03, rtol=0.03)
        assert not torch.equal(one, other)


def test_clipping_without_gradients_changes_nothing():
    """A task whose loss leaves all weights aside for a while; and 3 and 4, of length 5, clipped to 1."""
    alone, other = (nn.Parameter(torch.tensor([value])) for value in (1.0, 2.0))
    clip_([alone], [], most=1.0)
    assert alone.grad is None and alone.item() == 1.0
    alone.grad, other.grad = torch.tensor([3.0]), torch.tensor([4.0])
    clip_([alone], [other], most=1.0)
    assert (alone.grad.item(), other.grad.item()) == pytest.approx((0.6, 0.8), rel=1e-5)


def test_a_scaled_loss_is_unscaled_before_clipping():
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(2.0)

    class Linear(Squares):
        def loss(self, model, batch):
            return model(batch).float().square().mean()

    Recovery(epochs=1, lr=10.0, clip=0.01, speed=Speed("fp16"), **PLAIN)(model, Linear(((0.1,),)))
    assert model.weight.item() == pytest.approx(1.9, rel=1e-3)  # the gradient 0.04 became 0.01


def test_a_scale_that_overflows_is_lowered():
    """The gradient 4 overflows float16 (65504) until the scale 65536 has been halved three times."""

    class Half(Squares):
        def loss(self, model, batch):
            return model(batch).float().square().mean()

    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(2.0)
    history = Recovery(epochs=5, lr=0.1, speed=Speed("fp16"), **PLAIN)(model, Half())
    assert history.losses == pytest.approx([4.0, 4.0, 4.0, 4.0, 1.6**2], rel=1e-3)


def test_channels_last_is_inside_only():
    orders = []

    class Spy(Squares):
        def loss(self, model, batch):
            orders.append((model[0].weight.is_contiguous(memory_format=torch.channels_last), batch.stride()))
            return model(batch).square().mean()

    task = Spy()
    task.batches = [torch.randn(2, 3, 6, 6)]
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    Recovery(epochs=1, speed=Speed(channels_last=True))(model, task)
    assert orders == [(True, (108, 1, 18, 3))]
    assert all(p.is_contiguous() for p in model.parameters())


def test_compiled_training_gives_the_same_weights():
    one, other = Line(), Line()
    Recovery(epochs=2, speed=Speed(compile="eager"))(one, Squares(((1.0,), (2.0,))))
    Recovery(epochs=2)(other, Squares(((1.0,), (2.0,))))
    assert one.weight.item() == pytest.approx(other.weight.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Ema(1.0), "between 0 and 1"),
        (lambda: Mix(0.0, 0.0), "nothing to mix by"),
        (lambda: Mix(-1.0), "0 or more"),
        (lambda: Mix(probability=0.0), r"in \(0, 1\]"),
        (lambda: Drops((0.5, 0.5)), "rising shares"),
        (lambda: Drops((1.0,)), "rising shares"),
        (lambda: Drops(factor=1.0), "between 0 and 1"),
        (lambda: Validation(every=0), "at least 1"),
        (lambda: Validation(patience=0), "at least 1"),
        (lambda: Checkpoints(every_steps=0), "at least 1"),
        (lambda: Checkpoints(keep_last=0), "at least 1"),
        (lambda: Recovery(accumulate=0), "at least 1"),
        (lambda: Recovery(clip=0.0), "above 0"),
        (lambda: Recovery(checkpoints=Checkpoints())(Line(), Squares()), "give folder"),
        (lambda: Speed("fp8"), "known: fp32, bf16, fp16"),
    ],
)
def test_settings_of_groups_are_checked(make, says):
    with pytest.raises(InputError, match=says):
        make()


def test_settings_travel_as_json():
    how = Recovery(
        epochs=2, drops=Drops((0.3, 0.6)), ema=Ema(0.9), mix=Mix(0.1, 1.0), speed=Speed("bf16"), folder="x",
        validation=Validation(patience=3), checkpoints=Checkpoints(every_steps=5), clip=1.0,
    )  # fmt: skip
    assert Recovery.from_json(json.loads(json.dumps(how.to_json()))) == how
    assert Recovery.from_json({"lr": 1, "ema": None}) == Recovery(lr=1.0)


def test_wrong_settings_are_named():
    with pytest.raises(UnknownNameError, match=r"setting of training\.mix 'mixin'"):
        Recovery.from_json({"mix": {"mixin": 1}})
    with pytest.raises(InputError, match=r"training\.epochs = True"):
        Recovery.from_json({"epochs": True})
    with pytest.raises(
        InputError, match=r"training\.clip = 'much'; found: a str; do: give a value of type float or none"
    ):
        Recovery.from_json({"clip": "much"})
    with pytest.raises(InputError, match=r"training\.mix = 3"):
        Recovery.from_json({"mix": 3})
    assert from_plain(Mix, True, "mix") == Mix()


def test_a_network_of_convolutions_trains_with_everything_at_once(tmp_path):
    import niwaki.data

    task = Classification(niwaki.data.open("digits"), batch=32)
    how = Recovery(
        epochs=2, lr=0.05, accumulate=2, clip=5.0, ema=Ema(0.9), mix=Mix(0.2, 1.0, probability=0.5), limit=12,
        speed=Speed("bf16", channels_last=True), validation=Validation(limit=50), folder=str(tmp_path),
        checkpoints=Checkpoints(every_steps=5),
    )  # fmt: skip
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    history = how(model, task)
    assert history.losses[1] < history.losses[0] and all(math.isfinite(loss) for loss in history.losses)
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "epoch_loss" in line] == [6, 12]
    assert network()(torch.zeros(2, 1, 6, 6)).shape == (2, 4)
