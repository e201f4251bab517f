"""Loading: what was shared when saved is shared again, whatever the factory does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import niwaki
from niwaki.methods import Magnitude


class Net(nn.Module):
    """Two layers and a head over an embedding; `tie` names what shares its memory with what."""

    def __init__(self, tie: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("left", torch.ones(3))
        self.register_buffer("right", torch.ones(3))
        tensors: dict[str, Any] = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        for name, other in tie:
            path, _, leaf = name.rpartition(".")
            setattr(self.get_submodule(path), leaf, tensors[other])

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        y = y + self.b(self.a(y).relu()).relu()
        return self.head(y) * self.left.sum() * self.right.sum()


HEAD, TWINS, FLAGS = ("head.weight", "embed.weight"), ("b.weight", "a.weight"), ("right", "left")


def made(*tie: tuple[str, str]) -> nn.Module:
    return Net(tie).eval()


def saved(model: nn.Module, folder: Path) -> Any:
    example = torch.arange(10)[None]
    outcome = niwaki.compress(model, example, method=Magnitude(), budget=niwaki.Budget(keep=0.6, of="params"))
    outcome.save(folder)
    return outcome


@pytest.mark.parametrize("tie", [(HEAD,), (TWINS,), (FLAGS,), (HEAD, TWINS, FLAGS)], ids=str)
def test_what_the_factory_leaves_apart_is_shared_as_it_was_saved(tie: tuple[Any, ...], tmp_path: Path) -> None:
    outcome = saved(made(*tie), tmp_path / "run")
    fresh = made()
    loaded = niwaki.load(tmp_path / "run", lambda: fresh)
    for name, other in tie:
        one, two = (getattr(loaded.get_submodule(n.rpartition(".")[0]), n.rpartition(".")[2]) for n in (name, other))
        assert one is two
    example = torch.arange(10)[None]
    assert torch.equal(loaded(example), outcome.model(example))
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in outcome.model.parameters())
    assert len(list(fresh.parameters())) == 6 and fresh.left is not fresh.right  # the factory's model is left alone


def test_what_the_factory_shares_but_was_saved_apart_is_refused_by_name(tmp_path: Path) -> None:
    saved(made(), tmp_path / "run")
    with pytest.raises(niwaki.errors.PlanMismatchError, match=r"load head\.weight.*shares it with embed\.weight"):
        niwaki.load(tmp_path / "run", lambda: made(HEAD))


def test_shared_buffers_that_a_move_took_apart_are_no_other_model(tmp_path: Path) -> None:
    saved(made().double().float(), tmp_path / "run")
    assert niwaki.load(tmp_path / "run", lambda: made(FLAGS)).left.tolist() == [1, 1, 1]
    other = made()
    other.right.fill_(2)
    saved(other, tmp_path / "other")
    with pytest.raises(niwaki.errors.PlanMismatchError, match="load right"):
        niwaki.load(tmp_path / "other", lambda: made(FLAGS))


def test_a_model_is_no_factory(tmp_path: Path) -> None:
    with pytest.raises(niwaki.errors.InputError, match="not a factory"):
        niwaki.load(tmp_path, nn.Linear(2, 2))  # type: ignore[arg-type]


class Remembered(nn.Module):
    """A table as long as the last input, in a buffer that no state dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 2)
        self.register_buffer("table", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.table.shape[0] != x.shape[1]:
            self.table = torch.arange(x.shape[1], dtype=x.dtype)
        return self.second(self.first(x) * self.table[:, None])


def test_a_buffer_that_follows_the_input_is_no_other_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Remembered().eval(), torch.randn(2, 5, 3)
    model(x)
    outcome = niwaki.compress(model, x, method=Magnitude(), budget=niwaki.Budget(keep=0.5, of="units"))
    outcome.save(tmp_path / "run")
    loaded = niwaki.load(tmp_path / "run", Remembered)
    assert loaded.table.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(loaded(x), outcome.model(x))
