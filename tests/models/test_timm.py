"""Networks of timm."""

import sys

import pytest

import niwaki.models
from niwaki.errors import InputError, MissingExtraError, UnknownNameError

pytest.importorskip("timm", reason="timm is not installed")


def test_a_classifier_with_its_published_input():
    loaded = niwaki.models.load("timm:test_resnet?num_classes=10")
    assert loaded.example.shape == (1, 3, 160, 160)
    assert loaded.model(loaded.example).shape == (1, 10)
    assert loaded.normalisation is not None and len(loaded.normalisation[0]) == 3


def test_size_and_channels_follow_the_arguments():
    loaded = niwaki.models.load("timm:test_vit?img_size=64&in_chans=1")
    assert loaded.example.shape == (1, 1, 64, 64) and loaded.normalisation is None
    assert loaded.model(loaded.example).shape[0] == 1
    assert niwaki.models.load("timm:test_resnet", shape=(3, 96, 96)).example.shape == (1, 3, 96, 96)


def test_a_name_with_a_tag_is_its_architecture_untrained():
    loaded = niwaki.models.load("timm:test_resnet.r160_in1k")
    assert loaded.weights == "random"


@pytest.mark.parametrize("name", ["test_resnett", "hf-hub:timm/resnet18", "hf_hub:timm/resnet18", "timm/resnet18"])
def test_unknown_names_and_places_on_a_hub_are_refused(name):
    with pytest.raises(UnknownNameError, match="nearest") as caught:
        niwaki.models.load(f"timm:{name}")
    assert caught.value.exit_code == 2


def test_nothing_is_ever_downloaded():
    with pytest.raises(InputError, match="never downloads"):
        niwaki.models.load("timm:test_resnet?pretrained=true")


def test_arguments_that_the_model_does_not_take_are_refused():
    with pytest.raises(InputError, match="after the question mark"):
        niwaki.models.load("timm:test_resnet?flavour=3")


def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtraError, match=r"niwaki\[vision\]"):
        niwaki.models.load("timm:test_resnet")
