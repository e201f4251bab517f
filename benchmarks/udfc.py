"""Pruning and rounding without data on CIFAR-10: every closed form, the published baseline and a peer, side by side.

Rows are found again, so that a run that was interrupted goes on. VGG-16-BN and MobileNetV2 are trained here first
(`--train EPOCHS`, on a GPU where there is one); their weights stay in runs/.
"""

import argparse
import copy
import os
import time
import warnings
from typing import Any

import safetensors.torch
import torch
from cifar import DATA, WEIGHTS
from rows import ROOT, Rows, arguments, prose, table
from torch import nn

import niwaki
from niwaki.methods import UDFC
from niwaki.tasks import Classification
from niwaki.train.settings import PRECISIONS

PRETRAINED = {"resnet20": "resnet20-12fca82f.th", "resnet56": "resnet56-4bfd9763.th"}
TRAINED = ("vgg16_bn", "mobilenet_v2")
NETWORKS = (*PRETRAINED, *TRAINED)
KEEPS = (0.9, 0.8, 0.7, 0.5)
BITS = (32, 8, 6, 4)
FOLDED = {"select": "folded_norm"}
HOWS: dict[str, dict[str, Any]] = {
    "plain": {"solve": "none", **FOLDED},
    "Neuron Merging": {"solve": "neuron_merging", **FOLDED},
    "merge": {"solve": "merge", **FOLDED},
    "A": {"solve": "filter", **FOLDED},
    "A+": {"solve": "filter_positive", **FOLDED},
    "diag": {"solve": "diagonal", **FOLDED},
    "B": {"solve": "activation", **FOLDED},
    "plain, path norm": {"solve": "none"},
    "A, path norm": {"solve": "filter"},
    "B, path norm": {"solve": "activation"},
    "B, elimination": {"solve": "activation", "select": "elimination"},
    "B, elimination, shares by error": {"solve": "activation", "select": "elimination", "share": "error"},
    "B, elimination, fitted inputs": {"solve": "activation", "select": "elimination", "inputs": "fitted"},
    "B, all three": {"solve": "activation", "select": "elimination", "inputs": "fitted", "share": "error"},
}
PEER = "Torch-Pruning L2"


def network(name: str) -> nn.Module:
    """A trained network, from the shared weights or from what `--train` left.

    Raises:
        FileNotFoundError: it has not been trained yet.
    """
    if name in PRETRAINED:
        source, checkpoint = f"python:examples/cifar_resnet.py:{name}", f"{WEIGHTS}/{PRETRAINED[name]}"
        return niwaki.models.load(source, checkpoint=checkpoint, shape=(3, 32, 32)).model
    model = untrained(name)
    model.load_state_dict(safetensors.torch.load_file(ROOT / "runs" / f"udfc-{name}.safetensors"))
    return model.eval()


def untrained(name: str) -> nn.Module:
    """VGG-16-BN and MobileNetV2 for pictures of 32 x 32."""
    import torchvision.models as zoo

    torch.manual_seed(0)
    if name == "vgg16_bn":
        model = zoo.vgg16_bn(weights=None)
        return nn.Sequential(model.features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))
    model = zoo.mobilenet_v2(weights=None, num_classes=10)
    nn.Module.get_submodule(model, "features.0.0").stride = (1, 1)  # the first of five halvings is left out
    return model


def train(name: str, task: Classification, epochs: int, precision: str) -> None:
    """A short training from scratch, on a GPU where there is one."""
    model = untrained(name).to("cuda" if torch.cuda.is_available() else "cpu").to(memory_format=torch.channels_last)
    model.train()
    speed = niwaki.train.Speed(precision=precision)
    how = niwaki.train.Recovery(epochs=epochs, lr=0.1, warmup=0.1, seed=0, speed=speed)
    start = time.perf_counter()
    how(model, task, progress=lambda done, of, words: print(f"{name}: {done} of {of}, {words}", flush=True))
    model.eval().to("cpu")
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    path = ROOT / "runs" / f"udfc-{name}.safetensors"
    path.parent.mkdir(exist_ok=True)
    safetensors.torch.save_file(state, path, metadata={"epochs": str(epochs), "precision": precision})
    print(f"{name}: {task.evaluate(model).value:.2f} % after {time.perf_counter() - start:.0f} s", flush=True)


def suffix(split: str) -> str:
    """Behind the keys of rows that are not of the test split."""
    return "" if split == "test" else f", {split}"


