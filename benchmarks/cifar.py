"""Trained CIFAR-10 networks at half of their MACs: accuracy after the cut, after repair, after training; and a peer.

Weights and pictures are read from ../shared/data. The test pictures are used for the report and for nothing else.
"""

import argparse
import copy
import os
import statistics
import time
import warnings
from typing import Any

import torch
from rows import ROOT, Rows, arguments, prose, table
from torch import nn

import niwaki
from niwaki.repair import BatchNormStatistics
from niwaki.tasks import Classification
from niwaki.train import Recovery

DATA = "../shared/data/cifar10"
WEIGHTS = "../shared/data/weights/cifar10-resnet-option-a"
NETWORKS = {"resnet20": "resnet20-12fca82f.th", "resnet56": "resnet56-4bfd9763.th"}
KEEP = 0.5
CALIBRATION = 16
"""Batches for the re-estimation of batch norm, for us and for the peer."""
METHODS: dict[str, tuple[niwaki.methods.Method, int]] = {
    "Magnitude L2, uniform": (niwaki.methods.Magnitude(p=2, rule="uniform"), 0),
    "Magnitude L2, global rank": (niwaki.methods.Magnitude(p=2, rule="global_rank"), 0),
    "Magnitude L2, uniform, inner widths": (niwaki.methods.Magnitude(p=2, rule="uniform"), 0),
    "Magnitude L2, uniform, refitted, inner widths": (niwaki.methods.Magnitude(rule="uniform", refit=True), 0),
    "Magnitude L2, uniform, refitted in turn, inner widths": (
        niwaki.methods.Magnitude(rule="uniform", refit=True, refit_inputs="cut"),
        0,
    ),
    "Magnitude L2, global rank, inner widths": (niwaki.methods.Magnitude(), 0),
    "Magnitude L2, global rank, refitted, inner widths": (niwaki.methods.Magnitude(refit=True), 0),
    "Magnitude L2, global rank, refitted in turn, inner widths": (
        niwaki.methods.Magnitude(refit=True, refit_inputs="cut"),
        0,
    ),
    "NormScale": (niwaki.methods.NormScale(), 0),
    "Taylor": (niwaki.methods.Taylor(), 0),
    "Random, seed 0": (niwaki.methods.Random(), 0),
    "Random, seed 1": (niwaki.methods.Random(), 1),
    "Random, seed 2": (niwaki.methods.Random(), 2),
    "UDFC, the paper's form": (niwaki.methods.UDFC(select="folded_norm"), 0),
    "UDFC": (niwaki.methods.UDFC(), 0),
    "UDFC, activation, elimination": (niwaki.methods.UDFC(solve="activation", select="elimination", share="error"), 0),
}
STREAMS = ("conv1", "layer*.conv2")
"""What is protected where only inner widths are cut: what the shortcuts join keeps its width."""
PEERS = {
    "Torch-Pruning L2, all widths": ("all", 0.29),
    "Torch-Pruning L2, inner widths": ("inner", 0.5),
}
"""The peer's share of removed channels; on inner widths 0.5055 (ResNet-20) and 0.5018 (ResNet-56) of the MACs."""


def task_of(options: argparse.Namespace) -> Classification:
    splits = niwaki.data.open(f"cifar10:{DATA}", normalisation="imagenet", seed=0, root=ROOT)
    return Classification(splits, batch=options.batch, augment="flip_crop")


def network(name: str) -> nn.Module:
    source = f"python:examples/cifar_resnet.py:{name}"
    return niwaki.models.load(source, checkpoint=f"{WEIGHTS}/{NETWORKS[name]}", shape=(3, 32, 32)).model


def dense(rows: Rows, name: str, task: Classification, options: argparse.Namespace) -> None:
    key = f"{name}, dense"
    if rows.wanted(key):
        model = network(name)
        rows.add(
            key,
            {
                "what": "dense",
                "network": name,
                "accuracy": task.evaluate(model).value,
                "pictures": len(task.splits.test),
                "macs": int(niwaki.measure.Macs()(model, task.example()).value),
                "params": int(niwaki.measure.Params()(model, task.example()).value),
            },
            seed=0,
            threads=options.threads,
        )


