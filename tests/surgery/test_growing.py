"""Growth with numbers worked out by hand: tensors, outputs, the file, the optimiser, fresh weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planned import Heads, mlp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import niwaki
from laws.common import trace
from niwaki.distill.alignment import kept_at
from niwaki.errors import CannotCutError, FileDamagedError, InputError
from niwaki.graph.copies import along, growable
from niwaki.graph.memory import with_bytes, with_memory
from niwaki.graph.plans import plan_of
from niwaki.measure import Bytes, Memory
from niwaki.plan import Plan
from niwaki.surgery import renew_
from zoo import named

X = torch.tensor([[1.0, 2.0]])


def grown(model: nn.Module, often: list[int], example: Tensor = X, group: int = 0) -> Plan:
    """The plan in which the units of a free group are there so often."""
    graph = niwaki.trace(model, example)
    free = [g for g in graph.groups if g.fixed is None]
    times = np.ones(graph.units.count, np.int64)
    times[free[group].ids] = often
    return plan_of(graph, times)


def test_places_by_hand() -> None:
    """Units 0 1 2 in pairs; the first twice more, the second gone, -1 stays where it is."""
    units = np.array([-1, 0, 0, 1, 1, 2, 2])
    positions, copies = along(units, np.array([3, 0, 1, 1]))
    assert positions.tolist() == [0, 1, 2, 1, 2, 1, 2, 5, 6]
    assert copies.tolist() == [0, 0, 0, 1, 1, 2, 2, 0, 0]
    positions, copies = along(np.array([0, 1, 0, 1]), np.array([2, 1, 1]))  # one axis behind the other
    assert positions.tolist() == [0, 0, 1, 2, 2, 3] and copies.tolist() == [0, 1, 0, 0, 1, 0]


def test_a_hidden_unit_more_by_hand() -> None:
    """2-3-2 becomes 2-4-2: the second unit once more, whose outputs count nothing: 8 + 6 + 2 parameters and biases."""
    model = mlp()
    plan = grown(model, [1, 2, 1])
    assert plan.grows == {"0#2": 1} or plan.grows == {"0": 1}
    (kept,) = plan.kept.values()
    assert kept == (0, 1, 1, 2)
    big = niwaki.cut(model, plan)
    assert big[0].weight.tolist() == [[1, 2], [3, 0], [3, 0], [0, -1]] and big[0].bias.tolist() == [1, 0, 0, 2]
    assert big[2].weight.tolist() == [[1, 10, 0, 100], [0, 0, 0, -1]]
    assert (big[0].out_features, big[2].in_features) == (4, 4)
    assert big(X).tolist() == model(X).tolist() == [[1 + 4 + 1 + 30 + 5, 0]]
    assert (plan.promised["params_before"], plan.promised["params"]) == (17, 22)
    assert (plan.promised["macs_before"], plan.promised["macs"]) == (12, 16)
    entries = {(cut["tensor"], cut["axis"]): (cut["keep"], cut["new"], cut["zero"]) for cut in plan.cuts}
    assert entries == {
        ("0.weight", 0): ([0, 1, 1, 2], [2], False),
        ("0.bias", 0): ([0, 1, 1, 2], [2], False),
        ("2.weight", 1): ([0, 1, 1, 2], [2], True),
    }
    assert niwaki.verify(model, big, plan, X).passed


def test_one_grows_and_one_goes_by_hand() -> None:
    """The last unit goes and the first is there thrice: what the mask says, h0 + 10 h1 + 5."""
    model = mlp()
    plan = grown(model, [3, 1, 0])
    big = niwaki.cut(model, plan)
    assert big[0].weight.tolist() == [[1, 2], [1, 2], [1, 2], [3, 0]]
    assert big[2].weight.tolist() == [[1, 0, 0, 10], [0, 0, 0, 0]]
    assert big(X).tolist() == niwaki.mask(model, plan)(X).tolist() == [[6 + 30 + 5, 0]]


def test_the_file_of_a_growing_plan() -> None:
    model = mlp()
    plan = grown(model, [1, 2, 1])
    text = plan.to_json()
    assert json.loads(text)["format"] == "niwaki plan 2"
    again = Plan.from_json(text)
    assert again.to_json() == text and again.grows == plan.grows
    assert torch.equal(niwaki.cut(mlp(), again)[2].weight, niwaki.cut(model, plan)[2].weight)
    assert json.loads(grown(model, [1, 1, 0]).to_json())["format"] == "niwaki plan 1"


def _group(data: dict[str, Any]) -> dict[str, Any]:
    group: dict[str, Any] = next(iter(data["groups"].values()))
    return group


TAMPERED: dict[str, Any] = {
    "of the older format": lambda d: d.update(format="niwaki plan 1"),
    "a copy before its unit": lambda d: _group(d).update(keep=[1, 0, 1, 2]),
    "a copy of nothing": lambda d: d["cuts"][0].update(new=[0, 1, 2, 3]),
    "a place that is none": lambda d: d["cuts"][0].update(new=[7]),
    "places as text": lambda d: d["cuts"][0].update(new="2"),
    "no places": lambda d: d["cuts"][0].pop("new"),
    "places in blocks": lambda d: d["cuts"][0].update(blocks=2),
    "another unit copied": lambda d: d["cuts"][0].update(keep=[0, 0, 1, 2], new=[1]),
    "what reads is not zero": lambda d: d["cuts"][-1].update(zero=False),
    "a copy beyond": lambda d: d["cuts"][0].update(keep=[0, 1, 9, 2]),
    "one copy more than the group": lambda d: d["cuts"][0].update(keep=[0, 1, 1, 1, 2], new=[2, 3]),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_tampered_growth_is_refused(name: str) -> None:
    model = mlp()
    data = json.loads(grown(model, [1, 2, 1]).to_json())
    TAMPERED[name](data)
    with pytest.raises(InputError) as caught:
        niwaki.cut(model, Plan.from_json(json.dumps(data)))
    assert caught.value.exit_code == 2 and caught.value.do


def test_a_format_to_come_is_refused() -> None:
    data = json.loads(grown(mlp(), [1, 2, 1]).to_json())
    with pytest.raises(FileDamagedError, match="this version reads"):
        Plan.from_json(json.dumps(data | {"format": "niwaki plan 3"}))


def test_momentum_is_zero_for_new_units_by_hand() -> None:
    """dL/db of the hidden layer at (1, 2) is (1, 10, 0); the new unit has no past, and no slope: nothing listens."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    model(X).sum().backward()
    optimizer.step()
    plan = grown(model, [1, 2, 1])
    big = niwaki.cut(model, plan)
    niwaki.cut_optimizer_(optimizer, model, big, plan)
    assert optimizer.state[big[0].bias]["momentum_buffer"].tolist() == [1, 10, 0, 0]
    assert optimizer.state[big[0].weight]["momentum_buffer"].tolist() == [[1, 2], [10, 20], [0, 0], [0, 0]]
    assert optimizer.state[big[2].weight]["momentum_buffer"][:, 2].tolist() == [0, 0]
    optimizer.zero_grad()
    big(X).sum().backward()
    assert big[0].bias.grad[2] == 0 and big[2].weight.grad[0, 2] != 0  # the next step makes it heard
    optimizer.step()


