"""PAGCP beside plain baselines at equal multiply-adds and equal retraining, and what its search costs.

Cases: `camvid`, a network of three decoders on street scenes (classes, boundaries, distance to the next boundary; the
last two worked out from the masks); `resnet56`, the trained network on CIFAR-10; `speed`, evaluations of the search on
ResNet-50 beside the plain way. Everything is chosen on training pictures; test pictures are for the report alone.
"""

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rows import ROOT, Rows, arguments, prose, table
from torch import Tensor, nn
from torch.nn import functional

import niwaki
from niwaki.graph.plans import plan_of
from niwaki.measure.measurement import evaluating
from niwaki.measure.target import at_batch
from niwaki.methods import PAGCP, Magnitude, NormScale, Taylor
from niwaki.pressure import Slimming
from niwaki.search import Candidate, Choice, Masked
from niwaki.tasks import Boundary, Classification, Custom, Depth, Multitask, Segmentation
from niwaki.train import Checkpoints, Recovery, Speed
from niwaki.units import run

CASES = ("speed", "resnet56", "camvid")
DATA = ROOT.parent / "shared" / "data"
CLASSES, VOID = 11, 255
FAR = 32.0
"""Pixels at which distances to a boundary end."""
TOTALS = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
"""initial_thres is the first of these with which one search meets the budget; by training losses alone."""
SLIMMED = "network slimming"
RATE = 3e-3
"""Of Slimming: the usual 1e-4 is for a hundred times as many steps; chosen before anything was measured."""
FAST = Speed(channels_last=True)
SEARCH: dict[str, Any] = {"initial_rate": 0.06, "exp": True, "rounds": 1}
ARMS: dict[str, Any] = {
    "PAGCP": {},
    "PAGCP, gate selected": {"gate": "selected"},
    "PAGCP, equal allowances": {"exp": False},
    "PAGCP, cheap groups first": {"turned": True},
    "PAGCP, one loss for all": {"summed": True},
    "L2, uniform": Magnitude(p=2, rule="uniform"),
    "L2, global": Magnitude(p=2),
    "Taylor, global": Taylor(),
    "batch-norm scales, global": NormScale(),
    SLIMMED: NormScale(),
}
"""PAGCP with what is changed of it, and the baselines. Network slimming has a dense network of its own, trained as long
with L1 on the scales of batch norms."""


class Decoding(nn.Module):
    """From features of three sizes to one map of the picture's size."""

    def __init__(self, widths: tuple[int, ...], out: int) -> None:
        super().__init__()
        self.steps = nn.ModuleList(
            convolved(deep + shallow, shallow) for deep, shallow in zip(widths[::-1], widths[-2::-1], strict=False)
        )
        self.last = nn.Conv2d(widths[0], out, 1)

    def forward(self, features: list[Tensor], size: torch.Size) -> Tensor:
        x = features[-1]
        for step, side in zip(self.steps, features[-2::-1], strict=True):
            x = step(torch.cat([functional.interpolate(x, side.shape[2:]), side], 1))
        return self.last(functional.interpolate(x, size))


