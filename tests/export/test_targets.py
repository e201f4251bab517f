"""Every target: the file computes what the cut network computes, at any batch, or it is not there."""

import importlib.util
import json
import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import niwaki
from niwaki.errors import FileDamagedError, InputError, MissingExtraError, NiwakiError, UnknownNameError
from niwaki.export import TARGETS, Onnx, Target, export_model, make_artefact, unsupported_by_tensorrt
from niwaki.export.pt2_archive import _arithmetic

HERE = [name for name, kind in TARGETS.items() if all(importlib.util.find_spec(package) for package in kind.needs)]
DYNAMIC = [name for name in HERE if TARGETS[name].dynamic]


class Attending(nn.Module):
    """One transformer block over five tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.block = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.embed(x)).mean(1))  # [batch, 3]


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 4),
    )


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolutional": (convolutional, (1, 3, 8, 8)),
    "transformer": (Attending, (1, 5, 6)),
}


@pytest.fixture(scope="module")
def cut() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    """Both networks, cut by a plan to half of their MACs."""
    found = {}
    for name, (make, shape) in CASES.items():
        torch.manual_seed(0)
        model, example = make().eval(), torch.rand(shape)
        graph = niwaki.trace(model, example)
        scores = niwaki.score(graph, niwaki.collect(model, graph, frozenset()), how=niwaki.scores.Random())
        plan = niwaki.choose(graph, scores, niwaki.Budget(keep=0.5, of="macs"))
        small = niwaki.cut(model, plan).eval()
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
        found[name] = small, example
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("target", HERE)
def test_a_cut_network_leaves(cut: Any, target: str, case: str, tmp_path: Path) -> None:
    model, example = cut[case]
    file = tmp_path / f"small{TARGETS[target].extension}"
    made = export_model(model, example, file, runs=2)
    assert made.target == target and made.measurements["difference"].value < 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(made.files)
    assert made.measurements["bytes"].value == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert made.measurements["latency"].value > 0 and made.measurements["pytorch_latency"].value > 0
    dynamic = TARGETS[target].dynamic
    assert made.batch == ("dynamic" if dynamic else 1) and bool(made.note) != dynamic
    opened = TARGETS[target]().open(file, threads=1)
    for batch in (1, 5) if dynamic else (1,):
        inputs = torch.randn(batch, *example.shape[1:])
        (found,) = opened(inputs)
        torch.testing.assert_close(found, model(inputs).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", HERE)
def test_a_fixed_batch(cut: Any, target: str, tmp_path: Path) -> None:
    model, example = cut["convolutional"]
    file = tmp_path / f"fixed{TARGETS[target].extension}"
    made = export_model(model, example, file, batch=4, runs=0)
    assert made.batch == 4 and not made.note and set(made.measurements) == {"difference", "bytes"}
    opened = TARGETS[target]().open(file)
    assert opened(torch.zeros(4, 3, 8, 8))[0].shape == (4, 4)
    if TARGETS[target].dynamic:
        with pytest.raises((NiwakiError, RuntimeError, AssertionError)):
            opened(torch.zeros(3, 3, 8, 8))
    else:
        with pytest.raises(InputError, match="plans its memory for one batch"):
            export_model(model, example, file, batch="dynamic")


# -- what is wrong is not there --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spoilt(Target):
    """ONNX with one weight changed between the writing and the comparison."""

    name: ClassVar[str] = "spoilt"
    extension: ClassVar[str] = ".onnx"
    needs: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = ""
    runtime: ClassVar[str] = "ONNX Runtime"
    by: float = 0.0

    def write(self, model: nn.Module, example: Any, file: Path, *, dynamic_batch: bool) -> None:
        Onnx().write(model, example, file, dynamic_batch=dynamic_batch)
        import onnx

        graph = onnx.load(file)
        weight = next(one for one in graph.graph.initializer if len(one.dims) == 2)
        array = onnx.numpy_helper.to_array(weight).copy()
        array[0, 0] += self.by
        weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
        onnx.save(graph, file)

    def open(self, file: Path, *, threads: int | None = None) -> Any:
        return Onnx().open(file, threads=threads)


def test_one_wrong_weight_is_seen(cut: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model, example = cut["convolutional"]
    file = tmp_path / "a.onnx"
    assert make_artefact(model, example, file, target=Spoilt(), batch="dynamic", runs=0).file == file
    file.write_text("old")
    for batch in ("dynamic", None, 2):
        with pytest.raises(NiwakiError, match=r"ONNX Runtime differs from PyTorch by .*above 0\.0001; where: Seq.*not"):
            make_artefact(model, example, file, target=Spoilt(by=0.01), batch=batch, runs=0)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"] and file.read_text() == "old"


class Baked(nn.Module):
    """Two samples at a time: no graph of it has a free batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[i : i + 1] * (i + 1) for i in range(x.shape[0])])


