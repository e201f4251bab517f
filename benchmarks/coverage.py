"""Every architecture of torchvision, timm and transformers: traced, halved, judged, trained, saved, loaded again.

One process and one row a model, so that one that fails, hangs or eats the memory costs nothing but its row. Run again
to go on; `--shard 1/4` takes every fourth model, `--only WORD` those whose name holds a word.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from rows import ROOT, Rows, prose, table
from torch import Tensor, nn

import niwaki
from niwaki.units import run, tensors_in

KEEP = 0.5
BAR = 1e-8
"""Largest difference of cut and mask, relative to the outputs' scale."""


def torchvision_names() -> list[str]:
    import torchvision

    return [f"torchvision:{name}" for name in torchvision.models.list_models()]


def timm_names() -> list[str]:
    """Of every module of timm, the architecture with the fewest parameters (built on the meta device)."""
    import timm

    names = []
    for module in timm.list_modules():
        sizes = {}
        for name in timm.list_models(module=module):
            try:
                with torch.device("meta"), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    sizes[name] = sum(p.numel() for p in timm.create_model(name).parameters())
            except Exception:  # some need real numbers while they are built: those are not the smallest we look for
                continue
        if sizes:
            names.append(f"timm:{min(sizes, key=lambda name: (sizes[name], name))}")
    return names


def transformers_names() -> list[str]:
    return [f"hf:{path.relative_to(ROOT)}" for path in sorted((ROOT / "benchmarks" / "configs").glob("*.json"))]


LISTS = {"torchvision": torchvision_names, "timm": timm_names, "hf": transformers_names}


