"""Promised against measured milliseconds: budgets of latency and of MACs, on this machine, in turns.

    python benchmarks/latency.py --networks resnet50 mobilenet_v3_large vit_small --keep 0.7 0.5 --runtime onnxruntime

One row for each network, runtime and batch is appended to benchmarks/results/latency.jsonl; rows that are there are not
measured again (--again does). Weights are random: times do not depend on them. Every row says how busy the machine was.
"""

import argparse
import datetime
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import niwaki
from niwaki.budgets.timed import table_path, timed
from niwaki.measure.target import Target, at_batch, in_turns

ROOT = Path(__file__).parent
RESULTS = ROOT / "results" / "latency.jsonl"


def network(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if name == "vit_small":
        import timm

        return timm.create_model("vit_small_patch16_224").eval()
    import torchvision

    return getattr(torchvision.models, name)(weights=None).eval()


def row(name: str, target: Target, keeps: list[float], *, tables: Path, runs: int) -> dict[str, Any]:
    start, load = time.time(), os.getloadavg()[0]
    model, example = network(name), torch.zeros(1, 3, 224, 224)
    graph = timed(
        model, example, niwaki.trace(model, example), target=target, table=table_path(tables, target), progress=say
    )
    measured_in = time.time() - start
    how = niwaki.scores.Magnitude()
    scores = niwaki.score(graph, niwaki.collect(model, graph, how.needs), how=how)
    every = at_batch(example, target.batch)
    plans: dict[str, Any] = {}
    for keep in keeps:
        for of in ("latency", "macs"):
            plans[f"{of} {keep:g}"] = niwaki.choose(graph, scores, niwaki.Budget(keep, of=of))
    calls = {"uncut": target.open(model, every)}
    calls |= {label: target.open(niwaki.cut(model, plan).eval(), every) for label, plan in plans.items()}
    with target.threaded():
        wall = in_turns(calls, runs=runs)
        own = in_turns(calls, runs=runs, clock="cpu")
    uncut = next(iter(plans.values())).promised["latency_before"]
    base = min(own["uncut"])
    entries = {}
    for label in calls:
        promised = uncut if label == "uncut" else plans[label].promised["latency"]
        least = min(own[label])
        entries[label] = {
            "promised_ms": round(promised, 4),
            "cpu_min_ms": round(least, 4),
            "cpu_median_ms": round(statistics.median(own[label]), 4),
            "wall_min_ms": round(min(wall[label]), 4),
            "wall_median_ms": round(statistics.median(wall[label]), 4),
            "off": round(promised / least - 1, 4),
            "promised_share": round(promised / uncut, 4),
            "measured_share": round(least / base, 4),
            "macs_share": 1.0
            if label == "uncut"
            else round(plans[label].promised["macs"] / plans[label].promised["macs_before"], 4),
        }
    return {
        "network": name,
        **target.machine(),
        "niwaki": niwaki.__version__,
        "torch": torch.__version__,
        "runs": runs,
        "load": [round(load, 1), round(os.getloadavg()[0], 1)],
        "table_seconds": round(measured_in, 1),
        "seconds": round(time.time() - start, 1),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "plans": entries,
    }


def say(number: int, of: int, what: str) -> None:
    print(f"  {number + 1}/{of} {what}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["mobilenet_v3_large", "resnet50", "vit_small"])
    parser.add_argument("--keep", nargs="+", type=float, default=[0.7, 0.5])
    parser.add_argument("--runtime", default="onnxruntime")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--tables", type=Path, default=Path("runs/latency-tables"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--again", action="store_true", help="measure rows that are there, too")
    asked = parser.parse_args()
    target = Target(asked.runtime, batch=asked.batch)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    there = [json.loads(line) for line in asked.out.read_text().splitlines()] if asked.out.exists() else []
    for name in asked.networks:
        wanted = {"network": name, **target.machine()}
        if not asked.again and any(wanted.items() <= {k: str(v) for k, v in one.items()}.items() for one in there):
            print(f"{name}: there")
            continue
        print(f"{name} in {asked.runtime}", flush=True)
        made = row(name, target, asked.keep, tables=asked.tables, runs=asked.runs)
        with asked.out.open("a") as file:
            file.write(json.dumps(made) + "\n")
        for label, entry in made["plans"].items():
            print(
                f"  {label:14} promised {entry['promised_ms']:8.2f} ms, measured {entry['cpu_min_ms']:8.2f} "
                f"({100 * entry['off']:+.1f} %), share {entry['promised_share']:.3f} / {entry['measured_share']:.3f}, "
                f"MACs {entry['macs_share']:.3f}"
            )


if __name__ == "__main__":
    main()
