"""Networks of torchvision."""

import sys

import pytest
import torch

import niwaki.models
from niwaki.errors import InputError, MissingExtraError, UnknownNameError
from niwaki.units import run

pytest.importorskip("torchvision", reason="torchvision is not installed")


def test_a_classifier_with_arguments():
    loaded = niwaki.models.load("torchvision:resnet18?num_classes=10&zero_init_residual=true")
    assert loaded.model.fc.out_features == 10 and not loaded.model.layer1[0].bn2.weight.any()
    assert loaded.example.shape == (1, 3, 224, 224)
    assert loaded.normalisation == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert loaded.model(loaded.example).shape == (1, 10)


@pytest.mark.parametrize(
    ("source", "shapes"),
    [
        ("vit_b_16?image_size=32", [(1, 3, 32, 32)]),
        ("squeezenet1_1", [(1, 3, 224, 224)]),
        ("lraspp_mobilenet_v3_large", [(1, 3, 224, 224)]),
        ("ssdlite320_mobilenet_v3_large", [(3, 224, 224)]),
    ],
)
def test_examples_are_what_the_network_takes(source, shapes):
    loaded = niwaki.models.load(f"torchvision:{source}")
    example = loaded.example if isinstance(loaded.example, (list, tuple)) else [loaded.example]
    assert [tuple(tensor.shape) for tensor in example] == shapes
    with torch.no_grad():
        run(loaded.model, loaded.example)


def test_a_pair_of_pictures_for_optical_flow_and_a_clip_for_video():
    made = niwaki.models.SOURCES["torchvision"]
    flow = made("raft_small", {})._example("torchvision.models.optical_flow.raft", None)
    clip = made("r3d_18", {})._example("torchvision.models.video.resnet", None)
    assert isinstance(flow, tuple) and [t.shape[1:] for t in flow] == [(3, 128, 128)] * 2
    other = made("swin3d_t", {})._example("torchvision.models.video.swin_transformer", None)
    assert clip.shape == (1, 3, 16, 112, 112)  # what its weights were trained on, as the table says
    assert other.shape == (1, 3, 16, 224, 224)


def test_a_quantised_twin_takes_what_its_original_takes():
    twin = niwaki.models.SOURCES["torchvision"]("quantized_inception_v3", {})
    assert twin._example("torchvision.models.quantization.inception", None).shape == (1, 3, 299, 299)


def test_another_shape_on_request():
    assert niwaki.models.load("torchvision:squeezenet1_1", shape=(3, 64, 64)).example.shape == (1, 3, 64, 64)


def test_builders_that_would_warn_are_quiet():
    niwaki.models.load("torchvision:googlenet?num_classes=2&aux_logits=false")


@pytest.mark.parametrize("argument", ['weights="DEFAULT"', "pretrained=true", 'weights_backbone="DEFAULT"'])
def test_nothing_is_ever_downloaded(argument):
    with pytest.raises(InputError, match="never downloads") as caught:
        niwaki.models.load(f"torchvision:resnet18?{argument}")
    assert caught.value.exit_code == 2


def test_unknown_names_list_the_nearest():
    with pytest.raises(UnknownNameError, match=r"nearest: .*resnet18"):
        niwaki.models.load("torchvision:resnet19")


def test_arguments_that_the_builder_does_not_take_are_refused():
    with pytest.raises(InputError, match="after the question mark"):
        niwaki.models.load("torchvision:resnet18?depth=3")


def test_without_torchvision_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(MissingExtraError, match=r"niwaki\[vision\]"):
        niwaki.models.load("torchvision:resnet18")
