"""Shapes worked out beside the kernels are those that the kernels give."""

from typing import Any

import pytest
import torch
from torch import Tensor

from niwaki.graph.layouts import guessed

aten = torch.ops.aten


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


CALLS: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (aten.hardswish.default, (meta(2, 3),), {}),
    (aten.add.Tensor, (meta(2, 3, 4), meta(3, 1)), {"alpha": 2}),
    (aten.add.Tensor, (meta(2, 3, dtype=torch.int64), meta(2, 3)), {}),
    (aten.add.Tensor, (meta(2, 3, dtype=torch.int64), meta(2, 3, dtype=torch.int64)), {}),
    (aten.mul.Tensor, (meta(2, 3, dtype=torch.int32), meta(1, 3, dtype=torch.int64)), {}),
    (aten.gt.Scalar, (meta(5), 0), {}),
    (
        aten.convolution.default,
        (meta(2, 4, 9, 9), meta(6, 2, 3, 3), None, [2, 2], [1, 0], [1, 2], False, [0, 0], 2),
        {},
    ),
    (aten.convolution.default, (meta(2, 4, 9), meta(6, 4, 3), meta(6), [1], [0], [1], False, [0], 1), {}),
    (aten.cat.default, ([meta(2, 3), meta(2, 5), meta(2, 1)], -1), {}),
    (aten.addmm.default, (meta(5), meta(2, 3), meta(5, 3).t()), {}),
    (aten.mm.default, (meta(2, 3), meta(3, 5)), {}),
    (aten.mean.dim, (meta(2, 3, 4), [-1, 1], True), {}),
    (aten.mean.dim, (meta(2, 3, 4), [2]), {"dtype": torch.float64}),
    (aten.native_layer_norm.default, (meta(2, 3, 4), [3, 4], meta(3, 4), None, 1e-5), {}),
    (aten.native_layer_norm.default, (meta(2, 5, 3, 4).permute(0, 2, 3, 1), [5], meta(5), meta(5), 1e-5), {}),
    (aten.native_layer_norm.default, (meta(1, 4, 3)[:, :2], [3], None, None, 1e-5), {}),
    (aten._safe_softmax.default, (meta(2, 3, 4), -1), {}),
    (aten._safe_softmax.default, (meta(2, 3, 4), 1, torch.float64), {}),
    (aten._softmax.default, (meta(2, 3), 0, False), {}),
    (aten._log_softmax.default, (meta(2, 3), 1, False), {}),
    (aten.cumsum.default, (meta(2, 3, dtype=torch.int32), 1), {}),
    (aten.cumsum.default, (meta(2, 3), -2), {"dtype": torch.float64}),
    (aten.all.default, (meta(2, 3, dtype=torch.bool),), {}),
    (aten.any.default, (meta(2, 3),), {}),
    (aten.max_pool2d_with_indices.default, (meta(2, 3, 9, 8), [3, 2], [2, 1], [1, 0]), {}),
    (aten.max_pool2d_with_indices.default, (meta(1, 1, 8, 8), [2, 2]), {}),
    (aten.max_pool2d_with_indices.default, (meta(1, 1, 8, 8), [2, 2], [2, 2], [0, 0], [1, 1], False), {}),
    (aten.max_pool2d_with_indices.default, (meta(2, 3, 9, 9), [3, 3], [2, 2], [1, 1], [2, 2]), {}),
    (aten.avg_pool2d.default, (meta(2, 3, 9, 8), [3, 2]), {}),
    (aten.avg_pool2d.default, (meta(2, 1, 9, 8), [3, 3], [2, 1], [1, 1], False, False, 5), {}),
    (aten.linalg_vector_norm.default, (meta(2, 3, 4),), {}),
    (aten.linalg_vector_norm.default, (meta(2, 3, 4), 1, [-1, 0], True), {}),
    (aten.linalg_vector_norm.default, (meta(2, 3, 4), 2.0, [1]), {"dtype": torch.float64}),
    (aten.native_group_norm.default, (meta(2, 6, 5, 4), meta(6), meta(6), 2, 6, 20, 3, 1e-5), {}),
    (aten.native_group_norm.default, (meta(1, 6), None, None, 1, 6, 1, 1, 1e-5), {}),
    (aten.native_group_norm.default, (meta(1, 4, 1), meta(4), None, 1, 4, 1, 4, 1e-5), {}),
    (aten.native_batch_norm.default, (meta(2, 3, 4, 4), None, None, None, None, True, 0.1, 1e-5), {}),
    (aten.native_batch_norm.default, (meta(1, 1, 5), meta(1), meta(1), meta(1), meta(1), True, 0.1, 1e-5), {}),
    (aten.upsample_bilinear2d.default, (meta(2, 3, 4, 5), [8, 7], False), {}),
    (aten.upsample_bilinear2d.default, (meta(1, 1, 1, 1), [2, 1], True, 2.0, None), {}),
    (aten.upsample_bicubic2d.default, (meta(1, 1, 4, 1), [1, 3], False), {}),
    (aten.upsample_nearest2d.default, (meta(2, 3, 4, 5), [8, 10], 2.0, 2.0), {}),
    (aten._upsample_nearest_exact2d.default, (meta(2, 1, 4, 5), [2, 1]), {}),
]


