"""INT8 files: numbers by hand, integer kernels in ONNX Runtime, and the simulated network's outputs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from niwaki.errors import InputError, MissingExtraError, NiwakiError, UnknownNameError
from niwaki.export import export_onnx, export_qdq, kernels_of, time_files
from niwaki.export.qdq_graph import _fitted, folded_codes
from niwaki.export.runtimes import OPENVINO, read_openvino
from niwaki.quantize import Ranges, Uniform, from_batch_norm, from_inputs, simulated

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def small(channels: int = 8) -> nn.Module:
    """Convolutions with batch norm whose scales have both signs and a 0, pooling, and a linear layer."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(channels, channels, 3, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, 4),
    )
    with torch.no_grad():
        for norm in (model[1], model[5]):
            norm.weight.copy_(torch.linspace(-1.2, 1.5, channels))
            norm.weight[2] = 0
            norm.bias.normal_()
        model.train()
        for _ in range(20):
            model(torch.randn(16, 3, 8, 8))
    return model.eval()


def outputs(path: Path, *inputs: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = {entry.name: x.numpy() for entry, x in zip(session.get_inputs(), inputs, strict=True)}
    return torch.from_numpy(session.run(None, feeds)[0])


def constants(path: Path) -> dict[str, np.ndarray]:
    return {one.name: onnx.numpy_helper.to_array(one).copy() for one in onnx.load(path).graph.initializer}


def test_a_linear_layer_by_hand(tmp_path: Path) -> None:
    """Range 0 .. 2.55: steps of 0.01. Weights 1 and -0.5: 127 and -64 (a tie, to the even code) steps of 1 / 127."""
    model = nn.Sequential(nn.Linear(2, 1)).requires_grad_(False)
    model[0].weight.copy_(torch.tensor([[1.0, -0.5]]))
    model[0].bias.fill_(0.3)
    path = tmp_path / "a.onnx"
    found = export_qdq(model, torch.zeros(1, 2), path, ranges=Ranges({"0": (0.0, 2.55)}))
    arrays = constants(path)
    assert [a.tolist() for a in arrays.values() if a.dtype == np.int8 and a.any()] == [[[127, -64]]]
    assert [a.tolist() for a in arrays.values() if a.dtype == np.int32 and a.any()] == [[round(0.3 * 100 * 127)]]
    expected = 0.3 + 1.0 - 64 / 127 * 0.5
    assert float(outputs(path, torch.tensor([[1.002, 0.499]]))) == pytest.approx(expected, abs=1e-4)
    assert float(outputs(path, torch.tensor([[9.0, -3.0]]))) == pytest.approx(2.55 + 0.3, abs=1e-4)  # cut off
    assert found["difference"].value < 1e-5 and found["integer_layers"].value == 1


def test_integer_kernels_and_the_simulated_network(tmp_path: Path) -> None:
    model, x = small(), torch.randn(64, 3, 8, 8)
    ranges, path = from_inputs(model, [x]), tmp_path / "a.onnx"
    modes = [m.training for m in model.train().modules()]
    found = export_qdq(model, x[:1], path, ranges=ranges, inputs=x)
    assert modes == [m.training for m in model.modules()]
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"]
    kernels = kernels_of(path)
    assert kernels["QLinearConv"] == 2 and kernels["QGemm"] == 1
    assert not {"Conv", "FusedConv", "Gemm", "BatchNormalization"} & set(kernels)
    assert found["integer_layers"].value == 3 and not found["integer_layers"].uncounted
    assert found["difference"].value < 0.01 and found["agreement"].value > 0.98
    assert found["difference"].value < found["float_difference"].value < 0.1
    assert found["bytes"].value == path.stat().st_size
    weights = {name: Uniform()(p) for name, p in model.named_parameters() if p.dim() > 1}
    reference = simulated(model, weights, ranges)(x).detach()
    torch.testing.assert_close(outputs(path, x), reference, rtol=0, atol=0.02 * float(reference.abs().max()))


def test_without_data_and_smaller(tmp_path: Path) -> None:
    model, path = small(64), tmp_path / "a.onnx"
    ranges = from_batch_norm(model, torch.zeros(1, 3, 8, 8), input_range=(-3.0, 3.0))
    found = export_qdq(model, torch.zeros(1, 3, 8, 8), path, ranges=ranges)
    assert found["integer_layers"].value == 3 and found["agreement"].value > 0.9
    assert found["float_bytes"].value > 3 * found["bytes"].value
    assert not any(node.metadata_props for node in onnx.load(path).graph.node)


@pytest.mark.parametrize(
    "how", [Uniform(6), Uniform(6, per="tensor"), Uniform(5, symmetric=False), Uniform(4, grid="literal"), Uniform(8)]
)
def test_given_codes_are_those_in_the_file(tmp_path: Path, how: Uniform) -> None:
    """Whatever grid: the file's weights are the values, times what batch norm scales the filter with."""
    model, x = small().requires_grad_(False), torch.randn(8, 3, 8, 8)
    weights = {name: how(p) for name, p in model.named_parameters() if p.dim() > 1}
    for name, one in weights.items():
        model.get_parameter(name).copy_(one.values())  # what a method leaves behind
    path = tmp_path / "a.onnx"
    found = export_qdq(model, x[:1], path, ranges=from_inputs(model, [x]), weights=weights, inputs=x)
    assert found["difference"].value < 0.02 and found["integer_layers"].value == 3
    arrays = constants(path)
    graph = onnx.load(path).graph
    conv = [node for node in graph.node if node.op_type == "Conv"][1]
    stem = conv.input[1]
    factor = model[5].weight / (model[5].running_var + model[5].eps).sqrt()
    expected = weights["4.weight"].values() * factor[:, None, None, None]
    scale = torch.from_numpy(arrays[f"{stem}_scale"])[:, None, None, None]
    torch.testing.assert_close(torch.from_numpy(arrays[f"{stem}_codes"]) * scale, expected, rtol=1e-4, atol=1e-6)


def test_folding_by_hand() -> None:
    """Codes 1 and -3; factors 2, -0.5 and 0 stretch the scale, turn signs, and leave nothing."""
    original = torch.tensor([[1.0, -3.0]] * 3)
    one = Uniform(bits=3, per="channel")(original)
    assert one.codes.tolist() == [[1, -3]] * 3 and one.scale.tolist() == [1.0] * 3
    codes, scale = folded_codes(one, original, np.array([[2.0, -6.0], [-0.5, 1.5], [0.0, 0.0]]))
    assert codes.tolist() == [[1, -3], [-1, 3], [0, 0]] and scale.tolist() == [2.0, 0.5, 0.0]


def test_biases_fit_into_32_bits() -> None:
    """A bias of 1 with steps of 1e-12 would be the code 1e12: the scale grows and the weights become 0."""
    codes, scale = _fitted(
        np.array([[100, -50], [100, -50], [0, 0]], np.int8),
        np.array([1e-12, 1e-2, 0.0]),
        np.array([[1e-10, -5e-11], [1.0, -0.5], [0.0, 0.0]]),
        np.array([1.0, 1.0, 0.25]),
        1.0,
    )
    assert codes.tolist() == [[0, 0], [100, -50], [0, 0]]
    assert scale[0] == pytest.approx(2**-30, rel=1e-6) and scale[1] == 1e-2
    assert 0.25 / scale[2] == 2**24


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.third, self.norm3 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.first(x)).relu()
        y = self.norm2(self.second(x)).relu()
        return self.last((self.norm3(self.third(y)) + x).relu().mean((2, 3)))