class Street(nn.Module):
    """A shared encoder with shortcuts, and a decoder for each task."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width, 4 * width)
        self.stem = convolved(3, width, stride=2)
        stages, last = [], width
        for number, wide in enumerate(widths):
            stages.append(nn.Sequential(Residual(last, wide, stride=1 if number == 0 else 2), Residual(wide, wide)))
            last = wide
        self.stages = nn.ModuleList(stages)
        self.decoders = nn.ModuleDict(
            {name: Decoding(widths, out) for name, out in (("segmentation", CLASSES), ("boundary", 1), ("distance", 1))}
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        size, x, features = x.shape[2:], self.stem(x - 0.5), []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        found = {name: decoder(features, size) for name, decoder in self.decoders.items()}
        return {**found, "distance": functional.softplus(found["distance"])}


class Residual(nn.Module):
    def __init__(self, into: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.one = convolved(into, out, stride=stride)
        self.two = nn.Sequential(nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out))
        same = into == out and stride == 1
        self.side = nn.Identity() if same else nn.Sequential(
            nn.Conv2d(into, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.two(self.one(x)) + self.side(x))


def convolved(into: int, out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(into, out, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)
    )


def camvid(height: int, seed: int = 0) -> niwaki.data.samples.SampleSplits:
    """CamVid at 4:3, this high: pictures, classes (255 is none), boundaries between them, and distances to these.

    A tenth of the training pictures is split off by `seed` for validation; the test pictures are the publisher's.
    """
    file = ROOT / "runs" / f"camvid-{height}.npz"
    if not file.exists():
        arrays = prepared(DATA / "camvid", height)
        file.parent.mkdir(exist_ok=True)
        aside = file.with_suffix(".part.npz")
        np.savez(aside, **arrays)
        aside.replace(file)
    with np.load(file, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    count = int(arrays.pop("train"))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held = count // 10
    parts = (order[held:].sort().values, order[:held].sort().values, torch.arange(count, len(arrays["x"])))
    splits = [niwaki.data.Samples(arrays, index) for index in parts]
    return niwaki.data.SampleSplits(*splits, record={"source": "camvid", "height": height, "seed": seed})


def prepared(folder: Path, height: int) -> dict[str, np.ndarray]:
    """All pictures, those of the training split first, and how many these are."""
    from PIL import Image
    from scipy.ndimage import distance_transform_edt

    size = (height * 4 // 3, height)
    found: dict[str, list[np.ndarray]] = {name: [] for name in ("x", "segmentation", "boundary", "distance")}
    for split in ("train", "test"):
        for path in sorted((folder / split).glob("*.webp")):
            with Image.open(path) as picture:
                found["x"].append(np.asarray(picture.convert("RGB").resize(size, Image.Resampling.BILINEAR)))
            with Image.open(folder / f"{split}annot" / f"{path.stem}.png") as mask:
                classes = np.asarray(mask.resize(size, Image.Resampling.NEAREST))
            edge = np.zeros(classes.shape, bool)
            edge[:, :-1] |= classes[:, :-1] != classes[:, 1:]
            edge[:-1] |= classes[:-1] != classes[1:]
            far = distance_transform_edt(~edge) if edge.any() else np.full(classes.shape, FAR)
            found["segmentation"].append(np.where(classes >= CLASSES, VOID, classes).astype(np.uint8))
            found["boundary"].append(edge.astype(np.uint8))
            found["distance"].append(np.minimum(far, FAR).astype(np.float32))
        if split == "train":
            count = len(found["x"])
    arrays = {name: np.stack(listed) for name, listed in found.items()}
    return {**arrays, "x": arrays["x"].transpose(0, 3, 1, 2), "train": np.array(count)}


def heads() -> tuple[Any, ...]:
    return Segmentation(CLASSES), Boundary(positive=3.0), Depth(name="distance", weight=0.2)


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


def planned(model: nn.Module, task: Any, arm: str, keep: float, options: argparse.Namespace, seed: int) -> Any:
    """The plan of one arm, what its search found, and its seconds."""
    settings, example = ARMS[arm], task.example()
    start, told = time.perf_counter(), None
    budget = niwaki.Budget(keep, floor=options.floor)
    if isinstance(settings, dict):
        judged = summed(task, task.calibration(options.batches, seed)) if settings.get("summed") else task
        more = {name: value for name, value in settings.items() if name not in ("summed", "turned")}
        totals = options.totals if more.get("exp", True) else (0.0,)
        for total in totals:
            rate = {"initial_thres": total} if total else {"initial_rate": options.rate}
            method = PAGCP(**{**SEARCH, "batches": options.batches, "scan": options.scan, **more, **rate})
            with turned() if settings.get("turned") else nullcontext():
                outcome = niwaki.compress(
                    model, example, method=method, budget=budget, task=judged, repair=False, seed=seed, limit=1
                )
            told = outcome.details["search"]["rounds"][0]
            if told["reached"]:
                break
    else:
        outcome = niwaki.compress(
            model, example, method=settings, budget=budget, task=task, repair=False, seed=seed, limit=1
        )
    return outcome.plan, told, time.perf_counter() - start


def arm_row(
    rows: Rows, key: str, model: nn.Module, task: Any, arm: str, keep: float, seed: int, options: argparse.Namespace
) -> None:
    """One row: a plan, re-estimated batch norm, and retraining as long as every other arm's."""
    if not rows.wanted(key):
        return
    plan, told, seconds = planned(model, task, arm, keep, options, seed)
    small = niwaki.cut(model, plan)
    niwaki.repair.BatchNormStatistics()(small, (task.inputs(b) for b in task.calibration(16, seed)))
    cut = figures(small, task)
    how = Recovery(epochs=options.recover, lr=options.lr, seed=seed, limit=options.steps or None, speed=FAST)
    how(small.train(), task, progress=said(key))
    example = task.example().to(options.device)
    values = {
        "arm": arm,
        "keep": keep,
        "macs": plan.promised["macs"] / plan.promised["macs_before"],
        "params": plan.promised["params"] / plan.promised["params_before"],
        "cut": cut,
        "after": figures(small.eval(), task),
        "latency ratio": faster(model, small, at_batch(example, options.timed)),
        "timed": options.timed,
        "seconds": seconds,
        "recover": f"{options.recover} x {options.steps or task.steps}",
        "device": options.device,
    }
    if told is not None:
        widths = {
            s["group"]: (s["size"], 0 if s["accepted"] is None else s["trials"][s["accepted"]]["count"])
            for s in told["steps"]
        }
        values |= {"reached": told["reached"], "allowances": told["allowances"], "groups": widths}
        values["evaluations"] = sum(len(step["trials"]) for step in told["steps"])
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