class Deciding(nn.Module):
    """Decides by a value: nothing that a graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer(x)
        return x * 2 if float(x.sum()) > 0 else x


@pytest.mark.parametrize("target", DYNAMIC)
def test_where_no_batch_is_free_it_is_fixed_and_said(target: str, tmp_path: Path) -> None:
    file = tmp_path / f"a{TARGETS[target].extension}"
    with pytest.raises(NiwakiError):
        export_model(Baked(), torch.rand(2, 3), file, batch="dynamic", runs=0)
    assert not list(tmp_path.iterdir())
    made = export_model(Baked(), torch.rand(2, 3), file, runs=0)
    assert made.batch == 2 and made.note.startswith("no dynamic batch: ")


@pytest.mark.parametrize("target", HERE)
def test_what_torch_export_refuses_is_said(target: str, tmp_path: Path) -> None:
    file = tmp_path / f"a{TARGETS[target].extension}"
    with pytest.raises(NiwakiError, match=r"export to a\..*where: Deciding.*nothing was written") as caught:
        export_model(Deciding(), torch.rand(1, 3), file, runs=0)
    assert caught.value.exit_code == 1 and not list(tmp_path.iterdir())


def test_bad_places_and_names(cut: Any, tmp_path: Path) -> None:
    model, example = cut["convolutional"]
    with pytest.raises(UnknownNameError, match="unknown export target 'tflite'; found: known: onnx, openvino, pt2"):
        export_model(model, example, tmp_path / "a", target="tflite")
    with pytest.raises(InputError, match=r"known extensions: \.onnx \(onnx\), \.xml \(openvino\)"):
        export_model(model, example, tmp_path / "a.tflite")
    with pytest.raises(InputError, match=r"do: end it in \.pt2"):
        export_model(model, example, tmp_path / "a.onnx", target="pt2")
    with pytest.raises(InputError, match="no folder to write a file in"):
        export_model(model, example, tmp_path / "no" / "a.pt2")
    with pytest.raises(InputError, match="an example without tensors"):
        export_model(model, 3, tmp_path / "a.pt2")
    with pytest.raises(InputError, match="at batch 0"):
        export_model(model, example, tmp_path / "a.pt2", batch=0)
    with pytest.raises(InputError, match=r"not an nn\.Module"):
        export_model(len, example, tmp_path / "a.pt2")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="meta device"):
        export_model(nn.Linear(3, 3, device="meta"), torch.rand(1, 3), tmp_path / "a.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", [name for name, kind in TARGETS.items() if kind.needs])
def test_a_missing_package_is_named(cut: Any, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = TARGETS[target].needs[0]
    monkeypatch.setattr("niwaki.export.target.find_spec", lambda name: None if name == package else object())
    model, example = cut["convolutional"]
    with pytest.raises(MissingExtraError) as caught:
        export_model(model, example, tmp_path / f"a{TARGETS[target].extension}")
    assert caught.value.found == f"not installed: {package}" and caught.value.exit_code == 2
    assert f"pip install '{TARGETS[target].extra}'" in caught.value.do
    if target == "tensorrt":
        assert "NVIDIA GPU" in caught.value.do and "trtexec --onnx=FILE --stronglyTyped" in caught.value.do


def test_the_extras_bring_what_targets_need() -> None:
    import tomllib

    listed = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for kind in TARGETS.values():
        extras = kind.extra.partition("[")[2].rstrip("]").split(",")
        brought = " ".join(entry for extra in extras if extra for entry in listed["optional-dependencies"][extra])
        assert all(package in brought for package in kind.needs), kind.name


# -- what loading executes -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("pt2") / "a.pt2"
    export_model(nn.Linear(3, 2), torch.rand(1, 3), file, runs=0)
    return file


class Touching:
    """Unpickling it makes a file."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return Path.touch, (self.place,)


def rewritten(archive: Path, there: Path, change: Callable[[str, bytes], bytes]) -> Path:
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(there, "w") as made:
        for name in source.namelist():
            made.writestr(name, change(name, source.read(name)))
    return there


def test_archives_that_would_run_code_are_not_loaded(archive: Path, tmp_path: Path) -> None:
    touched = tmp_path / "touched"

    def pickled(name: str, data: bytes) -> bytes:
        return pickle.dumps(Touching(touched)) if "/sample_inputs/" in name else data

    def marked(name: str, data: bytes) -> bytes:
        return data.replace(b'"use_pickle": false', b'"use_pickle": true') if "weights_config" in name else data

    def evaluated(name: str, data: bytes) -> bytes:
        graph = name.endswith("models/model.json")
        code = f"__import__('pathlib').Path('{touched}').touch()"
        return data.replace(b"Symbol('", f"{code} or Symbol('".encode(), 1) if graph else data

    def called(name: str, data: bytes) -> bytes:
        return (
            data.replace(b"torch.ops.aten.linear.default", b"torch.hub.load") if name.endswith("model.json") else data
        )

    for change, why in (
        (pickled, "its example is pickled"),
        (marked, "is pickled"),
        (evaluated, "no plain arithmetic"),
        (called, "a call that is no operator: torch.hub.load"),
    ):
        file = rewritten(archive, tmp_path / "b.pt2", change)
        with pytest.raises(FileDamagedError, match=why):
            TARGETS["pt2"]().open(file)
    assert not touched.exists()
    assert TARGETS["pt2"]().run(rewritten(archive, tmp_path / "c.pt2", lambda _, data: data), torch.zeros(4, 3))


