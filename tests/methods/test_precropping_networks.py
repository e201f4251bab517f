"""PreCropping on the families that the paper and its reviews name, made small, and on what it can't crop."""

import logging
from typing import Any

import pytest
import torch
from test_precropping import EXAMPLE, cropped
from torch import Tensor, nn

import niwaki
from niwaki.errors import BudgetError, CannotCutError
from niwaki.methods import PreCropping

models = pytest.importorskip("torchvision.models")
resnet = pytest.importorskip("torchvision.models.resnet")
PICTURE = torch.zeros(1, 3, 32, 32)


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    network: nn.Module
    if name == "basic":  # two blocks with a projection in their shortcuts
        network = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)
    elif name == "bottleneck":
        network = resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=10)
    elif name == "grouped":
        network = resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=10, groups=8, width_per_group=4)
    elif name == "mobilenet_v2":
        network = models.mobilenet_v2(weights=None, num_classes=10, width_mult=0.25)
    else:
        network = models.shufflenetv2.ShuffleNetV2([1, 1, 1], [8, 16, 32, 64, 128], num_classes=10)
    return network.eval()


@pytest.mark.parametrize("of", ["params", "macs"])
@pytest.mark.parametrize("name", ["basic", "bottleneck", "grouped", "mobilenet_v2", "shufflenet"])
def test_families(name: str, of: str) -> None:
    """Forward shapes, the budget by PyTorch's own count of parameters, no width below the floor, and room for less
    than a unit of any width."""
    network = made(name)
    budget = niwaki.Budget(keep=0.4, of=of, floor=2)
    result = niwaki.compress(network, PICTURE, method=PreCropping(), budget=budget)
    assert result.receipt.passed and result.model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert result.plan.promised["params"] == sum(p.numel() for p in result.model.parameters())
    limit = 0.4 * result.plan.promised[f"{of}_before"]
    assert 0.97 * limit < result.plan.promised[of] <= limit
    assert all(len(kept) >= 2 for kept in result.plan.kept.values())
    assert any(len(kept) < result.plan.units[group] for group, kept in result.plan.kept.items())


def test_shortcuts_stay_one_stream() -> None:
    """All that writes to a stream has one width, the projection of the shortcut as well; it is no minimum."""
    small = cropped(made("bottleneck"), keep=0.4).model
    for layer in (small.layer1, small.layer2, small.layer3, small.layer4):
        block = layer[0]
        assert block.conv3.out_channels == block.downsample[0].out_channels > 1


@pytest.mark.parametrize("cap", [1.0, 4.0])
@pytest.mark.parametrize("name", ["basic", "mobilenet_v2"])
def test_widths_above_and_below(name: str, cap: float) -> None:
    """With a cap of 4 no width is above double, and one unit more of any width breaks the budget or the cap."""
    result = niwaki.compress(
        made(name), PICTURE, method=PreCropping(cap=cap), budget=niwaki.Budget(keep=0.5, of="params")
    )
    assert bool(result.plan.grows) == (cap > 1) and result.receipt.passed
    graph, limit = result.graph, 0.5 * result.plan.promised["params_before"]
    times = niwaki.graph.plans.times_of(graph, result.plan)
    for group in graph.groups:
        if group.fixed is None and group.kind == "channels":
            now = int(times[group.ids].sum())
            more = times.copy()
            more[group.ids[times[group.ids].argmin()]] += 1
            assert now + 1 > cap**0.5 * group.units or graph.cost(more)["params"] > limit
    assert result.model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_infeasible_budgets_say_the_least() -> None:
    with pytest.raises(BudgetError, match=r"the least that .* allow is \d+"):
        cropped(made("basic"), keep=0.000001)
    with pytest.raises(BudgetError, match=r"the least that .* allow is \d+"):
        niwaki.compress(
            made("basic"), PICTURE, method=PreCropping(cap=4.0), budget=niwaki.Budget(keep=0.000001, of="params")
        )
    both = (niwaki.Budget(keep=0.9, of="macs"), niwaki.Budget(keep=0.000001, of="params"))
    with pytest.raises(BudgetError, match=r"params: the least that"):
        niwaki.compress(made("basic"), PICTURE, method=PreCropping(), budget=both)


class Odd(nn.Module):
    """A fixed view, tied weights and a norm with written-out groups, beside a width that is free."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.groups = nn.GroupNorm(4, 8)
        self.free = nn.Conv2d(8, 12, 3, padding=1)
        self.a, self.b = nn.Conv2d(12, 12, 1), nn.Conv2d(12, 12, 1)
        self.b.weight = self.a.weight
        self.head = nn.Linear(12 * 64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.groups(self.first(x)).relu()
        x = self.b(self.a(self.free(x)).relu())
        y: Tensor = self.head(x.reshape(-1, 768))
        return y


def test_what_cannot_be_resized_is_listed_and_the_rest_is_cropped() -> None:
    result = cropped(Odd(), keep=0.6)
    told = result.details["precropping"]
    assert result.receipt.passed and result.model(torch.randn(2, 3, 8, 8)).shape == (2, 10)
    assert result.after["params"].value <= 0.6 * result.before["params"].value
    assert "output" in told["fixed"]["head"]
    left = {(cut["tensor"], cut["axis"]): len(cut["keep"]) for cut in result.plan.cuts if "blocks" not in cut}
    assert left.get(("first.weight", 0), 8) % 4 == 0  # four groups of equal size, as written
    assert left.get(("a.weight", 0)) == left.get(("b.weight", 0))  # the same tensor


class Branching(nn.Module):
    """Goes another way by what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if bool(x.mean() > 0):
            x = self.second(x)
        y: Tensor = self.head(x.mean((2, 3)))
        return y


def test_control_flow_by_data_is_said_with_its_place(caplog: Any) -> None:
    """The other way was never seen, and does not fit what was cropped: an error that says where it is taken."""
    with caplog.at_level(logging.WARNING), pytest.raises(CannotCutError, match=r"test_precropping_networks\.py:\d+"):
        niwaki.compress(Branching(), EXAMPLE, method=PreCropping(), budget=niwaki.Budget(keep=0.6, of="params"))
    assert "reads numbers out of data" in caplog.text and "never used: second.weight" in caplog.text
