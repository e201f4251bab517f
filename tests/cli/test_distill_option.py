"""`--distill`: its grammar, and a compressed network that was taught by the uncut one."""

import json

import pytest

from niwaki.cli.options import losses_of
from niwaki.distill import ChannelWise, Features, Logits, Weighted
from niwaki.errors import InputError, UnknownNameError

MODEL = "python:nets.py:small"


def test_the_grammar():
    assert losses_of(None) == ()
    assert losses_of(["logits"]) == (Weighted(Logits()),)
    assert losses_of(["logits?temperature=2&weight=0.5", "channel_wise?taps=a.1,b&temperature=1"]) == (
        Weighted(Logits(2), 0.5),
        Weighted(ChannelWise(1), taps=("a.1", "b")),
    )
    assert losses_of(["features?taps=0&adapter=true"]) == (Weighted(Features(adapter=True), taps=("0",)),)


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("attention", UnknownNameError, "known: channel_wise, features, logits, spatial_attention"),
        ("logits?heat=2", UnknownNameError, "known: temperature, axis, weight, taps"),
        ("logits?temperature", InputError, "no field=value"),
        ("logits?temperature=-1", InputError, "temperature above 0"),
        ("logits?temperature=warm", InputError, "numbers"),
        ("logits?weight=0", InputError, "weight above 0"),
        ("channel_wise", InputError, "taps=layer1,layer2"),
    ],
)
def test_what_is_wrong_is_said(text, error, says):
    with pytest.raises(error, match=says):
        losses_of([text])


def test_the_uncut_network_teaches(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef small():\n"
        "    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))\n"
        "    return net, torch.zeros(1, 1, 8, 8)\n"
    )
    common = ("compress", MODEL, "--data", "digits", "--runs", "0", "--limit-test", "40", "--calibrate", "0")
    found = run(
        *common, "--recover", "1", "--distill", "logits", "--distill", "channel_wise?taps=1&weight=3", "--out", "runs/d"
    )
    assert found.code == 0, found.err
    settings = json.loads((tmp_path / "runs" / "d" / "settings.json").read_text())
    assert settings["distill"] == [
        {"class": "Logits", "temperature": 4.0, "axis": None, "weight": 1.0, "taps": [["", ""]]},
        {"class": "ChannelWise", "temperature": 4.0, "axis": None, "weight": 3, "taps": [["1", "1"]]},
    ]
    found = run(*common, "--recover", "1", "--distill", "features?taps=nose", "--out", "runs/e")
    assert found.code == 2 and "unknown module to tap 'nose'" in found.err and not (tmp_path / "runs" / "e").exists()
    found = run(*common, "--distill", "logits", "--out", "runs/e")
    assert found.code == 2 and "--recover EPOCHS" in found.err
