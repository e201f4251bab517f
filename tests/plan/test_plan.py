"""The plan file: its documented form, both ways, by hand; damage is refused."""

import json
from typing import Any

import pytest
import torch
from torch import nn

import niwaki
from niwaki.plan import Plan, apply_cuts, decode_example, encode_example

REFUSED = (niwaki.errors.FileDamagedError, niwaki.errors.PlanMismatchError)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1)).eval()


def made(model: nn.Module | None = None, keep: Any = 0.5) -> Plan:
    """Half of the units of `net()`, with its graph."""
    model = model or net()
    graph = niwaki.trace(model, torch.zeros(1, 2))
    how = niwaki.scores.Random()
    return niwaki.choose(
        graph,
        niwaki.score(graph, niwaki.collect(model, graph, how.needs), how=how),
        niwaki.Budget(keep=keep, of="units"),
    )


def test_the_documented_form_by_hand() -> None:
    """2 -> 4 -> 3 -> 1 keeping 3 of 7: every cut axis of every tensor is one entry."""
    plan = made()
    data = json.loads(plan.to_json())
    kept = {name: list(keep) for name, keep in plan.kept.items()}
    assert data["groups"] == {
        name: {"units": {"0#2": 4, "0": 4, "2": 3}[name], "keep": keep} for name, keep in kept.items()
    }
    wanted = []
    for name, first, second in (("0", "0", "2"), ("2", "2", "4")):
        group = next((k for k in kept if k.split("#")[0] == name), None)
        if group is not None:
            keep = kept[group]
            wanted += [(f"{first}.weight", 0, keep), (f"{first}.bias", 0, keep), (f"{second}.weight", 1, keep)]
    assert sorted((c["tensor"], c["axis"], c["keep"]) for c in data["cuts"]) == sorted(wanted)
    assert data["promised"]["units"] == 3 and data["promised"]["units_before"] == 7
    assert data["budget"] == [{"keep": 0.5, "of": "units", "floor": 1, "multiple": 1}]
    assert data["model"] == {"class": "Sequential", "fingerprint": plan.fingerprint}
    assert data["decided_by"]["score"] == {"name": "Random", "seed": 0}
    assert data["example"] == {"tensor": [1, 2], "dtype": "float32"}


def test_both_ways_and_the_text_is_stable() -> None:
    plan = made()
    text = plan.to_json()
    again = Plan.from_json(text)
    assert again.to_json() == text
    assert again.kept == plan.kept and again.graph is None
    assert not {"values", "weights"} & set(json.loads(text))


def test_index_select_is_all_it_takes() -> None:
    model, plan = net(), made()
    small = niwaki.cut(model, plan)
    tensors = {name: t.detach() for name, t in model.named_parameters()}
    for cut in json.loads(plan.to_json())["cuts"]:
        tensors[cut["tensor"]] = tensors[cut["tensor"]].index_select(cut["axis"], torch.tensor(cut["keep"]))
    for name, parameter in small.named_parameters():
        assert torch.equal(parameter, tensors[name])


def test_cuts_in_blocks_by_hand() -> None:
    """[4, 2] in 2 blocks of 2 rows: block 0 keeps column 1, block 1 column 0; rows 0 and 3 stay."""
    weight = torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8]])
    blocks: dict[str, Any] = {"tensor": "w", "axis": 1, "blocks": 2, "keep": [[1], [0]]}
    rows: dict[str, Any] = {"tensor": "w", "axis": 0, "keep": [0, 3]}
    assert apply_cuts(weight, [blocks], "w").tolist() == [[2], [4], [5], [7]]
    assert apply_cuts(weight, [blocks, rows], "w").tolist() == [[2], [7]]
    whole: dict[str, Any] = {"tensor": "w", "axis": 1, "blocks": 2, "keep": [[], [0, 1]]}
    assert apply_cuts(weight, [whole, {"tensor": "w", "axis": 0, "keep": [2, 3]}], "w").tolist() == [[5, 6], [7, 8]]
    deep = weight.reshape(4, 1, 2).repeat(1, 2, 1)  # the same on axis 2
    assert apply_cuts(deep, [{**blocks, "axis": 2}, rows], "w").tolist() == [[[2], [2]], [[7], [7]]]


