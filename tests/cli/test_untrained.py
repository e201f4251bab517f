"""`niwaki compress --untrained --method precropping`, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from niwaki.cli import main

Run = Callable[..., Any]
NETS = """
import torch
from torch import nn
def small():
    return nn.Sequential(nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 48, 3), nn.BatchNorm2d(48),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 5)), torch.zeros(1, 3, 8, 8)
def used():
    net, example = small()
    net.train()(torch.randn(4, 3, 8, 8))
    return net.eval(), example
"""
QUICK = ("--runs", "0", "--method", "precropping", "--keep", "0.3", "--of", "params")


def test_an_untrained_network_is_cropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    assert main(["--quiet", "compress", "python:nets.py:small", "--untrained", *QUICK, "--out", "r"]) == 0
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    assert (
        report["after"]["params"]["value"] == report["promised"]["params"] <= 0.3 * report["before"]["params"]["value"]
    )
    assert {"params", "macs"} == set(report["precropping"]["kept"])
    assert [stage["stage"] for stage in report["stages"]] == ["cropped"]
    capsys.readouterr()
    assert main(["compress", "python:nets.py:used", *QUICK, "--out", "s"]) == 2
    assert "has seen 1 batches" in capsys.readouterr().err
    torch.save({}, "w.pt")
    assert main(["compress", "python:nets.py:small", "--untrained", "--checkpoint", "w.pt", *QUICK, "--out", "s"]) == 2
    assert "--untrained as well" in capsys.readouterr().err
    assert main(["compress", "python:nets.py:small", *QUICK, "--set", "cap=0.5", "--out", "s"]) == 2
    assert "no density from 1 to 100" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_layers_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The report tells of new units, is read again, and the run loads to the same bits; damage is still seen."""
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    grow = ("--runs", "0", "--method", "precropping", "--keep", "0.8", "--of", "params", "--set", "cap=4")
    assert main(["compress", "python:nets.py:small", "--untrained", *grow, "--out", "r"]) == 0
    assert " new" in capsys.readouterr().out
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    (grown,) = (group for group in report["groups"] if group.get("new"))
    assert grown["kept"] == grown["units"] + grown["new"] > grown["units"]
    assert report["after"]["params"]["value"] == report["promised"]["params"] <= 0.8 * 11477
    assert report["before"]["params"]["value"] == 11477
    assert json.loads((tmp_path / "r" / "plan.json").read_text())["format"] == "niwaki plan 2"
    assert main(["report", "r"]) == 0
    assert main(["load-check", "r"]) == 0
    assert "bit for bit" in capsys.readouterr().out
    grown["kept"] += 1
    (tmp_path / "r" / "report.json").write_text(json.dumps(report))
    assert main(["report", "r"]) == 2
    assert f"keeps {grown['kept']} of {grown['units']}" in capsys.readouterr().err