def run_camvid(rows: Rows, options: argparse.Namespace) -> None:
    splits = camvid(options.height)
    name = f"camvid {options.height}, width {options.width}, {options.epochs} epochs"

    def trained(seed: int, task: Any, rate: float = 0.0) -> nn.Module:
        torch.manual_seed(seed)
        model = Street(options.width).to(options.device)
        file = f"pagcp-{name.replace(', ', '-').replace(' ', '-')}-{seed}{'-slimmed' if rate else ''}"
        how = Recovery(
            epochs=options.epochs, lr=options.dense_lr, seed=seed, limit=options.steps or None, speed=FAST,
            folder=str(ROOT / "runs" / file), checkpoints=Checkpoints(),
        )  # fmt: skip
        pressure = Slimming(rate) if rate else None
        how(model.train(), task, resume=True, progress=said(file), pressure=pressure)
        return model.eval()

    for seed in options.seeds:
        task = Multitask(splits, heads(), batch=options.batch)
        model = trained(seed, task)
        dense = figures(model, task)
        if rows.wanted(f"{name}, seed {seed}, dense"):
            rows.add(
                f"{name}, seed {seed}, dense", {"arm": "dense", "after": dense}, seed=seed, threads=options.threads
            )
        firsts = {head.name: next(v for n, v in dense.items() if n.startswith(head.name)) for head in task.heads}
        judged = Multitask(splits, heads(), batch=options.batch, reference=firsts)
        for arm in options.arms:
            made = rows.get(f"{name}, keep {options.keep}, seed {seed}, PAGCP")
            keep = options.keep if arm.startswith("PAGCP") or made is None else made["macs"]  # equal to what it reached
            key = f"{name}, keep {options.keep}, seed {seed}, {arm}"
            whole = trained(seed, task, RATE) if arm == SLIMMED and rows.wanted(key) else model
            arm_row(rows, key, whole, judged, arm, keep, seed, options)


