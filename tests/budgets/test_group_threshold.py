"""Thresholds by group of layers, and the vote of coupled layers, by hand."""

import numpy as np
import pytest
import torch
from torch import nn

import niwaki
from niwaki.budgets import (
    GlobalRank,
    GroupThreshold,
    Layer,
    LayerGroup,
    at_pace,
    choose,
    groups_by_scale,
    groups_given,
    loss_rises,
    realised,
    scaled_layers,
)
from niwaki.errors import BudgetError, InputError, NotFiniteError, UnknownNameError


def with_scales(net, **scales):
    for name, values in scales.items():
        net.get_submodule(name.replace("_", ".")).weight.data = torch.tensor(values)
    return net.eval()


class Chain(nn.Sequential):
    """Two layers of four channels each, one behind the other."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1),
            nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
        )  # fmt: skip


class Coupled(nn.Module):
    """Three layers whose outputs are added: one unit each of four has three scales."""

    def __init__(self, members=3):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(1, 4, 1) for _ in range(members))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(members))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(sum(norm(conv(x)) for conv, norm in zip(self.convs, self.norms, strict=True)).mean((2, 3)))


PICTURE = torch.zeros(1, 1, 8, 8)


def chain():
    net = with_scales(Chain(), **{"1": [0.1, 0.2, 0.3, 0.4], "4": [1.0, 2.0, 3.0, 4.0]})
    graph = niwaki.trace(net, PICTURE)
    return net, graph, scaled_layers(graph, net)


def kept(plan, graph, layers):
    """Layer -> the channels that stay."""
    alive = niwaki.graph.plans.alive_of(graph, plan)
    return {layer.name: np.flatnonzero(alive[layer.units]).tolist() for layer in layers}


def test_each_group_has_its_threshold():
    """Scales 0.1..0.4 and 1..4 at 0.5 and 0.25: {0.3, 0.4} and {2, 3, 4} stay; one for all leaves one of four."""
    _, graph, layers = chain()
    groups = groups_given(["1", "4"], layers)
    paces = GroupThreshold((0.5, 0.25))(graph, layers, groups)
    assert [values.tolist() for values in paces.values.values()] == [[0.5, 1.0, 1.5, 2.0], [1.0, 2.0, 3.0, 4.0]]
    everything = (niwaki.Budget(keep=1.0),)
    plan = at_pace(graph, paces, everything)
    assert kept(plan, graph, layers) == {"1.weight": [2, 3], "4.weight": [1, 2, 3]}
    assert realised(graph, plan, layers, groups) == [
        {"group": "1", "layers": 1, "channels": 4, "kept": 2}, {"group": "4", "layers": 1, "channels": 4, "kept": 3}
    ]  # fmt: skip
    one = GroupThreshold((0.375,))(graph, layers, (LayerGroup("all", ("1.weight", "4.weight")),))
    assert kept(at_pace(graph, one, everything), graph, layers) == {"1.weight": [3], "4.weight": [0, 1, 2, 3]}


def test_as_the_authors_compare():
    """sorted[int(4 * 0.5)] = 0.3, and only what is above it stays: 0.4; of 1..4 at 0.25 what is above 2."""
    _, graph, layers = chain()
    paces = GroupThreshold((0.5, 0.25), strict=True)(graph, layers, groups_given(["1", "4"], layers))
    plan = at_pace(graph, paces, (niwaki.Budget(keep=1.0),))
    assert kept(plan, graph, layers) == {"1.weight": [3], "4.weight": [2, 3]}


def test_a_budget_is_met_by_one_pace():
    """Three of eight units may go: 0.1 at pace 0.5, then 0.2 and 1 at pace 1."""
    _, graph, layers = chain()
    paces = GroupThreshold((0.5, 0.25))(graph, layers, groups_given(["1", "4"], layers))
    plan = choose(graph, paces, niwaki.Budget(keep=5, of="units"), how=GlobalRank(normalise="none"))
    assert kept(plan, graph, layers) == {"1.weight": [2, 3], "4.weight": [1, 2, 3]}
    assert plan.decided_by["score"]["fractions"] == [0.5, 0.25]


def test_fractions_of_zero_leave_groups_whole():
    _, graph, layers = chain()
    groups = groups_given(["1", "4"], layers)
    assert not GroupThreshold((0.0, 0.0))(graph, layers, groups).values
    half = GroupThreshold((0.5, 0.0))(graph, layers, groups)
    assert list(half.values) == [graph.groups[0].name] and half.missing == (graph.groups[1].name,)
    plan = choose(graph, half, niwaki.Budget(keep=6, of="units"), how=GlobalRank(normalise="none"))
    assert kept(plan, graph, layers) == {"1.weight": [2, 3], "4.weight": [0, 1, 2, 3]}


def test_another_group_s_fraction_changes_nothing():
    _, graph, layers = chain()
    groups = groups_given(["1", "4"], layers)
    first, second = (GroupThreshold((p, 0.25))(graph, layers, groups).values for p in (0.2, 0.9))
    name = graph.groups[1].name
    assert torch.equal(first[name], second[name])


MASKS = ([1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 0])
"""Of three layers: what is above its threshold."""


def voted(meet, masks, **settings):
    """What stays where each layer is a group whose fraction is what its mask says."""
    net = Coupled(len(masks))
    for norm, mask in zip(net.norms, masks, strict=True):
        norm.weight.data = torch.tensor([1.0 + m - 0.01 * i for i, m in enumerate(mask)])
    graph = niwaki.trace(net.eval(), PICTURE)
    layers = scaled_layers(graph, net)
    how = GroupThreshold(tuple(1 - sum(mask) / 4 for mask in masks), meet=meet, **settings)
    paces = how(graph, layers, groups_given([f"norms.{i}" for i in range(len(masks))], layers))
    assert len(paces.values) == 1
    return [int(pace > 1) for pace in next(iter(paces.values.values()))]


@pytest.mark.parametrize(
    ("meet", "masks", "wanted"),
    [
        ("majority", MASKS, [1, 0, 0, 0]),
        ("union", MASKS, [1, 1, 1, 0]),
        ("least", MASKS, [1, 0, 0, 0]),
        ("majority", MASKS[:2], [1, 1, 1, 0]),  # a tie stays
        ("union", MASKS[:2], [1, 1, 1, 0]),
        ("least", ([1, 1, 0, 0], [1, 0, 1, 1], [1, 1, 1, 0]), [1, 1, 0, 0]),
        ("majority", ([1, 1, 0, 0],), [1, 1, 0, 0]),
    ],
)
def test_votes(meet, masks, wanted):
    assert voted(meet, masks) == wanted


@pytest.mark.parametrize("unit", [0.01, 1.0, 100.0])
def test_the_layer_that_loses_most_does_not_depend_on_the_unit_of_the_loss(unit):
    """Channels of the second layer cost a tenth of the first's: by the median it loses all four, in its own order."""
    net = Coupled(2)
    net.norms[0].weight.data = torch.tensor([4.0, 3.0, 2.0, 1.0])
    net.norms[1].weight.data = torch.tensor([1.0, 2.0, 3.0, 4.0])
    graph = niwaki.trace(net.eval(), PICTURE)
    layers = scaled_layers(graph, net)
    how = GroupThreshold(rises=((0.4 * unit,), (0.04 * unit,)), meet="least")
    (paces,) = how(graph, layers, groups_given(["norms.0", "norms.1"], layers)).values.values()
    assert paces.tolist() == pytest.approx([0.01 * unit, 0.02 * unit, 0.03 * unit, 0.04 * unit], rel=1e-5)


