"""Momentum and moments follow the cut, with numbers by hand."""

import pytest
import torch
from planned import keeping, mlp
from torch import nn

import niwaki
from niwaki.plan import apply_cuts

X = torch.tensor([[1.0, 2.0]])
KEEP = {"0": [0, 2]}


def cut_with(optimizer: torch.optim.Optimizer, model: nn.Module) -> nn.Module:
    plan = keeping(model, X, KEEP)
    small = niwaki.cut(model, plan)
    niwaki.cut_optimizer_(optimizer, model, small, plan)
    return small


def test_momentum_of_sgd_by_hand() -> None:
    """L = sum of outputs at x = (1, 2): dL/db0 = (v sums where h > 0) = (1, 10, 0); after one step that is
    the momentum.
    """
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(X).sum().backward()
    optimizer.step()
    assert optimizer.state[model[0].bias]["momentum_buffer"].tolist() == [1, 10, 0]
    small = cut_with(optimizer, model)
    assert optimizer.param_groups[0]["params"] == list(small.parameters())
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], small.parameters(), strict=True))
    assert optimizer.state[small[0].bias]["momentum_buffer"].tolist() == [1, 0]
    assert optimizer.state[small[0].weight]["momentum_buffer"].tolist() == [[1, 2], [0, 0]]
    assert len(optimizer.state) == 4
    before = small[0].bias.tolist()
    optimizer.zero_grad()
    small[0].bias.grad = torch.tensor([1.0, 1.0])
    optimizer.step()  # momentum 0.9 (1, 0) + (1, 1) = (1.9, 1), times the rate 0.1
    assert small[0].bias.tolist() == pytest.approx([before[0] - 0.19, before[1] - 0.1])


def test_moments_of_adam_by_hand() -> None:
    """First moment 0.1 g and second 0.001 g^2 after one step, the step count as it was."""
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, amsgrad=True)
    model(X).sum().backward()
    optimizer.step()
    small = cut_with(optimizer, model)
    state = optimizer.state[small[0].bias]
    assert state["exp_avg"].tolist() == pytest.approx([0.1, 0.0])
    assert state["exp_avg_sq"].tolist() == pytest.approx([0.001, 0.0])
    assert state["max_exp_avg_sq"].shape == (2,) and float(state["step"]) == 1
    columns = optimizer.state[small[2].weight]["exp_avg"]  # dL/dv = h for both outputs: (6, 3, 0) without unit 1
    assert columns.tolist() == [pytest.approx([0.6, 0.0]), pytest.approx([0.6, 0.0])]
    optimizer.zero_grad()
    small(X).sum().backward()
    optimizer.step()
    assert float(optimizer.state[small[0].bias]["step"]) == 2


def test_groups_keep_their_settings_and_frozen_or_new_parameters_have_no_state() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(
        [{"params": [model[0].weight], "lr": 0.5}, {"params": [model[2].bias]}], lr=0.1, momentum=0.9
    )
    small = cut_with(optimizer, model)
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.1]
    assert (
        optimizer.param_groups[0]["params"][0] is small[0].weight
        and optimizer.param_groups[1]["params"][0] is small[2].bias
    )
    assert len(optimizer.state) == 0


def test_old_and_new_state_share_no_memory() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(X).sum().backward()
    optimizer.step()
    old = optimizer.state[model[0].weight]["momentum_buffer"].clone()
    kept = optimizer.state[model[0].weight]["momentum_buffer"]
    small = cut_with(optimizer, model)
    small(X).sum().backward()
    optimizer.step()
    assert torch.equal(kept, old)


def test_a_parameter_of_another_model_is_refused_and_nothing_changes() -> None:
    model, other = mlp(), mlp()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    plan = keeping(model, X, KEEP)
    before = list(optimizer.param_groups[0]["params"])
    with pytest.raises(niwaki.errors.InputError, match="it holds a parameter that is not the model's"):
        niwaki.cut_optimizer_(optimizer, model, niwaki.cut(model, plan), plan)
    assert all(a is b for a, b in zip(before, optimizer.param_groups[0]["params"], strict=True))


@pytest.mark.parametrize("stepped", [True, False])
@pytest.mark.parametrize("kind", ["another plan", "uncut", "another architecture"])
def test_a_model_not_cut_by_this_plan_is_refused_and_nothing_changes(kind: str, stepped: bool) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if stepped:
        model(X).sum().backward()
        optimizer.step()
    plan = keeping(model, X, KEEP)
    small = {
        "another plan": lambda: niwaki.cut(model, keeping(model, X, {"0": [1]})),
        "uncut": mlp,
        "another architecture": lambda: nn.Sequential(nn.Linear(2, 2)),
    }[kind]()
    before = list(optimizer.param_groups[0]["params"])
    with pytest.raises(niwaki.errors.PlanMismatchError):
        niwaki.cut_optimizer_(optimizer, model, small, plan)
    assert all(a is b for a, b in zip(before, optimizer.param_groups[0]["params"], strict=True))
    assert len(optimizer.state) == (4 if stepped else 0)


