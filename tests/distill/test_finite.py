"""Distances that are not finite name their place, in whichever batch it is."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from niwaki.distill import BoxOutputs, Distilled, Features, OutputTaught, SpatialAttention, Weighted
from niwaki.distill.box_outputs import HeadOutputs
from niwaki.distill.finite import Place, refuse_not_finite
from niwaki.errors import NotFiniteError

INF, NAN = float("inf"), float("nan")


class Ones:
    """A task of pictures of ones, whose loss is a mean."""

    def loss(self, model, batch):
        return model(batch[0]).mean()

    def example(self):
        return torch.ones(1, 1, 4, 4)


def net():
    return nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 3, 1)).eval()


BATCH = (torch.ones(2, 1, 4, 4), [None, None])
AT = (Weighted(Features(), taps=("0",)), Weighted(SpatialAttention(), taps=("1",)))


@pytest.mark.parametrize(
    ("layer", "ours", "theirs", "message"),
    [
        (1, INF, None, "spatial_attention; found: NaN or infinity in the student's feature; where: student's 1, teach"),
        (1, 1e30, None, "so large that their distance is not finite; where: student's 1, teacher's 1"),  # its square
        (0, None, NAN, "distil by features; found: NaN or infinity in the teacher's feature; where: student's 0, teac"),
        (0, NAN, NAN, "in the student's feature and the teacher's feature; where: student's 0"),
    ],
)
def test_features_by_place_after_a_batch_that_was_fine(layer, ours, theirs, message):
    teacher, student = net(), net()
    task = Distilled(Ones(), teacher, AT, student=student)
    assert all(bool(part.isfinite()) for part in task.parts(student, BATCH).values())
    for model, value in ((student, ours), (teacher, theirs)):
        if value is not None:
            nn.init.constant_(model[layer].bias, value)
    with pytest.raises(NotFiniteError, match=message):
        task.parts(student, BATCH)


class TwoHeads:
    """Heads are what both layers put out: a box of two classes at every position."""

    def head_places(self, model):
        return "0", "1"

    def head_outputs(self, features, size):
        return [HeadOutputs(f.flatten(2).mT[..., :2], f.flatten(2).mT[..., [0, 0, 1, 1]]) for f in features]

    def matched(self, features, targets, size):
        return [torch.ones(len(f), f[0, 0].numel(), dtype=torch.bool) for f in features]


def test_outputs_by_place():
    teacher, student = net(), net()
    task = OutputTaught(Ones(), teacher, BoxOutputs(), TwoHeads())
    batch = (BATCH[0], [SimpleNamespace(to=lambda place: None)] * 2)
    assert len(task.parts(student, batch)) == 3
    nn.init.constant_(teacher[1].bias, NAN)
    with pytest.raises(
        NotFiniteError, match="distil outputs; found: NaN or infinity in the teacher's feature; where: 1"
    ):
        task.parts(student, batch)


def test_of_several_places_the_one_with_the_bad_feature_is_named():
    fine, bad, far = torch.ones(2), torch.tensor([1.0, NAN]), torch.tensor(INF)
    refuse_not_finite([Place("distil", "a", fine, bad, torch.tensor(1.0))])  # nothing came of it
    with pytest.raises(NotFiniteError, match="student's feature; where: c"):
        refuse_not_finite([Place("distil", "b", fine, fine, far), Place("distil", "c", bad, fine, far)])
    with pytest.raises(NotFiniteError, match="so large that their distance is not finite; where: b"):
        refuse_not_finite([Place("distil", "a", bad, fine, torch.tensor(1.0)), Place("distil", "b", fine, fine, far)])