def test_arithmetic() -> None:
    for text in ("Symbol('s31', positive=True, integer=True)", "2*s0 + 1", "Max(1, s0//3)", "Add(Integer(1), u0)"):
        assert _arithmetic(text), text
    for text in ("eval('1')", "s0.__class__", "(lambda: 1)()", "[1]", "x", "Symbol('a b')", "open", "1 +"):
        assert not _arithmetic(text), text


@pytest.mark.parametrize("target", HERE)
def test_what_is_no_file_of_the_kind(target: str, tmp_path: Path) -> None:
    file = tmp_path / f"a{TARGETS[target].extension}"
    for content in (b"", b"no such thing"):
        file.write_bytes(content)
        with pytest.raises(FileDamagedError):
            TARGETS[target]().open(file)
    file.unlink()
    with pytest.raises(FileDamagedError):
        TARGETS[target]().open(file)


# -- TensorRT --------------------------------------------------------------------------------------------------


def test_operators_that_tensorrt_does_not_take(tmp_path: Path, cut: Any) -> None:
    onnx = pytest.importorskip("onnx")
    model, example = cut["transformer"]
    export_model(model, example, tmp_path / "fine.onnx", runs=0)
    assert unsupported_by_tensorrt(tmp_path / "fine.onnx") == {}

    def value(name: str) -> Any:
        return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2, 2])

    nodes = [
        onnx.helper.make_node("Relu", ["x"], ["a"]),
        onnx.helper.make_node("Det", ["a"], ["b"]),
        onnx.helper.make_node("Det", ["a"], ["c"]),
        onnx.helper.make_node("Strange", ["c"], ["y"], domain="own"),
    ]
    graph = onnx.helper.make_graph(nodes, "g", [value("x")], [value("y")])
    opsets = [onnx.helper.make_opsetid("", 22), onnx.helper.make_opsetid("own", 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets), tmp_path / "odd.onnx")
    assert unsupported_by_tensorrt(tmp_path / "odd.onnx") == {"Det": 2, "own::Strange": 1, "opset 22": 1}
    (tmp_path / "none.onnx").write_text("text")
    with pytest.raises(FileDamagedError, match="ONNX can't read it"):
        unsupported_by_tensorrt(tmp_path / "none.onnx")


def test_the_network_is_strongly_typed(cut: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in for the library, since nobody here has it: which calls are made, and what a refusal says."""
    pytest.importorskip("onnxruntime")
    flags: list[int] = []
    parser = SimpleNamespace(
        num_errors=1, get_error=lambda number: f"no kernel {number}", parse_from_file=lambda _: False
    )
    library = SimpleNamespace(
        Logger=type("Logger", (), {"WARNING": 1, "__init__": lambda self, level: None}),
        Builder=lambda logger: SimpleNamespace(create_network=flags.append),
        NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=1),
        OnnxParser=lambda network, logger: parser,
    )
    monkeypatch.setitem(sys.modules, "tensorrt", library)
    monkeypatch.setattr("niwaki.export.target.find_spec", lambda name: object())
    model, example = cut["convolutional"]
    with pytest.raises(NiwakiError, match="TensorRT's parser: no kernel 0"):
        export_model(model, example, tmp_path / "a.engine", batch="dynamic")
    assert flags == [2] and not list(tmp_path.iterdir())


def test_entries_for_reports_are_plain(cut: Any, tmp_path: Path) -> None:
    model, example = cut["convolutional"]
    told = export_model(model, example, tmp_path / "a.pt2", runs=1).to_json()
    assert json.loads(json.dumps(told)) == told
    assert (told["file"], told["batch"], told["difference"]["unit"]) == ("a.pt2", "dynamic", "relative")


class InTwo(Target):
    """A graph and its weights, as OpenVINO has them."""

    name, extension, needs, extra, runtime = "two", ".xml", (), "niwaki", "two files"

    def write(self, model: nn.Module, example: Any, file: Path, *, dynamic_batch: bool) -> None:
        for one in (file, file.with_suffix(".bin")):
            one.write_text("new")

    def open(self, file: Path, *, threads: int | None = None) -> Any:
        return lambda inputs: [2 * inputs]


def test_no_graph_is_left_beside_another_one_s_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    file, real, done = tmp_path / "a.xml", os.replace, []

    def replace(old: Any, new: Any) -> None:
        if done:
            raise KeyboardInterrupt
        done.append(Path(new).name)
        real(old, new)

    for one in (file, tmp_path / "a.bin"):
        one.write_text("old")
    monkeypatch.setattr("niwaki.export.artefact.os.replace", replace)
    with pytest.raises(KeyboardInterrupt):
        make_artefact(Twice(), torch.ones(2, 3), file, target=InTwo(), runs=0)
    assert done == ["a.bin"] and not file.exists()
    monkeypatch.undo()
    make_artefact(Twice(), torch.ones(2, 3), file, target=InTwo(), runs=0)
    assert file.read_text() == (tmp_path / "a.bin").read_text() == "new"