def run_resnet56(rows: Rows, options: argparse.Namespace) -> None:
    from udfc import network

    model = network("resnet56").to(options.device)
    splits = niwaki.data.open(f"cifar10:{DATA / 'cifar10'}", normalisation="imagenet", seed=0, root=ROOT)
    task = Classification(splits, batch=128, augment="flip_crop")
    for seed in options.seeds:
        for arm in options.arms:
            if arm == SLIMMED:  # the network is given
                continue
            key = (
                f"resnet56, keep {options.keep}, {options.recover} x {options.steps or task.steps}, seed {seed}, {arm}"
            )
            made = rows.get(key.removesuffix(arm) + "PAGCP")
            keep = options.keep if arm.startswith("PAGCP") or made is None else made["macs"]
            arm_row(rows, key, model, task, arm, keep, seed, options)


def run_speed(rows: Rows, options: argparse.Namespace) -> None:
    """Seconds of the processor for 19 shares of every group: each candidate cut and run whole, and masked, from the
    group's first layer on. Three shares are timed; what the plain way spends on cutting is left out."""
    import torchvision

    torch.manual_seed(0)
    model = getattr(torchvision.models, options.network)(weights=None).eval()
    shape = (options.images, 3, options.pixels, options.pixels)
    batches = [(torch.randn(shape), torch.randint(1000, (options.images,)))]
    task = Custom(
        loss=lambda net, batch: functional.cross_entropy(net(batch[0]), batch[1]), metric=lambda net, given: 0.0,
        splits={"train": batches},
    )  # fmt: skip
    graph = niwaki.trace(model, batches[0][0][:1])
    judge = Masked(model, graph, task, batches)
    plain = kept = 0.0
    whole = graph.cost(np.ones(graph.units.count, bool))["macs"]
    choices, apart = judge.choices(), 0.0
    judge(Candidate({}))
    for choice in choices:
        times: list[list[float]] = [[], []]
        judge(Candidate({}, choice.name, 1))  # the prefix is worked out here, once a group
        for part in (5, 10, 15):
            candidate = Candidate({}, choice.name, choice.size * part // 20)
            small = niwaki.cut(model, plan_of(graph, judge.kept(candidate.all))).eval()
            with torch.no_grad():
                start = time.process_time()
                loss = float(task.loss(small, batches[0])) * options.images
                times[0].append(time.process_time() - start)
            start = time.process_time()
            found = judge(candidate)["loss"]
            times[1].append(time.process_time() - start)
            apart = max(apart, abs(found / loss - 1))
        with torch.no_grad():
            start = time.process_time()
            task.loss(model, batches[0])
            first = time.process_time() - start  # at most so much for the prefix, once
        plain += 19 * statistics.mean(times[0])
        kept += 19 * statistics.mean(times[1]) + first
        print(choice.name, [round(t, 3) for t in (*times[0], *times[1])], flush=True)
    key = f"{options.network}, {options.images} pictures of {options.pixels}"
    values = {"plain": plain, "masked": kept, "times faster": plain / kept, "apart": apart, "groups": len(choices)}
    rows.add(key, {"arm": "speed", "whole macs": whole, **values}, seed=0, threads=options.threads)


def page(rows: Rows) -> None:
    text = prose("""
        # PAGCP

        Written by `python benchmarks/pagcp.py --table`; do not edit.

        Every arm is cut to the multiply-adds that PAGCP reached, has its batch norms re-estimated on the same 16
        batches and is retrained for the same steps. PAGCP's `initial_thres` is the first of a list with which one
        search meets the budget, judged by training losses alone. Figures are of test pictures; mean over seeds (lowest
        to highest). The drop is the mean over tasks of the relative loss of each one's first figure against the uncut
        network's, in percent. How many times faster: medians of forward passes of a batch, whole and cut in turns, in
        seconds of the processor.
    """)
    cases: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows.rows:
        if row["arm"] not in ("speed", "dense"):
            case = row["key"].partition(", seed ")[0]
            cases.setdefault((case, row["arm"]), []).append(row)
    for case in dict.fromkeys(case for case, _ in cases):
        lines = []
        for (name, arm), same in cases.items():
            if name != case:
                continue
            names = list(same[0]["after"])
            cells = [spread([-row["after"][n] if n == "gain" else row["after"][n] for row in same]) for n in names]
            shared = (
                f"{same[0]['macs']:.3f}",
                f"{same[0]['params']:.3f}",
                f"{statistics.median(row['latency ratio'] for row in same):.2f}",
            )
            lines.append((arm, *shared, *cells, len(same)))
        heads_ = [("drop, %" if n == "gain" else n.replace("_", " ")) for n in names]
        text += f"## {case}\n\n" + table(("arm", "MACs", "params", "times faster", *heads_, "seeds"), lines) + "\n\n"
    speed = [row for row in rows.rows if row["arm"] == "speed"]
    if speed:
        text += "## What the search costs\n\n" + prose("""
            Processor seconds for 19 shares of every group of the uncut network: each candidate cut and run whole
            (cutting not counted), and masked, with what comes before the group's first layer computed once.
        """)
        heads_ = ["network", "groups", "plain, s", "masked, s", "times faster", "losses apart, relative"]
        lines = []
        for row in speed:
            numbers = (f"{row['plain']:.0f}", f"{row['masked']:.0f}", f"{row['times faster']:.2f}")
            lines.append((row["key"], row["groups"], *numbers, f"{row['apart']:.1g}"))
        text += table(heads_, lines) + "\n\n"
    rows.write(text)


def spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) < 2 else f"{mean} ({min(values):.2f}..{max(values):.2f})"


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--keep", type=float, default=0.4, help="share of MACs (default: %(default)s)")
        parser.add_argument("--floor", type=float, default=0.05, help="share of each group (default: %(default)s)")
        parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
        parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
        parser.add_argument("--batches", type=int, default=8, help="that losses are summed over")
        parser.add_argument("--batch", type=int, default=8, help="pictures in a batch of camvid")
        parser.add_argument("--scan", default="grid", help="grid or bisect")
        parser.add_argument("--totals", nargs="+", type=float, default=list(TOTALS), help="initial_thres, in turn")
        parser.add_argument("--timed", type=int, default=8, help="pictures in a timed pass")
        parser.add_argument("--rate", type=float, default=0.1, help="of equal allowances")
        parser.add_argument("--height", type=int, default=96, help="of camvid's pictures")
        parser.add_argument("--width", type=int, default=16, help="of the network on camvid")
        parser.add_argument("--epochs", type=int, default=60, help="of the uncut network on camvid")
        parser.add_argument("--dense-lr", type=float, default=0.05)
        parser.add_argument("--recover", type=int, default=10, help="epochs of retraining")
        parser.add_argument("--lr", type=float, default=0.01, help="highest rate of retraining")
        parser.add_argument("--steps", type=int, default=0, help="most steps of each training (default: all)")
        parser.add_argument("--network", default="resnet50", help="of torchvision, for speed")
        parser.add_argument("--images", type=int, default=8, help="for speed")
        parser.add_argument("--pixels", type=int, default=224, help="for speed")
        parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        parser.add_argument("--draft", action="store_true", help="rows to runs/ only")

    options = arguments((__doc__ or "").splitlines()[0], cases=CASES, threads=1, more=more)
    warnings.simplefilter("ignore")
    os.chdir(ROOT)
    torch.set_num_threads(options.threads)
    rows = Rows("pagcp", fresh=options.fresh, packages=("torchvision", "scipy"), draft=options.draft)
    if not options.table:
        runs = {"camvid": run_camvid, "resnet56": run_resnet56, "speed": run_speed}
        for case in options.only or CASES:
            runs[case](rows, options)
    if not options.draft:
        page(rows)


if __name__ == "__main__":
    main()
