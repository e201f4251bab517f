"""PreCropping with a cap above 1 (PreConfig): layers that grow."""

import logging
from typing import Any

import pytest
import torch
from test_precropping import EXAMPLE, cropped, network

import niwaki
from budgets.clocks import thousandths, work
from niwaki.errors import InputError
from niwaki.measure import Target
from niwaki.methods import PreCropping

PROBE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def widths(result: Any) -> dict[str, tuple[int, int]]:
    kept = result.plan.kept
    return {g.name: (g.units, len(kept.get(g.name, range(g.units)))) for g in result.graph.groups if g.fixed is None}


@pytest.mark.parametrize("of", ["params", "macs"])
@pytest.mark.parametrize("kind", ["depthwise", "grouped", "shuffle"])
def test_any_structure_grows_and_meets_either_budget(kind: str, of: str) -> None:
    net = network(kind)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    result = cropped(net, keep=0.7, of=of, cap=4.0)
    assert result.receipt.passed and result.receipt.exact
    assert bool(result.plan.grows) == (kind != "shuffle")  # whose forward splits its widths evenly
    assert result.after[of].value == result.plan.promised[of] <= 0.7 * result.before[of].value
    assert result.model(PROBE).shape == (2, 10) and bool(result.model(PROBE).isfinite().all())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    for group in result.graph.groups:
        units, now = widths(result).get(group.name, (1, 1))
        assert now <= (2 * units if group.kind == "channels" else units)
    assert result.details["precropping"]["grown"] == result.plan.grows


def test_more_freedom_is_never_worse_and_one_is_none() -> None:
    """The sum of log densities rises with the cap; a cap of 1 is the crop."""
    worth = []
    for cap in (1.0, 1.5, 4.0, 16.0):
        shares = cropped(network(), keep=0.5, cap=cap).details["precropping"]["shares"]
        graph = niwaki.trace(network(), EXAMPLE)
        assert all(share <= cap**0.5 + 1e-9 for share in shares.values())
        worth.append(_objective(graph, shares))
    assert worth == sorted(worth) and worth[-1] > worth[0] + 0.1
    assert cropped(network(), keep=0.5, cap=1.0).plan.grows == {}


def _objective(graph: Any, shares: dict[str, float]) -> float:
    from niwaki.budgets import pools_of
    from niwaki.budgets.atoms import make_atoms
    from niwaki.graph.weights import weights_of
    from niwaki.scores import Scores

    ones = {g.name: torch.ones(g.units, dtype=torch.float64) for g in graph.groups if g.fixed is None}
    atoms, _ = make_atoms(graph, Scores(ones, {"name": "none"}), grids="rows", exact_only=False, bundle="mean")
    pools = pools_of(graph, atoms, weights_of(graph), ("params",))
    assert list(atoms.pools) == list(shares)
    logs = torch.tensor(list(shares.values()), dtype=torch.float64).log().numpy()
    return float(pools.slopes[pools.layers.may()].sum(0) @ logs)


def test_new_units_start_as_their_layer_draws_them() -> None:
    """With start="slice" kept weights are those of before; new ones lie in the bound of a new layer's fan-in."""
    net = network()
    result = cropped(net, keep=0.7, cap=4.0, start="slice")
    grown = [cut for cut in result.plan.cuts if "new" in cut]
    old, now = dict(net.named_parameters()), dict(result.model.named_parameters())
    made = next(cut for cut in grown if cut["axis"] == 0 and cut["tensor"] in old and old[cut["tensor"]].dim() == 4)
    weight, before = now[made["tensor"]].detach(), old[made["tensor"]].detach()
    into = {cut["axis"]: cut["keep"] for cut in result.plan.cuts if cut["tensor"] == made["tensor"]}
    kept = [place for place in range(len(weight)) if place not in made["new"]]
    assert len(kept) == len(before)
    if 1 not in into:
        assert torch.equal(weight[kept], before)
    new = weight[made["new"]]
    bound = weight[0].numel() ** -0.5  # torch draws a convolution's weights evenly within 1 / sqrt(fan-in)
    assert 0.8 * bound < float(new.abs().max()) <= bound
    read = next(cut for cut in grown if cut["zero"] and cut["tensor"] in now)
    slices = now[read["tensor"]].detach().index_select(read["axis"], torch.tensor(read["new"]))
    assert float(slices.abs().min()) > 0  # what reads them is not zero any more
    assert made["tensor"] in result.details["precropping"]["start"]["grown"]
    again = cropped(net, keep=0.7, cap=4.0, start="slice")
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), result.model.parameters(), strict=True))


