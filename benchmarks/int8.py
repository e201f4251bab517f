"""Whole numbers for real: size and latency of INT8 files beside the float original, and what they cost in accuracy.

VGG-16-BN has random weights (sizes and times do not depend on them), takes 32 x 32 pictures, has one linear layer.
ResNet-56 is the trained one of ../shared/data, quantised without data or with 64 pictures: whole, and at 0.7 of its
channels, which UDFC chose and repaired without data.
"""

import argparse
import itertools
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rows import ROOT, Rows, arguments, prose, table
from torch import nn

import niwaki
from niwaki.export import export_onnx, export_qdq, kernels_of, time_files
from niwaki.export.qdq import DOES_PRODUCTS, ON_INTEGERS
from niwaki.quantize import Ranges, Uniform, from_batch_norm, from_inputs, packed_sizes, simulated

DATA = "../shared/data/cifar10"
CHECKPOINT = "../shared/data/weights/cifar10-resnet-option-a/resnet56-4bfd9763.th"
CASES = ("vgg16_bn", "resnet56")
STEP = 5
"""Every fifth test picture is taken, 2000: enough to see a loss of a point."""
KEEP = 0.7
SOURCES = ("batch norm", "64 pictures")
RUNS = 400


def vgg16_bn(seed: int) -> nn.Module:
    import torchvision

    torch.manual_seed(seed)
    model = torchvision.models.vgg16_bn(weights=None)
    model.avgpool, model.classifier = nn.Identity(), nn.Linear(512, 10)
    niwaki.repair(model, [torch.randn(16, 3, 32, 32) for _ in range(4)])
    return model.eval()


def sizes(rows: Rows, options: argparse.Namespace) -> None:
    """One row per runtime: four files, timed in turns."""
    runtimes = [name for name in ("onnxruntime", "openvino") if find_spec(name)]
    if not any(rows.wanted(f"vgg16_bn {name}") for name in runtimes):
        return
    whole, x = vgg16_bn(options.seed), torch.randn(16, 3, 32, 32)
    graph = niwaki.trace(whole, x[:1])
    scores = niwaki.score(
        graph, niwaki.collect(whole, graph, niwaki.scores.Magnitude().needs), how=niwaki.scores.Magnitude()
    )
    plan = niwaki.choose(graph, scores, niwaki.Budget(keep=0.5, of="units"), how=niwaki.budgets.Uniform())
    half = niwaki.cut(whole, plan).eval()
    niwaki.repair(half, [torch.randn(16, 3, 32, 32) for _ in range(4)])
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.onnx" for name in ("float", "float half", "int8", "int8 half")}
        told: dict[str, Any] = {}
        for name, model in (("", whole), (" half", half)):
            export_onnx(model, x[:1], files[f"float{name}"])
            found = export_qdq(model, x[:1], files[f"int8{name}"], ranges=from_inputs(model, [x]), inputs=x)
            kernels = kernels_of(files[f"int8{name}"])
            told[f"int8{name}"] = {
                "difference": found["difference"].value,
                "agreement": found["agreement"].value,
                "integer_products": sum(kernels.get(kind, 0) for kind in ON_INTEGERS),
                "float_products": sum(kernels.get(kind, 0) for kind in DOES_PRODUCTS),
            }
        size = {name: file.stat().st_size for name, file in files.items()}
        for runtime in runtimes:
            for batch in (1, 16):
                timed, spent = (
                    time_files(
                        files,
                        x[:batch],
                        runtime=runtime,
                        clock=clock,
                        threads=options.threads,
                        runs=RUNS // batch,
                        warm_up=5,
                    )
                    for clock in ("wall", "cpu")
                )
                rows.add(
                    f"vgg16_bn {runtime}" + ("" if batch == 1 else f" batch {batch}"),
                    {
                        "what": "sizes",
                        "runtime": runtime,
                        "batch": batch,
                        "runs": RUNS // batch,
                        "bytes": size,
                        "ms": {name: one.value for name, one in timed.items()},
                        "cpu_ms": {name: one.value for name, one in spent.items()},
                        "spread_ms": {name: one.spread for name, one in timed.items()},
                        "files": told,
                        "device": timed["float"].device,
                    },
                    seed=options.seed,
                    threads=options.threads,
                )


def resnet56() -> nn.Module:
    source = "python:examples/cifar_resnet.py:resnet56"
    return niwaki.models.load(source, checkpoint=CHECKPOINT, shape=(3, 32, 32)).model.eval()


