"""What depended on the old width keeps its value: attention's scale by hand, in every spelling, or a refusal."""

import pytest
import torch
from planned import Heads, fill, keeping
from torch import Tensor, nn

import niwaki
from niwaki.surgery import surgery_of

X = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(2))
COLUMNS = {"q": [0, 1, 4, 6]}
"""Two of the four columns of each of two heads."""


def test_the_scale_of_the_original_head_by_hand() -> None:
    """One head of 4, two tokens. Kept columns give q = (2, 0), k = (1, 0) and (3, 0): scores 2 and 6 over
    sqrt(4) = 1 and 3.

    weights = e / (e + e^3) = 0.1192 and 0.8808; with the new size they
    would be 2 / sqrt 2 and 6 / sqrt 2: 0.0558 and 0.9442.
    """
    model = Heads(heads=1, size=4, width=1, bias=False).eval()
    fill(model.q.weight, [[2], [0], [0], [0]])
    fill(model.k.weight, [[1], [0], [0], [0]])
    fill(model.v.weight, [[1], [0], [0], [0]])
    fill(model.out.weight, [[1, 0, 0, 0]])
    fill(model.out.bias, [0])
    x = torch.tensor([[[1.0], [3.0]]])
    plan = keeping(model, x, {"q": [0, 1]})
    small = niwaki.cut(model, plan)
    first = 0.1192029 * 1 + 0.8807971 * 3
    assert small(x)[0, 0, 0].item() == pytest.approx(first, abs=1e-6)
    assert model(x)[0, 0, 0].item() == pytest.approx(first, abs=1e-6)
    factors = [entry["factor"] for entry in surgery_of(small).scaled]
    product = 1.0
    for factor in factors:
        product *= factor
    assert product == pytest.approx((2 / 4) ** 0.5)  # new scale 1/sqrt(2) times this is 1/sqrt(4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("spelling", ["fused", "times", "divided"])
def test_every_spelling_keeps_its_value(spelling: str, bias: bool) -> None:
    model = Heads(spelling=spelling, bias=bias).double().eval()
    plan = keeping(model, X.double(), COLUMNS)
    small = niwaki.cut(model, plan)
    receipt = niwaki.verify(model, small, plan, X.double())
    assert receipt.exact and receipt.passed
    q = small.get_parameter("q.weight")
    assert q.shape == (4, 3)


def test_values_alone_leave_the_scale() -> None:
    model = Heads().eval()
    small = niwaki.cut(model, keeping(model, X, {"v": [0, 1, 4, 6]}))
    assert surgery_of(small).scaled == () and torch.equal(small.q.weight, model.q.weight)


def test_whole_heads_leave_the_scale() -> None:
    model = Heads().eval()
    small = niwaki.cut(model, keeping(model, X, {"q": [0, 1, 2, 3], "v": [0, 1, 2, 3]}))
    assert surgery_of(small).scaled == () and torch.equal(small.q.weight, model.q.weight[:4])


def test_a_scale_that_is_given_stays_as_it_is() -> None:
    class Given(Heads):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
            return self.out(nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2).flatten(2))

    model = Given().eval()
    plan = keeping(model, X, COLUMNS)
    small = niwaki.cut(model, plan)
    assert surgery_of(small).scaled == () and niwaki.verify(model, small, plan, X).passed


def test_behind_a_normalisation_the_factor_goes_into_its_scale() -> None:
    """Queries are normalised with a learned scale: scaling the layer before it would be undone."""

    class Normed(Heads):
        def __init__(self) -> None:
            super().__init__()
            self.nq = nn.LayerNorm(4)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
            return self.out(nn.functional.scaled_dot_product_attention(self.nq(q), k, v).transpose(1, 2).flatten(2))

    model = Normed().eval()
    plan = keeping(model, X, {"q": [0, 1, 4, 5], "nq": [0, 1], "nq.bias": [0, 1]})
    small = niwaki.cut(model, plan)
    assert not {entry["tensor"] for entry in surgery_of(small).scaled} & {"q.weight", "q.bias"}
    assert plan.inexact and torch.isfinite(small(X)).all()


