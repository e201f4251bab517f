"""PAGCP beside plain baselines at equal multiply-adds and equal retraining, and what its search costs.

Cases: `camvid`, a network of three decoders on street scenes (classes, boundaries, distance to the next boundary; the
last two worked out from the masks); `coco`, a trained detector with a decoder of masks, judged by the parts of its loss
(box, objectness, class) and by the masks; `resnet56`, the trained network on CIFAR-10; `speed`, evaluations of the
search on ResNet-50 beside the plain way; `scan`, halving beside shares in turn, on the networks of camvid and resnet56.
Everything is chosen on training pictures; test pictures are for the report alone.
"""

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from camvid import DATA, Street, camvid, heads
from pagcp_page import page
from pagcp_search import run_scan, run_speed
from rows import ROOT, Rows, arguments
from torch import nn

import niwaki
from niwaki.measure.measurement import evaluating
from niwaki.measure.target import at_batch
from niwaki.methods import PAGCP, Magnitude, NormScale, Taylor
from niwaki.pressure import Slimming
from niwaki.search import Choice, Masked
from niwaki.tasks import Classification, Custom, Multitask
from niwaki.train import Checkpoints, Recovery, Speed
from niwaki.train.settings import PRECISIONS
from niwaki.units import run

CASES = ("speed", "scan", "resnet56", "camvid", "coco")
TOTALS = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
"""initial_thres is the first of these with which one search meets the budget; by training losses alone."""
SLIMMED = "network slimming"
RATE = 3e-3
"""Of Slimming: the usual 1e-4 is for a hundred times as many steps; chosen before anything was measured."""
FAST = Speed(channels_last=True)
SEARCH: dict[str, Any] = {"exp": True, "rounds": 1}
ARMS: dict[str, Any] = {
    "PAGCP": {},
    "PAGCP, gate selected": {"gate": "selected"},
    "PAGCP, equal allowances": {"exp": False},
    "PAGCP, cheap groups first": {"turned": True},
    "PAGCP, one loss for all": {"summed": True},
    "PAGCP, statistics of batches": {"statistics": "batch"},
    "PAGCP, in rounds": {"in rounds": True},
    "PAGCP, in rounds, floor 0.25": {"in rounds": True, "floor": 0.25},
    "PAGCP, in rounds, statistics of batches": {"in rounds": True, "statistics": "batch"},
    "L2, uniform": Magnitude(p=2, rule="uniform"),
    "L2, global": Magnitude(p=2),
    "Taylor, global": Taylor(),
    "batch-norm scales, global": NormScale(),
    SLIMMED: NormScale(),
    "L2, uniform, in rounds": Magnitude(p=2, rule="uniform"),
    "Taylor, global, in rounds": Taylor(),
}
"""PAGCP with what is changed of it, and the baselines. Network slimming has a dense network of its own, trained as long
with L1 on the scales of batch norms. In rounds: cut and trained in turns, the epochs divided among them; baselines keep
the same share in each."""


BESIDE = ("summed", "turned", "in rounds", "floor")
"""What an arm changes beside PAGCP's own settings."""


def summed(task: Any, batches: list[Any]) -> Any:
    """The task, judged by one loss instead of several, on these batches."""
    return Custom(
        loss=lambda model, batch: task.loss(model, batch), metric=lambda model, given: 0.0,
        splits={"train": batches, "test": batches[:1]},  # of which nothing is reported
    )  # fmt: skip


@contextmanager
def turned() -> Iterator[None]:
    """Inside, PAGCP's cheapest groups get the largest allowances."""
    plain = Masked.choices

    def choices(judge: Masked) -> list[Choice]:
        return plain(judge)[::-1]

    Masked.choices = choices  # type: ignore[method-assign]
    try:
        yield
    finally:
        Masked.choices = plain  # type: ignore[method-assign]


def searched(arm: str, total: float, options: argparse.Namespace) -> PAGCP:
    """The method of an arm with this initial_thres; 0 where allowances are equal."""
    settings = {name: value for name, value in ARMS[arm].items() if name not in BESIDE}
    rate = {"initial_rate": options.first, "initial_thres": total} if total else {"initial_rate": options.rate}
    rounds = {"rounds": options.rounds} if ARMS[arm].get("in rounds") else {}
    return PAGCP(**{**SEARCH, "batches": options.batches, "scan": options.scan, **settings, **rate, **rounds})


