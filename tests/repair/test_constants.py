"""Constants of removed channels: the published check by its numbers, then every kind of consumer.

Source of the numbers: Chu et al. 2022, arXiv:2306.01526 (code): gamma 0, beta -0.5, LeakyReLU(0.1) gives a = -0.05.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import niwaki
from niwaki.graph.plans import plan_of
from niwaki.repair import FoldedConstants


def keeping(model: nn.Module, example: Any, kept: dict[str, list[int]]) -> Any:
    """The plan that keeps these positions of the outputs of these layers."""
    graph = niwaki.trace(model, example)
    import numpy as np

    alive = np.ones(graph.units.count, bool)
    for layer, keep in kept.items():
        for group in graph.groups:
            for member in group.members:
                if (member.tensor, member.axis) == (f"{layer}.weight", 0):
                    gone = ~np.isin(member.index, keep)
                    alive[group.ids[member.unit[gone]]] = False
    return plan_of(graph, alive)


def blocks(padding: int = 0, act: nn.Module | None = None, *, bias: bool = False) -> nn.Sequential:
    """3 -> 4 -> 5: two blocks of convolution, norm and activation; channel 2 of the first has gamma 0 and beta -0.5."""
    torch.manual_seed(0)
    act = act or nn.LeakyReLU(0.1)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=padding, bias=False),
        nn.BatchNorm2d(4),
        act,
        nn.Conv2d(4, 5, 3, padding=padding, bias=bias),
        nn.BatchNorm2d(5),
        act,
    ).eval()
    with torch.no_grad():
        for norm in (model[1], model[4]):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.5, 0.5)
            norm.running_mean.uniform_(-0.5, 0.5)
            norm.running_var.uniform_(0.5, 1.5)
        model[1].weight[2], model[1].bias[2] = 0.0, -0.5
    return model


def folded(
    model: nn.Module, example: Any, kept: dict[str, list[int]], how: FoldedConstants | None = None, batches: Any = None
) -> tuple[nn.Module, tuple[str, ...]]:
    plan = keeping(model, example, kept)
    small = niwaki.cut(model, plan)
    skipped = (how or FoldedConstants())(model, small, plan, batches=[example] if batches is None else batches)
    return small, skipped


KEEP = {"0": [0, 1, 3]}


def test_the_published_numbers() -> None:
    """a = LeakyReLU(-0.5) = -0.05; a kernel that sums to 2.0 raises the running mean by 0.1."""
    model = blocks()
    with torch.no_grad():
        model[3].weight[:, 2] *= (2.0 / model[3].weight[:, 2].sum((1, 2)))[:, None, None]
    before = model[4].running_mean.clone()
    small, skipped = folded(model, torch.randn(1, 3, 8, 8), KEEP)
    assert skipped == ()
    assert (small[4].running_mean - before).tolist() == pytest.approx([0.1] * 5, abs=1e-6)
    assert small[3].bias is None


def test_without_padding_the_whole_output_agrees() -> None:
    model, x = blocks(padding=0), torch.randn(2, 3, 8, 8)
    small, _ = folded(model, torch.randn(1, 3, 8, 8), KEEP)
    with torch.no_grad():
        assert float((model(x) - small(x)).abs().max()) < 1e-5
        assert float((model(x) - niwaki.cut(model, keeping(model, x, KEEP))(x)).abs().max()) > 1e-3  # not by itself


def test_with_padding_the_interior_agrees_and_the_border_differs() -> None:
    """Both are padded by 1 at 8 x 8: zeros around the constant reach one position inwards."""
    model, x = blocks(padding=1), torch.randn(2, 3, 8, 8)
    small, _ = folded(model, torch.zeros(1, 3, 24, 24), KEEP, batches=[interior_only(model)])
    with torch.no_grad():
        gap = (model(x) - small(x)).abs()
    assert float(gap[..., 1:-1, 1:-1].max()) < 4e-6
    assert float(gap.max()) > 1e-3


def interior_only(model: nn.Module) -> Tensor:
    return torch.randn(1, 3, 24, 24)


@pytest.mark.parametrize(
    "act", [nn.ReLU(), nn.ReLU6(), nn.Hardswish(), nn.Mish(), nn.Identity(), nn.Sigmoid()], ids=str
)
def test_every_activation(act: nn.Module) -> None:
    model, x = blocks(act=act), torch.randn(2, 3, 8, 8)
    small, _ = folded(model, x, KEEP)
    with torch.no_grad():
        assert float((model(x) - small(x)).abs().max()) < 1e-5


def test_a_bias_takes_the_constant_before_a_running_mean_does() -> None:
    model, x = blocks(bias=True), torch.randn(2, 3, 8, 8)
    small, _ = folded(model, x, KEEP)
    assert torch.equal(small[4].running_mean, model[4].running_mean)
    share = model[3].weight.detach()[:, 2].sum((1, 2)) * -0.05
    assert torch.allclose(small[3].bias - model[3].bias, share, atol=1e-6)


def test_a_consumer_without_bias_or_norm_gets_a_bias() -> None:
    model = nn.Sequential(*list(blocks())[:3], nn.Conv2d(4, 2, 1, bias=False)).eval()
    x = torch.randn(2, 3, 8, 8)
    small, _ = folded(model, x, KEEP)
    assert torch.allclose(small[3].bias, model[3].weight.detach()[:, 2, 0, 0] * -0.05, atol=1e-7)
    with torch.no_grad():
        assert torch.allclose(model(x), small(x), atol=1e-5)


class Paths(nn.Module):
    """Constants through up-sampling, concatenation and addition, into a convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.na, self.b, self.nb = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.c, self.nc, self.d = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(8, 5, 3)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        total = F.leaky_relu(self.na(self.a(x)) + self.nb(self.b(x)), 0.1)
        other = F.interpolate(F.relu(self.nc(self.c(x[..., ::2, ::2]))), scale_factor=2)
        return self.head(self.d(torch.cat([total, other], 1)).mean((2, 3)))