def fill_(model: nn.Module, seed: int) -> None:
    """No parameter that is all one number: behind those a wrong cut can hide. Statistics of norms likewise."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.is_floating_point() or tensor.numel() < 2:
                continue
            if bool((tensor == tensor.reshape(-1)[0]).all()):
                noise = torch.randn(tensor.shape, generator=generator).to(tensor)
                if name.endswith("running_var"):
                    tensor.copy_(1 + 0.3 * noise.abs())
                else:
                    tensor.add_(0.1 * noise)


def judge(source: str, *, seed: int = 0) -> dict[str, Any]:
    """The row of one model."""
    torch.manual_seed(seed)
    found: dict[str, Any] = {"source": source, "stage": "build"}
    loaded = niwaki.models.load(source, seed=seed)
    model, example = loaded.model, loaded.example
    fill_(model, seed)
    before = sum(p.numel() for p in model.parameters())
    found |= {"params": before, "stage": "trace"}
    print(json.dumps(found), flush=True)
    clock = time.perf_counter()
    graph = niwaki.trace(model, example)
    found["trace_s"] = time.perf_counter() - clock
    shut: dict[str, int] = {}
    for group in graph.groups:
        if group.fixed is not None:
            shut[group.fixed] = shut.get(group.fixed, 0) + group.units
    found |= {
        "device": graph.device,
        "unknown": sorted({u.operation for u in graph.unknown}),
        "free": graph.free_params / max(before, 1),
        "fixed": dict(sorted(shut.items(), key=lambda item: -item[1])[:6]),
        "unused": len(graph.unused),
        "stage": "choose",
    }
    print(json.dumps(found), flush=True)
    how = niwaki.scores.Random()
    clock = time.perf_counter()
    scores = niwaki.score(graph, niwaki.collect(model, graph, how.needs), how=how)
    plan = niwaki.choose(graph, scores, niwaki.Budget(keep=KEEP, of="units"), how=niwaki.budgets.Uniform())
    found |= {"choose_s": time.perf_counter() - clock, "inexact": len(plan.inexact), "stage": "cut"}
    print(json.dumps(found), flush=True)
    clock = time.perf_counter()
    small = niwaki.cut(model, plan)
    found |= {"cut_s": time.perf_counter() - clock, "stage": "verify"}
    found["kept"] = sum(p.numel() for p in small.parameters()) / max(before, 1)
    print(json.dumps(found), flush=True)
    receipt = niwaki.verify(model, small, plan, example, seed=seed)
    found |= {
        "door": receipt.door,
        "exact": receipt.exact,
        "difference": receipt.difference / max(receipt.scale, 1.0),
        "passed": receipt.passed and (not receipt.exact or receipt.difference / max(receipt.scale, 1.0) < BAR),
        "stage": "exact",
    }
    print(json.dumps(found), flush=True)
    if not receipt.exact:  # the judge can only compare what is exact: the same once more, without the rest
        strict = exact_part(graph, scores)
        found["exact_difference"] = None
        if strict is not None:
            second = niwaki.verify(model, niwaki.cut(model, strict), strict, example, seed=seed)
            found["exact_difference"] = second.difference / max(second.scale, 1.0)
            found["exact_units"] = strict.promised["units"] / strict.promised["units_before"]
            found["passed"] = found["passed"] and second.passed and found["exact_difference"] < BAR
    found["stage"] = "save"
    print(json.dumps(found), flush=True)
    found["saved"] = saved_and_loaded(model, example, source, seed)
    found["stage"] = "train"
    print(json.dumps(found), flush=True)
    found["gradients"] = gradients(model, small, example)
    found |= {"stage": "done", "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    return found


def exact_part(graph: Any, scores: Any) -> Any:
    """The plan that cuts exact groups alone to the smallest share they allow, in steps; None where there are none."""
    for share in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99):
        try:
            return niwaki.choose(
                graph,
                scores,
                niwaki.Budget(keep=share, of="units"),
                how=niwaki.budgets.Uniform(),
                exact_only=True,
            )
        except niwaki.errors.BudgetError:
            continue
    return None


def saved_and_loaded(model: nn.Module, example: Any, source: str, seed: int) -> bool:
    """Whether a saved run loads in a fresh process and puts out the same bits."""
    with tempfile.TemporaryDirectory() as folder:
        outcome = niwaki.compress(
            model,
            example,
            method=niwaki.methods.Random(rule="uniform"),
            budget=niwaki.Budget(keep=KEEP, of="units"),
            seed=seed,
            source=source,
        )
        outcome.save(Path(folder) / "run")
        words = [sys.executable, "-m", "niwaki", "load-check", f"{folder}/run", source, "--json"]
        told = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
        return told.returncode == 0 and json.loads(told.stdout)["equal"] is True


def gradients(model: nn.Module, small: nn.Module, example: Any) -> bool:
    """Whether every parameter that has a gradient in the model has one in the cut model."""

    def trained(network: nn.Module) -> set[str]:
        network.eval()
        network.zero_grad(set_to_none=True)
        outputs = [t for t in tensors_in(run(network, example)) if t.is_floating_point() and t.requires_grad]
        torch.stack([t.float().square().mean() for t in outputs if isinstance(t, Tensor)]).sum().backward()
        return {name for name, p in network.named_parameters() if p.grad is not None}

    return trained(model) <= trained(small)


def peer(source: str) -> dict[str, Any]:
    """The peer on the same model: does it prune half of the channels, and does what is left run?"""
    import torch_pruning as tp

    loaded = niwaki.models.load(source, seed=0)
    model, example = loaded.model, loaded.example
    before = sum(p.numel() for p in model.parameters())
    shapes = [tuple(t.shape) for t in tensors_in(run(model, example))]
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1:]
    clock = time.perf_counter()
    tp.pruner.BasePruner(
        model, example, importance=tp.importance.RandomImportance(), pruning_ratio=KEEP, ignored_layers=last
    ).step()
    seconds = time.perf_counter() - clock
    with torch.no_grad():
        after = [tuple(t.shape) for t in tensors_in(run(model, example))]
    kept = sum(p.numel() for p in model.parameters()) / max(before, 1)
    return {"peer": "runs" if after == shapes else "shapes differ", "peer_s": seconds, "peer_kept": kept}


def child(source: str, what: str) -> None:
    """Print the row, as far as it comes, a line a stage."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.chdir(ROOT)
    try:
        print(json.dumps(judge(source) if what == "ours" else peer(source)), flush=True)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{'/'.join(frame.filename.split('/')[-2:])}:{frame.lineno}"
        text = " ".join(str(error).split())[:400]
        key = "error" if what == "ours" else "peer_error"
        print(json.dumps({key: f"{type(error).__name__}: {text} ({where})"}), flush=True)