def test_the_mean_of_coupled_scales_is_ranked_once():
    """Means 0.5, 0.5, 0.5, 0.125: the last goes first, then of the equal ones the later."""
    net = Coupled(2)
    net.norms[0].weight.data, net.norms[1].weight.data = (
        torch.tensor([0.75, 0.25, 0.5, 0.25]), torch.tensor([0.25, 0.75, 0.5, 0.0])
    )  # fmt: skip
    graph = niwaki.trace(net.eval(), PICTURE)
    layers = scaled_layers(graph, net)
    paces = GroupThreshold((0.5,), meet="mean")(graph, layers, groups_given(["norms.*"], layers))
    assert next(iter(paces.values.values())).tolist() == [2.0, 1.5, 1.0, 0.5]


def test_rises_are_paces():
    """Half of the first group costs 0.1, all of it 1.1; the second costs 0.4 and 0.4: falls count as flat."""
    _, graph, layers = chain()
    groups = groups_given(["1", "4"], layers)
    first, second = GroupThreshold(rises=((0.1, 1.1), (0.4, 0.3)))(graph, layers, groups).values.values()
    assert first.tolist() == pytest.approx([0.05, 0.1, 0.6, 1.1], abs=1e-6)
    assert second.tolist() == pytest.approx([0.2, 0.4, 0.4, 0.4], abs=1e-6)
    assert bool((second.diff() > 0).all())  # of equal rises the smaller scale goes first
    plan = choose(graph, GroupThreshold(rises=((0.1, 1.1), (0.4, 0.3)))(graph, layers, groups),
                  niwaki.Budget(keep=4, of="units"), how=GlobalRank(normalise="none"))  # fmt: skip
    assert kept(plan, graph, layers) == {"1.weight": [2, 3], "4.weight": [2, 3]}


