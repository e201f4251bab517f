"""INT8 networks as ONNX files that ONNX Runtime and OpenVINO compute on whole numbers."""

import os
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.errors import InputError, NiwakiError
from niwaki.export import onnx_file, qdq_graph
from niwaki.measure import Measurement
from niwaki.measure.latency import at_batch
from niwaki.measure.measurement import evaluating, versions
from niwaki.quantize import Quantised, Ranges, Uniform, simulated
from niwaki.units import map_tensors, need_module, tensors_in

CHECKED = 16
"""Inputs on which the file is compared with the simulated network."""
DOES_PRODUCTS = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")
ON_INTEGERS = ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "MatMulInteger", "ConvInteger")
"""Kernels of ONNX Runtime for products, on floating point and on whole numbers."""


def export_qdq(
    model: nn.Module,
    example: Any,
    path: str | Path,
    *,
    ranges: Ranges,
    weights: Mapping[str, Quantised] | None = None,
    bits: int = 8,
    dynamic_batch: bool = True,
    opset: int | None = None,
    inputs: Any = None,
    tolerance: float = 0.1,
    seed: int = 0,
) -> dict[str, Measurement]:
    """Write `model` as an ONNX file with int8 weights and uint8 activations, after ONNX Runtime has run it.

    Batch norm is folded into convolutions, whose codes stay: a filter's scale takes the factor. Every convolution and
    linear layer with a range gets QuantizeLinear and DequantizeLinear before its input, at exactly the scales of
    `ranges`; its weight (one scale per output channel) and its bias (int32) are whole numbers in the file.

    Gives measurements: "difference" and "agreement" against `simulated(model, weights, ranges)` with biases rounded
    as in the file, "float_difference" against the model itself, "bytes", "float_bytes" (of the float file of the same
    model), and "integer_layers": how many products run on integer kernels in ONNX Runtime; layers left in floating
    point are in its `uncounted`.

    Args:
        ranges: of activations, from `niwaki.quantize.from_batch_norm` or `from_inputs`.
        weights: codes by names in the state dict ("features.0.weight"), of any grid that has a centred form (up to 7
            bits, or symmetric); None quantises `Uniform(bits)`. Codes of fewer than 8 bits are stored in 8.
        bits: of the weights where `weights` is None, 2 to 8. Activations have 8.
        tolerance: norm of the difference from the simulated network, relative to the outputs' norm, above which the
            file is refused, unless what quantisation itself changes is more. Rounding that falls the other
            way near a tie travels on, most in untrained networks; a wrong scale or kernel makes far more of it.
        inputs: a batch on which the file is compared; None draws some.
        seed: of inputs that are drawn within the range of the first layer (normal numbers where it has none).

    Raises:
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed.
        InputError: the place cannot be written to, weights that don't fit, a model that is not in float32, or no
            layer with a range.
        NiwakiError: the exporter refuses the model, or the file computes something else; nothing was written.
    """
    onnx_file.need_packages()
    need_module(model, "export to INT8")
    target = onnx_file.place(path)
    layers = qdq_graph.weights_of(model)
    _check(model, layers, ranges)
    codes = _codes(layers, weights, bits)
    traced = at_batch(example, onnx_file.TRACED_BATCH) if dynamic_batch else example
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as aside, evaluating(model):
        floating, file = Path(aside) / "float.onnx", Path(aside) / target.name
        onnx_file.write(model, traced, floating, dynamic_batch=dynamic_batch, opset=opset)
        float_bytes = sum(part.stat().st_size for part in Path(aside).iterdir())
        done = _rewrite(floating, file, layers, codes, ranges)
        reference = _reference(model, codes, ranges, done)
        if inputs is None:
            inputs = _within(at_batch(example, CHECKED) if dynamic_batch else example, ranges, seed)
        expected, found = onnx_file.expected_of(reference, inputs), onnx_file.outputs_of(file, inputs)
        exact = onnx_file.expected_of(model, inputs)
        allowed = max(tolerance, _share(exact, expected))
        if not _share(expected, found) <= allowed:
            raise NiwakiError(
                f"export to {target}",
                found=f"ONNX Runtime differs from the simulated network by {_share(expected, found):.3g} of its "
                f"outputs' norm, above {allowed:.3g}",
                where=type(model).__name__,
                do="nothing was written; a CPU without 8-bit dot products may overflow: try bits=7",
            )
        kernels, size = kernels_of(file), file.stat().st_size
        os.replace(file, target)
    made = versions() | {name: version(name) for name in onnx_file.PACKAGES}
    device = "cpu (ONNX Runtime)"
    relative = (
        "largest absolute difference of any output, divided by that output's largest absolute value, between ONNX "
        f"Runtime and {{}}, on {len(tensors_in(inputs)[0])} inputs"
    )
    floats = sum(kernels.get(kind, 0) for kind in DOES_PRODUCTS)
    taken = (
        Measurement(
            "difference",
            onnx_file.difference(expected, found),
            "relative",
            relative.format("the simulated network"),
            device=device,
            versions=made,
        ),
        Measurement(
            "float_difference",
            onnx_file.difference(exact, found),
            "relative",
            relative.format("the model in floating point"),
            device=device,
            versions=made,
        ),
        Measurement(
            "agreement",
            _agreement(expected, found),
            "share",
            "positions at which the largest entry along the last axis is the simulated network's",
            device=device,
            versions=made,
        ),
        Measurement("bytes", float(size), "bytes", "INT8 ONNX file on disk", versions=made),
        Measurement("float_bytes", float(float_bytes), "bytes", "float ONNX file of the same model", versions=made),
        Measurement(
            "integer_layers",
            float(sum(kernels.get(kind, 0) for kind in ON_INTEGERS)),
            "products",
            "nodes of ONNX Runtime's optimised graph that multiply whole numbers; "
            f"{floats} more multiply in floating point",
            device=device,
            versions=made,
            uncounted=tuple(f"{path} is left in floating point: {why}" for path, why in done.left.items()),
        ),
    )
    return {one.name: one for one in taken}