def test_cut_in_place_grows() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    same = niwaki.cut_(model, grown(model, [1, 2, 1]), optimizer=optimizer)
    assert same is model and model[0].out_features == 4 and optimizer.param_groups[0]["params"][0] is model[0].weight


def test_fresh_weights_of_new_units() -> None:
    """Kept ones stay with "slice"; those of a module without `reset_parameters` are kept ones in another order."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.arange(6.0).reshape(2, 3) + 1)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.matrix.T

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), Own()).eval()
    plan = grown(model, [1, 2, 1], torch.zeros(2, 2))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for how in ("slice", "rescale"):
        big = niwaki.cut(model, plan)
        done = renew_(big, model, shapes, how=how, seed=1, plan=plan)  # type: ignore[arg-type]
        assert done["grown"] == ("0.weight", "0.bias", "1.weight", "1.bias", "2.matrix")
        assert torch.equal(big[0].weight[[0, 1, 3]], model[0].weight)
        assert not torch.equal(big[0].weight[2], model[0].weight[1])
        assert big[1].weight.tolist() == [1, 1, 1, 1] and big[1].running_var.tolist() == [1, 1, 1, 1]
        factor = 1.0 if how == "slice" else (3 / 4) ** 0.5  # the matrix reads four now
        assert torch.allclose(big[2].matrix[:, [0, 1, 3]], model[2].matrix * factor)
        column = (big[2].matrix[:, 2] / factor).sort().values
        assert any(torch.allclose(column, old.sort().values) for old in model[2].matrix.T)
    big = niwaki.cut(model, plan)
    renew_(big, model, shapes, how="reset", seed=1, plan=plan)
    assert not torch.equal(big[0].weight[0], model[0].weight[0])


def test_weights_on_disk_grow_to_the_same_bits(tmp_path: Path) -> None:
    model = mlp()
    plan = grown(model, [1, 3, 0])
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    niwaki.surgery.cut_stored(model, plan, tmp_path, tmp_path / "out")
    held, meant = load_file(tmp_path / "out" / "model.safetensors"), niwaki.cut(model, plan).state_dict()
    assert held.keys() == meant.keys() and all(torch.equal(held[name], meant[name]) for name in meant)


def test_features_of_new_units_have_no_teacher() -> None:
    model = mlp()
    with pytest.raises(InputError, match="which the teacher does not have"):
        kept_at(model, grown(model, [1, 2, 1]), ["0"])


@pytest.mark.parametrize("name", ["chain", "residual_add", "dense_concat", "cat_flatten", "unet", "squeeze_excite"])
def test_bytes_and_memory_are_as_promised(name: str) -> None:
    model, example, graph = trace(named(name))
    graph = with_memory(with_bytes(graph))
    free, times = growable(graph), np.ones(graph.units.count, np.int64)
    for number, group in enumerate(g for g in graph.groups if g.ids.size and free[g.ids].all()):
        times[group.ids[: (1 + number % 2) * group.multiple]] += 1
    plan = plan_of(graph, times)
    assert plan.grows
    big = niwaki.cut(model, plan)
    assert Bytes()(big).value == plan.promised["bytes"] > plan.promised["bytes_before"]
    assert Memory(fused=False)(big, example).value == plan.promised["memory"] > plan.promised["memory_before"]


def test_heads_do_not_grow() -> None:
    model, example = Heads(), torch.zeros(1, 5, 3)
    graph = niwaki.trace(model, example)
    group = next(g for g in graph.groups if g.fixed is None and g.kind == "grid")
    times = np.ones(graph.units.count, np.int64)
    times[group.ids] = 2
    with pytest.raises(InputError, match="rows and columns of a grid do not grow"):
        plan_of(graph, times)


def test_groups_that_read_several_outputs_of_one_unit_do_not_grow() -> None:
    """Depthwise with two outputs each, then a convolution whose five groups read both: one unit, found by a search."""
    model = nn.Sequential(nn.Conv2d(2, 5, 1), nn.Conv2d(5, 10, 1, groups=5), nn.Conv2d(10, 5, 1, groups=5))
    net = nn.Sequential(*model, nn.Conv2d(5, 3, 1))
    graph = niwaki.trace(net, torch.zeros(1, 2, 4, 4))
    group = next(g for g in graph.groups if g.fixed is None)
    assert group.kind == "channels" and not growable(graph)[group.ids].any()
    times = np.ones(graph.units.count, np.int64)
    times[group.ids[0]] = 2
    with pytest.raises(InputError, match="do not grow"):
        plan_of(graph, times)


def test_written_out_widths_do_not_grow() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).view(-1, 8).relu())

    model = Written()
    with pytest.raises(CannotCutError, match=r"does not grow; where: a"):
        niwaki.cut(model, grown(model, [2] + [1] * 7, torch.zeros(4, 3)))
