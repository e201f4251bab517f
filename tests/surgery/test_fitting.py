"""Views whose sizes a forward takes from another width: made to fit, in a module of the same class."""

import copy
import inspect
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from planned import keeping
from torch import Tensor, nn

import niwaki
from niwaki.graph.trace import fingerprint
from niwaki.surgery import surgery_of
from niwaki.surgery.cut import redo
from niwaki.surgery.fitting import Fit, fit_, is_fitting

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


class Own(nn.Module):
    """Lays its heads side by side as wide as its input, which is no width of theirs."""

    def __init__(self, separate: bool = False) -> None:
        super().__init__()
        self.heads, self.size, self.separate = 4, 2, separate
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        if self.separate:
            y = x.transpose(0, 1)
            bias = torch.cat([self.q.bias, self.k.bias, self.v.bias])
            parts = {"q_proj_weight": self.q.weight, "k_proj_weight": self.k.weight, "v_proj_weight": self.v.weight}
            mask = torch.zeros(batch * self.heads, tokens, tokens)
            y, _ = F.multi_head_attention_forward(
                y, y, y, width, self.heads, torch.empty(0), bias, None, None, False, 0.0, self.out.weight,
                self.out.bias, training=self.training, attn_mask=mask, use_separate_proj_weight=True, **parts,
            )  # fmt: skip
            return y.transpose(0, 1)
        q, k, v = (f(x).view(batch, tokens, self.heads, self.size).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    def __init__(self, separate: bool = False) -> None:
        super().__init__()
        self.attention, self.norm = Own(separate), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.attention(x))


class Sharing(nn.Module):
    """Shares the width of its input out among its heads, which is right until that width is cut: 6 of 8 among 2 are no
    heads of 4. The scale is that share's, too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = torch.matmul((q * (width // self.heads) ** -0.5 @ k.transpose(-2, -1)).softmax(-1), v)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, width))


class Stream(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.attention, self.leave = nn.Linear(8, 8), Sharing(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.leave(x + self.attention(x))


def halved(model: nn.Module) -> tuple[nn.Module, niwaki.Plan]:
    """Heads 0 and 3 stay."""
    rows = [0, 1, 6, 7]
    plan = keeping(model, X, {"attention.q": rows, "attention.v": rows})
    return niwaki.cut(model, plan), plan


@pytest.mark.parametrize("separate", [False, True])
def test_heads_go_through_the_eager_door(separate: bool) -> None:
    model = Block(separate).eval()
    small, plan = halved(model)
    assert surgery_of(small).door == "eager"
    assert isinstance(small.attention, Own) and is_fitting(small.attention) and small.attention.heads == 2
    assert small.attention.q.weight.shape == (4, 8) and small.attention.out.weight.shape == (8, 4)
    assert niwaki.verify(model, small, plan, X).passed
    small.train()(X).sum().backward()
    assert all(p.grad is not None for p in small.parameters())
    torch.export.export(small.eval(), (X,), strict=False)


def test_a_cut_input_is_no_cut_of_the_heads() -> None:
    """Views of 2 heads of 6 // 2 become those of 2 heads of 4, in any batch; the scale stays that of 4."""
    model = Stream().eval()
    plan = keeping(model, X, {"enter": [0, 1, 3, 4, 6, 7]})
    small = niwaki.cut(model, plan)
    assert surgery_of(small).door == "eager" and is_fitting(small.attention)
    assert small.attention.qkv.weight.shape == (24, 6) and small.attention.out.weight.shape == (6, 8)
    assert niwaki.verify(model, small, plan, X).passed
    wide = torch.randn(7, 3, 8)
    torch.testing.assert_close(small(wide)[4:6], small(wide[4:6]))
    again = redo(model, plan, surgery_of(small))
    assert torch.equal(again(X), small(X))
    size = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(small, (X,), dynamic_shapes=({0: size},), strict=False)
    torch.testing.assert_close(program.module()(torch.cat([X, X, X])), small(torch.cat([X, X, X])))


def test_any_batch_and_any_length() -> None:
    small, _ = halved(Block().eval())
    assert small(torch.randn(3, 7, 8)).shape == (3, 7, 8)


def test_it_is_copied_pickled_and_done_again() -> None:
    model = Block().eval()
    small, plan = halved(model)
    again = redo(model, plan, surgery_of(small))
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small)), again):
        assert torch.equal(other(X), small(X)) and type(other.attention) is type(small.attention)
    assert fingerprint(small) == fingerprint(again) and not is_fitting(model.attention)
    assert inspect.signature(small.attention.forward) == inspect.signature(model.attention.forward)


def test_a_run_is_saved_and_loaded(tmp_path: Path) -> None:
    model = Block().eval()
    outcome = niwaki.compress(model, X, method=niwaki.methods.Random(), budget=niwaki.Budget(keep=0.5, of="units"))
    outcome.save(tmp_path / "run")
    assert torch.equal(niwaki.load(tmp_path / "run", Block).eval()(X), outcome.model(X))


def test_what_fits_is_left_alone() -> None:
    """4 x 6 positions: (6, 4) fits; (4, 12) becomes (4, 6); (2, 24) is not known, and (8, 6) that of another."""
    fit = Fit([(3, (), 2, ((0, 8, 4),)), (2, ((1, 12, 6),), 2, ((1, 12, 6),)), (2, (), 2, ((1, 24, 13),))])
    x = torch.zeros(4, 6)
    assert fit.fitted(x, (6, 4)) == (6, 4)
    assert list(fit.fitted(x, (4, 12))) == [4, 6]
    assert fit.fitted(torch.zeros(3, 6), (-1, 12)) == (-1, 12)
    assert fit.fitted(x, (2, 24)) == (2, 24)
    assert fit.fitted(x, (8, 6)) == (8, 6)
    with pytest.raises(RuntimeError), fit:
        x.view(2, 24)


def test_what_was_asked_for_by_another_width_has_one_answer_or_none() -> None:
    """2 x 12 positions asked for as 2 x 3 x 3 become 2 x 3 x 4; where 3 and 4 could be either way round, nothing is."""
    known = (2, ((1, 12, 12),), 3, ((1, 3, 3), (2, 4, 4)))
    x = torch.zeros(2, 12)
    assert list(Fit([known]).fitted(x, (2, 3, 3))) == [2, 3, 4]
    assert list(Fit([known, known]).fitted(torch.zeros(5, 12), (5, 3, 3))) == [5, 3, 4]
    turned = (2, ((1, 12, 12),), 3, ((1, 3, 4), (2, 4, 3)))
    assert Fit([known, turned]).fitted(x, (2, 3, 3)) == (2, 3, 3)
    assert Fit([known]).fitted(torch.zeros(2, 9), (2, 3, 4)) == (2, 3, 4)  # not what the plan says is viewed


def test_shapes_of_a_file_are_whole_numbers() -> None:
    with pytest.raises(TypeError):
        fit_(Own(), [[4, [], 3, [[2, 8, "4"]]]])
