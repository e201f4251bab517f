"""A measurement keeps its meaning through JSON; `measure` runs meters and leaves the model alone."""

import json

import pytest
import torch
from torch import nn

from niwaki.errors import InputError
from niwaki.measure import COUNTS, Latency, Macs, Measurement, Params, measure


def test_json_both_ways_keeps_everything() -> None:
    first = Measurement("latency", 1.5, "ms", "median", spread=0.25, device="cpu (x)", uncounted=("aten._trilinear",))
    assert Measurement.from_json(json.loads(json.dumps(first.to_json()))) == first
    assert set(first.versions) == {"niwaki", "torch", "python"}


def test_versions_are_not_shared_between_measurements() -> None:
    one, two = Measurement("a", 1.0, "x", "d"), Measurement("b", 1.0, "x", "d")
    assert one.versions == two.versions
    assert one.versions is not two.versions


@pytest.mark.parametrize("data", [{}, {"name": "a", "value": "many", "unit": "", "definition": ""}, {"colour": 1}])
def test_from_json_refuses_what_is_no_measurement(data: dict) -> None:
    with pytest.raises(InputError, match="a measurement from JSON"):
        Measurement.from_json(data)


def test_str_reads_well() -> None:
    assert str(Measurement("params", 11689512.0, "parameters", "")) == "params 11,689,512 parameters"
    assert str(Measurement("latency", 1.2345678, "ms", "", spread=0.061)) == "latency 1.235 ± 0.061 ms"


def test_measure_gives_one_measurement_per_meter_by_name() -> None:
    got = measure(nn.Linear(3, 2), torch.zeros(4, 3))
    assert {name: got[name].value for name in got} == {"params": 8.0, "macs": 24.0, "bytes": 32.0}
    assert all(got[name].definition and got[name].unit and got[name].name == name for name in got)


@pytest.mark.parametrize("meters", [(), (Params(), Params())])
def test_measure_refuses_no_meters_and_twins(meters: tuple) -> None:
    with pytest.raises(InputError, match="each meter once"):
        measure(nn.Linear(3, 2), torch.zeros(1, 3), meters=meters)


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.LSTM(6, 2))
    model = model[:3]
    model.train()
    model[1].eval()  # a frozen norm inside a training model: modes are kept one by one
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.random.get_rng_state()
    measure(
        model, torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), meters=(*COUNTS, Latency(runs=2))
    )
    assert [module.training for module in model] == [True, False, True]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(random, torch.random.get_rng_state())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_modes_come_back_when_the_forward_fails() -> None:
    model = nn.Linear(3, 2).train()
    with pytest.raises(InputError, match="its forward failed"):
        measure(model, torch.zeros(1, 5), meters=(Macs(),))
    assert model.training
    assert torch.backends.mha.get_fastpath_enabled()