def compressed(
    model: nn.Module, task: Any, arm: str, keep: float, options: argparse.Namespace, seed: int, **more: Any
) -> tuple[Any, Any]:
    """What one arm makes of the network, and what its search found."""
    settings, example, told = ARMS[arm], task.example(), None
    floor = settings.get("floor", options.floor) if isinstance(settings, dict) else options.floor
    budget = tuple(niwaki.Budget(keep, of=of, floor=floor) for of in options.of)
    if not isinstance(settings, dict):
        return niwaki.compress(
            model, example, method=settings, budget=budget, task=task, seed=seed, limit=1, **more
        ), None  # fmt: skip
    judged = summed(task, task.calibration(options.batches, seed)) if settings.get("summed") else task
    for total in options.totals if settings.get("exp", True) else (0.0,):
        with turned() if settings.get("turned") else nullcontext():
            outcome = niwaki.compress(
                model, example, method=searched(arm, total, options), budget=budget, task=judged, seed=seed, limit=1,
                **more,
            )  # fmt: skip
        told = outcome.details["search"]["rounds"]
        print(arm, total, len(told), outcome.plan.promised["macs"] / outcome.plan.promised["macs_before"], flush=True)
        if told[-1]["reached"]:
            break
    return outcome, told


def arm_row(
    rows: Rows, key: str, model: nn.Module, task: Any, arm: str, keep: float, seed: int, options: argparse.Namespace
) -> None:
    """One row: cut, re-estimated batch norm, and retraining as long as every other arm's."""
    if not rows.wanted(key):
        return
    start, told, rounds = time.perf_counter(), None, arm.count("in rounds")
    how = Recovery(
        epochs=options.recover // options.rounds if rounds else options.recover, lr=options.lr, seed=seed,
        limit=options.steps or None, speed=Speed(channels_last=True, precision=options.precision),
        clip=options.clip or None,
    )  # fmt: skip
    values: dict[str, Any] = {"arm": arm, "keep": keep, "precision": options.precision}
    if not rounds:
        outcome, told = compressed(model, task, arm, keep, options, seed, repair=False)
        seconds, small = time.perf_counter() - start, niwaki.cut(model, outcome.plan)
        niwaki.repair.BatchNormStatistics()(small, (task.inputs(b) for b in task.calibration(16, seed)))
        values["cut"] = figures(small, task)
        how(small.train(), task, progress=said(key))
    elif isinstance(ARMS[arm], dict):
        outcome, told = compressed(model, task, arm, keep, options, seed, recovery=how)
        small, left = outcome.model, (options.rounds - len(told)) * how.epochs
        if left:  # the budget was met sooner: all arms train as long
            replace(how, epochs=left)(small.train(), task, progress=said(key))
        seconds = time.perf_counter() - start
    else:
        small = model
        for _ in range(options.rounds):
            small = compressed(small, task, arm, keep ** (1 / options.rounds), options, seed, recovery=how)[0].model
        seconds = time.perf_counter() - start
    example = task.example().to(options.device)
    whole, now = (niwaki.trace(net, task.example()) for net in (model, small))
    values |= {
        "macs": now.macs / whole.macs,
        "params": now.params / whole.params,
        "after": figures(small.eval(), task),
        "latency ratio": faster(model, small, at_batch(example, options.timed)),
        "timed": options.timed,
        "seconds": seconds,
        "recover": f"{options.recover} x {options.steps or task.steps}",
        "device": options.device,
    }
    if told is not None:
        steps = [step for one in told for step in one["steps"]]
        gone = {step["group"]: 0 for step in steps}
        for step in steps:
            gone[step["group"]] += 0 if step["accepted"] is None else step["trials"][step["accepted"]]["count"]
        sizes = {step["group"]: step["size"] for step in reversed(steps)}
        values |= {"reached": told[-1]["reached"], "allowances": told[-1]["allowances"], "rounds": len(told)}
        values["groups"] = {group: (size, gone[group]) for group, size in sizes.items()}
        values["evaluations"] = sum(len(step["trials"]) for step in steps)
    rows.add(key, values, seed=seed, threads=options.threads)


