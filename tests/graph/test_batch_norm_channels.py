"""Batch norm: the usual case, which is done sooner, ties what any other ties."""

import pytest
import torch
from labelled import Net
from torch import nn

import niwaki
from niwaki.graph.rules import normalisation

SHAPE = (2, 3, 8, 8)


def nets() -> dict[str, nn.Module]:
    """An activation with labels of its own, norms without some of their tensors, one norm used twice, and an input
    whose channels are copies of one."""
    conv, norm = (lambda i, o, **k: nn.Conv2d(i, o, 3, **k)), nn.BatchNorm2d
    return {
        "plain": nn.Sequential(conv(3, 8), norm(8), nn.ReLU(), conv(8, 4, bias=False), norm(4)),
        "depthwise": nn.Sequential(conv(3, 8), norm(8), conv(8, 8, groups=8), norm(8), conv(8, 4)),
        "grouped": nn.Sequential(conv(3, 8), norm(8), conv(8, 8, groups=2), norm(8), conv(8, 4)),
        "bare": nn.Sequential(conv(3, 8), norm(8, affine=False), conv(8, 4)),
        "without statistics": nn.Sequential(conv(3, 8), norm(8, track_running_stats=False), conv(8, 4)),
        "twice": Net(
            lambda n, x: n.c(n.s(n.b(n.s(n.a(x))))), a=conv(3, 8), s=norm(8), b=conv(8, 8), c=nn.Conv2d(8, 4, 1)
        ),
        "copies": Net(lambda n, x: n.b(n.s(n.a(x).expand(-1, 8, -1, -1))), a=conv(3, 1), s=norm(8), b=conv(8, 4)),
        "input": nn.Sequential(norm(3), conv(3, 4), norm(4), nn.Flatten(), nn.Linear(144, 2)),
    }


@pytest.mark.parametrize("name", nets())
def test_the_usual_case_ties_what_any_other_ties(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = nets()[name]
    seen = []
    done = {"sooner": 0}
    usual = normalisation.channels_alone

    def counted(*given: object) -> bool:
        found = usual(*given)  # type: ignore[arg-type]
        done["sooner"] += found
        return found

    for function in (counted, lambda *_: False):
        monkeypatch.setattr(normalisation, "channels_alone", function)
        graph = niwaki.trace(net, torch.zeros(SHAPE))
        told = graph.to_json() | {"seconds": 0}
        values = [(v.zero, [f.tolist() for f in v.fields]) for r in graph.records for v in r.outputs]
        axes = [(a.tensor, a.axis, a.role, a.units.tolist()) for a in graph.axes]
        seen.append((told, values, axes, {k: v.tolist() for k, v in graph.units.inexact.items()}))
    assert seen[0] == seen[1]
    assert bool(done["sooner"]) == (name != "copies")
