"""Where the error of UDFC comes from, layer by layer: pruning, ReLU, quantiser, propagation.

Every layer that reads channels of which some are gone is looked at on validation pictures: what it puts out on the
inputs of the dense network, and what it puts out in the compressed one.
"""

import argparse
import os
import statistics
import warnings
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rows import ROOT, Rows, arguments, prose, table
from torch import Tensor, nn
from udfc import DATA, NETWORKS, TRAINED, network

import niwaki
from niwaki.methods.udfc import UDFC
from niwaki.quantize import Uniform
from niwaki.repair.sites import Path as Way
from niwaki.repair.sites import Site, bend_of, structure_of
from niwaki.tasks import Classification

PICTURES = 256
FITTED_ON = 512
"""Training pictures for the best mixing there is."""
FEW = 4
"""Layers below which no medians are compared."""
PARTS = {
    "removed": "the channels are gone, nothing is repaired",
    "A, before the ReLU": "A's mixing on what goes into the activation, where its assumption holds",
    "A": "A's mixing behind the activation, as it runs",
    "B": "B's mixing behind the activation",
    "best": "the best mixing for real activations, fitted on training pictures",
    "B, rounded": "B's mixing, the layer and the one before it rounded",
    "A, in the network": "A as the whole network runs, rounded, all layers compressed",
    "B, in the network": "B as the whole network runs, rounded, all layers compressed",
}


