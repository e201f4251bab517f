"""Multiply-adds, worked out by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from niwaki.measure import Macs


class Attention(nn.Module):
    """Two heads of 4 over T tokens, by the fused call."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize(
    ("model", "shape", "macs"),
    [
        (nn.Linear(3, 2), (5, 3), 5 * 3 * 2),
        (nn.Conv2d(3, 8, 3), (2, 3, 10, 10), 2 * 8 * 8 * 8 * 3 * 9),  # 8 x 8 places, 8 filters of 3 x 3 x 3
        (nn.Conv2d(8, 8, 3, padding=1, groups=8), (1, 8, 6, 6), 6 * 6 * 8 * 9),
        (nn.Conv2d(8, 4, 3, padding=1, groups=2), (1, 8, 6, 6), 6 * 6 * 4 * (8 // 2) * 9),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (1, 4, 5, 5), 5 * 5 * 4 * 6 * 4),  # every input place hits every tap
        (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Softmax(-1)), (5, 3), 60),
        (Attention(), (1, 2, 7, 4), 2 * 2 * 7 * 7 * 4),  # q k' and p v, per head
        (nn.LSTM(8, 16, batch_first=True), (1, 5, 8), 5 * 4 * 16 * (8 + 16)),
        (nn.GRU(8, 16, batch_first=True), (1, 5, 8), 5 * 3 * 16 * (8 + 16)),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (1, 5, 8), 5 * (4 * 64 + 2 * 128) + 2 * 2 * 25 * 4),
    ],
    ids=["linear", "conv", "depthwise", "grouped", "transposed", "pointwise", "attention", "lstm", "gru", "encoder"],
)
def test_by_hand(model: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    found = Macs()(model, torch.zeros(shape))
    assert (found.value, found.uncounted, found.unit) == (macs, (), "MACs")


def test_what_has_no_formula_is_named() -> None:
    found = Macs()(nn.Bilinear(3, 4, 5), (torch.zeros(2, 3), torch.zeros(2, 4)))
    assert found.uncounted == ("aten._trilinear",)


def test_a_fourier_transform_is_named() -> None:
    class Mixer(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.fft.fft(x).real

    assert Macs()(Mixer(), torch.zeros(2, 8)).uncounted == ("aten._fft_r2c",)


def test_on_meta_nothing_is_computed_and_the_count_is_the_same() -> None:
    with torch.device("meta"):
        model = nn.Conv2d(3, 8, 3)
    assert Macs()(model, torch.zeros(2, 3, 10, 10, device="meta")).value == 2 * 8 * 8 * 8 * 3 * 9


def test_switches_are_as_before() -> None:
    before = (torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled, torch.backends.mha.get_fastpath_enabled())
    Macs()(nn.LSTM(2, 2), torch.zeros(3, 2))
    after = (torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled, torch.backends.mha.get_fastpath_enabled())
    assert after == before


class Latents(nn.Module):
    """Hands a part of a parameter to a module, as class tokens and tables of positions are."""

    def __init__(self) -> None:
        super().__init__()
        self.latents, self.layer = nn.Parameter(torch.randn(4, 8)), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.latents[:2]) + x


def test_a_view_of_a_parameter_may_enter_a_module() -> None:
    model = Latents().eval()
    model.layer.bias.requires_grad_(False)
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    assert Macs()(model, torch.randn(2, 3)).value == 2 * 8 * 3
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted == [True, True, False]


def test_an_example_that_does_not_fit_is_the_users_mistake() -> None:
    import niwaki

    with pytest.raises(niwaki.errors.InputError, match="its forward failed: RuntimeError"):
        niwaki.measure(nn.Linear(3, 2), torch.zeros(1, 4))
