"""How fast models are traced and cut: alone on the meta device, at 70 billion parameters, and beside Torch-Pruning."""

import argparse
import copy
import cProfile
import gc
import json
import pstats
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rows import ROOT, Rows, arguments, prose, table
from torch import nn

import niwaki

TRACED = {"resnet50": 3.0, "densenet201": 3.0, "vit_l_16": 3.0, "swin_b": 3.0}
"""Models traced on the meta device, with the seconds they may take."""
BESIDE = ("resnet50", "densenet169", "vit_b_16")
FASTER = 5.0
"""Times that trace, choose and cut must be faster than the peer."""
LARGE_SECONDS, LARGE_GIB = 60.0, 4.0
TOKENS = 16


def build(name: str, *, seed: int, device: str) -> nn.Module:
    import torchvision

    torch.manual_seed(seed)
    with torch.device(device):
        settings = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        return torchvision.models.get_model(name, weights=None, **settings).eval()


def timed(work: Callable[[], Any]) -> float:
    return timed_both(work)[0]


def timed_both(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds on the wall clock, and of this process's work."""
    gc.collect()
    start, worked = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - worked


def where_time_goes(work: Callable[[], Any], *, lines: int = 14) -> list[str]:
    """Functions with the largest own time: share of the whole, calls, place."""
    profile = cProfile.Profile()
    profile.runcall(work)
    stats: Any = pstats.Stats(profile)
    whole = sum(entry[2] for entry in stats.stats.values())
    largest = sorted(stats.stats.items(), key=lambda item: -item[1][2])[:lines]
    return [
        f"{100 * entry[2] / whole:4.1f} % own, {100 * entry[3] / whole:5.1f} % with callees, {entry[1]} calls: "
        f"{Path(place[0]).parent.name}/{Path(place[0]).name}:{place[1]} {place[2]}"
        for place, entry in largest
    ]


def trace_case(rows: Rows, name: str, options: argparse.Namespace) -> None:
    key = f"trace {name}"
    if not rows.wanted(key):
        return
    model = build(name, seed=options.seed, device="meta")
    example = torch.empty(1, 3, 224, 224, device="meta")
    graph = niwaki.trace(model, example)
    seconds = [timed(lambda: niwaki.trace(model, example)) for _ in range(options.repeat)]
    rows.add(
        key,
        {
            "what": "trace",
            "model": name,
            "params": graph.params,
            "median_s": statistics.median(seconds),
            "seconds": seconds,
            "bar_s": TRACED[name],
            "passed": statistics.median(seconds) < TRACED[name],
            "groups": len(graph.groups),
            "unknown": len(graph.unknown),
            "profile": where_time_goes(lambda: niwaki.trace(model, example)) if options.profile else None,
        },
        seed=options.seed,
        threads=options.threads,
    )


def large_child(options: argparse.Namespace) -> None:
    """Build and trace in this fresh process; print what it took."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=False,
        use_cache=False,
    )
    start = time.perf_counter()
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
        # with a mask of its own: without one, transformers reads values that meta tensors do not have
        mask = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool).tril()
        example = {"input_ids": torch.zeros(1, TOKENS, dtype=torch.long), "attention_mask": mask}
    built = time.perf_counter() - start
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found: list[Any] = []
    seconds = timed(lambda: found.append(niwaki.trace(model, example, device="meta")))
    graph = found[0]
    print(
        json.dumps(
            {
                "params": graph.params,
                "build_s": built,
                "trace_s": seconds,
                "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
                "peak_before_gib": before / 2**20,
                "groups": len(graph.groups),
                "unknown": len(graph.unknown),
                "free": sum(g.fixed is None for g in graph.groups),
                "profile": where_time_goes(lambda: niwaki.trace(model, example, device="meta"))
                if options.profile
                else None,
            }
        )
    )


def large_case(rows: Rows, options: argparse.Namespace) -> None:
    key = "trace llama_70b"
    if not rows.wanted(key):
        return
    runs = []
    for _ in range(options.repeat_large):
        words = [
            sys.executable,
            str(Path(__file__)),
            "--child",
            "--threads",
            str(options.threads),
            *(["--profile"] if options.profile else []),
        ]
        done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
        if done.returncode:
            raise SystemExit(f"the process that traces llama_70b failed:\n{done.stderr[-4000:]}")
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    seconds, peaks = [run["trace_s"] for run in runs], [run["peak_gib"] for run in runs]
    rows.add(
        key,
        {
            **runs[0],
            "what": "trace",
            "model": "llama_70b",
            "median_s": statistics.median(seconds),
            "seconds": seconds,
            "peak_gib": max(peaks),
            "bar_s": LARGE_SECONDS,
            "bar_gib": LARGE_GIB,
            "passed": statistics.median(seconds) < LARGE_SECONDS and max(peaks) < LARGE_GIB,
        },
        seed=options.seed,
        threads=options.threads,
    )


def ours(model: nn.Module, example: torch.Tensor, spent: dict[str, float] | None = None) -> nn.Module:
    """Trace, score, choose and cut at half of the MACs: the network's norms, the same share of every group."""
    clock = time.perf_counter()

    def lap(stage: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        if spent is not None:
            spent[stage] = now - clock
        clock = now

    how = niwaki.scores.Magnitude(p=2)
    graph = niwaki.trace(model, example)
    lap("trace")
    scores = niwaki.score(graph, niwaki.collect(model, graph, how.needs), how=how)
    lap("score")
    plan = niwaki.choose(graph, scores, niwaki.Budget(keep=0.5, of="macs"), how=niwaki.budgets.Uniform())
    lap("choose")
    small = niwaki.cut(model, plan)
    lap("cut")
    return small


def peer_pruner(model: nn.Module, example: torch.Tensor, *, ratio: float, steps: int) -> Any:
    """The peer's pruner as its README has it; vision transformers as its example for torchvision has them."""
    import torch_pruning as tp

    heads = [m.num_heads for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    return tp.pruner.BasePruner(
        model,
        example,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        iterative_steps=steps,
        ignored_layers=[m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1000],
        round_to=heads[0] if heads else None,
    )


def peer_step(pruner: Any, model: nn.Module) -> None:
    from torchvision.models import VisionTransformer

    pruner.step()
    if isinstance(model, VisionTransformer):  # its forward reads this number; the peer's example sets it, too
        model.hidden_dim = model.conv_proj.out_channels


def theirs(model: nn.Module, example: torch.Tensor, ratio: float) -> nn.Module:
    """The peer's dependency graph, group norms and one step of pruning, the same share of every group, in place."""
    peer_step(peer_pruner(model, example, ratio=ratio, steps=1), model)
    return model


def theirs_to_budget(model: nn.Module, example: torch.Tensor, steps: int) -> int:
    """The peer's loop: a step, then its count of operations, until half of the MACs are left; how many steps it took.

    Half of the channels in all would go in `steps` steps.
    """
    import torch_pruning as tp

    pruner = peer_pruner(model, example, ratio=0.5, steps=steps)
    before, _ = tp.utils.count_ops_and_params(model, example)
    for taken in range(1, steps + 1):
        peer_step(pruner, model)
        if tp.utils.count_ops_and_params(model, example)[0] <= 0.5 * before:
            return taken
    return steps


def macs(model: nn.Module, example: torch.Tensor) -> float | None:
    """Counted by PyTorch's own counter; None where the model does not run."""
    try:
        return niwaki.measure.Macs()(model, example).value
    except Exception as error:
        print(f"does not run: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
        return None


def beside_case(rows: Rows, name: str, options: argparse.Namespace) -> None:
    key = f"beside {name}"
    if not rows.wanted(key):
        return
    model = build(name, seed=options.seed, device="cpu")
    example = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(options.seed))
    dense = macs(model, example)
    small = ours(model, example)  # also the warm-up
    peer = theirs(copy.deepcopy(model), example, options.ratio)
    our_macs, peer_macs = macs(small, example), macs(peer, example)
    mine: list[tuple[float, float]] = []
    other: list[tuple[float, float]] = []
    stages: list[dict[str, float]] = []
    loops: list[tuple[float, float]] = []
    steps: list[int] = []
    for _ in range(options.repeat):
        spent: dict[str, float] = {}
        mine.append(timed_both(lambda spent=spent: ours(model, example, spent)))
        stages.append(spent)
        twin = copy.deepcopy(model)
        other.append(timed_both(lambda twin=twin: theirs(twin, example, options.ratio)))
    for _ in range(min(options.repeat, options.repeat_loop)):
        twin = copy.deepcopy(model)
        loops.append(timed_both(lambda twin=twin: steps.append(theirs_to_budget(twin, example, options.peer_steps))))
    loop_macs = macs(twin, example)
    (wall, work), (peer_wall, peer_work), (loop_wall, loop_work) = (
        map(statistics.median, zip(*runs, strict=True)) for runs in (mine, other, loops)
    )
    ratio = peer_wall / wall
    rows.add(
        key,
        {
            "what": "beside",
            "model": name,
            "ours_s": wall,
            "peer_s": peer_wall,
            "faster": ratio,
            "ours_cpu_s": work,
            "peer_cpu_s": peer_work,
            "faster_cpu": peer_work / work,
            "faster_each": [b[0] / a[0] for a, b in zip(mine, other, strict=True)],
            "ours_seconds": mine,
            "peer_seconds": other,
            "stages": {stage: statistics.median(s[stage] for s in stages) for stage in stages[0]},
            "ours_macs": None if our_macs is None or not dense else our_macs / dense,
            "peer_macs": None if peer_macs is None or not dense else peer_macs / dense,
            "peer": "torch-pruning",
            "peer_ratio": options.ratio,
            "loop_s": loop_wall,
            "loop_cpu_s": loop_work,
            "loop_seconds": loops,
            "loop_steps": steps[0],
            "loop_most_steps": options.peer_steps,
            "loop_macs": None if loop_macs is None or not dense else loop_macs / dense,
            "loop_faster": loop_wall / wall,
            "loop_passed": loop_wall / wall >= FASTER,
            "bar": FASTER,
            "passed": ratio >= FASTER,
            "profile": where_time_goes(lambda: ours(model, example)) if options.profile else None,
        },
        seed=options.seed,
        threads=torch.get_num_threads(),
    )


def page(rows: Rows) -> None:
    """docs/benchmarks/speed.md from the rows."""
    said = {True: "yes", False: "**no**"}
    lines = [
        (
            r["model"],
            f"{r['params'] / 1e6:,.1f} M",
            f"{r['median_s']:.2f} s",
            f"{min(r['seconds']):.2f} - {max(r['seconds']):.2f} s",
            f"{r['peak_gib']:.2f} GiB" if "peak_gib" in r else "-",
            r["groups"],
            r["unknown"],
            f"{r['bar_s']:g} s" + (f", {r['bar_gib']:g} GiB" if "bar_gib" in r else ""),
            said[r["passed"]],
        )
        for r in rows.rows
        if r["what"] == "trace"
    ]
    text = prose(f"""
        # Speed

        Written by `python benchmarks/speed.py --table`; do not edit.

        ## Tracing and grouping on the meta device

        One example of 1 x 3 x 224 x 224; the Llama-shaped network (80 layers, 64 heads on 8 key/value heads,
        width 8192) gets {TOKENS} tokens and a process of its own, whose peak of resident memory is given (imports
        and the model included). It is given an attention
        mask, since without one transformers reads values that meta tensors do not have.
    """)
    text += table(
        ("model", "parameters", "median", "range", "peak memory", "groups", "unknown operations", "bar", "met"), lines
    )

    def share(value: float | None) -> str:
        return "does not run" if value is None else f"{value:.3f}"

    lines = [
        (
            r["model"],
            f"{r['ours_s']:.2f} s",
            " + ".join(f"{v:.2f}" for v in r["stages"].values()),
            f"{r['peer_s']:.2f} s",
            f"**{r['faster']:.1f}**",
            f"{r['ours_cpu_s']:.2f} s, {r['peer_cpu_s']:.2f} s: {r['faster_cpu']:.1f}",
            f"{min(r['faster_each']):.1f} - {max(r['faster_each']):.1f}",
            share(r["ours_macs"]),
            share(r["peer_macs"]),
            said[r["passed"]],
            f"{r['loop_s']:.2f} s, {r['loop_steps']} steps" if "loop_s" in r else "-",
            share(r["loop_macs"]) if "loop_s" in r else "-",
            f"**{r['loop_faster']:.1f}**" if "loop_s" in r else "-",
            said[r["loop_passed"]] if "loop_s" in r else "-",
        )
        for r in rows.rows
        if r["what"] == "beside"
    ]
    text += "\n\n" + prose("""
        ## Beside Torch-Pruning

        Trace, score, choose and cut on the CPU. Both take the same share of every group by the group's L2 norm. Ours
        is asked for half of the MACs. The peer has no budget of MACs, and is timed twice. *One step*: dependency
        graph, group norms and one step that removes a given share of the channels; the share that comes to about half
        of the MACs was found before and is not timed. *To the budget*: its loop of steps, after each of which its
        own counter of operations is asked, until half of the MACs are left; this is the same task as ours. The bar is
        to be 5 times faster. Runs alternate in one process, medians, one thread for both. Our time includes making the
        new model; the peer cuts in place and its copy is not timed. Our cut includes its check by a second forward.
        Within one trace, kernels on the meta device run once for each shape; between runs nothing is kept but
        what operators are (their arguments, the types of their results). Tracing and cutting pause Python's
        search for cycles. The peer's settings are those of its README, for ViT-B/16 those of its example for
        torchvision (widths rounded to the number of heads). On ViT-B/16 ours keeps or removes whole heads, the
        peer narrows the heads: the two do not do the same there.
    """)
    text += table(
        (
            "model",
            "niwaki",
            "trace + score + choose + cut",
            "peer, one step",
            "times faster",
            "processor time, times",
            "range of times",
            "MACs kept, niwaki",
            "MACs kept, one step",
            "5 times faster",
            "peer, to the budget",
            "MACs kept, to the budget",
            "times faster",
            "5 times faster",
        ),
        lines,
    )
    rows.write(text)


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--repeat", type=int, default=5, help="repetitions, of which the median counts (default: %(default)s)"
        )
        parser.add_argument("--repeat-large", type=int, default=1, help="the same for llama_70b (default: %(default)s)")
        parser.add_argument(
            "--threads-beside", type=int, default=1, help="threads of torch beside the peer (default: %(default)s)"
        )
        parser.add_argument(
            "--ratio", type=float, default=0.29, help="share of the channels the peer removes (default: %(default)s)"
        )
        parser.add_argument(
            "--peer-steps", type=int, default=5, help="steps of the peer's loop to half of the channels (%(default)s)"
        )
        parser.add_argument(
            "--repeat-loop", type=int, default=3, help="repetitions of the peer's loop, at most (default: %(default)s)"
        )
        parser.add_argument("--profile", action="store_true", help="add where our time goes to the row")
        parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)

    cases = [*(f"trace-{name}" for name in TRACED), "trace-llama_70b", *(f"beside-{name}" for name in BESIDE)]
    options = arguments(__doc__ or "", cases=cases, more=more)
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    if options.child:
        large_child(options)
        return
    rows = Rows("speed", fresh=options.fresh, packages=("torchvision", "transformers", "torch-pruning"))
    if not options.table:
        for case in options.only or cases:
            kind, _, name = case.partition("-")
            torch.set_num_threads(options.threads if kind == "trace" else options.threads_beside)
            if kind == "beside":
                beside_case(rows, name, options)
            elif name == "llama_70b":
                large_case(rows, options)
            else:
                trace_case(rows, name, options)
    page(rows)


if __name__ == "__main__":
    main()
