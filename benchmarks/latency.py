"""Budgets of latency, asked for and measured: networks cut to a share of their time in a runtime of this machine.

For every network the layers are measured over their widths (`niwaki.budgets.timed`), and channels go by their L2 norm.
A plan is chosen by those tables alone; and by tables that are corrected by measuring the chosen network, until it is
within 5 % of what was asked for (`niwaki.budgets.choose_measured`). For comparison, channels go by the same scores and
a budget of MACs of the same share. Afterwards all networks are timed again, in turns with the uncut one: what is
compared is the median over the turns of a network's time over the uncut one's in the same turn, in processor time,
which other work on the machine can't lengthen much. Nothing of these passes was seen when the plans were chosen.
Weights are random: times do not depend on them.
"""

import argparse
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rows import Rows, arguments, prose, table
from torch import nn

import niwaki
from niwaki.budgets import choose_measured, table_path, timed
from niwaki.measure.target import Target, at_batch, in_turns

NETWORKS = {
    "mobilenet_v3_large": "torchvision:mobilenet_v3_large",
    "resnet50": "torchvision:resnet50",
    "vit_small": "timm:vit_small_patch16_224",
}
KEEPS = (0.7, 0.5)
WIDTHS = (128, 127, 112, 111)
"""Channels of one layer: beside a multiple of 16, one less."""
BUSY = 1.2
"""Load of the machine above which times alone are not to be trusted, and ratios less."""
BAR = 0.1
"""How far a measured share may be from the one that was asked for."""


def timed_again(calls: Mapping[str, Any], whole: str, runs: int) -> dict[str, dict[str, Any]]:
    """Milliseconds of each, and the median and quartiles of its time over that of `whole` in the same turn."""
    wall, own = (in_turns(calls, runs=runs, clock=clock) for clock in ("wall", "cpu"))
    found = {}
    for name in calls:
        shares = [mine / theirs for mine, theirs in zip(own[name], own[whole], strict=True)]
        quarters = statistics.quantiles(shares, n=4)
        found[name] = {
            "cpu_ms": statistics.median(own[name]),
            "cpu_min_ms": min(own[name]),
            "wall_ms": statistics.median(wall[name]),
            "share": statistics.median(shares),
            "quarters": [quarters[0], quarters[2]],
            "wall_share": statistics.median(m / t for m, t in zip(wall[name], wall[whole], strict=True)),
        }
    return found


def network(rows: Rows, options: argparse.Namespace, name: str) -> None:
    """One row: a network at all shares, in one runtime at one batch."""
    key = f"{name} {options.runtime} batch {options.batch}"
    if not rows.wanted(key):
        return
    load, start = os.getloadavg()[0], time.time()
    target = Target(options.runtime, batch=options.batch, threads=options.threads)
    torch.manual_seed(options.seed)
    loaded = niwaki.models.load(NETWORKS[name], seed=options.seed)
    model, example = loaded.model.eval(), loaded.example
    graph = niwaki.trace(model, example)
    how = niwaki.scores.Magnitude()
    scores = niwaki.score(graph, niwaki.collect(model, graph, how.needs), how=how)
    with tempfile.TemporaryDirectory() as folder:  # every row has measured its own
        where: dict[str, Any] = {"table": table_path(Path(folder), target), "progress": say}
        graph = timed(model, example, graph, target=target, **where)
        took = {"tables": time.time() - start}
        plans: dict[str, Any] = {}
        told: dict[str, dict[str, Any]] = {}
        for keep in options.keep:
            budget = niwaki.Budget(keep, of="latency")
            start = time.time()
            plan, found = choose_measured(
                model, example, graph, (budget,), lambda g, b: niwaki.choose(g, scores, b), target=target, **where
            )
            took[f"choose {keep:g}"] = time.time() - start
            assert found is not None
            plans[f"measured {keep:g}"] = plan
            told[f"measured {keep:g}"] = found.to_json()
            plans[f"table {keep:g}"] = found.rounds[0].plan
            plans[f"macs {keep:g}"] = niwaki.choose(graph, scores, replace(budget, of="macs"))
    every = at_batch(example, target.batch)
    calls = {"uncut": target.open(model, every)}
    calls |= {label: target.open(niwaki.cut(model, plan).eval(), every) for label, plan in plans.items()}
    with target.threaded():
        found_again = timed_again(calls, "uncut", options.runs)
    shares = {label: plan.promised["macs"] / plan.promised["macs_before"] for label, plan in plans.items()}
    values = {
        "network": name,
        "keeps": options.keep,
        **{name: value for name, value in target.machine().items() if name != "threads"},
        "runs": options.runs,
        "load": [round(load, 1), round(os.getloadavg()[0], 1)],
        "seconds": {name: round(value, 1) for name, value in took.items()},
        "macs": shares,
        "chosen": told,
        "times": found_again,
    }
    rows.add(key, values, seed=options.seed, threads=options.threads)


