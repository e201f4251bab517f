"""The eager door, by hand: numbers, declared sizes, integers mended by evidence, refusals."""

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from planned import Hard, Heads, keeping, mlp
from torch import Tensor, nn

import niwaki
from niwaki.surgery import surgery_of
from niwaki.surgery.mending import FAR
from zoo import ZOO

X = torch.tensor([[1.0, 2.0]])


def test_by_hand() -> None:
    """x = (1, 2): hidden (6, 3, 0). Without unit 1: (6, 0) -> (6 + 0 + 5, 0) = (11, 0); whole: (41, 0)."""
    model = mlp()
    assert model(X).tolist() == [[41.0, 0.0]]
    small = niwaki.cut(model, keeping(model, X, {"0": [0, 2]}))
    assert small[0].weight.tolist() == [[1, 2], [0, -1]] and small[0].bias.tolist() == [1, 2]
    assert small[2].weight.tolist() == [[1, 100], [0, -1]] and small[2].bias.tolist() == [5, 0]
    assert small(X).tolist() == [[11.0, 0.0]]
    assert (small[0].out_features, small[2].in_features, small[0].in_features) == (2, 2, 2)


def test_a_new_model_and_the_given_one_left_alone() -> None:
    model = mlp().train()
    model[0].weight.requires_grad_(False)
    model[0].weight.grad = torch.ones(3, 2)
    small = niwaki.cut(model, keeping(model, X, {"0": [0, 2]}))
    assert type(small) is nn.Sequential and small.training and small is not model
    assert model[0].weight.shape == (3, 2) and model[0].out_features == 3 and model(X).tolist() == [[41.0, 0.0]]
    assert [p.requires_grad for p in small.parameters()] == [False, True, True, True]
    assert all(p.is_leaf and p.is_contiguous() and p.grad is None for p in small.parameters())
    memory = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert not memory & {p.untyped_storage().data_ptr() for p in small.parameters()}


def test_in_place() -> None:
    model = mlp()
    plan = keeping(model, X, {"0": [0, 2]})
    assert niwaki.cut_(model, plan) is model
    assert model(X).tolist() == [[11.0, 0.0]] and surgery_of(model).door == "eager"


def test_the_result_trains() -> None:
    small = niwaki.cut(mlp(), keeping(mlp(), X, {"0": [0, 2]}))
    before = small[0].weight.detach().clone()
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    small(X).sum().backward()
    optimizer.step()
    assert not torch.equal(small[0].weight, before)


def test_an_empty_plan_is_an_equal_copy() -> None:
    model = mlp()
    small = niwaki.cut(model, keeping(model, X, {}))
    assert small is not model and torch.equal(small(X), model(X))


def test_a_cut_model_can_be_cut_again() -> None:
    model = mlp()
    once = niwaki.cut(model, keeping(model, X, {"0": [0, 2]}))
    twice = niwaki.cut(once, keeping(once, X, {"0": [0]}))
    assert twice(X).tolist() == [[11.0, 0.0]] and twice[0].out_features == 1


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    small = niwaki.cut(model, keeping(model, X, {"0": [0, 2]}))
    assert small[0].weight.shape == (2, 2) and small[0].weight.is_meta


DECLARED: dict[str, tuple[Any, tuple[int, ...], dict[str, Any]]] = {
    "conv": (lambda: nn.Conv2d(6, 4, 3), (1, 3, 5, 5), {"in_channels": 3, "out_channels": 4}),
    "transposed conv": (lambda: nn.ConvTranspose2d(6, 4, 3), (1, 3, 5, 5), {"in_channels": 3}),
    "depthwise": (
        lambda: nn.Conv2d(6, 6, 3, groups=6),
        (1, 3, 5, 5),
        {"in_channels": 3, "out_channels": 3, "groups": 3},
    ),
    "batch norm": (lambda: nn.BatchNorm2d(6), (1, 3, 5, 5), {"num_features": 3}),
    "instance norm": (lambda: nn.InstanceNorm2d(6, affine=True), (1, 3, 5, 5), {"num_features": 3}),
    "group norm": (lambda: nn.GroupNorm(6, 6), (1, 3, 5, 5), {"num_channels": 3, "num_groups": 3}),
    "prelu": (lambda: nn.PReLU(6), (1, 3, 5, 5), {"num_parameters": 3}),
}


