"""Weights from files: every format, every wrapping, every kind of damage."""

import json
import math
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from niwaki.errors import FileDamagedError, InputError, NotFiniteError
from niwaki.models import load_checkpoint_, read_checkpoint


def net(seed=0, width=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 2))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight


def same(one, other):
    other = other.state_dict()
    return all(value.equal(other[name]) for name, value in one.state_dict().items())


def wrapped(form, state):
    prefixed = {f"module.{name}": value for name, value in state.items()}
    compiled = {f"module._orig_mod.{name}": value for name, value in state.items()}
    return {
        "plain": state,
        "state_dict": {"state_dict": state, "epoch": 3, "best": 0.5},
        "model": {"model": prefixed, "optimizer": {"state": {}}},
        "model_state_dict": {"model_state_dict": state},
        "twice": {"model": {"state_dict": prefixed}},
        "module.": prefixed,
        "compiled": compiled,
    }[form]


@pytest.mark.parametrize("form", ["plain", "state_dict", "model", "model_state_dict", "twice", "module.", "compiled"])
def test_torch_files_in_every_wrapping(form, tmp_path):
    model, other = net(1), net(2)
    torch.save(wrapped(form, model.state_dict()), tmp_path / "w.pth")
    load_checkpoint_(other, tmp_path / "w.pth")
    assert same(model, other)


def test_safetensors_and_old_torch_files(tmp_path):
    model = net(1)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    torch.save(model.state_dict(), tmp_path / "w.th", _use_new_zipfile_serialization=False)
    for name in ("w.safetensors", "w.th"):
        other = net(2)
        load_checkpoint_(other, str(tmp_path / name))
        assert same(model, other)


def test_shards_beside_their_index(tmp_path):
    model, other = net(1), net(2)
    state = model.state_dict()
    halves = {"a.safetensors": list(state)[:3], "b.safetensors": list(state)[3:]}
    for file, names in halves.items():
        save_file({name: state[name] for name in names}, tmp_path / file)
    index = tmp_path / "w.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, names in halves.items() for name in names}}))
    load_checkpoint_(other, index)
    assert same(model, other)
    for evil in ("../a.safetensors", "/a.safetensors", "a.bin", 3):
        index.write_text(json.dumps({"weight_map": {"0.weight": evil}}))
        with pytest.raises(FileDamagedError, match="beside the index"):
            read_checkpoint(index)
    index.write_text('{"weight')
    with pytest.raises(FileDamagedError, match="no weight_map"):
        read_checkpoint(index)


def test_half_precision_becomes_that_of_the_model(tmp_path):
    other = net(2)
    state = net(1).state_dict()
    half = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    save_file(half, tmp_path / "w.safetensors")
    load_checkpoint_(other, tmp_path / "w.safetensors")
    assert other[0].weight.dtype == torch.float32
    assert other[0].weight.equal(state["0.weight"].half().float())


def test_counters_and_second_names_of_shared_parameters_may_be_missing(tmp_path):
    state = net(1).state_dict()
    del state["1.num_batches_tracked"]
    save_file(state, tmp_path / "old.safetensors")
    load_checkpoint_(net(2), tmp_path / "old.safetensors")

    model = Tied()
    save_file({"second.weight": torch.ones(3, 3)}, tmp_path / "tied.safetensors")
    load_checkpoint_(model, tmp_path / "tied.safetensors")
    assert model.first.weight is model.second.weight and model.first.weight.equal(torch.ones(3, 3))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop("0.weight"), "1 missing: 0.weight"),
        (lambda s: s.update(extra=torch.ones(1)), "1 unexpected: extra"),
        (lambda s: s.update({"0.bias": torch.ones(7)}), r"1 of another shape: 0.bias \(7,\), in the model \(3,\)"),
    ],
)
def test_names_and_shapes_that_do_not_fit_are_listed_and_nothing_is_loaded(change, says, tmp_path):
    state, model, before = net(1).state_dict(), net(2), net(2)
    change(state)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=says) as caught:
        load_checkpoint_(model, tmp_path / "w.safetensors")
    assert caught.value.exit_code == 2 and same(model, before)


def test_nan_is_refused_everywhere_and_infinity_in_parameters(tmp_path):
    for name, value, says in (
        ("0.weight", math.nan, r"0.weight \(1 of 12\)"),
        ("0.bias", math.inf, r"0.bias \(1 of 3\)"),
        ("1.running_var", math.nan, "1.running_var"),
    ):
        state, model, before = net(1).state_dict(), net(2), net(2)
        state[name].view(-1)[0] = value
        save_file(state, tmp_path / "w.safetensors")
        with pytest.raises(NotFiniteError, match=says):
            load_checkpoint_(model, tmp_path / "w.safetensors")
        assert same(model, before)
    state = net(1).state_dict()
    state["1.running_var"][0] = math.inf  # as attention masks in buffers have it
    save_file(state, tmp_path / "w.safetensors")
    load_checkpoint_(net(2), tmp_path / "w.safetensors")


@pytest.mark.parametrize("name", ["w.pth", "w.th", "w.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "short"])
def test_damaged_files_are_refused(name, damage, tmp_path):
    file = tmp_path / name
    if name == "w.safetensors":
        save_file(net().state_dict(), file)
    else:
        torch.save(net().state_dict(), file, _use_new_zipfile_serialization=name == "w.pth")
    whole = file.read_bytes()
    file.write_bytes({"truncated": whole[:-50], "empty": b"", "text": b"hello world", "short": whole[:10]}[damage])
    with pytest.raises(FileDamagedError, match="w\\.") as caught:
        load_checkpoint_(net(), file)
    assert caught.value.exit_code == 2


class Evil:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def test_pickles_with_anything_but_tensors_are_never_run(tmp_path):
    trace = tmp_path / "trace"
    torch.save({"state_dict": net().state_dict(), "extra": Evil(str(trace))}, tmp_path / "zip.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Evil(str(trace))))
    torch.save(net(), tmp_path / "module.pth")
    for name in ("zip.pth", "raw.pth", "module.pth"):
        with pytest.raises(FileDamagedError, match="could run code and is not read"):
            read_checkpoint(tmp_path / name)
    assert not trace.exists()


def test_files_without_weights_are_refused(tmp_path):
    for content, says in (([1, 2], "a list, no weights"), ({}, "an empty dictionary"), ({"lr": 0.1}, r"lr \(float\)")):
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(FileDamagedError, match=says):
            read_checkpoint(tmp_path / "w.pth")
    (tmp_path / "text.pth").write_text("hi")
    with pytest.raises(FileDamagedError, match="found: no checkpoint of torch; where"):
        read_checkpoint(tmp_path / "text.pth")
    with pytest.raises(InputError, match="no such file"):
        read_checkpoint(tmp_path / "absent.pth")
    with pytest.raises(InputError, match="found: a folder"):
        read_checkpoint(tmp_path)