def dense(rows: Rows, name: str, task: Classification, options: argparse.Namespace) -> None:
    key = f"{name}, dense{suffix(options.split)}"
    if rows.wanted(key):
        model = network(name)
        counts = {what: measured.value for what, measured in niwaki.measure.measure(model, task.example()).items()}
        accuracy = task.evaluate(model, split=options.split, limit=options.pictures).value
        found = {
            "network": name,
            "accuracy": accuracy,
            "pictures": options.pictures,
            "split": options.split,
            "counts": counts,
        }
        rows.add(key, found, seed=0, threads=options.threads)


def ours(rows: Rows, name: str, keep: float, bits: int, how: str, task: Classification, options: Any) -> None:
    key = f"{name}, {how}, keep {keep}, {bits} bits{suffix(options.split)}"
    if not rows.wanted(key):
        return
    model, method = network(name), UDFC(bits=bits, **HOWS[how])
    clock = time.perf_counter()
    outcome = niwaki.compress(model, task.example(), method=method, budget=niwaki.Budget(keep=keep, of="units"))
    seconds = time.perf_counter() - clock
    after, plan = outcome.after, outcome.plan
    found = {
        "network": name,
        "keep": keep,
        "bits": bits,
        "how": how,
        "accuracy": task.evaluate(outcome.model, split=options.split, limit=options.pictures).value,
        "pictures": options.pictures,
        "split": options.split,
        "seconds": seconds,
        "closed_form_s": outcome.seconds["reconstruct"],
        "macs": plan.promised["macs"] / plan.promised["macs_before"],
        "params": plan.promised["params"] / plan.promised["params_before"],
        "bytes": after.get("packed_bytes", after["bytes"]).value,
        "difference": outcome.receipt.difference,
        "warnings": sum(len(one["warnings"]) for one in outcome.details["repaired"]),
    }
    rows.add(key, found, seed=0, threads=options.threads)


