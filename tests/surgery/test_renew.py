"""Fresh weights of a cropped network: drawn, rescaled or kept."""

import pytest
import torch
from torch import Tensor, nn

from niwaki.errors import CannotCutError, UnknownNameError
from niwaki.surgery import renew_


class Own(nn.Module):
    """A matrix of its own, without `reset_parameters`."""

    def __init__(self, out: int, into: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(out, into) * 3)
        self.scale = nn.Parameter(torch.full((out,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.matrix.T) * self.scale


def pair() -> tuple[nn.Sequential, nn.Sequential, dict[str, tuple[int, ...]]]:
    torch.manual_seed(0)
    big = nn.Sequential(nn.Linear(4, 32), nn.BatchNorm1d(32), Own(8, 32))
    small = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), Own(8, 8))
    with torch.no_grad():
        for net in (big, small):
            nn.init.zeros_(net[1].weight)  # as many networks begin their blocks
        small[0].weight.copy_(big[0].weight[:8])
    return small, big, {name: tuple(p.shape) for name, p in big.named_parameters()}


def test_reset_draws_anew_and_keeps_what_was_one_number() -> None:
    small, big, shapes = pair()
    before = small[0].weight.detach().clone()
    random = torch.get_rng_state()
    done = renew_(small, big, shapes, how="reset", seed=1)
    assert torch.equal(torch.get_rng_state(), random)
    assert not torch.equal(small[0].weight, before)
    assert bool((small[1].weight == 0).all())  # batch norm itself would draw ones
    assert done["rescaled"] == ("2.matrix",) and done["sliced"] == ("2.scale",)
    assert bool((small[2].matrix == 6).all())  # 3 x sqrt(32 / 8)
    again, big, shapes = pair()
    renew_(again, big, shapes, how="reset", seed=1)
    assert torch.equal(again[0].weight, small[0].weight)
    renew_(again, big, shapes, how="reset", seed=2)
    assert not torch.equal(again[0].weight, small[0].weight)


def test_rescale_and_slice() -> None:
    small, big, shapes = pair()
    done = renew_(small, big, shapes, how="rescale", seed=0)
    assert torch.equal(small[0].weight, big[0].weight[:8])  # reads as many as before
    assert bool((small[2].matrix == 6).all()) and done["reset"] == ()
    small, big, shapes = pair()
    done = renew_(small, big, shapes, how="slice", seed=0)
    assert bool((small[2].matrix == 3).all()) and done["rescaled"] == ()


def test_refusals() -> None:
    small, big, shapes = pair()
    with pytest.raises(UnknownNameError, match="reset, rescale, slice"):
        renew_(small, big, shapes, how="again", seed=0)  # type: ignore[arg-type]

    class Odd(nn.Linear):
        def reset_parameters(self) -> None:
            if self.out_features == 2:
                raise ValueError("three at least")
            super().reset_parameters()

    net = nn.Sequential(Odd(3, 4))
    net[0].out_features = 2
    with pytest.raises(CannotCutError, match="three at least"):
        renew_(net, net, {}, how="reset", seed=0)