class Seen:
    """Inputs and outputs of some modules in one forward pass, and its logits."""

    def __init__(
        self, model: nn.Module, pictures: Tensor, *, inputs: Iterable[str] = (), outputs: Iterable[str] = ()
    ) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        wanted = [(path, self.inputs, 0) for path in inputs] + [(path, self.outputs, 1) for path in outputs]
        with ExitStack() as hooks, torch.no_grad():
            for path, table, which in wanted:
                hooks.callback(model.get_submodule(path).register_forward_hook(self._hook(path, table, which)).remove)
            self.logits = model(pictures)

    @staticmethod
    def _hook(path: str, table: dict[str, Tensor], which: int) -> Any:
        def keep(module: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
            table[path] = (given[0], made)[which].detach().clone()  # the next module may write here

        return keep


def share(found: Tensor, wanted: Tensor) -> float:
    """Power of the difference, as a share of the power of what is wanted around its channels' means."""
    means = wanted.mean(dim=[d for d in range(wanted.dim()) if d != 1], keepdim=True)
    return float((found - wanted).pow(2).sum() / (wanted - means).pow(2).sum())


def kept(plan: Any, tensor: str, axis: int, of: int) -> Tensor:
    """Positions of an axis that a plan leaves."""
    found = [cut["keep"] for cut in plan.cuts if cut["tensor"] == tensor and cut["axis"] == axis]
    return torch.tensor(found[0]) if found else torch.arange(of)


def channels_last(a: Tensor) -> Tensor:
    """One row for each picture and position; `[rows, channels]`."""
    return a.movedim(1, -1).reshape(-1, a.shape[1])


def applied(module: nn.Module, weight: Tensor, a: Tensor) -> Tensor:
    """What a convolution or linear layer makes of `a` with another weight."""
    if isinstance(module, nn.Conv2d):
        return nn.functional.conv2d(a, weight, module.bias, module.stride, module.padding, module.dilation)  # type: ignore[arg-type]
    return nn.functional.linear(a, weight, module.bias)  # type: ignore[arg-type]


def layer_errors(
    model: nn.Module, runs: dict[str, Any], site: Site, way: Way, seen: dict[str, Seen], bits: int
) -> dict[str, float]:
    """The parts for one reader; `runs` are outcomes in floats and rounded, `seen` what each network computes."""
    reader, maker = way.reader.removesuffix(".weight"), site.weight.removesuffix(".weight")
    dense, module = seen["dense"], model.get_submodule(reader)
    weight: Tensor = module.weight.detach()  # type: ignore[assignment, union-attr, operator]
    found: dict[str, float] = {}
    a, whole = dense.inputs[reader], dense.outputs[reader]
    for how in ("A", "B"):
        plan, small = runs[how].plan, runs[how].model.get_submodule(reader)
        rows, columns = (kept(plan, way.reader, axis, weight.shape[axis]) for axis in (0, 1))
        channels = kept(plan, site.weight, 0, len(site.units))
        found[how] = share(applied(small, small.weight, a[:, columns]), whole[:, rows])
        y = dense.outputs[way.norms[-1].mean.removesuffix(".running_mean")] if way.norms else None
        if how == "A" and y is not None and y.shape == a.shape and not way.depthwise:
            found["A, before the ReLU"] = share(
                applied(small, small.weight, y[:, channels]), applied(module, weight, y)[:, rows]
            )
        left = kept(runs[f"{how} rounded"].plan, way.reader, 0, weight.shape[0])
        found[f"{how}, in the network"] = share(seen[f"{how} rounded"].outputs[reader], whole[:, left])
    found["removed"] = share(applied(small, weight[rows][:, columns], a[:, columns]), whole[:, rows])
    flat = channels_last(seen["training"].inputs[reader]).double()
    both = flat.T @ flat  # [channels, channels]
    inner = both[columns][:, columns]
    damped = inner + 1e-9 * inner.diagonal().mean() * torch.eye(len(inner), dtype=inner.dtype)
    mixing = torch.linalg.solve(damped, both[columns]).float()  # [kept, channels]
    best = torch.einsum("oc...,kc->ok...", weight[rows], mixing)
    found["best"] = share(applied(small, best, a[:, columns]), whole[:, rows])
    quantiser, first = Uniform(bits), model.get_submodule(maker)
    made: Tensor = first.weight.detach()[channels]  # type: ignore[index, operator, union-attr]
    if a.shape[1] == len(site.units) and not way.depthwise:
        with torch.no_grad():
            grid = quantiser(made).values() - made
            change = nn.functional.conv2d(
                dense.inputs[maker],
                grid,
                None,
                first.stride,
                first.padding,
                first.dilation,  # type: ignore[arg-type]
            )  # what rounding adds to what the layer makes
            y = dense.outputs[way.norms[-1].mean.removesuffix(".running_mean")][:, channels]
            norm = model.get_submodule(way.norms[-1].mean.removesuffix(".running_mean"))
            scale = (norm.weight / (norm.running_var + norm.eps).sqrt())[channels]  # type: ignore[operator, index]
            if y.shape == a[:, columns].shape:
                rounded_a = bend_of(way.bend)[1](y + change * scale[:, None, None])
                codes = quantiser(small.weight.detach()).values()
                found["B, rounded"] = share(applied(small, codes, rounded_a), whole[:, rows])
    return found


def errors(rows: Rows, name: str, keep: float, bits: int, task: Classification, options: argparse.Namespace) -> None:
    key = f"{name}, keep {keep}, {bits} bits"
    if not rows.wanted(key):
        return
    model, example = network(name), task.example()
    structure = structure_of(niwaki.trace(model, example))
    ways = [(site, way) for site in structure.sites if site.reason is None for way in site.paths]
    readers = {way.reader.removesuffix(".weight") for _, way in ways}
    makers = {site.weight.removesuffix(".weight") for site, _ in ways}
    norms = {norm.mean.removesuffix(".running_mean") for _, way in ways for norm in way.norms}
    runs: dict[str, Any] = {}
    budget = niwaki.Budget(keep=keep, of="units")
    for how, solve in (("plain", "none"), ("A", "filter"), ("B", "activation")):
        for label, width in (("", 32), (" rounded", bits)):
            runs[how + label] = niwaki.compress(
                model,
                example,
                method=UDFC(bits=width, solve=solve),
                budget=budget,  # type: ignore[arg-type]
            )
    only = niwaki.compress(model, example, method=UDFC(bits=bits), budget=niwaki.Budget(keep=1.0))
    pictures = torch.cat([x for x, _ in task.splits.val.batches(options.pictures)][:1])
    fitting = torch.cat([x for x, _ in task.calibration(FITTED_ON // task.batch, 0)])
    dense = Seen(model, pictures, inputs=readers | makers, outputs=readers | norms)
    seen = {how: Seen(run.model, pictures, outputs=readers if how[0] in "AB" else ()) for how, run in runs.items()}
    seen |= {"dense": dense, "training": Seen(model, fitting, inputs=readers)}
    found = {f"{site.weight} -> {way.reader}": layer_errors(model, runs, site, way, seen, bits) for site, way in ways}
    logits = {how: share(seen[how].logits, dense.logits) for how in runs}
    logits["rounded alone"] = share(Seen(only.model, pictures).logits, dense.logits)
    values = {"network": name, "keep": keep, "bits": bits, "pictures": len(pictures), "layers": found, "logits": logits}
    rows.add(key, values, seed=0, threads=options.threads)


def page(rows: Rows) -> None:
    text = prose(f"""
        # Where the error of UDFC comes from

        Written by `python benchmarks/udfc_errors.py --table`; do not edit.

        CIFAR-10, channels chosen by path norm, weights rounded per output channel. Errors are powers of the difference
        to the dense network, in percent of the power of what a layer puts out around its channels' means, on
        {PICTURES} validation pictures. All lines but the last two have the dense network's own inputs: they tell what
        happens at one layer. What the last two have more came with the inputs, from the layers before.
    """)
    for row in rows.rows:
        text += f"## {row['network']}, {row['keep']:.0%} kept, {row['bits']} bits\n\n"
        lines = []
        for part, meaning in PARTS.items():
            found = [errors[part] for errors in row["layers"].values() if part in errors]
            if found:
                low, middle, high = np.quantile(found, (0.1, 0.5, 0.9))
                cells = (f"{100 * value:.1f}" for value in (middle, low, high))
                lines.append((part, meaning, *cells, len(found)))
        text += table(("", "what it is", "median layer", "10 %", "90 %", "layers"), lines) + "\n\n"
        text += said(row) + "\n\n"
        ends = {how: f"{100 * value:.1f}" for how, value in row["logits"].items()}
        text += "At the logits, in percent of their power: " + ", ".join(f"{h} {v}" for h, v in ends.items()) + ".\n\n"
    rows.write(text)


def said(row: dict[str, Any]) -> str:
    """The decomposition in one sentence."""

    complete = [errors for errors in row["layers"].values() if len(errors) == len(PARTS)]
    if len(complete) < FEW:
        return f"Of {len(complete)} layers all parts are known: too few to split the error up."

    def middle(part: str) -> float:
        return 100 * statistics.median(errors[part] for errors in complete)

    relu = middle("A") - middle("A, before the ReLU")
    return (
        f"In the median of {len(complete)} layers of which all parts are known: pruning {middle('best'):.1f} points, "
        "which no mixing of the channels that stay brings back; "
        f"ReLU {relu:+.1f} for A, which mixes as if there were none; statistics in place of data "
        f"{middle('B') - middle('best'):+.1f} for B; the quantiser {middle('B, rounded') - middle('B'):+.1f}; "
        f"propagation {middle('B, in the network') - middle('B, rounded'):+.1f}."
    )


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--keep", type=float, default=0.7, help="share of channels (default: %(default)s)")
        parser.add_argument("--bits", type=int, default=6, help="of weights (default: %(default)s)")
        parser.add_argument("--pictures", type=int, default=PICTURES, help="to validate on (default: %(default)s)")

    options = arguments((__doc__ or "").splitlines()[0], cases=NETWORKS, threads=1, more=more)
    warnings.simplefilter("ignore")
    os.chdir(ROOT)
    torch.set_num_threads(options.threads)
    rows = Rows("udfc_errors", fresh=options.fresh)
    if not options.table:
        splits = niwaki.data.open(f"cifar10:{DATA}", normalisation="imagenet", seed=0, root=ROOT)
        task = Classification(splits, batch=256)
        for name in options.only or NETWORKS:
            if name in TRAINED and not Path(ROOT / "runs" / f"udfc-{name}.safetensors").exists():
                print(f"{name}: not trained yet (benchmarks/udfc.py --train EPOCHS)", flush=True)
                continue
            errors(rows, name, options.keep, options.bits, task, options)
    page(rows)


if __name__ == "__main__":
    main()