def test_rises_are_measured_and_leave_the_model_alone():
    """The loss is the sum of all |gamma|, but for a sign: masking a group's smallest takes them off, one by one."""
    net, _, layers = chain()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    groups = groups_given(["1", "4"], layers)

    def loss(model, batch):
        assert not model.training
        return batch - sum(model.get_submodule(name).weight.abs().sum() for name in ("1", "4"))

    net.train()
    found = loss_rises(net, layers, groups, batches=[torch.tensor(1.0), torch.tensor(3.0)], loss=loss, shares=2)
    assert np.array(found) == pytest.approx(np.array([[0.3, 1.0], [3.0, 10.0]]), abs=1e-5)
    assert net.training and all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    found = loss_rises(net, layers, groups, batches=[torch.tensor(1.0)], shares=2,
                       loss=lambda m, b: b / m.get_submodule("1").weight.sum())  # fmt: skip
    assert found[0][1] == found[0][0] > 0  # a loss that is infinite is as bad as the worst that is not
    with pytest.raises(InputError, match="no batches"):
        loss_rises(net, layers, groups, batches=[], loss=loss)


def test_floors_and_multiples_hold_at_a_pace():
    _, graph, layers = chain()
    paces = GroupThreshold((0.99, 0.99))(graph, layers, groups_given(["1", "4"], layers))
    budgets = (niwaki.Budget(keep=1.0, floor=0.01), niwaki.Budget(keep=1.0, of="units", floor=3))
    assert kept(at_pace(graph, paces, budgets), graph, layers) == {"1.weight": [1, 2, 3], "4.weight": [1, 2, 3]}
    even = at_pace(graph, paces, (niwaki.Budget(keep=1.0, multiple=2),))
    assert kept(even, graph, layers) == {"1.weight": [2, 3], "4.weight": [2, 3]}
    with pytest.raises(BudgetError, match="the fractions as they are leave"):
        at_pace(graph, paces, (niwaki.Budget(keep=0.1, multiple=2),))


def test_groups_are_found_by_scale():
    class Pyramid(nn.Module):
        """Strides 1, 2, 4, 8, then up to 4, then down to 8."""

        def __init__(self):
            super().__init__()
            self.down = nn.ModuleList(self.block(1 if i == 0 else 4, 4, 1 if i == 0 else 2) for i in range(4))
            self.up, self.again = self.block(8, 4, 1), self.block(4, 4, 2)
            self.head = nn.Conv2d(4, 2, 1)

        @staticmethod
        def block(before, after, stride):
            return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1), nn.BatchNorm2d(after), nn.ReLU())

        def forward(self, x):
            seen = []
            for block in self.down:
                x = block(x)
                seen.append(x)
            x = self.up(torch.cat([nn.functional.interpolate(x, scale_factor=2), seen[2]], 1))
            return self.head(self.again(x))

    net = Pyramid().eval()
    graph = niwaki.trace(net, torch.zeros(1, 1, 32, 32))
    groups = groups_by_scale(graph, scaled_layers(graph, net))
    assert {group.name: group.scales for group in groups} == {
        "strides 1 to 2": ("down.0.1.weight", "down.1.1.weight"), "stride 4": ("down.2.1.weight",),
        "stride 8": ("down.3.1.weight",), "top-down": ("up.1.weight",), "bottom-up and heads": ("again.1.weight",),
    }  # fmt: skip
    stages = niwaki.graph.stages.stages_of(graph)
    assert [(stage.turn, stage.stride, stage.place) for stage in stages] == [
        (0, 1, "down.0"), (0, 2, "down.1"), (0, 4, "down.2"), (0, 8, "down.3"), (1, 4, "up"), (2, 8, "again")
    ]  # fmt: skip


