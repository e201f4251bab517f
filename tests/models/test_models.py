"""Sources, their arguments, and what `load` gives whatever the source."""

import pytest
import torch

import niwaki.models
from niwaki.errors import InputError, UnknownNameError
from niwaki.models import arguments_of

FACTORY = """
import torch
from torch import nn

def net(width=3, bias=True):
    return nn.Sequential(nn.Flatten(), nn.Linear(4, width, bias=bias), nn.BatchNorm1d(width), nn.Dropout(0.5))

def pair():
    return net(), torch.ones(2, 1, 2, 2)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(FACTORY)
    return tmp_path


def test_weights_are_drawn_by_the_seed_and_nothing_else_changes(here):
    before = torch.get_rng_state()
    one, again, other = (niwaki.models.load("python:nets.py:net", seed=seed).model for seed in (1, 1, 2))
    assert one[1].weight.equal(again[1].weight) and not one[1].weight.equal(other[1].weight)
    assert torch.get_rng_state().equal(before)


def test_loaded_says_what_it_is(here):
    loaded = niwaki.models.load("python:nets.py:net?width=5", shape=(1, 2, 2))
    assert loaded.source == "python:nets.py:net?width=5" and loaded.weights == "random"
    assert loaded.example.shape == (1, 1, 2, 2) and loaded.normalisation is None
    assert not any(module.training for module in loaded.model.modules())


def test_the_factory_builds_the_same_architecture_again(here):
    loaded = niwaki.models.load("python:nets.py:net?width=5", config={"bias": False})
    again = loaded.factory()
    assert again is not loaded.model and again[1].bias is None
    one, other = ({name: value.shape for name, value in model.state_dict().items()} for model in (loaded.model, again))
    assert one == other


def test_arguments_are_json_and_never_evaluated():
    assert arguments_of('a=1&b=0.5&c=true&d=null&e="x"&f=[1,2]', "s") == {
        "a": 1,
        "b": 0.5,
        "c": True,
        "d": None,
        "e": "x",
        "f": [1, 2],
    }
    assert arguments_of("", "s") == {}


@pytest.mark.parametrize("question", ["a", "a=", "a=x", "a=__import__('os')", "1=2", "a=1&a=2", "a b=1"])
def test_arguments_that_are_no_json_are_refused(question):
    with pytest.raises(InputError, match="JSON values") as caught:
        arguments_of(question, "torchvision:resnet18")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("source", ["resnet18", "keras:resnet", "", "torchvision"])
def test_unknown_sources_list_the_known(source):
    with pytest.raises(UnknownNameError, match=r"torchvision:\.\.\., timm:\.\.\., hf:\.\.\., python:\.\.\."):
        niwaki.models.load(source)


def test_a_source_without_a_name_is_refused():
    with pytest.raises(InputError, match="no name after the colon"):
        niwaki.models.load("timm:?num_classes=1")


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("timm:test_resnet", {"fc.weight", "fc.bias"}),
        ("torchvision:mobilenet_v3_small", {"classifier.3.weight", "classifier.3.bias"}),
    ],
)
def test_weights_for_other_classes_bring_all_but_the_head(name, heads, tmp_path, caplog):
    pytest.importorskip(name.partition(":")[0])
    trained = niwaki.models.load(f"{name}?num_classes=7", seed=1).model.state_dict()
    torch.save(trained, tmp_path / "seven.pt")
    plain = niwaki.models.load(f"{name}?num_classes=3", seed=2).model.state_dict()
    loaded = niwaki.models.load(f"{name}?num_classes=3", checkpoint=str(tmp_path / "seven.pt"), seed=2)
    assert set(loaded.drawn) == heads and loaded.weights != "random"
    assert "than num_classes=3: drawn anew, to be trained" in caplog.text
    for key, tensor in loaded.model.state_dict().items():
        assert tensor.equal(plain[key] if key in heads else trained[key]), key
    same = niwaki.models.load(f"{name}?num_classes=7", checkpoint=str(tmp_path / "seven.pt"), seed=2)
    assert same.drawn == () and all(t.equal(trained[key]) for key, t in same.model.state_dict().items())
    with pytest.raises(InputError, match=r"another number of classes: write \?num_classes=N after the model's name"):
        niwaki.models.load(name, checkpoint=str(tmp_path / "seven.pt"))