@pytest.mark.parametrize(
    ("keep", "rows"),
    [([[2], [0]], [0, 3]), ([[0, 1], [0]], [0, 3]), ([[], []], [0, 3]), ([[1], [0]], [0, 4])],
    ids=["beyond", "uneven", "nothing", "rows beyond"],
)
def test_blocks_that_do_not_fit_are_refused(keep: list[list[int]], rows: list[int]) -> None:
    cuts: list[Any] = [{"tensor": "w", "axis": 1, "blocks": 2, "keep": keep}, {"tensor": "w", "axis": 0, "keep": rows}]
    with pytest.raises(niwaki.errors.PlanMismatchError, match="do not fit"):
        apply_cuts(torch.arange(8).reshape(4, 2), cuts, "w")


@pytest.mark.parametrize(
    ("shape", "axis", "columns"),
    [
        ((5, 8), 1, [0, 3, 4, 7]),
        ((5, 8), 1, [2, 3, 6, 7]),  # runs of two
        ((5, 8), 1, [5]),
        ((5, 3, 8), 2, [0, 1, 2, 3, 4, 5, 6, 7]),
        ((5, 8, 2, 3), 1, [4, 5, 6, 7]),  # one run of four
    ],
)
def test_large_tensors_lose_rows_and_columns_at_once(
    shape: tuple[int, ...], axis: int, columns: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("niwaki.plan.LARGE", 16)  # a row or two at a time
    weight = torch.arange(torch.Size(shape).numel()).reshape(shape)
    rows = [0, 2, 3]
    cuts: list[Any] = [{"tensor": "w", "axis": 0, "keep": rows}, {"tensor": "w", "axis": axis, "keep": columns}]
    small = apply_cuts(weight, cuts, "w")
    assert torch.equal(small, weight[rows].index_select(axis, torch.tensor(columns)))
    assert small.is_contiguous()
    beyond = [cuts[0], {**cuts[1], "keep": [shape[axis]]}]
    with pytest.raises(niwaki.errors.PlanMismatchError):
        apply_cuts(weight, beyond, "w")


def test_examples_keep_shapes_types_and_plain_values() -> None:
    example = {"x": torch.zeros(2, 3), "i": [torch.ones(4, dtype=torch.long), (True, "s", None, 1.5)]}
    spec = json.loads(json.dumps(encode_example(example)))
    back = decode_example(spec, "cpu")
    assert back["x"].shape == (2, 3) and back["i"][0].dtype == torch.long and back["i"][1] == (True, "s", None, 1.5)
    assert decode_example(spec)["x"].is_meta
    with pytest.raises(niwaki.errors.InputError, match="none was recorded"):
        decode_example(None)


def test_another_model_is_refused_before_anything_is_done() -> None:
    plan = made()
    for other in (
        nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 1)),
        nn.Linear(2, 4),
    ):
        for verb in (niwaki.cut, niwaki.cut_, niwaki.mask):
            with pytest.raises(niwaki.errors.PlanMismatchError, match="apply a plan made for Sequential"):
                verb(other, plan)
    small = niwaki.cut(net(), plan)
    with pytest.raises(niwaki.errors.PlanMismatchError):  # a cut model is another model, too
        niwaki.cut(small, plan)


def test_a_plan_fits_its_model_in_any_precision() -> None:
    """Which positions stay says nothing of how they are stored."""
    plan = made()
    for kind in (torch.float64, torch.bfloat16):
        small = niwaki.cut(net().to(kind), niwaki.Plan.from_json(plan.to_json()))
        assert {p.dtype for p in small.parameters()} == {kind}
        assert [p.shape for p in small.parameters()] == [p.shape for p in niwaki.cut(net(), plan).parameters()]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "7", '"plan"', "{}", '{"format": "niwaki plan 2"}', "\x00", "[" * 100_000]
)
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(niwaki.errors.FileDamagedError, match="read a plan"):
        Plan.from_json(text)


def test_every_truncation_is_refused() -> None:
    text = made().to_json()
    for end in range(0, len(text) - 1, 7):
        with pytest.raises(niwaki.errors.FileDamagedError):
            Plan.from_json(text[:end])


def test_every_missing_entry_is_refused() -> None:
    data = json.loads(made().to_json())
    for key in data:
        with pytest.raises(niwaki.errors.FileDamagedError):
            Plan.from_json(json.dumps({k: v for k, v in data.items() if k != key}))


def first_group(data: dict[str, Any]) -> dict[str, Any]:
    group: dict[str, Any] = next(iter(data["groups"].values()))
    return group