def stepped(kind: type[torch.optim.Optimizer], model: nn.Module, **settings: object) -> torch.optim.Optimizer:
    """An optimiser of this kind with the state of one step."""
    optimizer = kind(model.parameters(), **settings)  # type: ignore[call-arg]

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = model(X).square().sum()
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[arg-type]
    return optimizer


@pytest.mark.parametrize(
    ("kind", "settings"),
    [(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), (torch.optim.AdamW, {"lr": 0.01})],
    ids=["sgd", "adamw"],
)
def test_a_cut_in_place_takes_the_optimiser_along(
    kind: type[torch.optim.Optimizer], settings: dict[str, float]
) -> None:
    model = mlp()
    optimizer = stepped(kind, model, **settings)
    plan = keeping(model, X, KEEP)
    cuts = plan.by_tensor()
    meant = {
        name: {
            key: apply_cuts(value, cuts.get(name, []), name).clone() if value.dim() else value.clone()
            for key, value in optimizer.state[parameter].items()
        }
        for name, parameter in model.named_parameters()
    }
    assert niwaki.cut_(model, plan, optimizer=optimizer) is model
    live = dict(model.named_parameters())
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], live.values(), strict=True))
    assert live["0.weight"].shape == (2, 2) and set(optimizer.state) == set(live.values())
    for name, parameter in live.items():
        state = optimizer.state[parameter]
        assert state.keys() == meant[name].keys()
        assert all(torch.equal(value, meant[name][key]) for key, value in state.items())
    before = live["0.weight"].detach().clone()
    optimizer.zero_grad()
    model(X).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)


def test_a_cut_in_place_that_the_optimiser_cannot_follow_changes_nothing() -> None:
    model, other = mlp(), mlp()
    plan = keeping(model, X, KEEP)
    before = list(model.parameters())
    with pytest.raises(niwaki.errors.InputError, match="not the model's"):
        niwaki.cut_(model, plan, optimizer=torch.optim.SGD(other.parameters(), lr=0.1))
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True)) and model[0].out_features == 3


@pytest.mark.parametrize(
    ("kind", "frozen"),
    [(torch.optim.Adafactor, False), (torch.optim.LBFGS, False), (torch.optim.LBFGS, True)],
    ids=["adafactor", "lbfgs", "lbfgs with a first parameter that stays whole"],
)
def test_state_that_cannot_be_cut_is_refused_and_nothing_changes(
    kind: type[torch.optim.Optimizer], frozen: bool
) -> None:
    model = mlp()
    if frozen:
        model = nn.Sequential(*mlp(), nn.Linear(2, 2)).eval()
    optimizer = stepped(kind, model, lr=0.01)
    if frozen:  # the flat state lies beside the first parameter of the list
        group = optimizer.param_groups[0]["params"]
        state = optimizer.state.pop(group[0])
        group.insert(0, group.pop())
        optimizer.state[group[0]] = state
    plan = keeping(model, X, KEEP)
    small = niwaki.cut(model, plan)
    before, state = list(optimizer.param_groups[0]["params"]), dict(optimizer.state)
    with pytest.raises(niwaki.errors.InputError, match=f"cut the state of {kind.__name__}.*make a new optimiser"):
        niwaki.cut_optimizer_(optimizer, model, small, plan)
    assert all(a is b for a, b in zip(before, optimizer.param_groups[0]["params"], strict=True))
    assert optimizer.state.keys() == state.keys() and all(optimizer.state[p] is state[p] for p in state)


def test_an_optimiser_that_holds_on_to_its_list_follows_too() -> None:
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1)  # has no state yet
    small = cut_with(optimizer, model)
    before = small(X).square().sum().item()

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = small(X).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    assert small(X).square().sum().item() < before


@pytest.mark.parametrize("layer", ["1", "3"])
def test_two_parameters_on_one_storage_become_one(layer: str) -> None:
    """Whether what they share is cut or not: `small` has one tensor, which the optimiser must hold once."""
    model = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2)).eval()
    model[3].weight = nn.Parameter(model[1].weight.data)
    optimizer = stepped(torch.optim.SGD, model, lr=0.1, momentum=0.9)
    plan = keeping(model, X, {"0": [0, 1, 3]} if layer == "1" else {})
    kept = apply_cuts(optimizer.state[model[1].weight]["momentum_buffer"], plan.by_tensor().get("1.weight", []), "")
    small = niwaki.cut(model, plan)
    assert small[1].weight is small[3].weight
    niwaki.cut_optimizer_(optimizer, model, small, plan)
    held = optimizer.param_groups[0]["params"]
    assert [id(p) for p in held] == [id(p) for p in small.parameters()]
    assert torch.equal(optimizer.state[small[1].weight]["momentum_buffer"], kept)