def test_through_addition_concatenation_and_up_sampling() -> None:
    torch.manual_seed(0)
    model = Paths().eval()
    with torch.no_grad():
        for norm, value in ((model.na, 0.7), (model.nb, -0.9), (model.nc, 0.4)):
            norm.weight[1], norm.bias[1] = 0.0, value
    x = torch.randn(2, 3, 8, 8)
    small, skipped = folded(model, x, {"a": [0, 2, 3], "c": [0, 2, 3]})
    assert skipped == () and small.d.in_channels == 6
    with torch.no_grad():
        assert torch.allclose(model(x), small(x), atol=1e-5)


def test_means_over_batches_are_the_best_constant() -> None:
    """Removing a channel that varies: with "mean" the mean output stays, which "shift" does not give."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    batches = [torch.randn(16, 3) for _ in range(4)]
    every = torch.cat(batches)
    small, _ = folded(model, batches[0], KEEP, FoldedConstants("mean"), batches=batches)
    with torch.no_grad():
        assert torch.allclose(model(every).mean(0), small(every).mean(0), atol=1e-5)
        plain = niwaki.cut(model, keeping(model, batches[0], KEEP))
        assert not torch.allclose(model(every).mean(0), plain(every).mean(0), atol=1e-3)
        assert (model(every) - small(every)).pow(2).mean() < (model(every) - plain(every)).pow(2).mean()


def test_a_consumer_that_loses_outputs_as_well() -> None:
    """The middle layer is cut on both sides: the constant goes into the rows that stay."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)
    ).eval()
    with torch.no_grad():
        for norm, value in ((model[1], 0.8), (model[4], 0.6)):
            norm.weight[2], norm.bias[2] = 0.0, value
    x = torch.randn(5, 3)
    small, _ = folded(model, x, {"0": [0, 1, 3], "3": [0, 1, 3]})
    with torch.no_grad():
        assert torch.allclose(model(x), small(x), atol=1e-5)


def test_scaled_queries_take_a_scaled_constant() -> None:
    """Columns of heads go, so queries are scaled to keep the old head size; the constant they take is
    scaled with them.
    """

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.q, self.k, self.v, self.out = (
                nn.Linear(3, 4),
                nn.Linear(4, 8),
                nn.Linear(4, 8),
                nn.Linear(4, 8),
                nn.Linear(8, 2),
            )

        def forward(self, x: Tensor) -> Tensor:
            y = torch.sigmoid(self.a(x))
            q, k, v = (layer(y).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
            return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    model = Heads().double().eval()
    with torch.no_grad():
        model.q.weight *= 5
        model.k.weight *= 5
        model.a.weight[1] = 0.0  # puts out the constant sigmoid(bias)
        for name in ("q", "k"):  # the last column of both heads is nothing
            for i in (3, 7):
                getattr(model, name).weight[i] = 0.0
                getattr(model, name).bias[i] = 0.0
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    small, _ = folded(model, x, {"a": [0, 2, 3], "q": [0, 1, 2, 4, 5, 6]}, FoldedConstants("mean"))
    assert small.q.weight.shape == (6, 3)
    with torch.no_grad():
        assert torch.allclose(model(x), small(x), rtol=0, atol=1e-12)


def test_depthwise_and_grouped_consumers_are_named_and_left_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 2, 1)
    ).eval()
    small, skipped = folded(model, torch.randn(1, 3, 4, 4), {"0": [0, 1, 2, 4, 5, 6]})
    assert skipped == ("2",)
    assert torch.equal(small[2].bias, model[2].bias)