def measured(source: str, what: str, seconds: int) -> dict[str, Any]:
    """The row of one model from a process of its own."""
    words = [sys.executable, __file__, "--child", source, "--what", what]
    found: dict[str, Any] = {}
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=seconds, check=False)
        text, code = done.stdout, done.returncode
    except subprocess.TimeoutExpired as late:
        text = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        code = None
    for line in text.splitlines():
        try:
            found |= json.loads(line)
        except (ValueError, TypeError):
            continue
    key = "error" if what == "ours" else "peer_error"
    if code is None:
        found[key] = f"more than {seconds} s"
    elif code != 0 and key not in found:
        found[key] = f"the process ended with {code}"
    return found


def page(rows: Rows) -> None:
    text = prose(f"""
        # Coverage

        Written by `python benchmarks/coverage.py --table`; do not edit.

        Every architecture, untrained, with random numbers in every tensor; half of the units of every free group
        cut at once (random scores, uniform). *Difference* is that of cut and masked outputs in float64, relative to
        the largest output (bar {BAR:.0e}); where groups are inexact it is taken over the exact ones alone. *Saved*
        runs are loaded in a fresh process and compared bit by bit.
    """)
    for family in LISTS:
        mine = [row for row in rows.rows if row["key"].startswith(family + ":")]
        if not mine:
            continue
        good = [row for row in mine if row.get("stage") == "done" and row.get("passed") and row.get("saved")]
        text += f"## {family}\n\n{len(good)} of {len(mine)} cut, judged, saved and loaded.\n\n"
        lines = []
        for row in sorted(mine, key=lambda row: row["key"]):
            value = row.get("difference") if row.get("exact") else row.get("exact_difference")
            lines.append(
                (
                    row["key"].split(":", 1)[1].removeprefix("benchmarks/configs/"),
                    f"{row.get('params', 0) / 1e6:.1f}",
                    f"{row['free']:.2f}" if "free" in row else "-",
                    f"{row['kept']:.2f}" if "kept" in row else "-",
                    row.get("door", "-"),
                    f"{value:.0e}" if isinstance(value, float) else "-",
                    {True: "yes", False: "**no**"}.get(row.get("saved"), "-"),
                    {True: "yes", False: "**no**"}.get(row.get("gradients"), "-"),
                    " / ".join(f"{row[k]:.2f}" if k in row else "-" for k in ("trace_s", "choose_s", "cut_s")),
                    row.get("peer") or row.get("peer_error", "-")[:60],
                    row.get("error", "") or ", ".join(row.get("unknown", [])),
                )
            )
        heads = (
            "model",
            "M parameters",
            "in free groups",
            "kept",
            "door",
            "difference",
            "saved",
            "gradients",
            "trace / choose / cut (s)",
            "peer",
            "trouble",
        )
        text += table(heads, lines) + "\n\n"
    rows.write(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lists", nargs="+", choices=tuple(LISTS), default=list(LISTS), help="which collections")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="only models whose name holds one of these words")
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="every N-th model, from the I-th")
    parser.add_argument("--seconds", type=int, default=300, help="most for one model (default: %(default)s)")
    parser.add_argument("--peer", action="store_true", help="run the peer as well")
    parser.add_argument("--fresh", action="store_true", help="make rows again that are there")
    parser.add_argument("--table", action="store_true", help="only write the page")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--what", choices=("ours", "peer"), default="ours", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.what)
        return
    part, parts = map(int, options.shard.split("/"))
    rows = Rows("coverage", fresh=options.fresh, packages=("torchvision", "timm", "transformers", "torch-pruning"))
    if not options.table:
        names = [name for kind in options.lists for name in LISTS[kind]()][part - 1 :: parts]
        for name in names:
            if options.only and not any(word in name for word in options.only):
                continue
            if rows.wanted(name):
                found = measured(name, "ours", options.seconds)
                if options.peer:
                    found |= measured(name, "peer", options.seconds)
                rows.add(name, found, seed=0, threads=1)
    page(rows)


if __name__ == "__main__":
    main()