def peer(rows: Rows, name: str, keep: float, task: Classification, options: Any) -> None:
    """Torch-Pruning's one-shot group L2 with the same share of the same layers."""
    import torch_pruning as tp

    key = f"{name}, {PEER}, keep {keep}, 32 bits{suffix(options.split)}"
    if not rows.wanted(key):
        return
    model, example = network(name), task.example()
    outcome = niwaki.compress(
        model, example, method=UDFC(solve="none"), budget=niwaki.Budget(keep=keep, of="units")
    )  # tells which layers get narrower, and how narrow
    small = dict(outcome.model.named_modules())
    pruned = copy.deepcopy(model)
    layers = {path: m for path, m in pruned.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    whole = [layer for path, layer in layers.items() if small[path].weight.shape[0] == layer.weight.shape[0]]
    how = tp.importance.GroupMagnitudeImportance(p=2, group_reduction="mean")
    tp.pruner.BasePruner(pruned, example, importance=how, pruning_ratio=1 - keep, ignored_layers=whole).step()
    same = all(layer.weight.shape == small[path].weight.shape for path, layer in layers.items())
    found = {
        "network": name,
        "keep": keep,
        "bits": 32,
        "how": PEER,
        "accuracy": task.evaluate(pruned, split=options.split, limit=options.pictures).value,
        "pictures": options.pictures,
        "split": options.split,
        "same_widths": same,
        "macs": niwaki.measure.Macs()(pruned, example).value / outcome.before["macs"].value,
    }
    rows.add(key, found, seed=0, threads=options.threads)


def section(rows: Rows, name: str, split: str) -> str:
    """The tables of one network on one split."""
    whole = rows.get(f"{name}, dense{suffix(split)}")
    if whole is None:
        return ""
    said = "test" if split == "test" else "validation"
    text = f"## {name}, {said} pictures\n\nDense: {whole['accuracy']:.2f} % on {whole['pictures']} pictures, "
    text += f"{whole['counts']['macs'] / 1e6:.1f} M MACs, {whole['counts']['params'] / 1e6:.3f} M parameters.\n\n"
    mine = [row for row in rows.rows if row["network"] == name and "keep" in row and row.get("split", "test") == split]
    for bits in sorted({row["bits"] for row in mine}, reverse=True):
        keeps = sorted({row["keep"] for row in mine if row["bits"] == bits}, reverse=True)
        lines = []
        for how in (PEER, *HOWS):
            cells = [rows.get(f"{name}, {how}, keep {keep}, {bits} bits{suffix(split)}") for keep in keeps]
            if not any(cells):
                continue
            seconds = [cell["seconds"] for cell in cells if cell and "seconds" in cell]
            kept = cells[keeps.index(0.7)] if 0.7 in keeps else None
            lines.append(
                (
                    how,
                    *("-" if cell is None else f"{cell['accuracy']:.1f}" for cell in cells),
                    f"{kept['macs']:.2f}" if kept else "-",
                    f"{kept['bytes'] / 1024:.0f}" if kept and "bytes" in kept else "-",
                    f"{max(seconds):.1f}" if seconds else "-",
                )
            )
        heads = [f"{keep:.0%} kept" for keep in keeps]
        text += f"### {bits} bits\n\n" if bits != 32 else "### Floats\n\n"
        text += table(("", *heads, "MACs at 70%", "KiB at 70%", "seconds, whole run"), lines) + "\n\n"
    return text


def page(rows: Rows) -> None:
    """docs/benchmarks/udfc.md from the rows."""
    text = prose("""
        # Pruned and rounded without data

        Written by `python benchmarks/udfc.py --table`; do not edit.

        CIFAR-10, no data and no training: the share of channels that stays in every layer whose channels others can
        take over (the inner ones of residual blocks), and bits of all weights, per output channel, symmetric. Accuracy
        in percent on the first pictures of a split (how many is said). *Plain* is
        the cut and the rounding without repair; *A* the paper's closed form, *A+* without negative coefficients, *diag*
        rescaling alone, *B* behind the activation. Channels are chosen by the norms of folded filters, *path norm* by
        these times the norms of what reads them, *elimination* one after the other; *shares by error* also chooses
        how many of each layer, at as many channels in all; *fitted inputs* takes what goes into a layer to
        be what its batch norm's variances say. Activations stay floats. Seconds are the longest of a row, on a machine
        that did other work as well.

        The ResNets are published weights. VGG-16-BN and MobileNetV2 were trained here for 6 and 8 epochs on a CPU
        (`--train`): they have less to spare than networks trained to the end, and all their layers are cut.

        What was chosen on what: the closed forms and their weights are the source's. *Path norm* (the default), the
        series of variants below B and the weight of the prior behind *fitted inputs* were tried on 2000 test pictures
        of ResNet-20 while they were made, so the test tables are not blind to them. The validation tables are: nothing
        was chosen on those pictures (though the networks, trained elsewhere, saw them), and the order is the same.
    """)
    for name in NETWORKS:
        for split in ("test", "val"):
            text += section(rows, name, split)
    rows.write(text)


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--keeps", nargs="+", type=float, default=list(KEEPS), help="shares (default: all)")
        parser.add_argument("--bits", nargs="+", type=int, default=list(BITS), help="widths (default: all)")
        parser.add_argument("--hows", nargs="+", choices=[*HOWS, PEER], default=[PEER, *HOWS], help="which forms")
        parser.add_argument("--pictures", type=int, default=10000, help="of the test split (default: %(default)s)")
        parser.add_argument("--split", choices=("test", "val"), default="test", help="pictures (default: %(default)s)")
        parser.add_argument("--train", type=int, default=0, metavar="EPOCHS", help="train the networks of --only first")
        parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of training (default: fp32)")

    options = arguments((__doc__ or "").splitlines()[0], cases=NETWORKS, threads=1, more=more)
    warnings.simplefilter("ignore")
    os.chdir(ROOT)
    torch.set_num_threads(options.threads)
    rows = Rows("udfc", fresh=options.fresh, packages=("torch-pruning",))
    if not options.table:
        splits = niwaki.data.open(f"cifar10:{DATA}", normalisation="imagenet", seed=0, root=ROOT)
        task = Classification(splits, batch=128 if options.train else 250, augment="flip_crop")
        for name in options.only or NETWORKS:
            if options.train:
                train(name, task, options.train, options.precision)
                continue
            if name in TRAINED and not (ROOT / "runs" / f"udfc-{name}.safetensors").exists():
                print(f"{name}: not trained yet (--train EPOCHS)", flush=True)
                continue
            dense(rows, name, task, options)
            for keep in options.keeps:
                if PEER in options.hows:
                    peer(rows, name, keep, task, options)
                for bits in options.bits:
                    for how in (how for how in HOWS if how in options.hows):
                        ours(rows, name, keep, bits, how, task, options)
    page(rows)


if __name__ == "__main__":
    main()
