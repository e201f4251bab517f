"""ONNX files compute what PyTorch computes, and appear whole or not at all."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from niwaki.errors import InputError, MissingExtraError, NiwakiError
from niwaki.export import export_onnx

onnxruntime = pytest.importorskip("onnxruntime")


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


class Two(nn.Module):
    """Two inputs, a table lookup, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(10, 4), nn.Linear(4, 4)

    def forward(self, ids: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        looked = self.table(ids) * weights[..., None]  # [batch, tokens, 4]
        return {"looked": looked, "mixed": self.mix(looked)}


def test_outputs_are_equal_at_any_batch(tmp_path: Path) -> None:
    model = small().train()
    path = tmp_path / "small.onnx"
    found = export_onnx(model, torch.rand(1, 3, 8, 8), path)
    assert found["difference"].value < 1e-5
    assert found["bytes"].value == path.stat().st_size
    assert "onnxruntime" in found["difference"].versions
    assert model.training
    assert [p.name for p in tmp_path.iterdir()] == ["small.onnx"]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    inputs = torch.rand(5, 3, 8, 8)
    ours = model.eval()(inputs).detach()
    theirs = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0])
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", [tuple, dict])
def test_examples_of_several_tensors(tmp_path: Path, form: type) -> None:
    ids, weights = torch.randint(0, 10, (1, 5)), torch.rand(1, 5)
    example: Any = (ids, weights) if form is tuple else {"ids": ids, "weights": weights}
    assert export_onnx(Two(), example, tmp_path / "two.onnx")["difference"].value < 1e-5


def test_a_fixed_batch(tmp_path: Path) -> None:
    path = tmp_path / "fixed.onnx"
    assert export_onnx(small(), torch.rand(4, 3, 8, 8), path, dynamic_batch=False)["difference"].value < 1e-5
    shape = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).get_inputs()[0].shape
    assert shape == [4, 3, 8, 8]


class Deciding(nn.Module):
    """Decides by a value: nothing that a graph can hold."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if float(x.sum()) > 0 else x


def test_what_cannot_be_exported_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "old.onnx"
    path.write_text("old")
    with pytest.raises(NiwakiError, match=r"export to old\.onnx.*where: Deciding.*nothing was written"):
        export_onnx(Deciding(), torch.rand(1, 3), path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["old.onnx"]


def test_a_file_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    model = small()
    model[1].running_mean.fill_(float("nan"))
    path = tmp_path / "wrong.onnx"
    with pytest.raises(NiwakiError, match="ONNX Runtime differs from PyTorch by inf"):
        export_onnx(model, torch.rand(1, 3, 8, 8), path)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("niwaki.export.onnx_file.find_spec", lambda name: None if name == "onnxruntime" else True)
    with pytest.raises(MissingExtraError, match=r"not installed: onnxruntime; do: pip install 'niwaki\[export\]'"):
        export_onnx(small(), torch.rand(1, 3, 8, 8), tmp_path / "a.onnx")


def test_a_place_that_is_none(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "no" / "a.onnx"):
        with pytest.raises(InputError, match="no folder to write a file in"):
            export_onnx(small(), torch.rand(1, 3, 8, 8), place)
