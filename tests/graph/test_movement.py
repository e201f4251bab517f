"""Movement rules against brute force: the labels of the result are the result of the operator on index numbers."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from labelled import Net, Seen, cut_and_judge, group_of, numbers, tied
from torch import Tensor, nn

import niwaki
from niwaki.graph.rules import MOVEMENT, RULES, movement

IMPLICIT = "CompositeImplicitAutograd"
aten = torch.ops.aten
PICK = torch.tensor([3, 0, 0, 2])
MASK = torch.tensor([True, False, True, True, False, True])
TABLE = torch.tensor([[1, 0], [2, 3]])
Case = tuple[Callable[..., Any], tuple[int, ...], list[tuple[int, ...]]]
S = (4, 6, 8)
EACH: list[tuple[int, ...]] = [(0,), (1,), (2,), (0, 1, 2)]
"""Labels along one axis at a time, and one label per element."""

CASES: dict[str, Case] = {
    # the same elements
    "clone": (torch.clone, S, EACH),
    "to double": (lambda x: x.double(), S, EACH),
    "detach": (torch.detach, S, EACH),
    "dropout in evaluation": (lambda x: F.dropout(x, training=False), S, EACH),
    "alias": (aten.alias, S, EACH),
    # the same elements in another shape
    "view to the same": (lambda x: x.view(4, 6, 8), S, EACH),
    "split one axis": (lambda x: x.view(4, 2, 3, 8), S, EACH),
    "split every axis": (lambda x: x.view(2, 2, 3, 2, 2, 4), S, EACH),
    "merge the last two": (lambda x: x.flatten(1), S, [(1,), (2,), (0, 1, 2)]),
    "merge the first two": (lambda x: x.flatten(0, 1), S, [(0,), (1,), (0, 1, 2)]),
    "merge all": (lambda x: x.reshape(-1), S, [(0,), (1,), (2,), (0, 1, 2)]),
    "merge and split anew": (lambda x: x.reshape(4, 12, 4), S, [(2,), (0, 1, 2)]),
    "unflatten": (lambda x: x.unflatten(2, (2, 4)), S, EACH),
    "view_copy": (lambda x: aten.view_copy(x, [4, 2, 3, 8]), S, EACH),
    "_unsafe_view": (lambda x: aten._unsafe_view(x, [4, 2, 3, 8]), S, EACH),
    "reshape after transpose": (lambda x: x.transpose(1, 2).reshape(4, 48), S, [(0,), (2,), (0, 1, 2)]),
    "squeeze": (lambda x: x.squeeze(1), (4, 1, 8), [(0,), (2,), (0, 2)]),
    "squeeze all": (torch.squeeze, (1, 4, 1, 8), [(1,), (3,), (1, 3)]),
    "squeeze nothing": (lambda x: x.squeeze(0), S, EACH),
    "unsqueeze": (lambda x: x.unsqueeze(-2), S, EACH),
    "unsqueeze_copy": (lambda x: aten.unsqueeze_copy(x, 1), S, EACH),
    "squeeze_copy": (lambda x: aten.squeeze_copy(x, 1), (4, 1, 8), [(0,), (2,)]),
    # axes in another order
    "permute": (lambda x: x.permute(2, 0, 1), S, EACH),
    "permute_copy": (lambda x: aten.permute_copy(x, [-1, 0, 1]), S, EACH),
    "transpose": (lambda x: x.transpose(0, -1), S, EACH),
    "transpose_copy": (lambda x: aten.transpose_copy(x, 0, 1), S, EACH),
    "t": (torch.t, (4, 6), [(0,), (1,), (0, 1)]),
    "t of a vector": (torch.t, (6,), [(0,)]),
    "t_copy": (aten.t_copy, (4, 6), [(0,), (1,), (0, 1)]),
    "mT": (lambda x: x.mT, S, EACH),
    "movedim": (lambda x: torch.movedim(x, 0, 2), S, EACH),
    "swapaxes": (lambda x: torch.swapaxes(x, 0, 1), S, EACH),
    "einops style": (lambda x: x.view(4, 2, 3, 8).permute(0, 2, 1, 3), S, EACH),
    # parts
    "slice": (lambda x: x[:, 1:5], S, EACH),
    "strided slice": (lambda x: x[:, 1::2, ::3], S, EACH),
    "negative slice": (lambda x: x[..., -3:-1], S, EACH),
    "slice beyond": (lambda x: x[:, 2:99], S, EACH),
    "slice_copy": (lambda x: aten.slice_copy(x, 1, 1, 5, 2), S, EACH),
    "narrow": (lambda x: x.narrow(1, -4, 2), S, EACH),
    "narrow_copy": (lambda x: aten.narrow_copy(x, 1, 2, 3), S, EACH),
    "select": (lambda x: x[:, -2], S, [(0,), (2,)]),
    "select of elements": (lambda x: x[:, -2], S, [(0, 1, 2)]),
    "select_copy": (lambda x: aten.select_copy(x, 1, 3), S, [(0,), (2,)]),
    "unbind": (lambda x: x.unbind(1), S, [(0,), (2,), (0, 1, 2)]),
    "unbind_copy": (lambda x: aten.unbind_copy(x, 1), S, [(0,), (2,)]),
    "chunk": (lambda x: x.chunk(3, 2), S, EACH),
    "split": (lambda x: x.split(5, 2), S, EACH),
    "split of sizes": (lambda x: x.split([1, 5, 2], 2), S, EACH),
    "tensor_split": (lambda x: torch.tensor_split(x, (2, 3), 2), S, EACH),
    "unsafe_split": (lambda x: torch.unsafe_split(x, 3, 2), S, EACH),
    "unsafe_chunk": (lambda x: torch.unsafe_chunk(x, 2, 2), S, EACH),
    "unsafe_split_with_sizes": (lambda x: torch.unsafe_split_with_sizes(x, (3, 5), 2), S, EACH),
    "split_copy": (lambda x: aten.split_copy(x, 3, 2), S, EACH),
    "split_with_sizes_copy": (lambda x: aten.split_with_sizes_copy(x, [3, 5], 2), S, EACH),
    # repeats
    "repeat": (lambda x: x.repeat(1, 2, 3), S, EACH),
    "repeat with a new axis": (lambda x: x.repeat(1, 1, 2, 1), S, EACH),
    "tile": (lambda x: torch.tile(x, (2,)), S, EACH),
    "repeat_interleave": (lambda x: x.repeat_interleave(3, 1), S, EACH),
    "expand to the same": (lambda x: x.expand(4, 6, 8), S, EACH),
    "expand_copy": (lambda x: aten.expand_copy(x, [4, 6, 8]), S, EACH),
    "broadcast_to": (lambda x: x.broadcast_to(1, 4, 6, 8), S, EACH),
    # order
    "flip": (lambda x: x.flip(1, 2), S, EACH),
    "fliplr": (torch.fliplr, S, EACH),
    "flipud": (torch.flipud, S, EACH),
    "roll": (lambda x: x.roll((2, -3), (1, 2)), S, EACH),
    "roll of one": (lambda x: torch.roll(x, 5, -1), S, EACH),
    # joins with itself
    "cat": (lambda x: torch.cat([x, x.flip(1)], 1), S, [(1,)]),
    "cat of parts": (lambda x: torch.cat([x[:, 3:], x[:, :3]], 1), S, [(1,), (0, 1, 2)]),
    "cat on another axis": (lambda x: torch.cat([x, x], 2), S, [(0,), (1,)]),
    "cat with nothing": (lambda x: torch.cat([x.new_empty(0), x], 1), S, [(1,)]),
    "stack": (lambda x: torch.stack([x, x], 1), S, [(0,), (1,), (2,)]),
    # picks by constant tables
    "index_select": (lambda x: x.index_select(1, PICK), S, EACH),
    "index": (lambda x: x[:, PICK], S, EACH),
    "index by a table": (lambda x: x[:, TABLE], S, EACH),
    "index on two axes": (lambda x: x[PICK, :, PICK], S, [(1,)]),
    "index by a mask": (lambda x: x[:, MASK], S, EACH),
    "index by a table made in forward": (lambda x: x[:, torch.tensor([3, 0, 0, 2])], S, EACH),
    # windows, pixels
    "as_strided windows": (lambda x: x.contiguous().as_strided((4, 2, 4, 8), (48, 16, 8, 1)), S, EACH[:3]),
    "as_strided windows of elements": (lambda x: x.contiguous().as_strided((3, 4), (2, 1), 5), S, [(0, 1, 2)]),
    "unfold": (lambda x: x.unfold(2, 3, 2), S, [(0,), (1,)]),
    "unfold of elements": (lambda x: x.unfold(2, 3, 2), S, [(2,), (0, 1, 2)]),
    "unfold_copy": (lambda x: aten.unfold_copy(x, 2, 4, 4), S, [(0,), (1,), (2,)]),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), (2, 8, 3, 3), [(0,)]),
    "pixel_unshuffle": (lambda x: F.pixel_unshuffle(x, 2), (2, 3, 4, 6), [(0,), (1,), (0, 1, 2, 3)]),
    "channel_shuffle": (lambda x: torch.channel_shuffle(x, 3), (2, 6, 3, 3), [(0,), (1,), (0, 1, 2, 3)]),
    "im2col": (lambda x: F.unfold(x, 2), (1, 3, 4, 4), [(1,)]),
    "col2im": (lambda x: F.fold(x, (2, 3), 1), (1, 4, 6), [(1,)]),
    "negative padding": (lambda x: F.pad(x, (-1, -2)), S, [(0,), (1,), (2,)]),
    "diagonal of other axes": (lambda x: x.diagonal(dim1=0, dim2=2), S, [(1,)]),
    "view_as_real": (lambda x: torch.view_as_real(x.to(torch.complex64))[..., 0], S, EACH),
}


@pytest.mark.filterwarnings("ignore:Casting complex values")
@pytest.mark.parametrize("name", CASES)
def test_labels_move_as_index_numbers_do(name: str) -> None:
    operator, shape, choices = CASES[name]
    for axes in choices:
        seen = Seen(operator, shape, axes)
        wanted = numbers(operator, shape, axes)
        assert len(seen.outputs) == len(wanted)
        assert not seen.recorder.unknown
        for i, expected in enumerate(wanted):
            fields = [f for f in seen.fields(i) if f.min() < seen.first_new]
            if expected.unique().numel() == 1 and not fields:
                continue  # a single position: nothing is left to label
            (labels,) = fields
            assert labels.shape == tuple(n if n == m else 1 for n, m in zip(labels.shape, expected.shape, strict=True))
            assert np.array_equal(np.broadcast_to(labels, expected.shape), expected.numpy()), (name, axes, i)


def test_pixel_shuffle_ties_the_phases_of_a_channel() -> None:
    """8 channels become 2 of 2 x 2 phases in space: channels 0 to 3 are one unit, 4 to 7 the other."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.PixelShuffle(2), torch.nn.Conv2d(2, 5, 1))
    graph = niwaki.trace(model, torch.zeros(1, 3, 2, 2))
    (group,) = [g for g in graph.groups if g.fixed is None]
    members = {(m.tensor, m.axis): (m.index.tolist(), m.unit.tolist()) for m in group.members}
    assert members["0.weight", 0] == ([0, 1, 2, 3, 4, 5, 6, 7], [0, 0, 0, 0, 1, 1, 1, 1])
    assert members["2.weight", 1] == ([0, 1], [0, 1])


