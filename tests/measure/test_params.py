"""Parameters, worked out by hand."""

import torch
from torch import nn

from niwaki.measure import Params


def test_linear_and_norm() -> None:
    # 5 x 3 weights + 5 biases + 2 x 5 of the norm; its running statistics are buffers and do not count
    assert Params()(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))).value == 30.0


def test_one_parameter_object_under_two_names_counts_once() -> None:
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    assert Params()(nn.Sequential(first, second)).value == 16.0


def test_two_parameter_objects_on_one_storage_count_once() -> None:
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = nn.Parameter(first.weight.data)
    assert Params()(nn.Sequential(first, second)).value == 16.0


def test_meta_parameters_have_no_address_and_are_still_told_apart() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    found = Params()(model)
    assert (found.value, found.device) == (32.0, "meta")
