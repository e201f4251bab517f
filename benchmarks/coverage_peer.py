"""Torch-Pruning on the same model, timed turn by turn with ours, and a bare forward beside both."""

import contextlib
import copy
import json
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from coverage_judge import KEEP, RANDOM, closest, heads
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import niwaki
from niwaki.units import map_tensors, run, tensors_in

TURNS, TURNS_BUDGET, TURNS_SECONDS = 5, 3, 25
"""Turns in which both are timed, fewer where they take this long."""
PEER_STEPS = 5
"""Steps of the peer's loop to half of the channels: the count of its first examples."""
OWN_STEPS, OWN_SECONDS = 100, 30
"""Steps to no channel that its own script for ImageNet takes on the way to a share of the operations
(reproduce/main_imagenet.py), and most seconds of them: one that takes longer counts as if it had ended there."""


def peer(source: str) -> None:
    """The peer on the same model: does it prune half of the channels, and does what is left run? If so, both are timed,
    turn by turn: one step, then to half of the multiply-accumulates in a few steps, and in steps of its own script.
    """
    import torch_pruning as tp

    loaded = niwaki.models.load(source, seed=0)
    model, example = loaded.model, loaded.example
    with torch.no_grad():
        shapes = [tuple(t.shape) for t in tensors_in(run(model, example))]

    def pruner(network: nn.Module, steps: int, *, ratio: float = 1 - KEEP) -> Any:
        return tp.pruner.BasePruner(
            network,
            example,
            importance=tp.importance.RandomImportance(),
            pruning_ratio=ratio,
            iterative_steps=steps,
            ignored_layers=heads(network, shapes),
        )

    def theirs() -> tuple[nn.Module, float]:
        network = copy.deepcopy(model)
        clock = time.perf_counter()
        pruner(network, 1).step()
        return network, time.perf_counter() - clock

    left: dict[str, float] = {}

    def theirs_to_budget(
        name: str = "peer_left", steps: int = PEER_STEPS, ratio: float = 1 - KEEP, most: float = math.inf
    ) -> float:
        """Its loop of steps, its own count after each, until half of the operations are left or `most` seconds gone."""
        network = copy.deepcopy(model)
        clock = time.perf_counter()
        loop = pruner(network, steps, ratio=ratio)
        before, _ = tp.utils.count_ops_and_params(network, example)
        now, done = before, 0
        while now > KEEP * before and done < steps and time.perf_counter() - clock < most:
            loop.step()
            now, _ = tp.utils.count_ops_and_params(network, example)
            done += 1
        left[name], left[f"{name}_steps"] = now / before, done
        return time.perf_counter() - clock

    def ours(of: str) -> float:
        clock = time.perf_counter()
        graph = niwaki.trace(model, example)
        scores = niwaki.score(graph, niwaki.collect(model, graph, RANDOM.needs), how=RANDOM)
        plan, _ = closest(graph, scores, how=niwaki.budgets.Uniform(), of=of)
        niwaki.cut(model, plan)
        seconds = time.perf_counter() - clock
        if of == "macs":
            left["ours_left"] = plan.promised["macs"] / plan.promised["macs_before"]
        return seconds

    small, first = theirs()
    with torch.no_grad():
        after = [tuple(t.shape) for t in tensors_in(run(small, example))]
    kept = sum(p.numel() for p in small.parameters()) / max(sum(p.numel() for p in model.parameters()), 1)
    found = {"peer": "runs" if after == shapes else "shapes differ", "peer_s": first, "peer_kept": kept}
    print(json.dumps(found), flush=True)
    if found["peer"] != "runs":
        return
    del small
    print(json.dumps({"bare_s": bare(model, example)}), flush=True)
    turns("warm", lambda: ours("units"), lambda: theirs()[1], most=TURNS)
    turns("budget", lambda: ours("macs"), theirs_to_budget, most=TURNS_BUDGET)
    print(json.dumps(left), flush=True)
    turns("own", lambda: ours("macs"), lambda: theirs_to_budget("peer_own_left", OWN_STEPS, 1.0, OWN_SECONDS), most=1)
    print(json.dumps(left), flush=True)


class Nothing(TorchDispatchMode):
    """Sees every call and does nothing about it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def bare(model: nn.Module, example: Any) -> float:
    """Seconds of one forward whose calls are seen: on meta tensors, or on real ones where it can't run on those.

    No tool that looks at a forward takes less. The better of these two, the best of five.
    """
    skeleton = copy.deepcopy(model).to("meta")
    found = []
    for network, inputs in (skeleton, map_tensors(example, lambda t: t.to("meta"))), (model, example):
        with contextlib.suppress(Exception), torch.no_grad(), Nothing():
            for _ in range(5):
                clock = time.perf_counter()
                run(network, inputs)
                found.append(time.perf_counter() - clock)
    return min(found)


def turns(name: str, ours: Callable[[], float], theirs: Callable[[], float], *, most: int) -> None:
    """Print the medians of `most` turns, of fewer where they take long; ours first runs once that does not count."""
    spent = ours()
    pairs: list[tuple[float, float]] = []
    while len(pairs) < most and (not pairs or spent < TURNS_SECONDS):
        pairs.append((ours(), theirs()))
        spent += sum(pairs[-1])
    mine, other = (statistics.median(times) for times in zip(*pairs, strict=True))
    print(json.dumps({f"ours_{name}_s": mine, f"peer_{name}_s": other, f"{name}_turns": len(pairs)}), flush=True)
