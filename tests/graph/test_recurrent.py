"""Recurrent layers: the same graph on real tensors as on the meta device."""

import pytest
import torch
from torch import nn

import niwaki


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_on_real_tensors_as_on_meta(kind: type[nn.RNNBase]) -> None:
    """Backends that run a whole layer as one call are off while tracing, and on again afterwards."""
    net = nn.Sequential(nn.Linear(4, 6), kind(6, 5, batch_first=True))
    were = torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled
    seen = [niwaki.trace(net, torch.randn(2, 3, 4), device=device) for device in ("meta", "cpu")]
    assert not seen[1].unknown
    on_meta, on_real = ([(g.name, g.units, g.fixed) for g in graph.groups] for graph in seen)
    assert on_meta == on_real
    assert (torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled) == were
