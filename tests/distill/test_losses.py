"""Every distillation loss on a few numbers worked out by hand."""

import math

import pytest
import torch

from niwaki.distill import BoxOutputs, ChannelWise, Features, Logits, SpatialAttention
from niwaki.errors import InputError, UnknownNameError

LN3 = math.log(3)
ALL = (Logits(), ChannelWise(), SpatialAttention(), Features(), Features(normalise=True))


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_logits_by_hand():
    teacher, student = torch.tensor([[2 * LN3, 0.0]]), torch.tensor([[0.0, 0.0]])
    # over T = 2 the teacher's scores are ln 3 and 0: probabilities 3/4 and 1/4
    assert Logits(2.0)(student, teacher).item() == pytest.approx(4 * kl((0.75, 0.25), (0.5, 0.5)))
    assert Logits(1.0)(student, teacher).item() == pytest.approx(kl((0.9, 0.1), (0.5, 0.5)))


def test_logits_are_averaged_over_batch_and_tokens():
    teacher = torch.tensor([[[LN3, 0.0], [0.0, 0.0]]])  # one sample of two tokens
    student = torch.zeros(1, 2, 2)
    assert Logits(1.0)(student, teacher).item() == pytest.approx(kl((0.75, 0.25), (0.5, 0.5)) / 2)
    pixels = teacher.movedim(2, 1).unsqueeze(-1)  # [1, 2 classes, 2, 1]
    assert Logits(1.0)(student.movedim(2, 1).unsqueeze(-1), pixels).item() == pytest.approx(
        kl((0.75, 0.25), (0.5, 0.5)) / 2
    )


def test_logits_gradients_keep_their_size_over_temperatures():
    """For large T the gradient tends to (student - teacher) / classes once multiplied by T squared (eq. 4)."""
    teacher = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    student = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    Logits(1e4)(student, teacher).backward()
    assert student.grad[0].tolist() == pytest.approx([-0.5, 0.5], rel=1e-3)


def test_defaults_of_the_papers_of_detectors():
    assert vars(ChannelWise()) == {"temperature": 4.0, "axis": None}
    assert vars(SpatialAttention()) == {"power": 2.0, "over": "mean", "axis": None, "things": False}
    assert vars(BoxOutputs()) == {"temperature": 3.0, "classes": 1e-3, "boxes": 1e-3}


@pytest.mark.parametrize(("tau", "value"), [(1.0, 0.1438410), (2.0, 0.1319827), (4.0, 0.1231431)])
def test_channel_wise_by_hand(tau, value):
    teacher = torch.tensor([[[[0.0, 0.0], [0.0, LN3]]]])
    assert ChannelWise(tau)(torch.zeros(1, 1, 2, 2), teacher).item() == pytest.approx(value, abs=1e-6)


def test_channel_wise_on_two_channels():
    """A 2 x 2 x 2 feature: the first channel is 0.5 ln 4/3 away, the second agrees but for a constant."""
    teacher = torch.tensor([[[[0.0, 0.0], [0.0, LN3]], [[1.0, 2.0], [3.0, 4.0]]]])
    student = torch.tensor([[[[0.0, 0.0], [0.0, 0.0]], [[6.0, 7.0], [8.0, 9.0]]]])
    assert ChannelWise(1.0)(student, teacher).item() == pytest.approx(0.5 * math.log(4 / 3) / 2, abs=1e-6)
    tokens = [feature.flatten(2).mT for feature in (student, teacher)]  # [1, 4 tokens, width 2]
    assert ChannelWise(1.0)(*tokens).item() == pytest.approx(0.5 * math.log(4 / 3) / 2, abs=1e-6)


def test_channel_wise_gradient_by_hand():
    teacher = torch.tensor([[[[0.0, 0.0], [0.0, LN3]]]])
    student = torch.zeros(1, 1, 2, 2, requires_grad=True)
    ChannelWise(1.0)(student, teacher).backward()
    assert student.grad.flatten().tolist() == pytest.approx([1 / 12, 1 / 12, 1 / 12, -1 / 4], abs=1e-6)