def test_queries_that_someone_else_reads_are_not_scaled() -> None:
    """The output also adds the queries: only the keys can take the factor."""

    class Reader(Heads):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
            y = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.out(y.transpose(1, 2).flatten(2)) + q.sum((1, 3))[..., None]

    model = Reader().double().eval()
    plan = keeping(model, X.double(), COLUMNS)
    small = niwaki.cut(model, plan)
    assert niwaki.verify(model, small, plan, X.double()).passed
    scaled = {entry["tensor"].split(".")[0] for entry in surgery_of(small).scaled}
    assert surgery_of(small).door == "exported" or scaled == {"k"}


def test_the_original_keeps_its_weights() -> None:
    model = Heads().eval()
    before = model.q.weight.detach().clone()
    niwaki.cut(model, keeping(model, X, COLUMNS))
    assert torch.equal(model.q.weight, before)


def test_a_saved_surgery_scales_again_without_a_trace() -> None:
    from niwaki.surgery.cut import redo

    model = Heads().eval()
    plan = keeping(model, X, COLUMNS)
    small = niwaki.cut(model, plan)
    again = redo(model, plan, surgery_of(small))
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), again.parameters(), strict=True))


class Twice(nn.Module):
    """Attention called twice; `alike` False lets a plain layer read the query's and key's weights too."""

    def __init__(self, *, alike: bool = True) -> None:
        super().__init__()
        self.heads, self.alike = Heads(heads=1, size=4), alike
        self.own = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.heads(self.heads(x))
        if self.alike:
            return x
        return x + self.own(self.heads.q(x).relu() + self.heads.k(x).relu())


@pytest.mark.parametrize("alike", [True, False])
def test_a_weight_used_twice_takes_the_factor_once(alike: bool) -> None:
    model = Twice(alike=alike).double().eval()
    plan = keeping(model, X.double(), {"heads.q": [0, 1, 3]})
    small = niwaki.cut(model, plan)
    receipt = niwaki.verify(model, small, plan, X.double())
    assert receipt.exact and receipt.passed and receipt.door == ("eager" if alike else "exported")
    if alike:
        # the fused call scales queries and keys by the root each: weight and bias of both
        assert [entry["factor"] for entry in surgery_of(small).scaled] == pytest.approx([(3 / 4) ** 0.25] * 4)


class Stacked(nn.Module):
    """Queries, keys and values from one layer; queries and keys share the scale."""

    def __init__(self) -> None:
        super().__init__()
        self.parts, self.qkv, self.out = [8, 8, 6], nn.Linear(3, 22), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split(self.parts, -1)
        scale = q.shape[-1] ** -0.25
        return self.out(((q * scale) @ (k * scale).transpose(1, 2)).softmax(-1) @ v)


def test_two_parts_of_one_layer_are_scaled_each() -> None:
    model = Stacked().double().eval()
    plan = keeping(model, X.double(), {"qkv": [0, 1, 4, 6, *(8 + i for i in (0, 1, 4, 6)), *range(16, 22)]})
    small = niwaki.cut(model, plan)
    assert surgery_of(small).door == "eager" and small.parts == [4, 4, 6]
    assert [entry["tensor"] for entry in surgery_of(small).scaled] == ["qkv.weight", "qkv.bias"]
    for entry in surgery_of(small).scaled:
        assert entry["positions"] == list(range(8)) and entry["factor"] == pytest.approx((8**-0.25) / (4**-0.25))
    receipt = niwaki.verify(model, small, plan, X.double())
    assert receipt.exact and receipt.passed


class Repeatedly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = y * y.shape[-1] ** -0.5
        return self.b(torch.relu(y) * y.shape[-1] ** -0.5)


def test_two_scales_one_behind_the_other_are_not_taken_for_one() -> None:
    model = Repeatedly().double().eval()
    plan = keeping(model, X.double(), {"a": [0, 1, 4, 6]})
    small = niwaki.cut(model, plan)
    assert surgery_of(small).door == "exported"
    receipt = niwaki.verify(model, small, plan, X.double())
    assert receipt.exact and receipt.passed