@pytest.mark.parametrize("name", DECLARED)
def test_declared_sizes_follow_the_tensors(name: str) -> None:
    make, shape, expected = DECLARED[name]
    layer = make()
    width = layer.out_channels if hasattr(layer, "out_channels") else 6
    model = nn.Sequential(nn.Conv2d(3, 6, 1), layer, nn.Conv2d(width, 2, 1)).eval()
    small = niwaki.cut(model, keeping(model, torch.randn(shape), {"0": [0, 2, 5]}))
    assert {key: getattr(small[1], key) for key in expected} == expected
    assert repr(small[1]) != repr(model[1])


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_declared_shapes_of_layer_norms(kind: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 6), kind(6), nn.Linear(6, 2))
    small = niwaki.cut(model, keeping(model, torch.randn(1, 3), {"0": [0, 2, 5]}))
    assert tuple(small[1].normalized_shape) == (3,)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_declared_sizes_of_recurrent_layers(kind: Any) -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.r, self.b = nn.Linear(3, 6), kind(6, 5, batch_first=True), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.r(self.a(x))[0])

    model, x = Read().eval(), torch.randn(2, 4, 3)
    plan = keeping(model, x, {"a": [0, 2, 5]})
    small = niwaki.cut(model, plan)
    assert small.get_parameter("r.weight_ih_l0").shape[1] == 3
    assert niwaki.verify(model, small, plan, x).passed


def test_integers_that_the_forward_uses_are_mended_by_evidence() -> None:
    """`size` is 8 in three places: the width (which changes), a factor, and a list of split sizes."""

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(5, 2), nn.Linear(3, 2)
            self.size, self.parts, self.factor = 8, [5, 3], 8.0

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x).reshape(-1, self.size)
            left, right = y.split(self.parts, 1)
            return self.b(left) * self.factor + self.c(right)

    model, x = Counts().eval(), torch.randn(4, 3)
    plan = keeping(model, x, {"a": [0, 1, 4, 6]})
    small = niwaki.cut(model, plan)
    assert (small.size, small.parts, small.factor) == (4, [3, 1], 8.0)
    assert (model.size, model.parts) == (8, [5, 3])
    mended = {(m["module"], m["attribute"]): m["value"] for m in surgery_of(small).mends}
    assert mended["", "size"] == 4 and mended["", "parts"] == [3, 1]
    assert niwaki.verify(model, small, plan, x).passed


def test_a_number_that_changes_here_and_not_there() -> None:
    """Batch norm over 8 of both layers, but only one of them is cut."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(3, 8), nn.Linear(8, 2), nn.Linear(3, 8), nn.Linear(8, 2)
            self.first, self.second = 8, 8

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).view(-1, self.first)) + self.d(self.c(x).view(-1, self.second))

    model, x = Two().eval(), torch.randn(4, 3)
    plan = keeping(model, x, {"a": [0, 1, 4]})
    small = niwaki.cut(model, plan)
    assert (small.first, small.second) == (3, 8) and surgery_of(small).door == "eager"
    assert niwaki.verify(model, small, plan, x).passed


def test_heads_of_the_same_number_as_their_size() -> None:
    """4 heads of 4, whole heads 0 and 3 stay: the size of a head stays 4, the number of heads becomes 2."""

    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.size = 4
            self.q, self.k, self.v, self.out = (nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(16, 6))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (layer(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for layer in (self.q, self.k, self.v))
            return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    model, x = Square().eval(), torch.randn(2, 3, 6)
    rows = [0, 1, 2, 3, 12, 13, 14, 15]
    plan = keeping(model, x, {"q": rows, "v": rows})
    small = niwaki.cut(model, plan)
    assert (small.size, small.q.out_features, surgery_of(small).door) == (4, 8, "eager")
    assert niwaki.verify(model, small, plan, x).passed


def test_in_place_is_refused_where_only_the_exported_door_opens() -> None:
    model = Hard().eval()
    plan = keeping(model, torch.randn(2, 3), {"a": [0, 1, 2]})
    with pytest.raises(niwaki.errors.CannotCutError, match=r"it only cuts by torch\.export"):
        niwaki.cut_(model, plan)
    assert model.a.out_features == 8


def test_what_neither_door_cuts_is_refused_with_both_reasons_and_what_to_protect() -> None:
    """Hard-coded, and it asks for a value of the data, which torch.export can't follow."""

    class Closed(Hard):
        def forward(self, x: Tensor) -> Tensor:
            if float(x.sum()) > 1e9:
                return x[:, :2]
            return self.b(self.a(x).view(-1, 8).relu())

    model = Closed().eval()
    plan = keeping(model, torch.randn(2, 3), {"a": [0, 1, 2]})
    with pytest.raises(
        niwaki.errors.CannotCutError, match=r"cut Closed; found: eager: .*; exported: .*; do: protect the groups"
    ):
        niwaki.cut(model, plan)
    assert model.a.weight.shape == (8, 3)