def test_what_a_pooling_of_the_whole_map_left_is_no_scale():
    """Strides 1, 2, 4; at 4 a squeeze and an image pooling, whose norms see one position; then halves down to one."""

    class Pooled(nn.Module):
        def __init__(self, halvings):
            super().__init__()
            self.down = nn.ModuleList(self.block(1 if i == 0 else 4, 4, 1 if i == 0 else 2) for i in range(3))
            self.squeeze, self.image, self.join = self.block(4, 4, 1), self.block(4, 4, 1), self.block(8, 4, 1)
            self.last = nn.ModuleList(self.block(4, 4, 2) for _ in range(halvings))

        @staticmethod
        def block(before, after, stride):
            return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1), nn.BatchNorm2d(after), nn.ReLU())

        def forward(self, x):
            for block in self.down:
                x = block(x)
            x = x * self.squeeze(x.mean((2, 3), keepdim=True)).sigmoid()
            image = self.image(nn.functional.adaptive_avg_pool2d(x, 1)).flatten(1)[:, :, None, None]
            x = self.join(torch.cat([x, nn.functional.interpolate(image, size=x.shape[2:])], 1))
            for block in self.last:
                x = block(x)
            return x.mean((2, 3))

    at_four = ("down.2.1.weight", "squeeze.1.weight", "image.1.weight", "join.1.weight")
    for size, halvings in ((8, 0), (8, 1), (16, 2)):  # maps of 2, 2, 4 at stride 4: pooled where a window halves, too
        net = Pooled(halvings).eval()
        graph = niwaki.trace(net, torch.zeros(1, 1, size, size))
        stages = niwaki.graph.stages.stages_of(graph)
        assert [stage.stride for stage in stages] == [1, 2, 4, 8, 16][: 3 + halvings]
        assert [stage.turn for stage in stages] == [0] * (3 + halvings) and stages[2].scales == at_four
        assert stages[2].place == "join" and all((stage.place is None) == (stage.stride == size) for stage in stages)
        names = [group.name for group in groups_by_scale(graph, scaled_layers(graph, net))]
        assert len(names) == 3 and not any(name in ("top-down", "bottom-up and heads") for name in names)


def test_given_groups_name_every_layer_once():
    _, _, layers = chain()
    assert groups_given([("1", "4")], layers)[0].scales == ("1.weight", "4.weight")
    with pytest.raises(InputError, match=r"in no group: 4.weight"):
        groups_given(["1"], layers)
    with pytest.raises(InputError, match=r"in two groups: 1.weight"):
        groups_given(["1", "*"], layers)
    with pytest.raises(InputError, match=r"group 2 of layers: neck.*; found: no layer that can be cut.*1.weight"):
        groups_given(["*", "neck.*"], layers)


def test_networks_without_scales_are_refused():
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
    with pytest.raises(InputError, match=r"folded into the convolutions.*judges weights"):
        scaled_layers(niwaki.trace(plain, PICTURE), plain)
    bare = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Flatten(), nn.Linear(144, 2)).eval()
    with pytest.raises(InputError, match="batch norms without scales"):
        scaled_layers(niwaki.trace(bare, PICTURE), bare)
    net = Chain().eval()
    held = niwaki.trace(net, PICTURE, protect=("0", "3"))
    with pytest.raises(InputError, match="nothing that batch norms scale can be cut"):
        scaled_layers(held, net)
    net[1].weight.data[0] = float("nan")
    with pytest.raises(NotFiniteError, match=r"1.weight"):
        scaled_layers(niwaki.trace(net, PICTURE), net)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, InputError, "neither"),
        ({"fractions": (0.5,), "rises": ((1.0,),)}, InputError, "both"),
        ({"fractions": (1.0,)}, InputError, r"1.0 is no share in \[0, 1\)"),
        ({"fractions": (-0.1,)}, InputError, "-0.1 is no share"),
        ({"rises": ((float("nan"),),)}, InputError, "no finite numbers"),
        ({"fractions": (0.5,), "meet": "vote"}, UnknownNameError, "majority, union, least, mean"),
    ],
)
def test_refusals(settings, error, message):
    with pytest.raises(error, match=message):
        GroupThreshold(**settings)


def test_a_fraction_for_each_group_and_a_group_for_each_layer():
    _, graph, layers = chain()
    with pytest.raises(InputError, match=r"2 groups of layers; found: 1 fractions; where: 1: 1 layers; 4: 1 layers"):
        GroupThreshold((0.5,))(graph, layers, groups_given(["1", "4"], layers))
    with pytest.raises(InputError, match=r"4.weight is in no group"):
        GroupThreshold((0.5,))(graph, layers, (LayerGroup("one", ("1.weight",)),))
    assert isinstance(layers[0], Layer)
