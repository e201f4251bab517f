"""The judge: what it measures, what it lets pass, what it refuses."""

import copy
from typing import Any

import pytest
import torch
from planned import Hard, Heads, keeping, mlp
from torch import Tensor, nn

import niwaki
from niwaki.surgery.verify import fresh_like
from niwaki.units import Receipt

X = torch.tensor([[1.0, 2.0]])


def cut_mlp() -> tuple[nn.Module, nn.Module, Any]:
    model = mlp()
    plan = keeping(model, X, {"0": [0, 2]})
    return model, niwaki.cut(model, plan), plan


def test_a_right_cut_passes_in_float64() -> None:
    model, small, plan = cut_mlp()
    receipt = niwaki.verify(model, small, plan, X)
    assert receipt.passed and receipt.difference < 1e-12 and receipt.scale > 0
    assert (receipt.exact, receipt.inexact, receipt.door, receipt.inputs, receipt.physical) == (
        True,
        (),
        "eager",
        1,
        True,
    )
    assert receipt.to_json()["passed"] is True


def test_the_difference_by_hand() -> None:
    """A bias off by 0.25 is a difference of 0.25, whatever the input."""
    model, small, plan = cut_mlp()
    with torch.no_grad():
        small[2].bias[1] += 0.25
    receipt = niwaki.verify(model, small, plan, X, inputs=3)
    assert receipt.difference == pytest.approx(0.25) and not receipt.passed and receipt.inputs == 3


def test_units_in_another_order_do_not_pass() -> None:
    model, small, plan = cut_mlp()
    with torch.no_grad():
        small[2].weight.copy_(small[2].weight[:, [1, 0]])
    assert not niwaki.verify(model, small, plan, X).passed


def test_seeds_make_inputs() -> None:
    model, small, plan = cut_mlp()
    with torch.no_grad():
        small[0].weight[0, 0] += 1
    one, two, other = (niwaki.verify(model, small, plan, X, seed=seed).difference for seed in (1, 1, 2))
    assert one == two != other


def test_models_and_random_state_stay() -> None:
    model, small, plan = cut_mlp()
    model.train()
    state = torch.get_rng_state()
    niwaki.verify(model, small, plan, X)
    assert model.training and model[0].weight.dtype == torch.float32 and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("difference", "scale", "exact", "passed"),
    [
        (1e-10, 1.0, True, True),
        (1e-8, 1.0, True, False),
        (1e-8, 100.0, True, True),
        (1e-10, 1e-3, True, False),
        (1e-13, 1e-3, True, True),
        (1e-16, 0.0, True, True),  # what is left where outputs cancel
        (1e-14, 0.0, True, False),
        (0.5, 1.0, False, True),
        (float("inf"), 1.0, False, False),
        (float("nan"), 1.0, False, False),
    ],
)
def test_receipts(difference: float, scale: float, exact: bool, passed: bool) -> None:
    """Within 1e-9 of the largest output; inexact plans must only be finite."""
    assert Receipt(difference, scale, exact, (), "eager", 1).passed is passed


def test_outputs_that_are_not_numbers_do_not_pass() -> None:
    model, small, plan = cut_mlp()
    with torch.no_grad():
        small[2].bias[0] = float("nan")
    receipt = niwaki.verify(model, small, plan, X)
    assert receipt.difference == float("inf") and not receipt.passed