def test_folding_ties_the_window_of_a_channel() -> None:
    """8 rows of windows of 2 x 2 are added up into 2 channels: rows 0 to 3 are one unit, 4 to 7 the other."""
    model = torch.nn.Sequential(torch.nn.Conv1d(3, 8, 1), torch.nn.Fold((3, 3), 2), torch.nn.Conv2d(2, 5, 1))
    graph = niwaki.trace(model, torch.zeros(1, 3, 4))
    (group,) = [g for g in graph.groups if g.fixed is None]
    members = {(m.tensor, m.axis): (m.index.tolist(), m.unit.tolist()) for m in group.members}
    assert members["0.weight", 0] == ([0, 1, 2, 3, 4, 5, 6, 7], [0, 0, 0, 0, 1, 1, 1, 1])
    assert members["2.weight", 1] == ([0, 1], [0, 1])


@pytest.mark.parametrize(
    ("name", "operator"),
    {
        "transpose_": lambda x: x.transpose_(0, 1),
        "t_": lambda x: x[0].t_(),
        "unsqueeze_": lambda x: x.unsqueeze_(1),
        "squeeze_": lambda x: x[:1].squeeze_(0),
        "swapaxes_": lambda x: x.swapaxes_(1, 2),
    }.items(),
)
def test_in_place_movement(name: str, operator: Callable[..., Any]) -> None:
    for axes in ((1,), (2,), (0, 1, 2)):
        seen = Seen(operator, S, axes)
        (expected,) = numbers(operator, S, axes)
        (labels,) = seen.fields()
        assert np.array_equal(np.broadcast_to(labels, expected.shape), expected.numpy())