def test_channel_wise_gradient_at_another_temperature():
    """tau (student's - teacher's shares): at 2 the teacher's are in the ratio 1 : 1 : 1 : sqrt 3."""
    teacher = torch.tensor([[[[0.0, 0.0], [0.0, LN3]]]], dtype=torch.float64)
    student = torch.zeros(1, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    ChannelWise(2.0)(student, teacher).backward()
    share = 1 / (3 + math.sqrt(3))
    assert 2 * (0.25 - share) == pytest.approx(0.0773503, abs=1e-7)
    gradient = student.grad.flatten().tolist()
    assert gradient == pytest.approx([2 * (0.25 - share)] * 3 + [2 * (0.25 - math.sqrt(3) * share)], abs=1e-12)
    assert gradient[3] == pytest.approx(-0.2320508, abs=1e-7) and sum(gradient) == pytest.approx(0, abs=1e-12)


def test_channel_wise_at_large_temperatures_is_half_a_variance():
    """Of the differences over positions: (0, 0, 0, ln 3) has the variance 3/16 (ln 3)^2."""
    teacher = torch.tensor([[[[0.0, 0.0], [0.0, LN3]]]], dtype=torch.float64)
    found = {tau: ChannelWise(tau)(torch.zeros_like(teacher), teacher).item() for tau in (1e3, 1e5)}
    limit = 3 / 32 * LN3**2
    assert limit == pytest.approx(0.1131514, abs=1e-7)
    assert found[1e3] == pytest.approx(0.1131929, abs=1e-7) and found[1e5] == pytest.approx(limit, rel=1e-5)
    torch.manual_seed(0)
    ours, theirs = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)  # of samples and channels the mean
    half = (theirs - ours).flatten(2).var(2, correction=0).mean().item() / 2
    assert ChannelWise(1e5)(ours, theirs).item() == pytest.approx(half, rel=1e-4)


def test_spatial_attention_by_hand():
    teacher, student = torch.tensor([[[[0.0, 0.0], [0.0, 1.0]]]]), torch.tensor([[[[3.0, 0.0], [0.0, 4.0]]]])
    long = math.sqrt(9**2 + 16**2)
    by_hand = ((9 / long) ** 2 + (16 / long - 1) ** 2) / 4
    assert SpatialAttention()(student, teacher).item() == pytest.approx(by_hand)
    assert SpatialAttention(over="sum")(student, teacher).item() == pytest.approx(4 * by_hand)
    ones = torch.ones(1, 1, 2, 2)
    assert SpatialAttention()(ones, torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])).item() == pytest.approx(0.1013795)


def test_spatial_attention_cares_for_no_widths():
    teacher, student = torch.tensor([[[[0.0, 0.0], [0.0, 1.0]]]]), torch.tensor([[[[3.0, 0.0], [0.0, 4.0]]]])
    plain = SpatialAttention()(student, teacher).item()
    wide = torch.cat([teacher, teacher, torch.zeros(1, 2, 2, 2)], 1)
    assert SpatialAttention()(-7 * student, wide).item() == pytest.approx(plain)
    assert SpatialAttention()(torch.zeros_like(student), teacher).item() == pytest.approx(0.25)  # one of four is 1


@pytest.mark.parametrize(("height", "width"), [(2, 2), (3, 5), (8, 8)])
def test_spatial_attention_is_at_most_two_over_positions(height, width):
    """Maps of length 1 without negative numbers: at most sqrt 2 apart, where they have no position in common."""
    here, there = torch.zeros(2, 1, 1, height, width)
    here[0, 0, 0, 0], there[0, 0, -1, -1] = 3.0, -5.0
    assert SpatialAttention()(here, there).item() == pytest.approx(2 / (height * width))
    assert SpatialAttention(over="sum")(here, there).item() == pytest.approx(2.0)
    torch.manual_seed(0)
    for power in (1.0, 2.0, 4.0):
        ours, theirs = torch.randn(2, 1, 3, height, width).pow(3)  # peaks, of either sign
        assert 0 < SpatialAttention(power)(ours, theirs).item() < 2 / (height * width)


def test_spatial_attention_where_things_lie_by_hand():
    """Maps are as before; of the four squared distances only those of the covered cells count, still over four."""
    teacher, student = torch.tensor([[[[0.0, 0.0], [0.0, 1.0]]]]), torch.tensor([[[[3.0, 0.0], [0.0, 4.0]]]])
    long = math.sqrt(9**2 + 16**2)
    first, last = (9 / long) ** 2, (16 / long - 1) ** 2
    for covered, by_hand in (
        ([[True, False], [False, False]], first / 4),
        ([[False, True], [True, True]], last / 4),
        ([[True, True], [True, True]], (first + last) / 4),
        ([[False, False], [False, False]], 0.0),
    ):
        there = torch.tensor([covered])
        assert SpatialAttention(things=True).among(student, teacher, there).item() == pytest.approx(by_hand)
        summed = SpatialAttention(over="sum", things=True).among(student, teacher, there).item()
        assert summed == pytest.approx(4 * by_hand)
    last_axis = SpatialAttention(axis=-1, things=True)  # [batch, rows, columns, channels]
    there = torch.tensor([[[True, False], [False, False]]])
    assert last_axis.among(student.movedim(1, -1), teacher.movedim(1, -1), there).item() == pytest.approx(first / 4)
    two = [torch.cat([one, one]) for one in (student, teacher)]  # the second picture has no things
    there = torch.cat([there, torch.zeros(1, 2, 2, dtype=torch.bool)])
    assert SpatialAttention(things=True).among(*two, there).item() == pytest.approx(first / 8)
    with pytest.raises(InputError, match=r"SpatialAttention\(things='yes'\); do: give true or false"):
        SpatialAttention(things="yes")


