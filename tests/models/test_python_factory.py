"""Networks from the user's own code."""

import sys
from pathlib import Path

import pytest
import torch

import niwaki.data
import niwaki.models
from niwaki.errors import InputError, UnknownNameError
from niwaki.tasks import Classification

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"
FACTORY = """
import torch
from torch import nn
import neighbour_of_nets

def net(width=3):
    return nn.Linear(4, width)

def pair():
    return net(), torch.ones(2, 4)

def double():
    return net().double()

def halves():
    return net().half(), torch.ones(2, 4, dtype=torch.float16)

def tokens():
    return nn.Embedding(4, 3), torch.ones(2, 4, dtype=torch.int64)

def wrong():
    return "no network"

def fails():
    raise RuntimeError("out of paint")
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_nets").mkdir()
    (tmp_path / "own_nets" / "__init__.py").write_text("")
    (tmp_path / "own_nets" / "nets.py").write_text(FACTORY)
    (tmp_path / "neighbour_of_nets.py").write_text("")
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith(("own_nets", "neighbour_of_nets"))]:
        del sys.modules[name]


def test_by_module_and_by_file_with_the_current_folder_importable_meanwhile(here):
    before = list(sys.path)
    for place in ("own_nets.nets", "own_nets/nets.py"):
        assert niwaki.models.load(f"python:{place}:net?width=7").model.out_features == 7
    assert sys.path == before


def test_a_factory_may_bring_its_example(here):
    loaded = niwaki.models.load("python:own_nets.nets:pair")
    assert loaded.example.equal(torch.ones(2, 4))
    assert isinstance(loaded.factory(), torch.nn.Linear)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("net", torch.float32), ("double", torch.float64), ("halves", torch.float16), ("tokens", torch.int64)],
)
def test_an_example_of_a_given_shape_has_the_type_the_model_takes(name, kind, here):
    example = niwaki.models.load(f"python:own_nets.nets:{name}", shape=(5, 4)).example
    assert example.shape == (1, 5, 4) and example.dtype == kind


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("own_nets.nets", InputError, "package.module:factory"),
        ("own_nets.absent:net", InputError, "ModuleNotFoundError"),
        ("absent.py:net", InputError, "no such file"),
        ("own_nets.nets:nett", UnknownNameError, "known: net, pair, double, halves, tokens, wrong, fails"),
        ("own_nets.nets:wrong", InputError, "returned a str"),
        ("own_nets.nets:fails", InputError, "RuntimeError: out of paint"),
        ("own_nets.nets:net?depth=3", InputError, "after the question mark"),
    ],
)
def test_what_is_no_network_is_refused(name, error, says, here):
    with pytest.raises(error, match=says.replace("?", r"\?")) as caught:
        niwaki.models.load(f"python:{name}")
    assert caught.value.exit_code == 2


def test_the_example_family_has_the_published_sizes(monkeypatch):
    monkeypatch.chdir(ROOT)
    for depth, params in ((20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018)):
        loaded = niwaki.models.load(f"python:examples/cifar_resnet.py:resnet{depth}", shape=(3, 32, 32))
        assert sum(parameter.numel() for parameter in loaded.model.parameters()) == params
    assert loaded.model(loaded.example).shape == (1, 10)


def accuracy(depth, **how):
    (checkpoint,) = (SHARED / "weights" / "cifar10-resnet-option-a").glob(f"resnet{depth}-*.th")
    loaded = niwaki.models.load(f"python:examples/cifar_resnet.py:resnet{depth}", checkpoint=str(checkpoint))
    task = Classification(niwaki.data.open(f"cifar10:{SHARED / 'cifar10'}", normalisation="imagenet"), batch=250)
    return task.evaluate(loaded.model, **how).value


@pytest.mark.skipif(not SHARED.exists(), reason="the shared CIFAR-10 pictures and weights are not on this machine")
def test_a_published_network_scores_on_real_pictures(monkeypatch):
    """93.6 % is our own figure for the first 1000 pictures; the published one for all is in the slow test below."""
    monkeypatch.chdir(ROOT)
    assert accuracy(20, limit=1000) == pytest.approx(93.6, abs=0.2)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="the shared CIFAR-10 pictures and weights are not on this machine")
@pytest.mark.parametrize(("depth", "published"), [(20, 91.73), (32, 92.63), (44, 93.10), (56, 93.39)])
def test_the_published_accuracies_to_the_printed_digit(depth, published, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert accuracy(depth) == pytest.approx(published, abs=0.005)
