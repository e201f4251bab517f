"""`--data voc:DIR`, `coco:FILE`, `yolo:FOLDER/data.yaml`: detectors measured, trained and compressed."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import niwaki
from niwaki.cli.verify import _made_from
from niwaki.data import open_boxes
from niwaki.models.darknet_files import save_darknet

pytest.importorskip("pycocotools")
pytest.importorskip("torchvision")

CFG = """[net]
width=32
height=32
channels=3
{body}
[convolutional]
filters={filters}
size=1
stride=1
activation=linear

[yolo]
mask=0,1
anchors=8,8, 16,16
classes={classes}
num=2
iou_loss=ciou
ignore_thresh=.7
"""
LAYER = """
[convolutional]
batch_normalize=1
filters={}
size=3
stride=2
pad=1
activation=leaky
"""


def cfg(classes):
    return CFG.format(
        body="".join(LAYER.format(width) for width in (8, 12, 16)), filters=2 * (5 + classes), classes=classes
    )


@pytest.fixture
def folder(here):
    """A detector of two classes, and bright squares and dark bars to be found."""
    (here / "net.cfg").write_text(cfg(2))
    (here / "other.cfg").write_text(cfg(3))
    generator = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (here / "set" / kind).mkdir(parents=True)
    for number in range(24):
        label, (x, y) = number % 2, generator.integers(12, 28, 2)
        width, height = ((10, 10), (20, 8))[label]
        pixels = np.full((40, 40, 3), 90, np.uint8)
        pixels[y - height // 2 : y + height // 2, x - width // 2 : x + width // 2] = (250, 10)[label]
        Image.fromarray(pixels).save(here / "set" / "images" / f"{number}.png")
        shares = " ".join(f"{value / 40:.4f}" for value in (x, y, width, height))
        (here / "set" / "labels" / f"{number}.txt").write_text(f"{label} {shares}\n")
    (here / "set" / "data.yaml").write_text("train: images\nnames: [square, bar]\n")
    return here


DATA = ("--data", "yolo:set/data.yaml")


def test_train_compress_and_measure(run, folder):
    trained = run(
        "train", "darknet:net.cfg", *DATA, "--epochs", "30", "--batch", "8", "--augment", "none",
        "--optimizer", "adamw", "--lr", "0.01", "--out", "t", "--json",
    )  # fmt: skip
    assert trained.code == 0, trained.err
    report = trained.data["report"]
    assert list(report["after"])[-1] == "AP50" and "AP50" in report["validation"]
    before, after = report["before"]["AP50"]["value"], report["after"]["AP50"]["value"]
    assert after > before + 20, (before, after)
    assert report["splits"]["classes"] == ["square", "bar"] and report["splits"]["counts"]["test"] == 5

    cut = run(
        "compress", "t", *DATA, "--keep", "0.7", "--recover", "2", "--batch", "8", "--augment", "flip", "--runs", "0",
        "--out", "c", "--json",
    )  # fmt: skip
    assert cut.code == 0, cut.err
    report = cut.data["report"]
    assert report["receipt"]["passed"] and report["before"]["AP50"]["value"] == pytest.approx(after)
    assert [stage["stage"] for stage in report["stages"]][-1] == "recovery"
    assert report["after"]["macs"]["value"] <= 0.7 * report["before"]["macs"]["value"]
    page = (folder / "c" / "report.html").read_text()
    assert page.count('src="data:image/jpeg;base64,') == len(report["pictures"]) == 12 and "AP50 and cost" in page
    assert [one["words"].split(":")[0] for one in report["pictures"][:3]] == ["1 object", "before", "after"]
    assert page.count("data:image") == page.count("<img") and len(page) < 300_000
    assert f"AP50 {after:.2f} →" in page
    settings = json.loads((folder / "c" / "settings.json").read_text())["task"]
    assert settings["class"] == "Detection" and settings["fit"] == "squash" and settings["size"] == [32, 32]

    taken = run("measure", "c", *DATA, "--runs", "0", "--json")
    assert taken.code == 0, taken.err
    assert taken.data["AP50"]["value"] == pytest.approx(report["after"]["AP50"]["value"])
    framed = run(
        "measure", "c", "--data", "yolo:set/data.yaml?fit=letterbox", "--runs", "0", "--limit-test", "3", "--json"
    )
    assert "3 of 5 pictures of the test split, in a frame of 32 x 32 (letterbox)" in framed.data["AP"]["definition"]


def test_sensitivity(run, folder):
    found = run("sensitivity", "darknet:net.cfg", *DATA, "--shares", "0.5", "--json")
    assert found.code == 0, found.err
    assert found.data["metric"] == "AP50" and len(found.data["rows"]) == 3


def test_random_detectors_are_built_for_the_classes_of_the_data(run, folder):
    ssd = "torchvision:ssdlite320_mobilenet_v3_large"
    found = run("measure", ssd, *DATA, "--input", "1x3x64x64", "--runs", "0", "--limit-test", "1", "--json")
    assert found.code == 0, found.err
    assert f"{ssd}?num_classes=3: built for the 2 classes of the data" in " ".join(found.err.split())
    assert found.data["AP50"]["value"] < 100 and "64 x 64 (letterbox)" in found.data["AP50"]["definition"]
    found = run("measure", f"{ssd}?num_classes=5", *DATA, "--input", "1x3x64x64", "--runs", "0")
    assert found.code == 2 and "the network tells 4, the data have 2" in " ".join(found.err.split())


def test_weights_for_other_classes_are_taken_where_the_number_is_said(run, folder):
    """Trained for 3 classes, wanted for 2: the method trains the new heads before it presses and cuts."""
    _, weights = save_darknet(niwaki.models.load("darknet:other.cfg", seed=4).model, "trained")
    small = [word for s in ("dense", "sparse", "tune", "distil") for word in ("--set", f"{s}_epochs=1")]
    words = (
        *DATA, "--checkpoint", str(weights), "--batch", "8", "--augment", "none", "--runs", "0",
        "--method", "group_channel_pruning", *small, "--recover", "1", "--recovery-set", "limit=1", "--recovery-set",
        "clip=10", "--keep", "0.7", "--of", "params", "--limit-test", "2", "--seed", "3", "--out", "c",
    )  # fmt: skip
    said = run("compress", "darknet:other.cfg", *words)
    told = " ".join(said.err.split())
    assert said.code == 2 and "the network tells 3, the data have 2" in told and "FILE.cfg?classes=2" in told, said.err
    said = run("compress", "darknet:net.cfg", *words)
    assert said.code == 2 and "?classes=N after its name" in " ".join(said.err.split()), said.err
    said = run("compress", "darknet:other.cfg?classes=2", *words, "--json")
    assert said.code == 0, said.err
    assert "drawn anew, to be trained: layers.3.conv.weight, layers.3.conv.bias" in " ".join(said.err.split())
    report, settings = said.data["report"], json.loads((folder / "c" / "settings.json").read_text())
    assert report["stages"][0]["stage"] == "dense training" and report["receipt"]["passed"]
    assert settings["drawn"] == ["layers.3.conv.weight", "layers.3.conv.bias"] and settings["weights"] == str(weights)
    judged = run("verify", "c", "--json")
    assert judged.code == 0 and judged.data["passed"], judged.err
    assert _made_from(folder / "c", None, 0) == ("darknet:other.cfg?classes=2", str(weights), 3)  # draws the same heads


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        ("darknet:net.cfg", ("--data", "yolo:nowhere.yaml"), "no such file or folder"),
        ("darknet:net.cfg", ("--data", "yolo:set"), "a folder"),
        ("darknet:net.cfg", ("--data", "coco:"), "nothing after the colon"),
        ("darknet:net.cfg", ("--data", "yolo:set/data.yaml?size=3"), "known: fit, together, val, test, images"),
        ("darknet:net.cfg", ("--data", "yolo:set/data.yaml?fit=crop"), "known: letterbox, squash"),
        ("darknet:net.cfg", ("--data", "yolo:set/data.yaml?val=many"), "no such file or folder"),
        ("darknet:net.cfg", (*DATA, "--normalisation", "half"), "colours from 0 to 1"),
        ("darknet:other.cfg", DATA, "the network tells 3, the data have 2"),
        ("python:nets.py:with_example", DATA, "no detector that niwaki knows how to train and read"),
    ],
)
def test_refusals(run, folder, model, options, says):
    found = run("measure", model, "--runs", "0", *options)
    assert found.code == 2 and says in " ".join(found.err.split()), found.err


def test_augmentations_by_name(run, folder):
    words = ("train", "darknet:net.cfg", *DATA, "--epochs", "1", "--out", "t")
    found = run(*words, "--augment", "flip_crop")
    assert found.code == 2 and "known: none, flip, mosaic" in " ".join(found.err.split())
    found = run(*words, "--label-smoothing", "0.1")
    assert found.code == 2 and "its own" in found.err
    assert not (folder / "t").exists()
    found = run(*words, "--batch", "4", "--json")
    assert found.code == 0, found.err
    settings = json.loads((folder / "t" / "settings.json").read_text())
    assert "mosaic=1.0" in settings["task"]["augment"] and settings["training"]["lr"] == 0.01


def test_a_training_goes_on_when_a_broken_picture_is_mended(run, folder):
    words = ("train", "darknet:net.cfg", *DATA, "--epochs", "2", "--batch", "4", "--augment", "none")
    words = (*words, "--set", "checkpoints.every_steps=1", "--limit-test", "2")
    whole = run(*words, "--out", "whole", "--json")
    assert whole.code == 0, whole.err
    pictures = open_boxes("yolo:set/data.yaml").train
    last = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0)).tolist()[15]  # of the first pass
    file = pictures[last].path
    right = file.read_bytes()
    file.write_bytes(right[:-30])  # its head is right
    found = run(*words, "--out", "t")
    assert found.code == 2 and file.name in found.err, found.err
    file.write_bytes(right)
    found = run("resume", "t", "--json")
    assert found.code == 0, found.err
    assert (folder / "t" / "model.safetensors").read_bytes() == (folder / "whole" / "model.safetensors").read_bytes()