def faster(model: nn.Module, small: nn.Module, example: Any, turns: int = 15) -> float:
    """How many times less time a forward pass takes: medians of passes in turns, in seconds of the processor; of the
    wall on a GPU."""
    times: tuple[list[float], list[float]] = ([], [])
    gpu = torch.cuda.is_available() and next(model.parameters()).is_cuda
    with evaluating(model), evaluating(small):
        for turn in range(turns + 3):
            for net, found in zip((model, small), times, strict=True):
                start = time.perf_counter() if gpu else time.process_time()
                run(net, example)
                if gpu:
                    torch.cuda.synchronize()
                found.append((time.perf_counter() if gpu else time.process_time()) - start)
                if turn < 3:  # of warm-up
                    found.clear()
    return statistics.median(times[0]) / statistics.median(times[1])


def said(what: str) -> Callable[[int, int, str], None]:
    """Tells of every fiftieth step."""
    return lambda done, of, words: None if done % 50 and done < of else print(f"{what}: {done} of {of}", flush=True)


def figures(model: nn.Module, task: Any) -> dict[str, float]:
    return {name: measured.value for name, measured in task.metrics(model).items()}


def name_of(options: argparse.Namespace) -> str:
    return f"camvid {options.height}, width {options.width}, {options.epochs} epochs"


def trained(options: argparse.Namespace, seed: int, task: Any, rate: float = 0.0) -> nn.Module:
    """The uncut network on CamVid, from its checkpoint where there is one."""
    torch.manual_seed(seed)
    model = Street(options.width).to(options.device)
    file = f"pagcp-{name_of(options).replace(', ', '-').replace(' ', '-')}-{seed}{'-slimmed' if rate else ''}"
    how = Recovery(
        epochs=options.epochs, lr=options.dense_lr, seed=seed, limit=options.steps or None, speed=FAST,
        folder=str(ROOT / "runs" / file), checkpoints=Checkpoints(),
    )  # fmt: skip
    pressure = Slimming(rate) if rate else None
    how(model.train(), task, resume=True, progress=said(file), pressure=pressure)
    return model.eval()


def share(rows: Rows, key: str, arm: str, options: argparse.Namespace) -> float:
    """Of multiply-adds that an arm keeps: the baselines as many as PAGCP reached."""
    made = rows.get(key.removesuffix(arm) + ("PAGCP, in rounds" if "in rounds" in arm else "PAGCP"))
    return options.keep if arm.startswith("PAGCP") or made is None else made["macs"]


def run_camvid(rows: Rows, options: argparse.Namespace) -> None:
    splits = camvid(options.height)
    name = name_of(options)
    for seed in options.seeds:
        task = Multitask(splits, heads(), batch=options.batch)
        model = trained(options, seed, task)
        dense = figures(model, task)
        if rows.wanted(f"{name}, seed {seed}, dense"):
            rows.add(
                f"{name}, seed {seed}, dense", {"arm": "dense", "after": dense}, seed=seed, threads=options.threads
            )
        firsts = {head.name: next(v for n, v in dense.items() if n.startswith(head.name)) for head in task.heads}
        judged = Multitask(splits, heads(), batch=options.batch, reference=firsts)
        for arm in options.arms:
            key = f"{name}, keep {options.keep}, seed {seed}, {arm}"
            keep = share(rows, key, arm, options)
            whole = trained(options, seed, task, RATE) if arm == SLIMMED and rows.wanted(key) else model
            arm_row(rows, key, whole, judged, arm, keep, seed, options)


def run_coco(rows: Rows, options: argparse.Namespace) -> None:
    import coco_multitask  # asks for what reads boxes

    name = f"coco {options.size}, {options.recover} x {options.steps or 'all'}"
    loaded, task = coco_multitask.coco(options)
    for seed in options.seeds:
        model = coco_multitask.trained(loaded, task, options, seed).to(options.device)
        dense = figures(model, task)
        if rows.wanted(f"{name}, seed {seed}, dense"):
            rows.add(
                f"{name}, seed {seed}, dense", {"arm": "dense", "after": dense}, seed=seed, threads=options.threads
            )
        judged = coco_multitask.compared(task, dense)
        for arm in options.arms:
            if arm == SLIMMED:  # the network is given
                continue
            key = f"{name}, keep {options.keep}, seed {seed}, {arm}"
            arm_row(rows, key, model, judged, arm, share(rows, key, arm, options), seed, options)


def resnet56(options: argparse.Namespace) -> tuple[nn.Module, Any]:
    """The trained network and its task."""
    from udfc import network

    splits = niwaki.data.open(f"cifar10:{DATA / 'cifar10'}", normalisation="imagenet", seed=0, root=ROOT)
    return network("resnet56").to(options.device), Classification(splits, batch=128, augment="flip_crop")