def test_a_group_must_keep_something_and_fixed_ones_everything() -> None:
    model = mlp()
    with pytest.raises(niwaki.errors.BudgetError, match="no unit of it would stay"):
        keeping(model, X, {"0": []})
    with pytest.raises(niwaki.errors.InputError, match="it is fixed: output of the model"):
        keeping(model, X, {"2": [0]})


def test_a_plan_from_a_file_cuts_without_the_graph() -> None:
    model = Heads().eval()
    plan = keeping(model, torch.randn(1, 5, 3), {"q": [0, 1, 4, 6], "v": [0, 1, 2, 3, 4, 5, 6, 7]})
    again = niwaki.cut(model, niwaki.Plan.from_json(plan.to_json()))
    first = niwaki.cut(model, plan)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_strides_are_no_widths() -> None:
    """Two groups, a kernel of two and a stride of two: only the groups are halved."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 2, 1)
    ).eval()
    small = niwaki.cut(model, keeping(model, torch.randn(1, 3, 4, 4), {"0": [0, 1, 2, 3], "1.bias": [0, 1]}))
    assert (small[1].groups, small[1].kernel_size, small[1].stride) == (1, (2, 2), (2, 2))


class Strided(nn.Module):
    """Keeps its stride as a plain integer that equals its number of groups."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 3, padding=2, groups=2), nn.Conv2d(4, 2, 1)
        self.groups = self.dilation = 2

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(self.a(x), self.b.weight, padding=2, dilation=self.dilation, groups=self.groups)
        return self.c(x.mean((2, 3), keepdim=True))


def test_a_check_of_windows_finds_the_right_integer() -> None:
    model = Strided().double().eval()
    example = torch.randn(1, 3, 6, 6).double()
    plan = keeping(model, example, {"a": [0, 1, 2, 3], "b": [0, 1]})
    small = niwaki.cut(model, plan)
    assert (small.groups, small.dilation) == (1, 2)
    assert niwaki.verify(model, small, plan, example).difference < 1e-12


class Routed(nn.Module):
    """Each row goes to the expert that a layer picks for it: sizes depend on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.route = nn.Linear(6, 8), nn.Linear(8, 2)
        self.experts = nn.ModuleList([nn.Linear(8, 3) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        picked = self.route(h).argmax(-1)
        y = x.new_zeros(x.shape[0], 3)
        for number, expert in enumerate(self.experts):
            rows = torch.where(picked == number)[0]
            y = y.index_add(0, rows, expert(h[rows]))
        return y


def test_sizes_that_depend_on_the_data() -> None:
    model = Routed().double().eval()
    example = torch.randn(16, 6).double()
    plan = keeping(model, example, {"a": [0, 1, 4, 6, 7]})
    small = niwaki.cut(model, plan)
    assert small.a.out_features == small.experts[1].in_features == 5
    assert niwaki.verify(model, small, plan, example).passed


class Detects(nn.Module):
    """A detector in small: places whose score is above a threshold are read out and laid end to end."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.score = nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 1))
        self.box = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4 * 2))

    def forward(self, x: torch.Tensor) -> Any:
        places = nn.functional.relu(self.conv(x)).permute(0, 2, 3, 1).reshape(-1, self.conv.out_channels)
        best = torch.nonzero(self.score(places).squeeze(1) > self.threshold).squeeze(1)
        picture = nn.functional.interpolate(x, size=(1 + len(best) % 3, 4))
        return self.box(places[best]).reshape(-1, 4), torch.arange(2).view(1, -1).expand(len(best), 2), picture


@pytest.mark.parametrize("threshold", [0.0, 0.1, 1e9])
def test_how_many_are_found_is_for_the_data_to_say(threshold: float) -> None:
    """The cut detector finds others than the whole one, or nothing at all, and is right all the same."""
    torch.manual_seed(0)
    model, example = Detects(threshold).eval(), torch.randn(1, 3, 8, 8)
    graph = niwaki.trace(model, example)
    how = niwaki.scores.Random()
    scores = niwaki.score(graph, niwaki.collect(model, graph, how.needs), how=how)
    plan = niwaki.choose(graph, scores, niwaki.Budget(keep=0.5, of="units"), how=niwaki.budgets.Uniform())
    small = niwaki.cut(model, plan)
    assert type(small) is Detects and small.conv.out_channels == 4 and small.box[0].out_features == 3
    receipt = niwaki.verify(model, small, plan, example)
    assert receipt.exact and receipt.passed and receipt.numbers


