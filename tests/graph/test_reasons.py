"""Why a group is fixed: said in words, with the module and the line where there is one."""

import copy
import inspect
import json
import pickle
from typing import Any

import pytest
import torch
from labelled import Net, cut_and_judge, group_of
from torch import nn

import niwaki
from niwaki.units import Needed


def two() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


class Strange(nn.Module):
    """Calls an operator that no rule knows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cdist(x, x.flip(0))


def test_unknown_operation_is_named_with_module_file_and_line() -> None:
    net = nn.Sequential(nn.Linear(4, 8), Strange(), nn.Linear(3, 2))
    graph = niwaki.trace(net, torch.randn(3, 4))
    (unknown,) = graph.unknown
    line = inspect.getsourcelines(Strange.forward)[1] + 1
    assert unknown.operation.startswith("aten::") and "cdist" in unknown.operation
    assert (unknown.module, unknown.where) == ("1", f"graph/test_reasons.py:{line}")
    expected = f"unknown operation {unknown.operation} called in 1, graph/test_reasons.py:{line}"
    assert group_of(graph, "0.weight", 0).fixed == expected
    assert graph.to_json()["unknown"] == [
        {"operation": unknown.operation, "module": "1", "where": f"graph/test_reasons.py:{line}"}
    ]


def test_what_follows_an_unknown_operation_is_fixed_by_its_result() -> None:
    net = nn.Sequential(nn.Linear(4, 8), Strange(), nn.Linear(3, 2))
    graph = niwaki.trace(net, torch.randn(3, 4))
    assert (group_of(graph, "2.weight", 1).fixed or "").startswith("meets the result of unknown operation aten::")


def test_an_unknown_operation_leaves_the_rest_free() -> None:
    net = Net(
        lambda n, x: n.c(n.b(n.s(n.a(x))).relu()), a=nn.Linear(4, 8), s=Strange(), b=nn.Linear(3, 6), c=nn.Linear(6, 2)
    )
    _plan, small, receipt = cut_and_judge(net, torch.randn(3, 4))
    assert small.b.weight.shape == (3, 3) and small.a.weight.shape == (8, 4)
    assert receipt.passed


def test_outputs_of_every_shape_are_fixed() -> None:
    for make in (lambda a, b: (a, b), lambda a, b: {"x": a, "y": [b]}, lambda a, b: [a, {"z": (b,)}]):
        net = Net(lambda n, x, make=make: make(n.a(x), n.b(x)), a=nn.Linear(4, 8), b=nn.Linear(4, 6))
        graph = niwaki.trace(net, torch.randn(1, 4))
        for name in ("a.weight", "b.weight"):
            assert group_of(graph, name, 0).fixed == "output of the model"


def test_the_input_is_fixed() -> None:
    assert group_of(niwaki.trace(two(), torch.randn(1, 4)), "0.weight", 1).fixed == "meets input of the model"


@pytest.mark.parametrize("name", ["0", "0.weight", "0.bias", "[0]", "?"])
def test_protected_by_the_user(name: str) -> None:
    graph = niwaki.trace(two(), torch.randn(1, 4), protect=(name,))
    assert group_of(graph, "0.weight", 0).fixed == "protected by the user"


def test_protected_by_the_source_of_the_network() -> None:
    """Whoever hands the name on, also as a copy; what its user names besides is the user's."""
    why = "protected by the zoo: its loss counts on all of them"
    given = copy.deepcopy((Needed("0", why), "0.bias"))
    assert group_of(niwaki.trace(two(), torch.randn(1, 4), protect=given), "0.weight", 0).fixed == why
    again = pickle.loads(pickle.dumps(given[0]))
    assert (again, again.why, json.dumps(again)) == ("0", why, '"0"')
    own = niwaki.trace(two(), torch.randn(1, 4), protect=given[1:])
    assert group_of(own, "0.weight", 0).fixed == "protected by the user"


def test_a_single_name_will_do() -> None:
    net = Net(lambda n, x: n.head(n.body(x)), body=nn.Linear(4, 8), head=nn.Linear(8, 2))
    assert (
        group_of(niwaki.trace(net, torch.randn(1, 4), protect="body"), "body.weight", 0).fixed
        == "protected by the user"
    )