def test_the_original_and_its_modes_stay() -> None:
    model = blocks().train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    folded(model, torch.randn(1, 3, 8, 8), KEEP)
    assert model.training and all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_refusals() -> None:
    model, x = blocks(), torch.randn(1, 3, 8, 8)
    plan = keeping(model, x, KEEP)
    small = niwaki.cut(model, plan)
    before = {name: t.clone() for name, t in small.state_dict().items()}
    with pytest.raises(niwaki.errors.InputError, match="fold constants; found: no batches"):
        FoldedConstants()(model, small, plan, batches=[])
    assert all(torch.equal(t, before[name]) for name, t in small.state_dict().items())

    class Hard(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).view(-1, 8).relu())

    hard, y = Hard().eval(), torch.randn(2, 3)
    plan = keeping(hard, y, {"a": [0, 1, 2, 3]})
    with pytest.raises(niwaki.errors.InputError, match="a model cut through the exported door"):
        FoldedConstants()(hard, niwaki.cut(hard, plan), plan, batches=[y])


def test_by_hand_what_relu_leaves_of_beta_goes_into_the_next_bias() -> None:
    """gamma = 0, beta = 0.5: relu(0.5) = 0.5, read with weights (2, -4): the bias (1, 1) becomes (2, -1).

    The network that keeps the constant (only the channel's scale at zero) and the folded one then agree everywhere.
    """
    model = nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2), nn.ReLU(), nn.Linear(2, 2)).eval()
    with torch.no_grad():
        model[1].weight[:], model[1].bias[:] = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.5])
        model[3].weight[:], model[3].bias[:] = torch.tensor([[1.0, 2.0], [1.0, -4.0]]), torch.ones(2)
    x = torch.linspace(-3, 3, 7)[:, None]
    plan = keeping(model, x, {"0": [0]})
    small = niwaki.cut(model, plan)
    assert niwaki.repair(small, [x], how=FoldedConstants(), model=model, plan=plan) == ()
    assert small[3].bias.tolist() == [2.0, -1.0]
    with torch.no_grad():
        assert torch.allclose(model(x), small(x), atol=1e-6)
        assert not torch.allclose(niwaki.mask(model, plan)(x), small(x), atol=0.1)  # masking takes the constant, too


def test_the_verb_asks_for_what_it_needs() -> None:
    model, x = blocks(), torch.randn(1, 3, 8, 8)
    plan = keeping(model, x, KEEP)
    small = niwaki.cut(model, plan)
    for given, missing in (({}, "no model"), ({"model": model}, "no plan")):
        with pytest.raises(niwaki.errors.InputError, match=f"fold constants; found: {missing}; do: niwaki.repair"):
            niwaki.repair(small, [x], how=FoldedConstants(), **given)
    with pytest.raises(niwaki.errors.InputError, match="known: BatchNormStatistics, FoldedConstants"):
        niwaki.repair(small, [x], how="fold")