class Remembers(nn.Module):
    """Anchors are computed in the first forward and kept; written out, the width is hard-coded or not."""

    def __init__(self, hard: bool, late: bool) -> None:
        super().__init__()
        self.hard, self.late, self.known = hard, late, None
        self.a, self.coordinates, self.last = map(nn.Linear, (3, 6, 4), (6, 4, 2))

    def anchors(self, x: Tensor) -> Tensor:
        if self.known is None:
            self.known = torch.arange(20.0, device=x.device).reshape(5, 4) / 5 / 10
        return self.known

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self.late:
            self.anchors(x)
        y = self.a(x)
        y = y.reshape(-1, 3, 2).flatten(1) if self.hard else y
        boxes = self.coordinates(y / 4) + self.anchors(x)
        return boxes, self.last(torch.sigmoid(boxes) / 20)


@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_a_forward_that_remembers_what_it_computed_at_first(hard: bool, late: bool) -> None:
    """Traced before it remembers, cut afterwards: fewer calls, and a tensor that nobody registered."""
    model, x = Remembers(hard, late).eval(), torch.randn(5, 3)
    keep = {"a": [0, 1, 2, 3]}
    graph = niwaki.trace(model, x)
    model(x)
    plan = keeping(model, x, keep, graph=graph)
    small = niwaki.cut(model, plan)
    assert surgery_of(small).door == ("exported" if hard else "eager")
    assert small.a.weight.shape == (4, 3)
    assert niwaki.verify(model, small, plan, x).passed


def test_integers_far_from_a_hopeless_call_are_hardly_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve modules whose integers are mended right away, and one that writes 6: few ways are left to try."""

    class Mendable(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.width, self.a, self.b = width, nn.Linear(4, width), nn.Linear(width, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).reshape(-1, self.width))

    class Hopeless(Mendable):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).reshape(-1, 3, 2).flatten(1))

    model, x = nn.Sequential(*(Mendable(8 + i) for i in range(12)), Hopeless(6)).eval(), torch.randn(5, 4)
    tried, module = [], sys.modules["niwaki.surgery.cut"]
    check = module.replays
    monkeypatch.setattr(module, "replays", lambda *given: tried.append(1) or check(*given))
    plan = keeping(model, x, {f"{i}.a": [0, 1, 5] for i in range(12)})
    small = niwaki.cut(model, plan)
    assert len(tried) == 1 and [small[i].width for i in range(12)] == [3] * 12
    tried.clear()
    plan = keeping(model, x, {f"{i}.a": [0, 1, 2, 3] for i in range(13)})
    small = niwaki.cut(model, plan)
    assert surgery_of(small).door == "exported" and len(tried) <= 2 + FAR
    assert niwaki.verify(model, small, plan, x).passed


def test_integers_of_a_module_that_is_asked_by_a_method() -> None:
    """The module with the table of positions is never called; its number of heads follows that of its holder."""
    model, example = next((c.make(), c.example()) for c in ZOO if c.name == "bias_by_method")
    graph = niwaki.trace(model, example)
    (heads,) = {g.rows for g in graph.groups if any(m.tensor == "qkv.weight" and m.axis == 0 for m in g.members)}
    how = niwaki.scores.Random()
    scores = niwaki.score(graph, niwaki.collect(model, graph, how.needs), how=how)
    small = niwaki.cut(model, niwaki.choose(graph, scores, niwaki.Budget(keep=0.5, of="units")))
    assert surgery_of(small).door == "eager"
    assert (heads, small.heads, small.position.heads) == (4, 2, 2)


class KeepsItsTable(nn.Module):
    """Keeps what evaluation made of a parameter for the next forward, and drops it when it goes into training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 8), nn.Linear(8, 2)
        self.bias = nn.Parameter(torch.randn(8))
        self.kept: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> "KeepsItsTable":
        if mode:
            self.kept = {}
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.down((self.up(x) + self.bias.exp()).relu())
        device = str(x.device)
        if device not in self.kept:
            self.kept[device] = self.bias.exp()
        return self.down((self.up(x) + self.kept[device]).relu())


def test_what_earlier_forwards_kept_is_not_cut_along() -> None:
    model, x = KeepsItsTable().eval(), torch.randn(2, 3)
    with torch.no_grad():
        before = model(x)
    plan = keeping(model, x, {"up": [0, 2, 5]})
    small = niwaki.cut(model, plan)
    assert small.bias.shape == (3,) and not small.training
    assert small(x).shape == before.shape
    assert niwaki.verify(model, small, plan, x).passed
    assert list(model.kept) == ["cpu"] and torch.equal(model(x), before)