def test_sums(tmp_path: Path) -> None:
    """The end of a branch is rounded too, and the shortcut: their convolutions are integer kernels."""
    torch.manual_seed(1)
    model, x = Residual().train(), torch.randn(32, 3, 6, 6)
    for _ in range(10):
        model(x)
    model.eval()
    for ranges in (from_inputs(model, [x]), from_batch_norm(model, x, input_range=(-4, 4))):
        assert (
            set(ranges.outputs) == {"norm1", "norm3"} and ranges.outputs["norm1"][0] == 0 > ranges.outputs["norm3"][0]
        )
        path = tmp_path / "a.onnx"
        found = export_qdq(model, x[:1], path, ranges=ranges, inputs=x)
        assert found["difference"].value < 0.03 and not found["integer_layers"].uncounted
        assert kernels_of(path)["QLinearConv"] == 3


def test_grouped_convolutions_and_norms_without_scale(tmp_path: Path) -> None:
    """Depthwise and grouped filters, ReLU6 and hardswish, a batch norm without scale, a dead filter."""
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(4, 16, 1, bias=False),
        nn.BatchNorm2d(16, affine=False),
        nn.ReLU6(),
        nn.Conv2d(16, 16, 3, groups=16, padding=1),
        nn.BatchNorm2d(16),
        nn.Hardswish(),
        nn.Conv2d(16, 8, 1, groups=2),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1),
    )
    x = torch.randn(32, 4, 6, 6)
    for _ in range(10):
        model(x)
    model.eval().requires_grad_(False)
    model[3].weight[5] = 0
    path = tmp_path / "a.onnx"
    found = export_qdq(model, x[:1], path, ranges=from_inputs(model, [x]), inputs=x)
    assert found["difference"].value < 0.03 and not found["integer_layers"].uncounted
    assert found["integer_layers"].value == 3, "the last one puts out floating point"
    assert found["float_difference"].value < 0.1