def small(name: str, label: str, task: Classification, model: nn.Module) -> Any:
    """The method's outcome as cut; accuracies are measured outside, the dense network's only once."""
    method, seed = METHODS[label]
    return niwaki.compress(
        model,
        task.example(),
        method=method,
        budget=niwaki.Budget(keep=KEEP, of="macs"),
        task=task,
        repair=False,
        protect=STREAMS if label.endswith("inner widths") else (),
        seed=seed,
        limit=1,
    )


def repair_(model: nn.Module, task: Classification, *, seed: int) -> None:
    BatchNormStatistics()(model, (task.inputs(batch) for batch in task.calibration(CALIBRATION, seed)))


def ours(rows: Rows, name: str, label: str, task: Classification, options: argparse.Namespace) -> None:
    """Accuracy after the cut and after batch norm, the receipt and the counts."""
    key = f"{name}, {label}"
    if not rows.wanted(key):
        return
    outcome = small(name, label, task, network(name))
    after, receipt, plan, seed = outcome.after, outcome.receipt, outcome.plan, METHODS[label][1]
    cut = task.evaluate(outcome.model).value
    repair_(outcome.model, task, seed=seed)
    rows.add(
        key,
        {
            "what": "cut",
            "network": name,
            "method": label,
            "title": type(METHODS[label][0]).__name__,
            "cut": cut,
            "batch_norm": task.evaluate(outcome.model).value,
            "pictures": len(task.splits.test),
            "calibration": CALIBRATION * options.batch,
            "difference": receipt.difference,
            "exact": receipt.exact,
            "passed": receipt.passed,
            "door": receipt.door,
            "macs_before": plan.promised["macs_before"],
            "macs_promised": plan.promised["macs"],
            "macs_counted": int(after["macs"].value),
            "params_before": plan.promised["params_before"],
            "params_promised": plan.promised["params"],
            "params_counted": int(after["params"].value),
            "settings": {"score": plan.decided_by["score"], "rule": plan.decided_by["rule"]},
            "seconds": outcome.seconds,
            "widths": {group: f"{len(kept)} of {plan.units[group]}" for group, kept in plan.kept.items()},
        },
        seed=seed,
        threads=options.threads,
    )


def recover(rows: Rows, name: str, label: str, task: Classification, options: argparse.Namespace) -> None:
    """The same cut once more, trained for three passes (or for so many steps of each)."""
    limit = options.steps or None
    key = f"{name}, {label}, recovery {limit or 'full'}"
    if not rows.wanted(key):
        return
    recovery = Recovery(epochs=3, limit=limit, seed=METHODS[label][1])
    # a third to a fifth faster on a CPU; numbers differ by rounding alone
    model = small(name, label, task, network(name)).model.to(memory_format=torch.channels_last)
    repair_(model, task, seed=METHODS[label][1])
    start = time.perf_counter()
    model.train()
    history = recovery(model, task)
    model.eval()
    seconds = time.perf_counter() - start
    rows.add(
        key,
        {
            "what": "recovery",
            "network": name,
            "method": label,
            "recovered": task.evaluate(model).value,
            "steps": limit or task.steps,
            "epochs": 3,
            "batch": options.batch,
            "lr": recovery.lr,
            "losses": history.losses,
            "layout": "channels_last",
            "training_s": seconds,
        },
        seed=METHODS[label][1],
        threads=options.threads,
    )