def test_inexact_groups_are_named() -> None:
    model = nn.Sequential(nn.Linear(2, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    plan = keeping(model, X, {"0": [0, 1, 2]})
    receipt = niwaki.verify(model, niwaki.cut(model, plan), plan, X)
    assert not receipt.exact and receipt.passed and receipt.difference > 1e-6
    assert len(receipt.inexact) == 1 and "layer_norm takes its statistic across it" in receipt.inexact[0]


def test_the_door_is_on_the_receipt() -> None:
    model = Hard().eval()
    plan = keeping(model, torch.randn(2, 3), {"a": [0, 1, 2]})
    assert niwaki.verify(model, niwaki.cut(model, plan), plan, torch.randn(2, 3)).door == "exported"


@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=str)
def test_a_copy_is_judged_like_the_model_it_is_of(kind: torch.dtype) -> None:
    """Its weights are scaled by a factor that float32 rounds: the verdict must not depend on who remembers that."""
    model, x = Heads().to(kind).eval(), torch.randn(2, 3, 3, dtype=kind)
    plan = keeping(model, x, {"q": [0, 1, 3, 4, 5, 7]})
    small = niwaki.cut(model, plan)
    twin = copy.deepcopy(small)
    assert niwaki.verify(model, twin, plan, x) == niwaki.verify(model, small, plan, x)
    assert niwaki.verify(model, twin, plan, x).passed
    with torch.no_grad():
        twin.q.bias[0] += 0.01
    assert not niwaki.verify(model, twin, plan, x).passed


def test_a_copy_keeps_its_door() -> None:
    model, x = Hard().eval(), torch.randn(2, 3)
    plan = keeping(model, x, {"a": [0, 1, 2]})
    receipt = niwaki.verify(model, copy.deepcopy(niwaki.cut(model, plan)), plan, x)
    assert receipt.passed and receipt.door == "exported"


def test_what_was_done_to_a_copy_is_not_made_up() -> None:
    model, small, _ = cut_mlp()
    assert niwaki.surgery.surgery_of(small).door == "eager"
    for stranger in (copy.deepcopy(small), model):
        with pytest.raises(niwaki.errors.InputError, match="no surgery is known"):
            niwaki.surgery.surgery_of(stranger)


class Labels(nn.Module):
    """Puts out the number of the largest entry only, or a flag, or a complex number."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.body, self.kind = mlp(), kind

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return {"argmax": y.argmax(1), "flag": y > 5.5, "complex": torch.complex(y, -y)}[self.kind]


@pytest.mark.parametrize("kind", ["argmax", "flag", "complex"])
def test_outputs_that_are_no_floating_numbers_are_compared_too(kind: str) -> None:
    """First output 40 higher than the second before, far below it after the damage: always another answer."""
    model = Labels(kind).eval()
    plan = keeping(model, X, {"body.0": [0, 2]})
    small = niwaki.cut(model, plan)
    assert niwaki.verify(model, small, plan, X).passed
    with torch.no_grad():
        small.body[2].bias.copy_(torch.tensor([-1e9, 1e9]))
    assert not niwaki.verify(model, small, plan, X, inputs=4).passed


def test_no_inputs_are_refused() -> None:
    """Nothing tried is nothing shown."""
    model, small, plan = cut_mlp()
    for inputs in (0, -1):
        with pytest.raises(niwaki.errors.InputError):
            niwaki.verify(model, small, plan, X, inputs=inputs)


def test_outputs_of_another_shape_are_refused() -> None:
    model, _, plan = cut_mlp()
    other = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 3))
    with pytest.raises(
        niwaki.errors.InputError, match=r"verify a cut model; found: outputs \[\(1, 3\)\]; where: expected \[\(1, 2\)\]"
    ):
        niwaki.verify(model, other, plan, X)


def test_another_model_is_refused() -> None:
    _, small, plan = cut_mlp()
    with pytest.raises(niwaki.errors.PlanMismatchError):
        niwaki.verify(nn.Sequential(nn.Linear(2, 2)), small, plan, X)


def test_fresh_inputs() -> None:
    """Real ones are drawn in float64, whole ones from the example's range, flags are all true."""
    example = {"x": torch.zeros(50), "i": torch.tensor([3, 7] * 20), "m": torch.zeros(4, dtype=torch.bool), "n": 3}
    fresh = fresh_like(example, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert fresh["x"].dtype == torch.float64 and float(fresh["x"].std()) > 0.5
    assert set(fresh["i"].tolist()) == {3, 4, 5, 6, 7} and fresh["m"].all() and fresh["n"] == 3


@pytest.mark.parametrize("which", ["model", "small"])
def test_a_model_without_numbers_is_refused(which: str) -> None:
    model, small, plan = cut_mlp()
    (model if which == "model" else small).to("meta")
    with pytest.raises(niwaki.errors.InputError, match=r"holds no numbers to compare; where: 0\.weight; do: load"):
        niwaki.verify(model, small, plan, X)


class Narrow(nn.Module):
    """Casts to single precision in the middle, and makes single numbers and positions of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 6), nn.Linear(6, 3)
        self.steps = torch.linspace(0, 1, 3)  # no buffer: nobody moves it to doubles

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x).sin().to(torch.float32).softmax(1, dtype=torch.float32) * 3.7
        return self.b(hidden.type_as(x)).float() + torch.linspace(0, 1, 3) @ torch.outer(self.steps, self.steps)


def test_doubles_throughout_whatever_a_forward_casts_to() -> None:
    torch.manual_seed(0)
    model = Narrow().eval()
    plan = keeping(model, X, {"a": [0, 2, 5]})
    small = niwaki.cut(model, plan)
    seen = []
    hook = small.b.register_forward_hook(lambda module, given, out: seen.append((given[0].dtype, out.dtype)))
    receipt = niwaki.verify(model, small, plan, X)
    hook.remove()
    assert seen == [(torch.float64, torch.float64)]
    assert receipt.inexact and receipt.difference > 1e-3  # a softmax over what is left
    assert model(X).dtype == torch.float32 and model.steps.dtype == torch.float32


def test_a_factor_made_of_a_width_is_seen_as_a_tensor_too() -> None:
    """Scores of a single head carry no label, and their factor is a tensor: sqrt of the width before the cut."""

    class Correlate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(2, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)  # [batch, tokens, 8]
            return y @ y.transpose(1, 2) / torch.sqrt(torch.tensor(y.shape[-1]))

    torch.manual_seed(0)
    model, example = Correlate().eval(), torch.zeros(1, 4, 2)
    plan = keeping(model, example, {"a": [0, 3]})
    small = niwaki.cut(model, plan)
    receipt = niwaki.verify(model, small, plan, example)
    assert receipt.exact and receipt.passed and receipt.difference < 1e-12


class Finds(nn.Module):
    """Puts out what its head finds above a threshold that nothing reaches."""

    def __init__(self, inner: bool) -> None:
        super().__init__()
        self.a = nn.Linear(2, 6)
        self.head: Any = nn.Linear(6, 3)
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = self.head(y) if self.inner else nn.functional.linear(y, self.head.weight, self.head.bias)
        return y[y > 1e9]


def test_nothing_found_is_judged_by_the_parts() -> None:
    """The three scores of each of two inputs are compared in place of the detections, of which there are none."""
    torch.manual_seed(0)
    model = Finds(inner=True).eval()
    plan = keeping(model, X, {"a": [0, 2, 5]})
    small = niwaki.cut(model, plan)
    receipt = niwaki.verify(model, small, plan, X, inputs=2)
    assert receipt.passed and receipt.numbers == 6 and receipt.scale > 0
    with torch.no_grad():
        small.head.bias[1] += 0.25
    receipt = niwaki.verify(model, small, plan, X)
    assert receipt.difference == pytest.approx(0.25) and not receipt.passed


def test_nothing_to_compare_does_not_pass() -> None:
    torch.manual_seed(0)
    model = Finds(inner=False).eval()
    plan = keeping(model, X, {"a": [0, 2, 5]})
    receipt = niwaki.verify(model, niwaki.cut(model, plan), plan, X)
    assert receipt.numbers == 0 and not receipt.passed


class Sorts(nn.Module):
    """Puts out the places of its scores in order: two of them tie."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(2, 16), nn.Linear(16, 3)
        with torch.no_grad():
            self.head.weight[1], self.head.bias[1] = self.head.weight[0], self.head.bias[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.a(x)).sort(descending=True).indices.float()


def test_what_is_sorted_may_hang_on_the_last_bit() -> None:
    """Rounding in the middle is set right before it decides; a wrong number in the middle is not."""
    torch.manual_seed(0)
    model, example = Sorts().double().eval(), X.double()
    plan = keeping(model, example, {"a": [1, 2, 4, 6, 7, 8, 10, 12, 13, 15]})
    right = niwaki.mask(model, plan)(example)
    told = []
    for error in (1e-13, -1e-13, 0.1, -0.1):
        small = niwaki.cut(model, plan)
        with torch.no_grad():
            small.head.bias[0] += error
        told.append((torch.equal(small(example), right), niwaki.verify(model, small, plan, example).passed))
    assert sorted(told[:2]) == [(False, True), (True, True)]  # other places, by rounding alone
    assert sorted(told[2:]) == [(False, False), (True, True)]  # other places, by a tenth