def test_one_layer_called_twice(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x).relu()).relu().mean((2, 3))

    model, x = Twice().eval(), torch.randn(16, 3, 6, 6)
    found = export_qdq(model, x[:1], tmp_path / "a.onnx", ranges=from_inputs(model, [x]), inputs=x)
    assert found["difference"].value < 0.03 and found["agreement"].value > 0.9


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def test_linear_layers_on_tokens(tmp_path: Path) -> None:
    model, x = Tokens(), torch.randn(8, 5, 6)
    path = tmp_path / "a.onnx"
    found = export_qdq(model, x[:1], path, ranges=from_inputs(model, [x]), inputs=x)
    assert found["difference"].value < 0.01 and not found["integer_layers"].uncounted
    assert found["integer_layers"].value == 2
    fixed = export_qdq(model, x, path, ranges=from_inputs(model, [x]), dynamic_batch=False)
    assert fixed["difference"].value < 0.02


def test_what_stays_in_floating_point_is_named(tmp_path: Path) -> None:
    model, x = small(), torch.randn(4, 3, 8, 8)
    found = export_qdq(model, x, tmp_path / "a.onnx", ranges=from_batch_norm(model, x), inputs=x)
    assert found["integer_layers"].uncounted == (
        "0 is left in floating point: an input of the model, whose range is not given (input_range)",
    )
    codes = {"4.weight": Uniform()(model[4].weight)}
    found = export_qdq(model, x, tmp_path / "a.onnx", ranges=from_inputs(model, [x]), weights=codes, inputs=x)
    assert [told.split(" ")[0] for told in found["integer_layers"].uncounted] == ["0", "9"]
    assert found["difference"].value < 0.01