def test_out_variants_write_what_they_compute() -> None:
    """torch.cat(out=) and friends: the tensor given as `out` carries the labels afterwards."""

    def operator(x: torch.Tensor) -> torch.Tensor:
        place = torch.empty(4, 12, 8, device=x.device)
        torch.cat([x, x.flip(1)], 1, out=place)
        return place

    seen = Seen(operator, S, (1,))
    (labels,) = seen.fields()
    assert labels.ravel().tolist() == [0, 1, 2, 3, 4, 5, 5, 4, 3, 2, 1, 0]


def test_every_movement_rule_is_tried() -> None:
    """Names that no case reaches are those that torch itself takes apart, or that write by position (tested below)."""
    reached: set[str] = set()
    for operator, shape, choices in CASES.values():
        reached |= Seen(operator, shape, choices[0]).names
    left = {name for name, rule in RULES.items() if rule.__module__ in MOVEMENT} - reached

    def composite(name: str) -> bool:
        packet = getattr(aten, name, None)
        return packet is None or all(torch._C._dispatch_has_kernel_for_dispatch_key(n, IMPLICIT) for n in full(packet))

    def full(packet: Any) -> list[str]:
        return [
            o
            for o in torch._C._dispatch_get_all_op_names()
            if (o.split(".")[0] == f"aten::{packet.__name__}" and "." not in o)
            or (o.startswith(f"aten::{packet.__name__}.") and not o.endswith(("out", "names", "Dimname")))
        ]

    writes = {"gather", "slice_scatter", "select_scatter", "masked_scatter"}
    writes |= {n for n in left if n.startswith(("scatter", "index_", "_index_put", "_unsafe_index"))}
    in_place = {n for n in left if n.endswith("_")}
    layout = {
        "as_strided_copy",
        "_reshape_alias",
        "_reshape_copy",
        "resize_as_",
        "set_",
        "lift",
        "lift_fresh",
        "lift_fresh_copy",
        "_pin_memory",
        "_conj",
        "view_as_complex",
        "constant_pad_nd",
        "expand",
        "view_of",
    }
    other = {
        "alias_copy",
        "record_stream",
        "repeat_interleave",
        "diagonal_copy",
        "_to_dense",
        "native_dropout",
        "native_channel_shuffle",
        "split_with_sizes",
    }
    untried = {name for name in left if not composite(name)} - writes - in_place - layout - other
    assert untried == set()