def test_protecting_a_layer_keeps_what_it_is_coupled_to() -> None:
    """a and b are added: protecting b keeps a's width, while c stays free."""
    net = Net(
        lambda n, x: n.d(n.c(n.a(x) + n.b(x)).relu()),
        a=nn.Linear(4, 8),
        b=nn.Linear(4, 8),
        c=nn.Linear(8, 6),
        d=nn.Linear(6, 2),
    )
    graph = niwaki.trace(net, torch.randn(1, 4), protect=("b",))
    assert group_of(graph, "a.weight", 0).fixed == "protected by the user"
    assert group_of(graph, "c.weight", 0).fixed is None
    with_c = niwaki.trace(net, torch.randn(1, 4), protect=("c",))
    assert group_of(with_c, "a.weight", 0).fixed is None  # what c reads may go


def test_protecting_a_container_protects_what_is_in_it() -> None:
    net = Net(
        lambda n, x: n.head(n.body(x)), body=nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 6)), head=nn.Linear(6, 2)
    )
    graph = niwaki.trace(net, torch.randn(1, 4), protect=("body",))
    assert all(group.fixed for group in graph.groups)


def test_protecting_a_norm_protects_its_channels() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    assert (
        group_of(niwaki.trace(net, torch.randn(2, 4), protect=("1",)), "0.weight", 0).fixed == "protected by the user"
    )


def test_protecting_a_module_without_parameters_is_not_silently_nothing() -> None:
    """Its output keeps its width, or it is refused; but never nothing."""
    try:
        graph = niwaki.trace(two(), torch.randn(1, 4), protect=("1",))
    except niwaki.errors.InputError:
        return
    assert group_of(graph, "0.weight", 0).fixed == "protected by the user"


def test_a_name_that_does_not_exist_is_refused_with_what_is_near() -> None:
    with pytest.raises(
        niwaki.errors.InputError, match=r"protect 'body\.head'; found: no module or parameter of that name; near: head"
    ):
        niwaki.trace(Net(lambda n, x: n.head(x), head=nn.Linear(4, 2)), torch.randn(1, 4), protect=("body.head",))


def test_a_forward_that_fails_is_refused() -> None:
    with pytest.raises(niwaki.errors.InputError, match="its forward failed: RuntimeError"):
        niwaki.trace(two(), torch.randn(1, 5))


def test_a_full_device_is_no_mistake_of_the_user() -> None:
    """torch.OutOfMemoryError in the forward is an error of its own, not a forward that does not fit the example."""

    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises((torch.OutOfMemoryError, niwaki.errors.OutOfMemoryError)):
        niwaki.trace(Net(forward, a=nn.Linear(4, 2)), torch.randn(1, 4))


def test_data_dependent_control_flow_needs_real_tensors() -> None:
    net = Net(lambda n, x: n.b(n.a(x)) if float(x.sum()) > 0 else n.b(-n.a(x)), a=nn.Linear(4, 8), b=nn.Linear(8, 2))
    with pytest.raises(niwaki.errors.InputError):
        niwaki.trace(net, torch.ones(1, 4), device="meta")
    graph = niwaki.trace(net, torch.ones(1, 4))
    assert (graph.device, group_of(graph, "a.weight", 0).fixed) == ("cpu", None)


def test_a_value_read_by_forward_is_fixed() -> None:
    net = Net(lambda n, x: n.b(n.a(x) * float(n.a(x)[0, 0])), a=nn.Linear(4, 8), b=nn.Linear(8, 2))
    graph = niwaki.trace(net, torch.ones(1, 4))
    reasons = {g.fixed for g in graph.groups for m in g.members if m.tensor == "a.weight" and m.axis == 0}
    assert {"picked by a constant index"} <= reasons or {"its value is read by forward"} <= reasons


def test_unused_parameters_are_listed_and_left_alone() -> None:
    net = Net(lambda n, x: n.b(n.a(x)), a=nn.Linear(4, 8), b=nn.Linear(8, 2), idle=nn.Linear(5, 7))
    graph = niwaki.trace(net, torch.ones(1, 4))
    assert set(graph.unused) == {"idle.weight", "idle.bias"}
    _, small, receipt = cut_and_judge(net, torch.ones(1, 4))
    assert small.idle.weight.shape == (7, 5) and receipt.passed


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    net = two()
    net.stream = (i for i in range(3))
    with pytest.raises(niwaki.errors.CannotCutError, match="copy a Sequential"):
        niwaki.trace(net, torch.ones(1, 4))
