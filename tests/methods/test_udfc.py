"""UDFC as a whole: what it removes without loss, what it refuses, and what it writes."""

import json
import warnings
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import niwaki
import niwaki.report
from laws.common import AnyTask
from niwaki.errors import BudgetError, InputError, NotFiniteError
from niwaki.measure import Measurement
from niwaki.methods.udfc import UDFC
from niwaki.quantize import Uniform
from niwaki.repair import Diagonal, Filters

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def trained_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Numbers as training leaves them: statistics and scales that are not those of a new network."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor, low, high in (
                    (module.running_mean, -0.5, 0.5), (module.running_var, 0.5, 2), (module.weight, 0.5, 2),
                    (module.bias, -0.5, 0.5),
                ):  # fmt: skip
                    assert tensor is not None
                    tensor.copy_(torch.empty(tensor.shape).uniform_(low, high, generator=generator))
    return model.eval()


def chain(width: int = 12) -> nn.Module:
    torch.manual_seed(0)
    return trained_(
        nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 5),
        )
    )  # fmt: skip


def doubled_(model: Any, conv: int, norm: int) -> None:
    """Every odd channel of a layer becomes a positive multiple of the even one before it."""
    with torch.no_grad():
        model[conv].weight[1::2] = model[conv].weight[::2]
        model[conv].bias[1::2] = model[conv].bias[::2]
        for own in (model[norm].running_mean, model[norm].running_var):
            own[1::2] = own[::2]
        for own in (model[norm].weight, model[norm].bias):
            own[1::2] = 1.5 * own[::2]


