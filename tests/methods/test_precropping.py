"""PreCropping on small untrained networks: what it keeps, starts from, refuses and tells."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import niwaki
from niwaki.errors import BudgetError, InputError
from niwaki.methods import PreCropping
from niwaki.methods.precropping import trained
from niwaki.train import Recovery

EXAMPLE = torch.zeros(1, 3, 8, 8)


class Block(nn.Module):
    """A bottleneck with a grouped or depthwise middle, squeeze-and-excitation and a shortcut."""

    def __init__(self, width: int, inner: int, groups: int) -> None:
        super().__init__()
        self.up, self.n1 = nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.mid, self.n2 = nn.Conv2d(inner, inner, 3, padding=1, groups=groups, bias=False), nn.BatchNorm2d(inner)
        self.squeeze, self.excite = nn.Conv2d(inner, 8, 1), nn.Conv2d(8, inner, 1)
        self.down, self.n3 = nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.n2(self.mid(self.n1(self.up(x)).relu())).relu()
        y = y * self.excite(self.squeeze(y.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return x + self.n3(self.down(y))


class Shuffle(nn.Module):
    """Half of the channels pass, the other half are computed, and the halves are interleaved."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.body = nn.Sequential(nn.Conv2d(half, half, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        y = torch.stack([a, self.body(b)], 2)
        return y.flatten(1, 2)


def network(kind: str = "depthwise") -> nn.Module:
    torch.manual_seed(0)
    inner = {"depthwise": Block(16, 24, 24), "grouped": Block(16, 24, 4), "shuffle": Shuffle(16)}[kind]
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), inner,
        nn.Conv2d(16, 32, 3, stride=2, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def cropped(net: nn.Module, keep: float = 0.4, of: str = "params", *, target: Any = None, **settings: Any) -> Any:
    budget = niwaki.Budget(keep=keep, of=of)
    return niwaki.compress(net, EXAMPLE, method=PreCropping(**settings), budget=budget, target=target)


@pytest.mark.parametrize("of", ["params", "macs"])
@pytest.mark.parametrize("kind", ["depthwise", "grouped", "shuffle"])
def test_any_structure_meets_either_budget(kind: str, of: str) -> None:
    net = network(kind)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    result = cropped(net, of=of)
    assert result.after[of].value == result.plan.promised[of] <= 0.4 * result.before[of].value
    assert result.receipt.passed
    assert result.model(torch.randn(2, 3, 8, 8)).shape == (2, 10)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    told = result.details["precropping"]
    assert told["kept"][of] <= 0.4 and told["binding"] == of and "9" in told["fixed"]


@pytest.mark.parametrize("densities", ["synexp", "synflow", "random", "erk", "uniform"])
@pytest.mark.parametrize("widths", ["auto", "neighbours", "log_fit", "square_root"])
def test_every_density_and_rule_meets_the_budget(densities: Any, widths: Any) -> None:
    result = cropped(network(), densities=densities, widths=widths, rounds=5)
    assert result.after["params"].value <= 0.4 * result.before["params"].value
    if widths != "auto" or densities != "synexp":
        told = result.details["precropping"]["densities"]
        assert told["9.weight"] > 0 and all(0 < p <= 1 for p in told.values())


@pytest.mark.parametrize("densities", ["snip", "grasp"])
def test_scores_with_data(densities: Any) -> None:
    with pytest.raises(InputError, match="needs batches"):
        cropped(network(), densities=densities)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 10),
    )  # fmt: skip
    task = niwaki.tasks.Classification(niwaki.data.open("digits"), batch=32)
    result = niwaki.compress(
        net,
        task.example(),
        method=PreCropping(densities=densities),
        budget=niwaki.Budget(keep=0.5, of="params"),
        task=task,
        limit=32,
        recovery=Recovery(epochs=1),
    )
    assert result.after["params"].value <= 0.5 * result.before["params"].value
    assert [stage.stage for stage in result.stages] == ["cropped", "training"]


def test_streams_stay_whole_inside_blocks() -> None:
    result = cropped(network(), keep=0.3, inside=True)
    assert result.model[0].out_channels == 16 and result.model[3].up.out_channels < 24
    both = cropped(network(), keep=0.3)
    assert both.model[0].out_channels < 16


def test_what_training_starts_from() -> None:
    net = network()
    slices, fresh = cropped(net, start="slice"), cropped(net, start="reset")
    width = slices.model[0].out_channels
    assert torch.equal(slices.model[0].weight, net[0].weight[:width])
    assert not torch.equal(fresh.model[0].weight, slices.model[0].weight)
    assert fresh.plan.to_json() != "" and fresh.plan.kept == slices.plan.kept
    again = cropped(net, start="reset")
    assert torch.equal(again.model[0].weight, fresh.model[0].weight)


def test_it_is_saved_and_loaded(tmp_path: Any) -> None:
    result = cropped(network())
    result.save(tmp_path / "run")
    small = niwaki.load(tmp_path / "run", network).eval()
    probe = torch.randn(1, 3, 8, 8)
    assert torch.equal(small(probe), result.model.eval()(probe))


def test_trained_networks_are_refused() -> None:
    net = network()
    net.train()(torch.randn(4, 3, 8, 8))
    with pytest.raises(InputError, match="has seen 1 batches; cropping throws its training away"):
        cropped(net)
    assert cropped(net, insist=True).receipt.passed
    job = niwaki.Job(network(), EXAMPLE, (niwaki.Budget(keep=0.5),), weights="w.safetensors")
    assert trained(job) == "weights from w.safetensors"
    with pytest.raises(InputError, match=r"weights from w\.safetensors"):
        PreCropping()(job)


def test_budgets_that_fit_or_cannot_be_met() -> None:
    with pytest.warns(niwaki.errors.NothingChangedWarning):
        assert cropped(network(), keep=1.0).plan.kept == {}
    with pytest.raises(BudgetError, match="the least that"):
        cropped(network(), keep=0.001)
    with pytest.raises(BudgetError, match="params, macs, bytes, latency"):
        cropped(network(), of="memory")
    both = (niwaki.Budget(keep=0.9, of="params"), niwaki.Budget(keep=0.3, of="macs"))
    result = niwaki.compress(network(), EXAMPLE, method=PreCropping(), budget=both)
    assert result.details["precropping"]["binding"] == "macs"


def test_refused_settings(caplog: Any) -> None:
    with pytest.raises(InputError, match="without densities"):
        PreCropping(densities="erk", widths="program")
    with pytest.raises(InputError, match="known: reset"):
        PreCropping(start="again")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no count"):
        PreCropping(rounds=0)
    with pytest.raises(InputError, match="no convolution or linear layer"):
        niwaki.compress(nn.Sequential(nn.BatchNorm2d(3)), EXAMPLE, method=PreCropping(), budget=niwaki.Budget(keep=0.5))
    with caplog.at_level(logging.WARNING):
        PreCropping(widths="square_root")
        cropped(network(), keep=0.1)
    assert "worse than one width" in caplog.text and "fewer than 8 channels" in caplog.text


def test_attention_keeps_its_heads(caplog: Any) -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 64, batch_first=True)
    with caplog.at_level(logging.WARNING):
        result = niwaki.compress(
            layer, torch.zeros(1, 5, 16), method=PreCropping(), budget=niwaki.Budget(keep=0.7, of="params")
        )
    assert "attention" in caplog.text
    assert result.model.linear1.out_features < 64 and result.model.self_attn.num_heads == 4