def layouts(result: Any) -> list[Any]:
    tensors = [result] if isinstance(result, Tensor) else list(result)
    return [(tuple(t.shape), t.stride(), t.dtype, t.device.type) for t in tensors]


@pytest.mark.parametrize(("func", "args", "kwargs"), CALLS, ids=lambda value: getattr(value, "_name", ""))
def test_as_the_operator_says(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    result = guessed(func, args, kwargs)
    assert result is not None
    assert layouts(result) == layouts(func(*args, **kwargs))


def test_in_place_gives_the_tensor_itself() -> None:
    x = meta(2, 3)
    assert guessed(aten.hardswish_.default, (x,), {}) is x
    assert guessed(aten.add_.Tensor, (x, meta(3)), {}) is x


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (aten.add.Tensor, (meta(2, 3), meta(2))),  # do not meet
        (aten.add_.Tensor, (meta(1, 3), meta(2, 3))),  # does not fit into the first
        (aten.relu.default, (meta(3, 2).t(),)),  # lies in another order
        (aten.relu.default, (meta(),)),  # a number promotes types in a way of its own
        (aten.convolution.default, (meta(2, 4, 9), meta(6, 3, 3), None, [1], [0], [1], False, [0], 1)),
        (aten.convolution.default, (meta(2, 4, 2), meta(6, 4, 3), None, [1], [0], [1], False, [0], 1)),
        (aten.convolution.default, (meta(2, 4, 9), meta(4, 6, 3), None, [1], [0], [1], True, [0], 1)),
        (aten.cat.default, ([meta(2, 3), meta(4, 3)], 1)),
        (aten.cat.default, ([meta(0), meta(4, 3)], 0)),
        (aten.mm.default, (meta(2, 3), meta(2, 3))),
        (aten.mean.dim, (meta(2, 3), [2])),
        (aten.native_layer_norm.default, (meta(2, 3), [2], None, None, 1e-5)),
        (aten.view.default, (meta(2, 3), [6])),
        (aten._softmax.default, (meta(2, 3), 2, False)),
        (aten._softmax.default, (meta(3, 2).t(), 1, False)),
        (aten.cumsum.default, (meta(3, 2).t(), 0)),
        (aten.all.dim, (meta(5, dtype=torch.bool), 0)),  # right by chance, and what is known of it is taken for others
        (aten.all.dim, (meta(2, 3, dtype=torch.bool), 1)),
        (aten.max_pool2d_with_indices.default, (meta(2, 3, 9, 9), [2, 2], [2, 2], [0, 0], [1, 1], True)),
        (aten.max_pool2d_with_indices.default, (meta(2, 3, 1, 1), [3, 3])),
        (aten.max_pool2d_with_indices.default, (meta(3, 9, 9), [2, 2])),
        (aten.avg_pool2d.default, (meta(2, 3, 9, 9), [2, 2], [2, 2], [0, 0], True)),
        (aten.avg_pool2d.default, (meta(2, 3, 9, 9), [2])),
        (aten.avg_pool2d.default, (meta(2, 3, 9, 9), [1, 1], [1, 1], [1, 0])),  # more padding than half the window
        (aten.linalg_vector_norm.default, (meta(3, 2).t(), 2, [0])),
        (aten.native_group_norm.default, (meta(2, 6, 5), meta(6), None, 2, 6, 5, 4, 1e-5)),  # six into four
        (aten.native_group_norm.default, (meta(2, 6, 5), meta(5), None, 2, 6, 5, 3, 1e-5)),
        (aten.native_group_norm.default, (meta(2, 6, 5), None, None, 2, 6, 4, 3, 1e-5)),
        (aten.native_batch_norm.default, (meta(2, 3), None, None, meta(3), meta(3), False, 0.1, 1e-5)),
        (aten.native_batch_norm.default, (meta(2, 3), meta(2), None, None, None, True, 0.1, 1e-5)),
        (aten.native_batch_norm.default, (meta(1, 3, 1), None, None, None, None, True, 0.1, 1e-5)),  # no statistics
        (aten.native_batch_norm.default, (meta(3), None, None, None, None, True, 0.1, 1e-5)),
        (aten.upsample_bilinear2d.default, (meta(2, 3, 4, 5).to(memory_format=torch.channels_last), [8, 7], False)),
        (aten.upsample_bilinear2d.vec, (meta(2, 3, 4, 5), None, False, [2.0, 2.0])),
        (aten.upsample_nearest2d.default, (meta(2, 3, 4, 5), [0, 10])),
    ],
)
def test_left_to_the_operator(func: Any, args: tuple[Any, ...]) -> None:
    assert guessed(func, args, {}) is None


def test_only_on_the_meta_device() -> None:
    assert guessed(aten.relu.default, (torch.zeros(2),), {}) is None


def test_an_operator_that_gives_something_else_is_asked_every_time() -> None:
    x = meta(2, 3)
    assert guessed(aten._to_copy.default, (x,), {"device": torch.device("cpu")}) is None
    assert guessed(aten.mean.dim, (x, [0]), {"out": x}) is None