def compressed(model: nn.Module, keep: float, **settings: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return niwaki.compress(model, X, method=UDFC(**settings), budget=niwaki.Budget(keep=keep, of="units"))


@pytest.mark.parametrize("solve", ["filter", "filter_positive", "activation", "merge"])
def test_copies_are_removed_without_loss(solve: str) -> None:
    model = chain()
    doubled_(model, 0, 1)
    doubled_(model, 3, 4)
    outcome = compressed(model, 0.5, solve=solve, ridge=1e-10, select="elimination")
    assert outcome.model[0].weight.shape[0] == outcome.model[3].weight.shape[0] == 6
    assert outcome.model[8].weight.shape == (5, 24)
    with torch.no_grad():
        whole, small = model(X), outcome.model(X)
        bare = compressed(model, 0.5, solve="none", select="elimination").model(X)
    tolerance = {"activation": 0.01}.get(solve, 1e-4)  # whose ridge is a share of the power
    assert float((whole - small).abs().max() / whole.abs().max()) < tolerance
    assert float((whole - bare).abs().max() / whole.abs().max()) > 0.1


@pytest.mark.parametrize(
    "solve", ["filter", "filter_positive", "diagonal", "activation", "merge", "neuron_merging", "none"]
)
def test_nothing_to_do_changes_nothing(solve: str) -> None:
    model = chain()
    outcome = compressed(model, 1.0, solve=solve)
    with torch.no_grad():
        assert torch.equal(outcome.model(X), model(X))
    assert outcome.quantised == {}


class Mobile(nn.Module):
    """Expand, filter, project, with a sum; then a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.up, self.up_norm = nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.each, self.each_norm = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16)
        self.down, self.down_norm = nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.side, self.head = nn.Conv2d(8, 6, 1), nn.Linear(14, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_norm(self.stem(x)))
        y = F.relu6(self.each_norm(self.each(F.relu6(self.up_norm(self.up(x))))))
        x = x + self.down_norm(self.down(y))
        return self.head(torch.cat([x, F.silu(self.side(x))], 1).mean((2, 3)))


@pytest.mark.parametrize("solve", ["none", "filter", "activation"])
@pytest.mark.parametrize("bits", [32, 6])
def test_sums_stay_and_depthwise_filters_and_concatenations_follow(bits: int, solve: str) -> None:
    model = trained_(Mobile())
    outcome = compressed(model, 0.5, solve=solve, bits=bits)
    small = outcome.model
    assert (small.stem.weight.shape[0], small.up.weight.shape[0], small.each.weight.shape[0]) == (8, 8, 8)
    assert small.down.weight.shape[:2] == (8, 8) and small.side.weight.shape[0] == 3
    assert small.head.weight.shape == (3, 11)
    assert outcome.receipt.passed and outcome.receipt.exact
    assert outcome.details["left_whole"]["stem.weight"] == "add in the model reads them"
    said = {group.fixed for group in outcome.graph.groups}
    assert "others can't take over: add in the model reads them" in said and "protected by the user" not in said
    if bits == 6:
        assert set(outcome.quantised) == {f"{name}.weight" for name in ("stem", "up", "each", "down", "side", "head")}
        for name, codes in outcome.quantised.items():
            assert torch.equal(dict(small.named_parameters())[name], codes.values())


def test_a_repair_brings_the_network_nearer() -> None:
    model = trained_(Mobile()).double()
    x = torch.randn(64, 3, 8, 8, dtype=torch.double)
    errors = {}
    with torch.no_grad():
        for solve in ("none", "activation"):
            how = UDFC(solve=solve, select="elimination")
            outcome = niwaki.compress(model, x, method=how, budget=niwaki.Budget(keep=0.75, of="units"))
            errors[solve] = float((outcome.model(x) - model(x)).square().mean())
    assert errors["activation"] < 0.8 * errors["none"]


def test_weights_are_saved_at_their_width_and_read_back_bit_by_bit(tmp_path: Path) -> None:
    model = chain(32)
    outcome = compressed(model, 0.5, bits=4, first_bits=8, solve="filter")
    assert {name: codes.bits for name, codes in outcome.quantised.items()} == {
        "0.weight": 8, "3.weight": 4, "8.weight": 4
    }  # fmt: skip
    folder = outcome.save(tmp_path / "run")
    loaded = niwaki.load(folder, lambda: chain(32))
    with torch.no_grad():
        assert torch.equal(loaded(X), outcome.model(X))
    # 16 x 16 x 9 codes of 4 bits and 5 x 64; 16 x 27 of 8; a scale for each of 37 channels
    codes = 16 * 16 * 9 // 2 + 5 * 64 // 2 + 16 * 27
    floats = 4 * (16 + 16 + 5 + 2 * 16 * 4 + 37) + 2 * 8
    size = (folder / "model.safetensors").stat().st_size
    assert codes + floats < size < codes + floats + 4000  # and a header
    report = json.loads((folder / "report.json").read_text())
    assert report["after"]["packed_bytes"]["value"] == codes + floats
    assert [one["weight"] for one in report["repaired"]] == ["0.weight", "3.weight"]
    page = niwaki.report.write(folder).read_text().replace("\N{NO-BREAK SPACE}", " ")
    assert "Channels that others stand in for" in page and "16 of 32" in page
    assert "left whole: output of the model" in page


def test_no_data_is_touched() -> None:
    class Poisoned:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"asked for {name}")

    model = chain()
    job = niwaki.methods.Job(model=model, example=X, budget=(niwaki.Budget(keep=0.5, of="units"),), task=None)
    object.__setattr__(job, "recovery", None)
    outcome = UDFC()(job)
    assert outcome.model[0].weight.shape[0] == 6
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compressed(model, 0.5, bits=4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_is_refused() -> None:
    attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    attention.linear1, attention.linear2 = nn.Identity(), nn.Identity()  # type: ignore[assignment]
    with pytest.raises(InputError, match="no layer whose channels others can take over"):
        niwaki.compress(attention, torch.randn(1, 3, 8), method=UDFC(), budget=niwaki.Budget(keep=0.5))
    fresh = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    with pytest.raises(InputError, match="look untrained"):
        compressed(fresh, 0.5, solve="activation")
    broken = chain()
    with torch.no_grad():
        broken[3].weight[0, 0, 0, 0] = torch.nan  # type: ignore[index]
    with pytest.raises(NotFiniteError):
        compressed(broken, 0.5)
    with pytest.raises(InputError, match="trains nothing"):
        niwaki.compress(
            chain(), X, method=UDFC(), budget=niwaki.Budget(keep=0.5), recovery=niwaki.train.Recovery(epochs=1)
        )
    with pytest.raises(BudgetError, match="for all of it: 1 is a count"):
        niwaki.compress(chain(), X, method=UDFC(bits=6), budget=niwaki.Budget(keep=1))
    for settings in (
        {"bits": 9},
        {"first_bits": 1},
        {"solve": "magic"},
        {"select": "best"},
        {"share": "half"},
        {"inputs": "fitted"},
        {"per": "row"},
        {"grid": "odd"},
        {"bits": 6.0},
        {"ridge": -1.0},
        {"bias_weight": float("nan")},
        {"first_bits": 8, "grid": "literal", "symmetric": False},
    ):
        with pytest.raises(InputError):
            UDFC(**settings)


def test_rounding_alone_needs_no_layer_that_can_be_repaired() -> None:
    single = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid()).eval()  # its only width is the model's output
    whole = niwaki.Budget(keep=1.0)
    outcome = niwaki.compress(single, torch.randn(1, 3, 8, 8), method=UDFC(bits=4), budget=whole)
    weight = single[0].weight.detach()
    assert torch.equal(outcome.model[0].weight, Uniform(4)(weight).values())  # type: ignore[index]
    with pytest.raises(InputError, match=r"round alone: keep=1\.0"):
        niwaki.compress(single, torch.randn(1, 3, 8, 8), method=UDFC(bits=4), budget=niwaki.Budget(keep=0.5))
    with pytest.raises(InputError, match=r"round alone: keep=1\.0"):  # nothing would be done at all
        niwaki.compress(single, torch.randn(1, 3, 8, 8), method=UDFC(), budget=whole)


def test_dead_channels_go_first_and_zero_scales_are_no_trouble() -> None:
    model = chain()
    with torch.no_grad():
        model[1].weight[3:9] = 0  # type: ignore[index]
    for solve in ("filter", "activation", "merge", "neuron_merging"):
        outcome = compressed(model, 0.5, solve=solve)
        kept = next(kept for name, kept in outcome.plan.kept.items() if outcome.plan.units[name] == 12)
        assert set(kept).isdisjoint(range(3, 9)), solve
        assert bool(torch.isfinite(outcome.model(X)).all())


class TwoReaders(nn.Module):
    """One layer or two read what a depthwise filter puts out."""

    def __init__(self, readers: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.each = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=6)
        self.down = nn.ModuleList([nn.Conv2d(6, 2, 1) for _ in range(readers)])

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.relu(self.each(F.relu(self.up(x))))
        return [down(x) for down in self.down]


def test_a_depthwise_filter_is_evened_out_once_however_many_read_it() -> None:
    one, two = (compressed(TwoReaders(n).eval(), 1.0, first_bits=2).model for n in (1, 2))
    assert torch.equal(one.each.weight, two.each.weight) and torch.equal(one.down[0].weight, two.down[0].weight)


def test_numbers_that_do_not_fit_a_half_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1)).eval()
    with torch.no_grad():
        model[0].weight[1] = 2 * model[0].weight[0]  # type: ignore[index, operator, union-attr]
        model[0].bias[1] = 2 * model[0].bias[0]  # type: ignore[index, operator, union-attr]
        model[2].weight.fill_(6e4)  # type: ignore[operator, union-attr]
    with pytest.raises(NotFiniteError, match="float16"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        budget = niwaki.Budget(keep=0.5, of="units")
        niwaki.compress(model.half(), X.half(), method=UDFC(solve="merge"), budget=budget)


def test_the_plan_says_who_chose_and_the_stages_compare_the_same_channels() -> None:
    model = chain(16)
    outcome = compressed(model, 0.5, solve="filter", select="residual")
    assert outcome.plan.decided_by["score"]["name"] == "residual"
    assert outcome.plan.decided_by["rule"]["name"] == "Uniform"

    class Asked(AnyTask):
        seen: ClassVar[list[nn.Module]] = []

        def evaluate(self, model: nn.Module, *, split: str = "test", limit: int | None = None) -> Measurement:
            self.seen.append(model)
            return Measurement("accuracy", 50.0, "%", "always the same")

    told = niwaki.compress(
        model, X, method=UDFC(select="residual"), budget=niwaki.Budget(keep=0.5, of="units"), task=Asked(X)
    )
    assert [stage.stage for stage in told.stages] == ["cut, not repaired", "reconstruction"]
    _, plain, repaired = Asked.seen
    assert torch.equal(plain[0].weight, repaired[0].weight)  # type: ignore[index]
    assert plain[3].weight.shape == repaired[3].weight.shape  # type: ignore[index]
    assert not torch.equal(plain[3].weight, repaired[3].weight)  # type: ignore[index]


def test_rounding_is_evened_out_in_the_reader() -> None:
    """Of the first layer alone: the second reads every rounded channel times the number that brings it nearest."""
    model = chain()
    outcome = compressed(model, 1.0, first_bits=3, solve="diagonal")
    assert list(outcome.quantised) == ["0.weight"]
    conv, norm = model[0], model[1]
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).double()
    bias = norm.bias.double() + scale * (conv.bias - norm.running_mean).double()
    whole = Filters(scale[:, None] * conv.weight.detach().double().flatten(1), bias)
    rounded = Filters(scale[:, None] * outcome.quantised["0.weight"].values().double().flatten(1), bias)
    matrix = Diagonal()(whole, rounded, torch.arange(12)).matrix
    assert float((matrix.diagonal() - 1).abs().max()) > 0.01
    expected = model[3].weight.detach() * matrix.diagonal().float()[:, None, None]
    assert torch.allclose(outcome.model[3].weight, expected, atol=1e-6)


def test_rounding_in_front_of_a_depthwise_filter_is_evened_out_in_its_rows() -> None:
    torch.manual_seed(0)
    model = trained_(
        nn.Sequential(
            nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8),
            nn.ReLU(), nn.Conv2d(8, 4, 1),
        )
    )  # fmt: skip
    small: Any = compressed(model, 1.0, first_bits=2, solve="diagonal").model
    ratio = (small[3].weight / model[3].weight).detach().flatten(1)  # type: ignore[operator, index]
    assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-4)  # one number a channel
    assert float((ratio - 1).abs().max()) > 0.01


def test_fitted_inputs_mix_otherwise() -> None:
    white, fitted = (compressed(chain(), 0.75, solve="activation", inputs=how).model for how in ("white", "fitted"))
    assert white[3].weight.shape == fitted[3].weight.shape
    assert not torch.allclose(white[3].weight, fitted[3].weight, rtol=1e-2)


def test_bits_of_the_first_and_the_last_layer() -> None:
    found = compressed(chain(), 1.0, bits=4, first_bits=8, last_bits=6, solve="none").quantised
    assert {name: codes.bits for name, codes in found.items()} == {"0.weight": 8, "3.weight": 4, "8.weight": 6}


def test_shares_by_error_take_from_where_others_stand_in() -> None:
    model = chain()
    doubled_(model, 0, 1)
    how = {"solve": "activation", "select": "elimination"}
    uniform, by_error = (compressed(model, 0.75, share=share, **how).model for share in ("uniform", "error"))
    assert [uniform[i].weight.shape[0] for i in (0, 3)] == [9, 9]
    first, second = (by_error[i].weight.shape[0] for i in (0, 3))
    assert first <= 7 < second and first + second == 18