def test_one_step_of_training_moves_new_units() -> None:
    result = cropped(network(), keep=0.7, cap=4.0)
    model = result.model.train()
    model(PROBE).square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert all(grad is not None and bool(grad.isfinite().all()) for grad in gradients.values())
    entry = next(cut for cut in result.plan.cuts if "new" in cut and gradients.get(cut["tensor"]) is not None)
    moved = gradients[entry["tensor"]].index_select(entry["axis"], torch.tensor(entry["new"]))
    assert float(moved.abs().sum()) > 0


def test_it_is_saved_and_loaded(tmp_path: Any) -> None:
    result = cropped(network(), keep=0.7, cap=4.0)
    result.save(tmp_path / "run")
    small = niwaki.load(tmp_path / "run", network).eval()
    assert torch.equal(small(PROBE), result.model.eval()(PROBE))
    plan = niwaki.Plan.from_json((tmp_path / "run" / "plan.json").read_text())
    assert plan.grows == result.plan.grows


@pytest.mark.parametrize("widths_", ["neighbours", "log_fit", "square_root"])
def test_other_rules_grow_too(widths_: Any) -> None:
    result = cropped(network(), keep=0.7, cap=4.0, widths=widths_)
    assert result.plan.grows and result.receipt.passed
    assert max(result.details["precropping"]["densities"].values()) > 1


def test_both_budgets_and_multiples() -> None:
    both = (niwaki.Budget(keep=0.7, of="params", multiple=4), niwaki.Budget(keep=1.0, of="macs"))
    result = niwaki.compress(network(), EXAMPLE, method=PreCropping(cap=4.0), budget=both)
    assert result.plan.promised["params"] <= 0.7 * result.plan.promised["params_before"]
    assert result.plan.promised["macs"] <= result.plan.promised["macs_before"]
    assert all(len(kept) % 4 == 0 for kept in result.plan.kept.values()) and result.plan.grows


@pytest.mark.parametrize("cap", [0.5, float("nan"), float("inf"), "4", True])
def test_caps_that_mean_nothing_are_refused(cap: Any) -> None:
    with pytest.raises(InputError, match="no density from 1 to 100"):
        PreCropping(cap=cap)


def test_what_the_forward_holds_is_left_as_wide_and_said(caplog: Any) -> None:
    """Halves that a forward splits evenly can't be of different widths where the modules stay."""
    with caplog.at_level(logging.WARNING):
        result = cropped(network("shuffle"), keep=0.7, cap=4.0)
    rigid = result.details["precropping"]["rigid"]
    assert rigid and "forward holds their widths: " + ", ".join(rigid) in caplog.text
    assert not set(rigid) & set(result.plan.kept) and result.plan.door == "eager"


def test_a_grown_network_promises_no_time_that_nobody_measured(monkeypatch: Any, caplog: Any) -> None:
    """Layers are measured up to their own widths; a crop has its promise, of a grown one the time is measured only."""
    monkeypatch.setattr("niwaki.budgets.timed", lambda model, example, graph, **_: thousandths(graph))
    words: Any = {"keep": 0.7, "target": Target("pytorch")}
    with caplog.at_level(logging.WARNING):
        grown, crop = cropped(network(), cap=4.0, **words), cropped(network(), **words)
    assert grown.plan.grows and "latency" not in grown.plan.promised and "latency_before" in grown.plan.promised
    assert "no latency is promised" in caplog.text and "runtime_latency" in grown.after
    assert crop.plan.promised["latency"] == pytest.approx(work(crop.model), rel=0.05)