def accuracy(rows: Rows, options: argparse.Namespace) -> None:
    """One row per width of weights and source of ranges: simulated, and the INT8 file in ONNX Runtime."""
    import onnxruntime

    splits = niwaki.data.open(f"cifar10:{DATA}", normalisation="imagenet", seed=0, root=ROOT)
    task = niwaki.tasks.Classification(splits, batch=64)
    batches = list(splits.test.batches(500))
    pictures, labels = (torch.cat([batch[part][::STEP] for batch in batches]) for part in (0, 1))
    few = torch.cat([task.inputs(batch) for batch in task.calibration(1, options.seed)])
    ends = (float(few.min()), float(few.max()))
    model = resnet56()

    def right(network: Any) -> float:
        with torch.no_grad():
            return float(
                torch.cat([network(part).argmax(1) for part in pictures.split(100)]).eq(labels).double().mean()
            )

    dense = right(model)
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(model, few[:1], Path(folder) / "float.onnx")
        float_bytes = (Path(folder) / "float.onnx").stat().st_size
    for kept, bits in itertools.product((1.0, KEEP), (8, 6, 4)):
        if not any(rows.wanted(_key(kept, bits, source)) for source in SOURCES):
            continue
        small, weights = _rounded(model, few[:1], kept, bits)
        alone = right(simulated(small, weights))
        packed = packed_sizes(small.state_dict(), weights)
        found: dict[str, Ranges] = {
            "batch norm": from_batch_norm(small, few[:1], input_range=ends),
            "64 pictures": from_inputs(small, [few]),
        }
        for source, ranges in found.items():
            if not rows.wanted(_key(kept, bits, source)):
                continue
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "a.onnx"
                taken = export_qdq(small, few[:1], file, ranges=ranges, weights=weights, inputs=few)
                session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
                name = session.get_inputs()[0].name
                in_file = right(lambda x, s=session, n=name: torch.from_numpy(s.run(None, {n: x.numpy()})[0]))
            rows.add(
                _key(kept, bits, source),
                {
                    "what": "accuracy",
                    "kept": kept,
                    "bits": bits,
                    "ranges": source,
                    "pictures": len(labels),
                    "dense": dense,
                    "weights_only": alone,
                    "simulated": right(simulated(small, weights, ranges)),
                    "int8_file": in_file,
                    "difference": taken["difference"].value,
                    "agreement": taken["agreement"].value,
                    "file_bytes": taken["bytes"].value,
                    "float_bytes": float_bytes,
                    "packed_bytes": packed["packed_bytes"].value,
                    "left": list(taken["integer_layers"].uncounted),
                },
                seed=options.seed,
                threads=options.threads,
            )


def _key(kept: float, bits: int, source: str) -> str:
    return f"resnet56 {'' if kept == 1 else f'{kept} kept, '}{bits} bits, {source}"


def _rounded(model: nn.Module, example: torch.Tensor, kept: float, bits: int) -> tuple[nn.Module, dict[str, Any]]:
    """The network with so many of its channels, repaired without data where some go, and the codes of its weights."""
    if kept == 1:
        layers = ((path, m) for path, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
        return model, {f"{path}.weight": Uniform(bits)(module.weight) for path, module in layers}
    method = niwaki.methods.UDFC(bits=bits, solve="activation", select="elimination")
    outcome = niwaki.compress(model, example, method=method, budget=niwaki.Budget(keep=kept, of="units"))
    return outcome.model.eval(), outcome.quantised


def page(rows: Rows) -> None:
    lines = []
    for row in (row for row in rows.rows if row["what"] == "sizes"):
        for name in row["bytes"]:
            smaller, faster = row["bytes"]["float"] / row["bytes"][name], row["ms"]["float"] / row["ms"][name]
            lines.append(
                (
                    row["runtime"],
                    row["batch"],
                    name,
                    f"{row['bytes'][name] / 1e6:.2f} MB",
                    f"{smaller:.1f}",
                    f"{row['ms'][name]:.2f} ± {row['spread_ms'][name]:.2f} ms",
                    f"{faster:.1f}",
                    f"{row['cpu_ms']['float'] / row['cpu_ms'][name]:.1f}",
                )
            )
    text = "# INT8 files\n\n" + prose(__doc__ or "")
    text += prose(
        """## VGG-16-BN, whole and at half of its channels

        *half* keeps 0.5 of the units of every group (L2 norm, uniform). Times are medians with interquartile range, in
        turns in one process, one thread. *Smaller* and *faster* are against the float original. The machine was shared:
        the processor's time, which leaves out what else ran, is the figure to go by."""
    ).replace("channels *half*", "channels\n\n*half*")
    text += (
        table(("runtime", "batch", "file", "size", "times smaller", "time", "times faster", "by processor time"), lines)
        + "\n\n"
    )
    text += "## ResNet-56, trained\n\n" + prose(
        """Accuracy on every fifth test picture of CIFAR-10, weights rounded per channel, activations to 8 bits. *70 %*
        is pruned, repaired and rounded by UDFC (behind the activation, by elimination); the whole network is rounded
        alone. Sizes are beside the whole network in floats. *Packed* is the state dict with weights at their real
        width; the file holds them in 8 bits."""
    )
    heads = (
        "channels",
        "weights",
        "ranges from",
        "float",
        "weights alone",
        "simulated",
        "INT8 file",
        "agreement",
        "file",
        "packed",
    )
    text += table(
        heads,
        [
            (
                f"{row.get('kept', 1):.0%}",
                f"{row['bits']} bits",
                row["ranges"],
                *(
                    f"{100 * row[name]:.2f} %"
                    for name in ("dense", "weights_only", "simulated", "int8_file", "agreement")
                ),
                *(f"{row['float_bytes'] / row[name]:.1f} times smaller" for name in ("file_bytes", "packed_bytes")),
            )
            for row in rows.rows
            if row["what"] == "accuracy"
        ],
    )
    rows.write(text + "\n")


def main() -> None:
    options = arguments(__doc__ or "", cases=CASES, threads=1)
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    rows = Rows("int8", fresh=options.fresh, packages=("torchvision", "onnx", "onnxruntime", "openvino"))
    for case in () if options.table else options.only or CASES:
        (sizes if case == "vgg16_bn" else accuracy)(rows, options)
    page(rows)


if __name__ == "__main__":
    main()
