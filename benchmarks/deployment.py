"""How much of a cut is saved as time: the speed-up of networks at half of their MACs, in four runtimes.

Weights are random and channels go by their L2 norm, evenly over the layers: only shapes matter for time. Both networks
get the same inputs in turns, each runtime in a process of its own (`niwaki bench`). *Achieved* is the speed-up divided
by how many times fewer MACs there are: 100 % would be a runtime whose time is its MACs.
"""

import argparse
import os
import statistics
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rows import ROOT, Rows, arguments, prose, table

import niwaki

NETWORKS = {
    "resnet50": "torchvision:resnet50",
    "mobilenet_v3_large": "torchvision:mobilenet_v3_large",
    "vit_small": "timm:vit_small_patch16_224",
}
WIDTHS = {"any width": 1, "multiples of 16": 16}
"""Kernels work on vectors of 8 or 16 numbers: what does keeping to them bring?"""
RUNTIMES = ("eager", "compile", "onnxruntime", "openvino")
KEEP = 0.5
BUSY = 1.2
"""Load of the machine, in processes that want to run, above which times are not to be trusted."""


def cut_run(network: str, widths: str, seed: int) -> Path:
    """The folder of the cut network, made where it is not there."""
    folder = ROOT / "runs" / "deployment" / f"{network}-{WIDTHS[widths]}"
    if not (folder / "report.json").is_file():
        torch.manual_seed(seed)
        loaded = niwaki.models.load(NETWORKS[network], seed=seed)
        outcome = niwaki.compress(
            loaded.model,
            loaded.example,
            method=niwaki.methods.Magnitude(rule="uniform"),
            budget=niwaki.Budget(keep=KEEP, of="macs", multiple=WIDTHS[widths]),
            repair=False,
            seed=seed,
            source=NETWORKS[network],
            weights=loaded.weights,
        )
        outcome.save(folder, force=True)
    return folder


def measure(rows: Rows, options: argparse.Namespace, network: str, runtime: str, batch: int) -> None:
    """One row: the network, and its cuts at all widths, in turns."""
    key = f"{network} {runtime} batch {batch}"
    if not rows.wanted(key):
        return
    folders = {widths: cut_run(network, widths, options.seed) for widths in WIDTHS}
    load = os.getloadavg()[0]
    found = niwaki.bench.bench(
        [NETWORKS[network], *folders.values()],
        runtimes=(runtime,),
        batches=(batch,),
        threads=options.threads,
        runs=options.runs,
        warm_up=options.warm_up,
        seed=options.seed,
    )
    told: dict[str, Any] = {}
    for label, item, row in zip(("whole", *WIDTHS), found.items, found.rows, strict=True):
        told[label] = {
            "macs": item.macs,
            "ms": row.ms,
            "quarters": row.quarters,
            "cpu_ms": row.cpu_ms,
            "times_as_fast": row.times_as_fast,
            "failed": row.failed,
        }
    values = {"network": network, "runtime": runtime, "batch": batch, "keep": KEEP, "runs": options.runs, "load": load}
    device = found.settings["machine"]
    rows.add(key, {**values, "times": told, "device": device}, seed=options.seed, threads=options.threads)


def achieved(rows: Rows) -> dict[str, list[str]]:
    """Runtime -> for each kind of widths the lowest, median and highest of what was achieved, in percent."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows.rows:
        whole = row["times"]["whole"]
        for widths in WIDTHS:
            cut = row["times"][widths]
            if not (cut["failed"] or whole["failed"]):
                faster, fewer = whole["ms"] / cut["ms"], whole["macs"] / cut["macs"]
                found.setdefault(row["runtime"], {}).setdefault(widths, []).append(100 * faster / fewer)
    return {
        runtime: [f"{min(v):.0f}, {statistics.median(v):.0f}, {max(v):.0f} %" for v in by_widths.values()]
        for runtime, by_widths in found.items()
    }


def page(rows: Rows) -> None:
    lines = []
    order = [f"{network} {runtime} batch {batch}" for network in NETWORKS for runtime in RUNTIMES for batch in (1, 32)]
    for row in sorted(rows.rows, key=lambda row: order.index(row["key"]) if row["key"] in order else len(order)):
        whole = row["times"]["whole"]
        for widths in WIDTHS:
            cut = row["times"][widths]
            head = (row["network"], row["runtime"], row["batch"], widths)
            if cut["failed"] or whole["failed"]:
                lines.append((*head, "-", "-", "-", "-", "-", "-", "-", cut["failed"] or whole["failed"]))
                continue
            fewer, faster = whole["macs"] / cut["macs"], whole["ms"] / cut["ms"]
            processor = whole["cpu_ms"] / cut["cpu_ms"]
            noisy = any(one["quarters"][1] - one["quarters"][0] > 0.25 * one["ms"] for one in (whole, cut))
            lines.append(
                (
                    *head,
                    f"{whole['ms']:.1f} ms",
                    f"{cut['ms']:.1f} ms",
                    f"{fewer:.2f}",
                    f"{faster:.2f}",
                    f"{100 * faster / fewer:.0f} %",
                    f"{processor:.2f}",
                    f"{100 * processor / fewer:.0f} %",
                    "; ".join(filter(None, (row["load"] > BUSY and f"load {row['load']:.0f}", noisy and "noisy"))),
                )
            )
    heads = ("network", "runtime", "batch", "widths", "whole", "cut", "fewer MACs", "faster", "achieved")
    text = "# What a cut saves as time\n\n" + prose(__doc__ or "")
    busy = [row for row in rows.rows if row["load"] > BUSY]
    if busy:
        text += prose(
            f"""**Preliminary**: {len(busy)} of {len(rows.rows)} rows were taken while the machine was busy (*load*
            is how many processes wanted to run on its two cores); they are to be made again, by
            `python benchmarks/deployment.py --fresh`. Under such load neither times nor ratios are to be trusted."""
        )
    text += prose(
        """Float32, medians. *Faster* by the clock on the wall, and by processor time, which leaves out what others on
        the machine took; with one thread on an idle machine both are the same."""
    )
    text += table((*heads, "by processor time", "achieved", "remark"), lines) + "\n"
    text += "\nAchieved over all networks and batches, lowest, median and highest:\n\n"
    text += table(("runtime", *WIDTHS), [(runtime, *spans) for runtime, spans in achieved(rows).items()]) + "\n"
    missing = [key for key in order if rows.get(key) is None]
    if missing:
        text += "\n" + prose(f"Not measured yet: {', '.join(missing)}.")
    rows.write(text)


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
        parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
        parser.add_argument("--runs", type=int, default=20, help="timed passes of each (default: %(default)s)")
        parser.add_argument("--warm-up", type=int, default=3, help="passes before them (default: %(default)s)")

    options = arguments((__doc__ or "").splitlines()[0], cases=tuple(NETWORKS), threads=1, more=more)
    packages = ("torchvision", "timm", "onnx", "onnxscript", "onnxruntime", "openvino")
    rows = Rows("deployment", fresh=options.fresh, packages=packages)
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    os.chdir(ROOT)
    if not options.table:
        for network in options.only or NETWORKS:
            for batch in options.batches:
                for runtime in options.runtimes:
                    if runtime in ("eager", "compile") or find_spec(runtime):
                        measure(rows, options, network, runtime, batch)
    page(rows)


if __name__ == "__main__":
    main()
