"""Kernels on the meta device run once a shape, and give what they would have given."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from niwaki.graph.kernels import Kernels, is_pure, like_input


class Through(TorchDispatchMode):
    """All calls through one `Kernels`; counts those that came."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = Kernels()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return self.kernels(func, args, kwargs or {})


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def facts(result: Any) -> list[Any]:
    tensors = [result] if isinstance(result, Tensor) else list(result)
    return [(t.shape, t.stride(), t.dtype, t.device.type) for t in tensors]


WORK: dict[str, Callable[[], Any]] = {
    "convolution": lambda: F.conv2d(meta(1, 3, 8, 8), meta(4, 3, 3, 3), padding=1),
    "strided": lambda: F.conv2d(meta(1, 3, 8, 8), meta(4, 3, 3, 3), stride=2),
    "layer norm": lambda: F.layer_norm(meta(2, 5, 8), (8,)),
    "transposed": lambda: meta(4, 6).t() + meta(6, 4),
    "channels last": lambda: F.relu(meta(1, 3, 4, 4).contiguous(memory_format=torch.channels_last)),
    "integer plus integer": lambda: meta(3, dtype=torch.int32) + 1,
    "integer plus float": lambda: meta(3, dtype=torch.int32) + 1.0,
    "integer plus bool": lambda: meta(3, dtype=torch.bool) + True,
    "several results": lambda: torch.max(meta(3, 4), dim=1),
    "attention": lambda: F.scaled_dot_product_attention(*(meta(1, 2, 5, 4) for _ in range(3))),
    "in place": lambda: meta(3, 4).add_(1),
    "pieces": lambda: meta(3, 4).split(2),
    "number of no axes": lambda: meta(3, dtype=torch.int32) * meta(dtype=torch.float64),
}


@pytest.mark.parametrize("work", WORK.values(), ids=WORK)
def test_a_second_call_gives_what_the_first_gave(work: Callable[[], Any]) -> None:
    expected = facts(work())
    with Through():
        assert facts(work()) == expected
        assert facts(work()) == expected


def test_settings_that_are_equal_but_of_other_types_are_kept_apart() -> None:
    """1, 1.0 and True are one key to Python, but three types of result to torch."""
    with Through():
        x = meta(3, dtype=torch.bool)
        assert [(x + one).dtype for one in (1, 1.0, True, 1)] == [torch.int64, torch.float32, torch.bool, torch.int64]


def test_repeated_calls_are_remembered_and_results_are_tensors_of_their_own() -> None:
    x, other, w = meta(1, 4, 8, 8), meta(1, 4, 9, 9), meta(4, 3, 3, 3)
    with Through() as through:
        first, again = F.conv_transpose2d(x, w), F.conv_transpose2d(x, w)
        assert len(through.kernels.known) == 1
        F.conv_transpose2d(other, w)
        assert len(through.kernels.known) == 2
        F.conv2d(x, x)  # plain arithmetic tells what it gives
        assert len(through.kernels.known) == 2
    assert first is not again and facts(first) == facts(again)


def test_only_operators_that_give_new_tensors_are_pure() -> None:
    aten = torch.ops.aten
    assert is_pure(aten.convolution.default) and is_pure(aten.native_layer_norm.default)
    for other in (aten.view.default, aten.relu_.default, aten.split.Tensor, aten.nonzero.default, aten.add.out):
        assert not is_pure(other)


def test_real_tensors_are_computed() -> None:
    with Through():
        x = torch.arange(3.0)
        assert [(x + 1).tolist(), (x + 2).tolist(), ((x + 1) + 1).tolist()] == [[1, 2, 3], [2, 3, 4], [2, 3, 4]]


def test_a_mistake_stays_a_mistake() -> None:
    with Through():
        for _ in range(2):
            with pytest.raises(RuntimeError):
                F.conv2d(meta(1, 3, 8, 8), meta(4, 5, 3, 3))


def test_what_a_batch_norm_gives_has_the_shape_torch_gives() -> None:
    x, v = meta(2, 3, 4, 4), meta(3)
    whole = torch.ops.aten._native_batch_norm_legit_no_training(x, v, v, v, v, 0.1, 1e-5)
    assert (
        facts(like_input(x))[:1] == facts(whole)[:1]
    )  # saved statistics are empty or not by device; no label is theirs