def kernels_of(file: str | Path) -> dict[str, int]:
    """How many nodes of each kind are in the graph that ONNX Runtime makes of a file and runs on this CPU."""
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as aside:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # it warns that the graph suits this machine only, which is the point
        options.optimized_model_filepath = str(Path(aside) / "optimised.onnx")
        onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(options.optimized_model_filepath, load_external_data=False).graph
    counts: dict[str, int] = {}
    for node in graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts


def _check(model: nn.Module, layers: Mapping[str, Tensor], ranges: Ranges) -> None:
    other = next((name for name, p in model.named_parameters() if p.dtype != torch.float32), None)
    if other is not None:
        raise InputError("export to INT8", found="parameters that are not float32", where=other, do="model.float()")
    if not any(path in ranges.inputs for path in layers):
        why = "; ".join(f"{path}: {reason}" for path, reason in list(ranges.missing.items())[:3])
        raise InputError(
            "export to INT8",
            found=f"no layer whose input has a range{' (' + why + ')' if why else ''}",
            do="find ranges by niwaki.quantize.from_inputs(model, batches)",
        )


def _codes(layers: Mapping[str, Tensor], weights: Mapping[str, Quantised] | None, bits: int) -> dict[str, Quantised]:
    """Path -> codes of its weight, all of a form that integer kernels take."""
    if weights is None:
        how = Uniform(bits)
        return {path: how(weight, name=f"{path}.weight") for path, weight in layers.items()}
    found = {}
    for name, one in weights.items():
        path = name.removesuffix(".weight")
        if path in layers and name.endswith(".weight"):
            if one.shape != layers[path].shape:
                raise InputError(
                    f"export {name} {tuple(one.shape)}",
                    found=f"{tuple(layers[path].shape)}",
                    do="give the model that was quantised",
                )
            one.centred()  # refused here where 8 bits can't hold it
            found[path] = one
    return found


def _rewrite(
    floating: Path, file: Path, layers: Mapping[str, Tensor], codes: Mapping[str, Quantised], ranges: Ranges
) -> qdq_graph.Rewritten:
    import onnx

    proto = onnx.load(floating)
    done = qdq_graph.rewrite(proto.graph, layers, codes, ranges)
    onnx.checker.check_model(proto)
    onnx.save(proto, file)
    return done


def _reference(
    model: nn.Module, codes: Mapping[str, Quantised], ranges: Ranges, done: qdq_graph.Rewritten
) -> nn.Module:
    """The simulated network with what the file has on grids, its biases rounded as in the file."""
    inputs = {path: span for path, span in ranges.inputs.items() if path in done.quantised}
    outputs = {path: span for path, span in ranges.outputs.items() if path in done.outputs}
    weights = {f"{path}.weight": codes[path] for path in done.quantised}
    reference = simulated(model, weights, Ranges(inputs, {}, outputs, ranges.definition))
    modules = dict(reference.network.named_modules())
    for path, shift in done.shifts.items():
        bias = modules[path].bias if path in modules else None
        if isinstance(bias, Tensor):
            bias.add_(torch.from_numpy(shift).to(bias))
    return reference


def _within(example: Any, ranges: Ranges, seed: int) -> Any:
    """Inputs of the example's kinds, real ones evenly within the first range."""
    drawn = onnx_file.fresh(example, torch.Generator().manual_seed(seed))
    low, high = next(iter(ranges.inputs.values()))
    if not low < 0 < high:  # behind ReLU: not the range of what enters
        return drawn

    def move(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return (tensor * min(-low, high) / 3).clamp(low, high)

    return map_tensors(drawn, move)


def _share(expected: list[Tensor], found: list[Tensor]) -> float:
    """Norm of the difference of all outputs, relative to the expected ones' norm; infinite where they don't compare."""
    if not onnx_file.difference(expected, found) < float("inf"):
        return float("inf")
    wanted = torch.cat([tensor.detach().cpu().double().reshape(-1) for tensor in expected])
    given = torch.cat([tensor.double().cpu().reshape(-1) for tensor in found])
    norm = float(wanted.norm())
    return float((given - wanted).norm()) / norm if norm else float((given - wanted).norm())


def _agreement(expected: list[Tensor], found: list[Tensor]) -> float:
    same = [a.argmax(-1).cpu() == b.argmax(-1) for a, b in zip(expected, found, strict=True) if a.dim() and a.numel()]
    return float(torch.cat([one.reshape(-1) for one in same]).double().mean()) if same else 1.0
