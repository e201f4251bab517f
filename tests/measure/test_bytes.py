"""Bytes, worked out by hand."""

import torch
from torch import nn

from niwaki.measure import Bytes


def test_parameters_and_buffers() -> None:
    # BatchNorm1d(5): weight, bias, mean, variance of 5 floats each, and one int64 counter: 4 * 5 * 4 + 8
    assert Bytes()(nn.BatchNorm1d(5)).value == 88.0


def test_half_precision_halves() -> None:
    assert Bytes()(nn.Linear(8, 8, bias=False).half()).value == 128.0


def test_a_slice_that_keeps_its_storage_saves_nothing() -> None:
    model = nn.Linear(8, 8, bias=False)
    model.weight = nn.Parameter(model.weight.data[:4])
    assert Bytes()(model).value == 8 * 8 * 4
    model.weight = nn.Parameter(model.weight.data.clone())
    assert Bytes()(model).value == 4 * 8 * 4


def test_tied_tensors_count_once() -> None:
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    assert Bytes()(nn.Sequential(first, second)).value == 64.0


def test_sparse_layouts_are_said_to_be_uncounted() -> None:
    model = nn.Module()
    model.register_buffer("table", torch.eye(3).to_sparse())
    model.register_buffer("other", torch.zeros(2))
    found = Bytes()(model)
    assert (found.value, found.uncounted) == (8.0, ("table",))