TAMPERED: dict[str, Any] = {
    "kept none": lambda d: first_group(d).update(keep=[]),
    "kept out of order": lambda d: first_group(d).update(keep=[1, 0]),
    "kept twice": lambda d: first_group(d).update(keep=[1, 1]),
    "kept below zero": lambda d: first_group(d).update(keep=[-1, 0]),
    "kept beyond": lambda d: first_group(d).update(keep=[0, 4]),
    "kept halves": lambda d: first_group(d).update(keep=[0.4, 1.9]),
    "kept text": lambda d: first_group(d).update(keep="01"),
    "more units than the model has": lambda d: first_group(d).update(units=100, keep=[0, 99]),
    "an unknown group": lambda d: d["groups"].update(zzz={"units": 4, "keep": [0]}),
    "no groups": lambda d: d["groups"].clear(),
    "groups as a list": lambda d: d.update(groups=[1]),
    "cut out of order": lambda d: d["cuts"][0].update(keep=[1, 0]),
    "cut below zero": lambda d: d["cuts"][0].update(keep=[-1]),
    "cut beyond": lambda d: d["cuts"][0].update(keep=[0, 999]),
    "cut to nothing": lambda d: d["cuts"][0].update(keep=[]),
    "cut of other positions": lambda d: d["cuts"][0].update(
        keep=[i for i in range(4) if i not in d["cuts"][0]["keep"]]
    ),
    "axis text": lambda d: d["cuts"][0].update(axis="0"),
    "axis from the end": lambda d: d["cuts"][0].update(axis=-1),
    "axis far below zero": lambda d: d["cuts"][0].update(axis=-9),
    "axis beyond": lambda d: d["cuts"][0].update(axis=9),
    "blocks on a plain axis": lambda d: d["cuts"][0].update(blocks=3, keep=[[0], [1], [2]]),
    "blocks without lists": lambda d: d["cuts"][0].update(blocks=2),
    "cut of an unknown tensor": lambda d: d["cuts"].append({"tensor": "nope.weight", "axis": 0, "keep": [0]}),
    "cut without tensor": lambda d: d["cuts"][0].pop("tensor"),
    "a cut left out": lambda d: d["cuts"].pop(),
    "no cuts": lambda d: d["cuts"].clear(),
    "cuts as a number": lambda d: d.update(cuts=3),
    "example of another type": lambda d: d["example"].update(dtype="save"),
    "example with a text size": lambda d: d["example"].update(tensor=["a"]),
    "example as text": lambda d: d.update(example="abc"),
    "another fingerprint": lambda d: d["model"].update(fingerprint="0" * 16),
    "model as a list": lambda d: d.update(model=["Sequential"]),
    "promised as a number": lambda d: d.update(promised=7),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_tampered_plans_are_refused_with_the_users_exit_code(name: str) -> None:
    """When read or at the latest when used; never a raw error, never a silently different model."""
    model, plan = net(), made(keep=4)
    if name == "cut of other positions":
        plan = made(keep=0.5)
    data = json.loads(plan.to_json())
    TAMPERED[name](data)
    with pytest.raises(niwaki.errors.InputError) as caught:
        niwaki.cut(model, Plan.from_json(json.dumps(data)))
    assert caught.value.exit_code == 2 and caught.value.asked and caught.value.found and caught.value.do


def test_what_a_prompt_shows_is_one_line() -> None:
    """2 -> 4 -> 3 -> 1: 8 + 4 + 12 + 3 + 3 + 1 parameters, 8 + 12 + 3 multiply-adds, 4 + 3 units of which 3 stay."""
    plan = made()
    assert repr(plan.graph) == (
        f"ChannelGraph(Sequential: {len(plan.graph.groups)} groups, 2 of them free, 0 blocks, 31 parameters, "
        "23 multiply-adds; meta)"
    )
    cut = sum(plan.units[name] for name in plan.kept)
    stay = sum(len(keep) for keep in plan.kept.values())
    assert cut - stay == 7 - 3
    said = f"Plan(Sequential: {len(plan.kept)} groups cut, {stay} of their {cut} units stay; "
    assert repr(plan).startswith(said) and repr(plan).endswith("units 7 -> 3)") and "\n" not in repr(plan)
    group = plan.graph.group("2")
    assert "tensor='2.weight', axis=0" in repr(group) and "array" not in repr(group)
    assert repr(niwaki.collect(net(), plan.graph, niwaki.scores.Magnitude().needs)) == "Evidence(batches=0)"