def peer(rows: Rows, name: str, label: str, task: Classification, options: argparse.Namespace) -> None:
    """The peer's dependency graph and group norms; does the network run, and how well?"""
    import torch_pruning as tp

    key = f"{name}, {label}"
    if not rows.wanted(key):
        return
    which, ratio = PEERS[label]
    model, example = network(name), task.example()
    before = niwaki.measure.Macs()(model, example).value
    ignored: list[nn.Module] = [model.linear]
    if which == "inner":
        ignored += [model.conv1, *(module for path, module in model.named_modules() if path.endswith("conv2"))]
    widths = {path: module.out_channels for path, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    pruned = copy.deepcopy(model)
    kept = dict(pruned.named_modules())
    twins = [kept[path] for path, module in model.named_modules() if any(module is one for one in ignored)]
    found: dict[str, Any] = {
        "what": "peer",
        "network": name,
        "method": label,
        "ratio": ratio,
        "runs": True,
        "error": None,
    }
    try:
        tp.pruner.BasePruner(
            pruned,
            example,
            importance=tp.importance.GroupMagnitudeImportance(p=2, group_reduction="mean"),
            pruning_ratio=ratio,
            ignored_layers=twins,
        ).step()
        found["narrower"] = sum(
            module.out_channels != widths[path]
            for path, module in pruned.named_modules()
            if isinstance(module, nn.Conv2d)
        )
        found["convolutions"] = len(widths)
        with torch.no_grad():
            pruned(example)
    except Exception as error:
        found |= {"runs": False, "error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    if found["runs"]:
        found["macs"] = int(niwaki.measure.Macs()(pruned, example).value)
        found["share"] = found["macs"] / before
        found["cut"] = task.evaluate(pruned).value
        repair_(pruned, task, seed=0)
        found["batch_norm"] = task.evaluate(pruned).value
        found |= at_same_macs(model, task, share=found["share"], protect=STREAMS if which == "inner" else ())
    rows.add(key, found, seed=0, threads=options.threads)


def at_same_macs(model: nn.Module, task: Classification, *, share: float, protect: tuple[str, ...]) -> dict[str, float]:
    """Our uniform L2 with as many MACs as the peer was left with: half a percent of them moves accuracy by points."""
    graph, how = niwaki.trace(model, task.example(), protect=protect), niwaki.scores.Magnitude(p=2)
    scores = niwaki.score(graph, niwaki.collect(model, graph, how.needs), how=how)
    plan = niwaki.choose(graph, scores, niwaki.Budget(keep=share, of="macs"), how=niwaki.budgets.Uniform())
    small = niwaki.cut(model, plan)
    cut = task.evaluate(small).value
    repair_(small, task, seed=0)
    return {"ours_macs": plan.promised["macs"], "ours_cut": cut, "ours_batch_norm": task.evaluate(small).value}


def page(rows: Rows) -> None:
    """docs/benchmarks/cifar.md from the rows."""
    text = prose("""
        # CIFAR-10 at half of the MACs

        Written by `python benchmarks/cifar.py --table`; do not edit.

        Trained CIFAR-10 ResNets with parameter-free (option A) shortcuts, budget 0.5 of the MACs, at once.
        Accuracies in percent on the 10 000 test pictures, which nothing was chosen on but UDFC's choice of channels (on
        2000 of them and ResNet-20; [validation pictures](udfc.md) agree): scores, batch norm and
        recovery see the training split (45 000 pictures) alone, and settings not named are the library's defaults.
        *Cut* is the network as cut (*refitted*: and its layers refitted by least squares on 16 batches of 128; *in
        turn*: all of them, to the inputs that they get from the network as it is cut so far),
        *batch norm* after re-estimating its statistics on them, *recovered* after three passes of training from
        there (SGD, rate 0.01, cosine) with the number of steps of 128 pictures that each pass was limited to; a full
        pass has 351. The binomial standard error of an accuracy of 90 % is 0.3, of 50 % 0.5.
    """)
    for name in NETWORKS:
        whole = rows.get(f"{name}, dense")
        if whole is None:
            continue
        text += f"## {name}\n\nDense: {whole['accuracy']:.2f} %, {whole['macs'] / 1e6:.2f} M MACs, "
        text += f"{whole['params'] / 1e6:.3f} M parameters.\n\n"
        lines = []
        for label in METHODS:
            row = rows.get(f"{name}, {label}")
            if row is None:
                continue
            trained = sorted(
                (r for r in rows.rows if r["what"] == "recovery" and (r["network"], r["method"]) == (name, label)),
                key=lambda r: r["steps"],
            )
            right = {
                kind: f"{promised:,} {'=' if promised == counted else 'is not'} {counted:,} ({counted / before:.4f})"
                for kind in ("macs", "params")
                for promised, counted, before in [[row[f"{kind}_{what}"] for what in ("promised", "counted", "before")]]
            }
            lines.append(
                (
                    label,
                    f"{whole['accuracy']:.2f}",
                    f"{row['cut']:.2f}",
                    f"{row['batch_norm']:.2f}",
                    "; ".join(f"{r['recovered']:.2f} (3 x {r['steps']} steps)" for r in trained) or "-",
                    f"{row['difference']:.1e}",
                    row["door"],
                    right["macs"],
                    right["params"],
                )
            )
        text += table(
            (
                "method",
                "dense",
                "cut",
                "batch norm",
                "recovered",
                "cut against mask",
                "door",
                "MACs promised = counted (kept)",
                "parameters promised = counted (kept)",
            ),
            lines,
        )
        draws = [row for label in METHODS if label.startswith("Random") and (row := rows.get(f"{name}, {label}"))]
        if len(draws) > 1:
            text += f"\n\nRandom over {len(draws)} seeds: " + ", ".join(
                f"{said} {statistics.mean(values):.1f} ({min(values):.1f} - {max(values):.1f})"
                for what, said in (("cut", "cut"), ("batch_norm", "batch norm"))
                if (values := [row[what] for row in draws])
            )
            text += "."
        found = [row for label in PEERS if (row := rows.get(f"{name}, {label}"))]
        if found:
            text += "\n\n" + prose("""
                A peer in the same run, for orientation (group L2 norm, the same share of channels in every layer
                it may prune; as many batches for batch norm), and our uniform L2 with the MACs that it kept, which are
                not 0.5:
            """)
            lines = []
            for row in found:
                runs = row["runs"]
                lines.append(
                    (
                        row["method"],
                        f"{row['ratio']:.2f}",
                        f"{row['narrower']} of {row['convolutions']}" if "narrower" in row else "-",
                        "yes" if runs else f"**no**: {row['error']}",
                        *((f"{row['share']:.4f}", f"{row['cut']:.2f}", f"{row['batch_norm']:.2f}") if runs else "---"),
                        *(
                            (
                                f"{row['ours_macs'] / whole['macs']:.4f}",
                                f"{row['ours_cut']:.2f}",
                                f"{row['ours_batch_norm']:.2f}",
                            )
                            if "ours_cut" in row
                            else "---"
                        ),
                    )
                )
            heads = (
                "what",
                "channels removed",
                "narrower convolutions",
                "cut network runs",
                "MACs kept",
                "cut",
                "batch norm",
                "ours: MACs kept",
                "cut",
                "batch norm",
            )
            text += table(heads, lines)
        text += "\n\n"
    rows.write(text)


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--steps",
            type=int,
            default=0,
            help="most training steps in each pass of the recovery; 0 is all (default: %(default)s)",
        )
        parser.add_argument("--batch", type=int, default=128, help="pictures in a batch (default: %(default)s)")
        parser.add_argument(
            "--stages",
            nargs="+",
            choices=("cut", "peer", "recovery"),
            default=["cut", "peer", "recovery"],
            help="what to make",
        )
        parser.add_argument(
            "--methods", nargs="+", metavar="WORD", help="only methods whose name holds one of these words"
        )

    options = arguments((__doc__ or "").splitlines()[0], cases=tuple(NETWORKS), threads=1, more=more)
    warnings.simplefilter("ignore")
    os.chdir(ROOT)
    torch.set_num_threads(options.threads)
    rows = Rows("cifar", fresh=options.fresh, packages=("accelerate", "torch-pruning"))
    if not options.table:
        task = task_of(options)
        labels = [
            label
            for label in METHODS
            if not options.methods or any(word.lower() in label.lower() for word in options.methods)
        ]
        names = options.only or tuple(NETWORKS)
        for stage in options.stages:
            for name in names:
                dense(rows, name, task, options)
                for label in labels if stage != "peer" else PEERS:
                    {"cut": ours, "peer": peer, "recovery": recover}[stage](rows, name, label, task, options)
    page(rows)


if __name__ == "__main__":
    main()