# -- by hand: what brute force over one tensor can't show ----------


def test_two_labelled_axes_that_become_one_get_a_label_for_each_pair() -> None:
    """[2 heads, 3 channels] -> 6: unit (h, c) lies in slab h and in slab c."""
    heads, channels = torch.nn.Parameter(torch.ones(2, 1)), torch.nn.Parameter(torch.ones(1, 3))
    net = Net(
        lambda n, x: n.out((n.heads * n.channels * x).flatten(0, 1)),
        heads=heads,
        channels=channels,
        out=torch.nn.Linear(6, 1),
    )
    graph = niwaki.trace(net, torch.ones(2, 3))
    units = {m.axis: m.index.tolist() for g in graph.groups for m in g.members if m.tensor == "out.weight"}
    assert units[1] == [0, 1, 2, 3, 4, 5]


def test_padding_of_a_labelled_axis_makes_positions_of_its_own() -> None:
    """[6] padded by (1, 2): new, 0 ... 5, new, new; the new ones hold zero and may go with what reads them."""
    seen = Seen(lambda x: F.pad(x, (1, 2)), (4, 6), (1,))
    (labels,) = seen.fields()
    flat = labels.ravel().tolist()
    assert flat[1:7] == [0, 1, 2, 3, 4, 5]
    assert len({flat[0], flat[7], flat[8]} - set(range(6))) == 3
    assert not seen.space.fixed
    fixed = Seen(lambda x: F.pad(x, (1, 2), value=1.0), (4, 6), (1,))
    assert [reason for _, reason in fixed.space.fixed] == ["padded with a constant that is not zero"]