class Readers(nn.Module):
    """A recurrent layer, attention's own projections, a grouped convolution and a bare parameter, all reading `a`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.cell = nn.Linear(3, 8), nn.LSTM(8, 5, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, kdim=8, vdim=8)
        self.own, self.used = nn.Parameter(torch.randn(8, 4)), nn.Linear(8, 4, bias=False)
        self.grouped, self.back = nn.Conv1d(8, 8, 1, groups=2), nn.ConvTranspose1d(8, 3, 1)
        self.read = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> list[Tensor]:
        y = torch.sigmoid(self.a(x))
        by_channel = y.transpose(1, 2)
        return [
            self.cell(y)[0],
            self.attention(y, y, y)[0],
            y @ self.own,
            F.linear(y, self.used.weight),
            self.grouped(by_channel),
            self.back(by_channel),
            self.read(y),
        ]


def test_every_reader_that_cannot_take_a_constant_is_named() -> None:
    torch.manual_seed(0)
    model, x = Readers().eval(), torch.randn(2, 4, 3)
    small, skipped = folded(model, x, {"a": [0, 1, 2, 4, 5, 6]}, FoldedConstants("mean"))
    assert set(skipped) == {
        "cell.weight_ih_l0", "attention.in_proj_weight", "own", "used", "grouped", "back"
    }  # fmt: skip
    assert small.used.bias is None and small.read.weight.shape == (4, 6)
    assert not torch.equal(small.read.bias, model.read.bias)


def test_attention_that_loses_heads_names_the_layer_that_reads_them() -> None:
    torch.manual_seed(0)
    model, x = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).eval(), torch.randn(2, 4, 8)
    graph = niwaki.trace(model, x)
    scores = niwaki.score(graph, niwaki.collect(model, graph, frozenset()), how=niwaki.scores.Random())
    plan = niwaki.choose(graph, scores, niwaki.Budget(keep=0.4, of="units"))
    assert any(cut["tensor"] == "self_attn.out_proj.weight" and cut["axis"] == 1 for cut in plan.cuts)
    small = niwaki.cut(model, plan)
    skipped = niwaki.repair(small, [x], how=FoldedConstants("mean"), model=model, plan=plan)
    assert "self_attn.out_proj" in skipped


def test_a_plan_from_a_file_folds_the_same() -> None:
    model, x = blocks(), torch.randn(2, 3, 8, 8)
    plan = keeping(model, x, KEEP)
    states = []
    for made in (plan, niwaki.Plan.from_json(plan.to_json())):
        small = niwaki.cut(model, made)
        niwaki.repair(small, [x], how=FoldedConstants(), model=model, plan=made)
        states.append(small.state_dict())
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def unbiased() -> nn.Sequential:
    return nn.Sequential(*list(blocks())[:3], nn.Conv2d(4, 2, 1, bias=False)).eval()


def test_an_added_bias_is_done_again_on_a_fresh_copy() -> None:
    from niwaki.surgery import surgery_of
    from niwaki.surgery.cut import redo

    model, x = unbiased(), torch.randn(2, 3, 8, 8)
    small, _ = folded(model, x, KEEP)
    assert surgery_of(small).biases == ("3",)
    again = redo(model, keeping(model, x, KEEP), surgery_of(small))
    assert set(again.state_dict()) == set(small.state_dict())
    again.load_state_dict(small.state_dict())
    with torch.no_grad():
        assert torch.equal(again(x), small(x))


def test_an_added_bias_trains() -> None:
    """With an optimiser in use it joins its weight's group; a later one has it by `parameters()`."""
    model, x = unbiased(), torch.randn(2, 3, 8, 8)
    plan = keeping(model, x, KEEP)
    for late in (False, True):
        small = niwaki.cut(model, plan)
        optimizer = torch.optim.SGD(
            [{"params": [*model[:3].parameters()], "lr": 0.1}, {"params": [model[3].weight], "lr": 0.5}]
        )
        niwaki.cut_optimizer_(optimizer, model, small, plan)
        FoldedConstants()(model, small, plan, batches=[x], optimizer=None if late else optimizer)
        if late:
            optimizer = torch.optim.SGD(small.parameters(), lr=0.5)
        before = small[3].bias.detach().clone()
        small(x).sum().backward()
        optimizer.step()
        assert torch.allclose(small[3].bias, before - 0.5 * small[3].bias.grad)
        assert float(small[3].bias.grad.abs().min()) > 0


def test_an_optimiser_of_the_uncut_model_is_refused() -> None:
    model, x = unbiased(), torch.randn(2, 3, 8, 8)
    plan = keeping(model, x, KEEP)
    small = niwaki.cut(model, plan)
    with pytest.raises(niwaki.errors.InputError, match=r"do: call niwaki\.cut_optimizer_ first"):
        FoldedConstants()(model, small, plan, batches=[x], optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    assert small[3].bias is None


@pytest.mark.parametrize("late", [True, False])
def test_an_added_bias_is_trained_whenever_the_optimiser_follows(late: bool) -> None:
    """An optimiser that follows after the folding, or before it and is given to it, holds the new bias once."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2, bias=False)).eval()
    with torch.no_grad():
        model[1].weight[1], model[1].bias[1] = 0.0, 0.5  # a constant of 0.5 behind the activation
    example = torch.randn(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    plan = keeping(model, example, {"0": [0, 2, 3]})
    small = niwaki.cut(model, plan)
    if not late:
        niwaki.cut_optimizer_(optimizer, model, small, plan)
    FoldedConstants()(model, small, plan, batches=[example], **({} if late else {"optimizer": optimizer}))
    if late:
        niwaki.cut_optimizer_(optimizer, model, small, plan)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(held) == len({id(p) for p in held}) == len(list(small.parameters()))
    assert any(parameter is small[3].bias for parameter in held)
    assert torch.allclose(small[3].bias, 0.5 * model[3].weight[:, 1])


def test_a_norm_without_running_statistics_takes_constants_off_by_itself():
    """It subtracts the batch's mean, and with it what the removed channel still put out."""
    model = blocks()
    own = nn.BatchNorm2d(5, track_running_stats=False)
    own.load_state_dict({name: model[4].state_dict()[name] for name in ("weight", "bias")})
    model[4] = own
    model[1].bias.data[2] = 0.5  # put out at full size
    pictures = torch.rand(4, 3, 8, 8)
    small, skipped = folded(model.eval(), pictures, {"0": [0, 1, 3]})
    assert skipped == () and small[3].bias is None
    assert torch.allclose(small(pictures), model(pictures), atol=1e-5)
    assert not torch.allclose(small[3](small[2](small[1](small[0](pictures)))),
                              model[3](model[2](model[1](model[0](pictures)))), atol=1e-2)  # fmt: skip