def test_features_by_hand():
    student, teacher = torch.tensor([[[1.0, 2.0], [0.0, 3.0]]]), torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    assert Features()(student, teacher).item() == pytest.approx((4 + 9) / 4)
    away = torch.tensor([[[0.0, 2.0], [3.0, 0.0]]])
    # tokens are (0, 1) against (1, 0), 2 apart, and (1, 0) against (0, 0), which stays (0, 0): 1 apart
    assert Features(normalise=True)(away, teacher).item() == pytest.approx((2 + 1) / 2)


@pytest.mark.parametrize("loss", ALL, ids=repr)
def test_agreement_is_nothing_and_only_the_student_learns(loss):
    generator = torch.Generator().manual_seed(0)
    feature = torch.randn(2, 3, 4, 4, generator=generator)
    assert loss(feature, feature.clone()).item() == 0.0
    student = torch.randn(2, 3, 4, 4, generator=generator, requires_grad=True)
    teacher = torch.randn(2, 3, 4, 4, generator=generator, requires_grad=True)
    value = loss(student, teacher)
    value.backward()
    assert value > 0 and student.grad.abs().sum() > 0 and teacher.grad is None


@pytest.mark.parametrize("loss", ALL, ids=repr)
def test_channels_in_another_order_on_both_sides_change_nothing(loss):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 4, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    order = torch.tensor([2, 0, 3, 1])
    value = loss(student, teacher).item()
    assert loss(student[:, order], teacher[:, order]).item() == pytest.approx(value)
    if loss.widths == "equal":
        assert loss(student[:, order], teacher).item() != pytest.approx(value)


@pytest.mark.parametrize("loss", ALL, ids=repr)
def test_half_precision_is_compared_in_float32(loss):
    value = loss(torch.randn(2, 3, 4, 4).half(), torch.randn(2, 3, 4, 4).half())
    assert value.dtype == torch.float32 and value.isfinite()


def test_sharp_maps_do_not_underflow():
    assert ChannelWise(1.0)(torch.zeros(1, 1, 2, 2), torch.tensor([[[[0.0, 0.0], [0.0, 1e4]]]])).isfinite()


def test_the_axis_of_the_channels_can_be_said():
    """[batch, height, width, channels], as Swin puts out."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 4, 3, 3, generator=generator) for _ in range(2))
    for first, last in ((ChannelWise(), ChannelWise(axis=-1)), (Logits(), Logits(axis=3))):
        moved = last(student.movedim(1, -1), teacher.movedim(1, -1))
        assert moved.item() == pytest.approx(first(student, teacher).item(), rel=1e-6)


@pytest.mark.parametrize(
    ("loss", "shapes", "says"),
    [
        (Logits(), [(2, 3), (2, 4)], "3 channels in the student, 4 in the teacher.*Distilled.*student=model"),
        (Logits(), [(2,), (2,)], r"tap a place that puts out \[batch, channels"),
        (ChannelWise(), [(2, 3, 4, 4), (2, 5, 4, 4)], "give the plan"),
        (ChannelWise(), [(2, 3, 4, 4), (2, 3, 2, 2)], "nothing is resized"),
        (ChannelWise(), [(2, 3), (2, 3)], "one position"),
        (SpatialAttention(), [(2, 3, 1, 1), (2, 3, 1, 1)], "one position"),
        (Features(), [(2, 3, 4), (2, 3, 4, 4)], "tap places of one kind"),
        (Features(axis=0), [(2, 3), (2, 3)], "the batch is axis 0"),
        (Features(axis=4), [(2, 3), (2, 3)], "channels on axis 4"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(loss, shapes, says):
    with pytest.raises(InputError, match=says):
        loss(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: Logits(0.0), InputError),
        (lambda: Logits(math.nan), InputError),
        (lambda: ChannelWise(-1.0), InputError),
        (lambda: SpatialAttention(power=0.0), InputError),
        (lambda: SpatialAttention(over="max"), UnknownNameError),
    ],
)
def test_settings_out_of_range_are_refused(make, error):
    with pytest.raises(error):
        make()