def test_expanded_axes_are_free_and_do_not_tie() -> None:
    seen = Seen(lambda x: x.unsqueeze(1).expand(4, 5, 6), (4, 6), (1,))
    by_axis = {next(a for a, n in enumerate(f.shape) if n > 1): f for f in seen.fields()}
    assert by_axis[2].ravel().tolist() == [0, 1, 2, 3, 4, 5]
    assert seen.space.is_free(by_axis[1])


def test_a_part_of_nothing_joins_the_rest() -> None:
    """Heads of four channels of which all four are turned and none is passed by: cut by heads, exactly."""

    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        y = net.a(x).unflatten(-1, (3, 4))  # [batch, tokens, heads, size]
        y = torch.cat([y[..., :4].sin(), y[..., 4:]], -1)
        return net.b(y.flatten(2))

    net = Net(forward, a=torch.nn.Linear(6, 12), b=torch.nn.Linear(12, 2))
    _, small, receipt = cut_and_judge(net, torch.randn(2, 5, 6), keep=0.7)
    assert receipt.passed and receipt.exact and small.get_parameter("a.weight").shape == (8, 6)


def test_stack_ties_what_lies_on_top_of_each_other() -> None:
    seen = Seen(lambda x: torch.stack([x[:, :3], x[:, 3:]], 1), (4, 6), (1,))
    component = tied(seen.space, 6)
    assert (component[:3] == component[3:]).all()
    assert len(set(component[:3].tolist())) == 3


def test_a_diagonal_fixes_the_axes_it_is_taken_of() -> None:
    seen = Seen(lambda x: x.diagonal(dim1=1, dim2=2), (4, 6, 6), (1,))
    assert [reason for _, reason in seen.space.fixed] == ["a diagonal is taken"]


def test_what_falls_on_no_axis_is_fixed() -> None:
    seen = Seen(lambda x: x[:, 3], (4, 6), (1,))
    ((labels, reason),) = seen.space.fixed
    assert (labels.tolist(), reason) == ([3], "picked by a constant index")


def test_interleaved_rows_of_a_merge_go_together() -> None:
    """[6 channels, 4 positions] labelled by element and laid as channels last: nothing is lost."""
    operator = lambda x: x.reshape(2, 3, 4).transpose(0, 1).reshape(12, 2)  # noqa: E731
    seen = Seen(operator, (6, 4), (0, 1))
    (expected,) = numbers(operator, (6, 4), (0, 1))
    (labels,) = seen.fields()
    assert np.array_equal(np.broadcast_to(labels, expected.shape), expected.numpy())