@pytest.mark.parametrize(
    ("change", "settings", "error", "match"),
    [
        (
            lambda m: m,
            {"ranges": Ranges({}, {"0": "no norm"})},
            InputError,
            r"no layer whose input has a range \(0: no",
        ),
        (lambda m: m.half(), {}, InputError, "not float32; where: 0.weight"),
        (lambda m: m, {"bits": 1}, InputError, "2 to 8"),
        (lambda m: m, {"weights": {"0.weight": Uniform()(torch.ones(2))}}, InputError, r"export 0\.weight \(2,\)"),
        (
            lambda m: m,
            {"weights": {"9.weight": Uniform(8, symmetric=False)(torch.rand(4, 8) + 1)}},
            InputError,
            "quantise symmetrically",
        ),
    ],
)
def test_refusals(
    tmp_path: Path, change: Callable[[Any], Any], settings: dict[str, Any], error: type[Exception], match: str
) -> None:
    model = small()
    ranges = from_batch_norm(model, torch.zeros(1, 3, 8, 8), input_range=(-3.0, 3.0))
    with pytest.raises(error, match=match):
        export_qdq(change(model), torch.zeros(1, 3, 8, 8), tmp_path / "a.onnx", **{"ranges": ranges, **settings})
    assert not list(tmp_path.iterdir())


def test_a_file_that_computes_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault: signs of negative factors are not turned."""
    model, x, path = small(), torch.randn(8, 3, 8, 8), tmp_path / "a.onnx"
    path.write_text("old")

    def wrong(*args: Any) -> tuple[np.ndarray, np.ndarray]:
        codes, scale = folded_codes(*args)
        return np.abs(codes), scale

    monkeypatch.setattr("niwaki.export.qdq_graph.folded_codes", wrong)
    with pytest.raises(NiwakiError, match=r"differs from the simulated network.*nothing was written"):
        export_qdq(model, x[:1], path, ranges=from_inputs(model, [x]), inputs=x)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_files_are_timed_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small(), torch.randn(1, 3, 8, 8)
    export_qdq(model, x, tmp_path / "a.onnx", ranges=from_inputs(model, [x]))
    files = {"one": tmp_path / "a.onnx", "two": tmp_path / "a.onnx"}
    found = time_files(files, x, runs=3, warm_up=1)
    assert set(found) == {"one", "two"} and all(one.value > 0 and one.unit == "ms" for one in found.values())
    assert "3 runs in onnxruntime, in turns" in found["one"].definition and "onnxruntime" in found["one"].versions
    assert "median processor time" in time_files(files, x, runs=2, clock="cpu")["one"].definition
    with pytest.raises(UnknownNameError, match="known: wall, cpu"):
        time_files(files, x, clock="sun")  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="known: onnxruntime, openvino"):
        time_files(files, x, runtime="abacus")
    with pytest.raises(InputError, match="nothing to time"):
        time_files({}, x)
    monkeypatch.setattr("niwaki.export.runtimes.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"not installed: openvino; do: pip install 'niwaki\[openvino\]'"):
        time_files(files, x, runtime="openvino")


def test_openvino_computes_on_whole_numbers_with_the_settings_that_files_are_run_with(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    model, x, path = small(), torch.randn(16, 3, 8, 8), tmp_path / "a.onnx"
    export_qdq(model, x[:1], path, ranges=from_inputs(model, [x]), inputs=x)
    export_onnx(model, x[:1], tmp_path / "float.onnx")
    kinds = {}
    for name in ("a", "float"):
        compiled = openvino.Core().compile_model(str(tmp_path / f"{name}.onnx"), "CPU", OPENVINO)
        told = [
            {key: str(op.get_rt_info()[key].astype(str)) for key in ("layerType", "runtimePrecision")}
            for op in compiled.get_runtime_model().get_ops()
        ]
        products = ("Convolution", "FullyConnected", "MatMul")
        kinds[name] = [one["runtimePrecision"] for one in told if one["layerType"] in products]
    assert set(kinds["float"]) == {"f32"} and len(kinds["a"]) == 3 and set(kinds["a"]) <= {"u8", "i8"}
    (found,) = read_openvino(path)([x])
    expected = outputs(path, x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05 * float(expected.abs().max()))
    assert time_files({"a": path}, x, runtime="openvino", runs=2)["a"].value > 0