def run_scans(rows: Rows, options: argparse.Namespace) -> None:
    if rows.wanted("scan, resnet56"):
        run_scan(rows, "resnet56", *resnet56(options), options)
    task = Multitask(camvid(options.height), heads(), batch=options.batch)
    if rows.wanted(f"scan, {name_of(options)}"):
        run_scan(rows, name_of(options), trained(options, 0, task), task, options)


def run_resnet56(rows: Rows, options: argparse.Namespace) -> None:
    model, task = resnet56(options)
    for seed in options.seeds:
        for arm in options.arms:
            if arm == SLIMMED:  # the network is given
                continue
            keep = f"keep {options.keep}" + (f" of {' and '.join(options.of)}" if options.of != ["macs"] else "")
            key = f"resnet56, {keep}, {options.recover} x {options.steps or task.steps}, seed {seed}, {arm}"
            arm_row(rows, key, model, task, arm, share(rows, key, arm, options), seed, options)


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--keep", type=float, default=0.4, help="share of MACs (default: %(default)s)")
        parser.add_argument("--of", nargs="+", default=["macs"], help="what is held to it (default: macs)")
        parser.add_argument("--floor", type=float, default=0.05, help="share of each group (default: %(default)s)")
        parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
        parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
        parser.add_argument("--batches", type=int, default=8, help="that losses are summed over")
        parser.add_argument("--batch", type=int, default=8, help="pictures in a batch of camvid, coco")
        parser.add_argument("--scan", default="grid", help="grid or bisect")
        parser.add_argument("--totals", nargs="+", type=float, default=list(TOTALS), help="initial_thres, in turn")
        parser.add_argument("--timed", type=int, default=8, help="pictures in a timed pass")
        parser.add_argument("--first", type=float, default=0.06, help="initial_rate of geometric allowances")
        parser.add_argument("--rate", type=float, default=0.1, help="of equal allowances")
        parser.add_argument("--height", type=int, default=96, help="of camvid's pictures")
        parser.add_argument("--width", type=int, default=16, help="of the network on camvid")
        parser.add_argument("--epochs", type=int, default=60, help="of the uncut network on camvid, of coco's decoder")
        parser.add_argument("--dense-lr", type=float, default=0.05)
        parser.add_argument("--size", type=int, default=256, help="of coco's frame")
        parser.add_argument("--masks", type=float, default=5.0, help="weight of coco's masks in training")
        parser.add_argument("--recover", type=int, default=10, help="epochs of retraining")
        parser.add_argument("--rounds", type=int, default=3, help="of arms in rounds (default: %(default)s)")
        parser.add_argument("--lr", type=float, default=0.01, help="highest rate of retraining")
        parser.add_argument("--clip", type=float, default=0.0, help="largest norm of gradients in retraining; 0: any")
        parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of retraining (default: fp32)")
        parser.add_argument("--steps", type=int, default=0, help="most steps of each training (default: all)")
        parser.add_argument("--scan-rate", type=float, default=0.06, help="initial_rate of the case scan")
        parser.add_argument("--scan-total", type=float, default=16.0, help="initial_thres of the case scan")
        parser.add_argument("--network", default="resnet50", help="of torchvision, for speed")
        parser.add_argument("--images", type=int, default=32, help="for speed")
        parser.add_argument("--together", type=int, default=16, help="of them in a batch")
        parser.add_argument("--gib", type=float, default=4.0, help="that may be kept of 1000 pictures, for speed")
        parser.add_argument("--pixels", type=int, default=224, help="for speed")
        parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        parser.add_argument("--draft", action="store_true", help="rows to runs/ only")

    options = arguments((__doc__ or "").splitlines()[0], cases=CASES, threads=1, more=more)
    warnings.simplefilter("ignore")
    os.chdir(ROOT)
    torch.set_num_threads(options.threads)
    rows = Rows("pagcp", fresh=options.fresh, packages=("torchvision", "scipy"), draft=options.draft)
    if not options.table:
        runs = {
            "camvid": run_camvid, "resnet56": run_resnet56, "speed": run_speed, "scan": run_scans, "coco": run_coco
        }  # fmt: skip
        for case in options.only or CASES:
            runs[case](rows, options)
    if not options.draft:
        page(rows)


if __name__ == "__main__":
    main()