@pytest.mark.parametrize(
    "operator",
    {
        "gather": lambda x, i: torch.gather(x, 0, i),
        "scatter": lambda x, i: torch.scatter(x, 0, i, x),
        "scatter_add": lambda x, i: torch.scatter_add(x, 0, i, x),
        "index_add": lambda x, i: torch.index_add(x, 0, i[:, 0], x),
        "index_copy": lambda x, i: torch.index_copy(x, 0, i[:, 0], x),
        "index_fill": lambda x, i: torch.index_fill(x, 0, i[:, 0], 0.0),
        "index_put": lambda x, i: torch.index_put(x, (i[:, 0],), x),
        "take_along_dim": lambda x, i: torch.take_along_dim(x, i, 0),
        "scatter_reduce": lambda x, i: torch.scatter_reduce(x, 0, i, x, "sum"),
        "slice_scatter": lambda x, i: torch.slice_scatter(x, x[1:3], 0, 1, 3),
        "select_scatter": lambda x, i: torch.select_scatter(x, x[0], 0, 2),
    }.values(),
    ids=[
        "gather",
        "scatter",
        "scatter_add",
        "index_add",
        "index_copy",
        "index_fill",
        "index_put",
        "take_along_dim",
        "scatter_reduce",
        "slice_scatter",
        "select_scatter",
    ],
)
def test_reads_and_writes_by_position_keep_the_other_axes_free_and_judged(operator: Callable[..., Any]) -> None:
    """Rows are addressed; channels pass, and the cut network computes what the masked one does."""
    index = torch.tensor([[2], [0], [1], [3]]).expand(4, 6).contiguous()

    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        y = net.a(x)
        place = index.to(x.device)[:, : y.shape[1]].contiguous()
        return net.b(operator(y, place))

    net = Net(forward, a=torch.nn.Linear(5, 6), b=torch.nn.Linear(6, 2))
    _plan, small, receipt = cut_and_judge(net, torch.randn(4, 5))
    assert small.a.weight.shape == (3, 5)
    assert receipt.exact and receipt.passed, receipt


def test_addressed_axes_are_fixed() -> None:
    def forward(net: Any, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        y = net.a(x)
        return net.b(torch.gather(y, 1, index))

    net = Net(forward, a=torch.nn.Linear(5, 6), b=torch.nn.Linear(6, 2))
    graph = niwaki.trace(net, (torch.randn(4, 5), torch.zeros(4, 6, dtype=torch.long)))
    assert group_of(graph, "a.weight", 0).fixed == "indexed by data"


def test_gather_with_a_smaller_index_on_another_axis() -> None:
    """torch allows index.size(d) <= input.size(d) for d != dim: only the first positions are read."""
    index = torch.zeros(3, 5, 2, dtype=torch.long)

    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        return net.b(torch.gather(net.a(x).transpose(1, 2), 2, index.to(x.device)).transpose(1, 2))

    net = Net(forward, a=torch.nn.Linear(4, 8), b=torch.nn.Linear(5, 2))
    graph = niwaki.trace(net, torch.randn(3, 6, 4))
    assert graph.outputs == ((3, 2, 2),)


def test_too_many_places_are_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tables laid out against each other, one number for every pair: 3 x 4 places."""

    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.out = nn.Linear(2, 3), nn.Linear(2, 4), nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            pairs = self.first(x)[:, :, None] * self.second(x)[:, None, :]
            return self.out(pairs.flatten(1))

    def reasons() -> dict[str, str | None]:
        graph = niwaki.trace(Pairs(), torch.zeros(1, 2))
        return {m.tensor: g.fixed for g in graph.groups for m in g.members if m.role == "out" and m.axis == 0}

    monkeypatch.setattr(movement, "MOST_PLACES", 12)
    assert reasons()["first.weight"] is None
    monkeypatch.setattr(movement, "MOST_PLACES", 11)
    assert str(reasons()["first.weight"]).startswith("spread over 12 places by ")