def layer(rows: Rows, options: argparse.Namespace) -> None:
    """One row: a 3x3 convolution with its ReLU at 28x28, 128 channels out, fewer in or out."""
    key = f"layer {options.runtime}"
    if not rows.wanted(key):
        return
    load = os.getloadavg()[0]
    target = Target(options.runtime, threads=options.threads)
    calls = {}
    for width in WIDTHS:
        model = nn.Sequential(nn.Conv2d(width, 128, 3, padding=1), nn.ReLU()).eval()
        calls[str(width)] = target.open(model, torch.zeros(1, width, 28, 28))
    with target.threaded():
        found = timed_again(calls, "128", max(options.runs, 30))
    values = {**{name: value for name, value in target.machine().items() if name != "threads"}, "times": found}
    values |= {"runs": max(options.runs, 30), "load": [round(load, 1), round(os.getloadavg()[0], 1)]}
    rows.add(key, values, seed=options.seed, threads=options.threads)


def say(number: int, of: int, what: str) -> None:
    if number % 10 == 0 or number + 1 == of:
        print(f"  {number + 1}/{of} {what}", flush=True)


def page(rows: Rows) -> None:
    lines, off = [], {"measured": list[float](), "table": list[float]()}
    nets = [row for row in rows.rows if not row["key"].startswith("layer")]
    for row in sorted(nets, key=lambda row: (list(NETWORKS).index(row["network"]), row["key"])):
        for keep in row["keeps"]:
            chosen, times = row["chosen"][f"measured {keep:g}"], row["times"]
            found = {kind: times[f"{kind} {keep:g}"] for kind in ("table", "measured", "macs")}
            for kind, listed in off.items():
                listed.append(found[kind]["share"] / keep - 1)
            lines.append(
                (
                    row["network"], row["runtime"], row["batch"], f"{times['uncut']['cpu_min_ms']:.1f} ms", f"{keep:g}",
                    _share(found["table"]), f"{100 * off['table'][-1]:+.1f} %", len(chosen["rounds"]),
                    _share(found["measured"]), f"{100 * off['measured'][-1]:+.1f} %",
                    f"{row['macs'][f'measured {keep:g}']:.2f}", _share(found["macs"]),
                )
            )  # fmt: skip
    heads = (
        "network",
        "runtime",
        "batch",
        "uncut",
        "asked",
        "by the table alone",
        "off",
        "rounds",
        "measured and chosen",
    )
    text = "# Budgets of latency\n\n" + prose(__doc__ or "")
    busy = [row for row in rows.rows if max(row["load"]) > BUSY]
    if busy:
        most = max(max(row["load"]) for row in busy)
        text += prose(
            f"""The machine was busy: {len(busy)} of {len(rows.rows)} rows were taken at a load above {BUSY} (up to
            {most:.0f} processes that wanted to run on its cores). Ratios of turns bear that; milliseconds less."""
        )
    text += prose(
        """*Asked* is the share of the uncut network's time that may stay. The shares beside it are measured (in
        brackets the quartiles over the turns), and *off* is how far they are from it: of the plan by the table alone,
        and of the plan that was measured, its table corrected, and chosen again for so many *rounds*. *MACs* is the
        share of the multiply-adds that this plan keeps. The last column is the measured share of a network that keeps
        the asked share of its MACs."""
    )
    text += table((*heads, "off", "MACs", "a budget of MACs"), lines) + "\n\n"
    if off["measured"]:
        text += prose(
            f"""Measured and chosen again, the largest distance from what was asked for is
            {100 * max(map(abs, off["measured"])):.1f} % (the bar is {100 * BAR:.0f} %); by the tables alone it is
            {100 * max(map(abs, off["table"])):.1f} %."""
        )
    layers = [row for row in rows.rows if row["key"].startswith("layer")]
    if layers:
        text += "## Fewer channels can be slower\n\n" + prose(
            "A 3x3 convolution and its ReLU at 28x28, 128 channels out; by how many it takes in, in processor time "
            "over that of 128, in turns."
        )
        text += table(
            ("runtime", *(f"{width} in" for width in WIDTHS)),
            [(row["runtime"], *(_share(row["times"][str(width)]) for width in WIDTHS)) for row in layers],
        )
        text += "\n"
    rows.write(text)


def _share(times: Mapping[str, Any]) -> str:
    low, high = times["quarters"]
    return f"{times['share']:.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--runtime", default="onnxruntime", choices=("onnxruntime", "openvino", "pytorch"))
        parser.add_argument("--batch", type=int, default=1)
        parser.add_argument("--keep", nargs="+", type=float, default=list(KEEPS), help="shares of the time to ask for")
        parser.add_argument("--runs", type=int, default=30, help="timed turns (default: %(default)s)")
        parser.add_argument("--draft", action="store_true", help="rows to runs/, and no page")

    cases: Sequence[str] = ("layer", *NETWORKS)
    options = arguments((__doc__ or "").splitlines()[0], cases=cases, threads=1, more=more)
    packages = ("torchvision", "timm", "onnx", "onnxscript", "onnxruntime", "openvino")
    rows = Rows("latency", fresh=options.fresh, packages=packages, draft=options.draft)
    warnings.simplefilter("ignore")
    if not options.table:
        for case in options.only or cases:
            layer(rows, options) if case == "layer" else network(rows, options, case)
    if not options.draft:
        page(rows)


if __name__ == "__main__":
    main()
