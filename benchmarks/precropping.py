"""Do densities decide before training? The same ones as masks and as crops, beside networks of one width for all.

CIFAR-10 in ../shared/data, everything trained from scratch by one recipe; and ImageNet networks cropped by parameters
and by MACs, with the time and the memory of a training step. Rows are found again, so that a run that was interrupted
goes on. A GPU runs all of it: `python benchmarks/precropping.py --device cuda --epochs 40`; a CPU a short version:
`--epochs 1 --limit 600 --batch 32 --stride 2`. What is tried out with `--draft` lies in runs/ and is no result.
"""

import argparse
import itertools
import os
import statistics
import time
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from cifar import DATA
from precropping_page import ARMS, page
from rows import ROOT, Rows, arguments
from torch import Tensor, nn
from torch.nn.utils import parametrize

import niwaki
from niwaki import Budget
from niwaki.budgets import DensityWidths, Layers, TargetWidths, WaterFilling, choose, pools_of
from niwaki.budgets.atoms import make_atoms
from niwaki.budgets.pools import to_limits
from niwaki.graph.weights import weights_of
from niwaki.measure.turns import in_turns
from niwaki.methods import PreCropping
from niwaki.scores import Scores, Seen, SynFlow, masks, shuffled
from niwaki.surgery import renew_
from niwaki.tasks import Classification
from niwaki.train import Recovery

NETWORKS = ("resnet20", "vgg11_bn", "mobilenet_v2")
SHRINKS = (4, 10, 2)
"""Times fewer parameters, in the order of the runs."""
STRUCTURES = {
    "resnet50": "timm:resnet50",
    "shufflenet_v2_x1_0": "torchvision:shufflenet_v2_x1_0",
    "mobilenetv2_100": "timm:mobilenetv2_100",
    "efficientnet_b0": "timm:efficientnet_b0",
}
VGG11 = (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M")
LR = 0.1


def network(name: str, seed: int, stride: int = 1) -> nn.Module:
    """An untrained network for pictures of 32 x 32, whose first convolution goes in steps of `stride` pixels."""
    if name == "resnet20":
        model = niwaki.models.load("python:examples/cifar_resnet.py:resnet20", seed=seed, shape=(3, 32, 32)).model
        model.get_submodule("conv1").stride = (stride, stride)
        return model
    torch.manual_seed(seed)
    if name == "mobilenet_v2":
        import torchvision.models as zoo

        model = zoo.mobilenet_v2(weights=None, num_classes=10)
        model.features[0][0].stride = (stride, stride)
        model.features[2].conv[1][0].stride = (1, 1)
        return model.eval()
    parts: list[nn.Module] = []
    width = 3
    for step in VGG11 if stride == 1 else VGG11[:-1]:  # half of the pixels can be halved once less
        if isinstance(step, str):
            parts.append(nn.MaxPool2d(2))
        else:
            parts += [nn.Conv2d(width, step, 3, padding=1, bias=False), nn.BatchNorm2d(step), nn.ReLU(inplace=True)]
            width = step
    parts[0].stride = (stride, stride)
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(512, 10)).eval()


class Masked(nn.Module):
    """A weight of which only some numbers count."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def masked(model: nn.Module, kept: dict[str, Tensor]) -> nn.Module:
    """`model` whose weights outside the masks are zero and stay so."""
    for name, mask in kept.items():
        path, _, leaf = name.rpartition(".")
        parametrize.register_parametrization(model.get_submodule(path), leaf, Masked(mask.float()))
    return model


def kernels(kept: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Masks of whole kernels at random, as many as come nearest to each layer's count."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, mask in kept.items():
        flat = mask.flatten(2) if mask.dim() > 2 else mask.unsqueeze(2)
        count = max(1, round(int(mask.sum()) / flat.shape[2]))
        pick = torch.zeros(flat.shape[0] * flat.shape[1], dtype=torch.bool)
        pick[torch.randperm(pick.numel(), generator=generator)[:count]] = True
        found[name] = pick.reshape(*flat.shape[:2], 1).expand_as(flat).reshape(mask.shape).clone()
    return found


def weights(model: nn.Module, example: Any) -> list[str]:
    return [weight.name for weight in weights_of(niwaki.trace(model, example))]


def neutral(graph: Any) -> Scores:
    ones = {g.name: torch.ones(g.units, dtype=torch.float64) for g in graph.groups if g.fixed is None}
    return Scores(ones, {"name": "none"})


def narrow(model: nn.Module, example: Any, budget: Budget, *, backwards: bool, seed: int) -> nn.Module:
    """One width for all, or the widths of the program's densities in reverse order; with fresh weights."""
    graph = niwaki.trace(model, example)
    shares: tuple[float, ...] = ()
    if backwards:
        atoms, _ = make_atoms(graph, neutral(graph), grids="rows", exact_only=False, bundle="mean")
        pools = pools_of(graph, atoms, weights_of(graph), (budget.of,))
        free = pools.layers.may()
        whole = Layers({budget.of: pools.layers.costs[budget.of]}, free=free)
        limit = {budget.of: float(budget.keep) * float(whole.costs[budget.of].sum())}
        densities = WaterFilling()(whole, limit)
        densities[free] = densities[free][::-1]
        ones = 1.0 + 0.0 * pools.sizes
        rough = DensityWidths("neighbours")(pools, densities)
        limits = {budget.of: budget.limit(pools.costs[budget.of](ones))}
        shares = tuple(to_limits(pools, rough, limits, ones).tolist())
    plan = choose(graph, neutral(graph), budget, how=TargetWidths(shares))
    small = niwaki.cut(model, plan)
    renew_(small, model, graph.shapes, how="reset", seed=seed)
    return small


def cropped(model: nn.Module, example: Any, budget: Budget, seed: int, **settings: Any) -> nn.Module:
    method = PreCropping(**settings)
    return niwaki.compress(model, example, method=method, budget=budget, seed=seed).model


@lru_cache(maxsize=1)
def flowing(name: str, shrink: int, seed: int, stride: int) -> dict[str, Tensor]:
    """SynFlow's mask, which three arms share."""
    model, example = network(name, seed, stride), torch.zeros(1, 3, 32, 32)
    return masks(model, weights(model, example), 1 / shrink, how=SynFlow(), seen=Seen(example))


def made(arm: str, name: str, shrink: int, seed: int, stride: int) -> nn.Module:
    """The network of one arm, untrained; masked ones have all their weights, of which some are zero."""
    model, example = network(name, seed, stride), torch.zeros(1, 3, 32, 32)
    if arm == "dense":
        return model
    budget = Budget(keep=1 / shrink, of="params")
    if arm in ("a", "b", "c"):
        kept = flowing(name, shrink, seed, stride)
        kept = {"a": lambda: kept, "b": lambda: shuffled(kept, seed=seed), "c": lambda: kernels(kept, seed)}[arm]()
        return masked(model, kept)
    if arm == "d":
        return cropped(model, example, budget, seed, densities="synflow")
    if arm == "h":
        return narrow(model, example, budget, backwards=True, seed=seed)
    if arm == "g":
        return narrow(model, example, budget, backwards=False, seed=seed)
    first = cropped(model, example, budget, seed)
    if arm == "e":
        return first
    same = Budget(keep=int(niwaki.measure.Macs()(first, example).value), of="macs")
    if arm == "f":
        return cropped(model, example, same, seed)
    return narrow(model, example, same, backwards=False, seed=seed)


def trained(
    rows: Rows, arm: str, name: str, shrink: int, seed: int, task: Classification, options: argparse.Namespace
) -> None:
    """One network made, trained and tested."""
    short = f", {options.limit} steps each" if options.limit else ""
    strided = f", stride {options.stride}" if options.stride > 1 else ""
    key = f"{name}, {shrink}x, {arm}, seed {seed}, {options.epochs} epochs{short}, batch {options.batch}{strided}"
    if not rows.wanted(key):
        return
    example = torch.zeros(1, 3, 32, 32)
    start = time.perf_counter()
    model = made(arm, name, shrink, seed, options.stride)
    making = time.perf_counter() - start
    counted = {"macs": None, "params": None}
    if arm not in ("a", "b", "c"):
        counted = {n: int(m(model, example).value) for n, m in
                   (("macs", niwaki.measure.Macs()), ("params", niwaki.measure.Params()))}  # fmt: skip
    left = {
        name.partition(".parametrizations")[0]: round(float(module.mask.mean()), 4)
        for name, module in model.named_modules()
        if isinstance(module, Masked)
    }
    model.to(options.device).train()
    start = time.perf_counter()
    history = Recovery(epochs=options.epochs, lr=LR, seed=seed, limit=options.limit or None)(model, task)
    seconds = time.perf_counter() - start
    model.eval()
    rows.add(
        key,
        {
            "what": "accuracy",
            "network": name,
            "shrink": shrink,
            "arm": arm,
            "accuracy": task.evaluate(model, limit=options.pictures or None).value,
            "pictures": options.pictures or len(task.splits.test),
            **counted,
            "densities": left or None,
            "epochs": options.epochs,
            "steps": options.limit or task.steps,
            "batch": options.batch,
            "stride": options.stride,
            "lr": LR,
            "losses": history.losses,
            "making_s": making,
            "training_s": seconds,
            "device": device_name(options.device),
        },
        seed=seed,
        threads=options.threads,
    )


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"


def step_of(model: nn.Module, inputs: Tensor) -> Callable[[], None]:
    """One training step by SGD with momentum."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(inputs).square().mean().backward()
        optimizer.step()
        if inputs.is_cuda:
            torch.cuda.synchronize()

    return step


def step_bytes(model: nn.Module, inputs: Tensor) -> int:
    """Memory of a training step: the largest that was allocated on a GPU; on a CPU what the backward pass is kept for,
    with weights, gradients and momentum.
    """
    step = step_of(model, inputs)
    if inputs.is_cuda:
        step()
        torch.cuda.reset_peak_memory_stats()
        step()
        return int(torch.cuda.max_memory_allocated())
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(inputs)
    own = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    del out
    return sum({**held, **own}.values()) + 2 * sum(own.values())


def cpu_time(steps: dict[str, Callable[[], None]], runs: int) -> dict[str, float]:
    """Median milliseconds of this process's own time for each step, in turns: other work on the machine adds little."""
    taken: dict[str, list[float]] = {which: [] for which in steps}
    for _ in range(runs):
        for which, step in steps.items():
            start = time.process_time()
            step()
            taken[which].append(1e3 * (time.process_time() - start))
    return {which: statistics.median(times) for which, times in taken.items()}


def next_unit(graph: Any, plan: Any, of: str) -> float | None:
    """What the cheapest row that was cut would cost to have back, with as many as its groups' multiples ask for."""
    alive = niwaki.graph.plans.alive_of(graph, plan)
    atoms, _ = make_atoms(graph, neutral(graph), grids="rows", exact_only=False, bundle="mean")
    now, found = graph.cost(alive)[of], []
    for pool in range(len(atoms.pools)):
        more = alive.copy()
        for number in np.flatnonzero(atoms.pool == pool):
            units = atoms.units[number]
            if not alive[units].all():
                more[units] = True
                if all(int(more[g.ids].sum()) % g.multiple == 0 for g in graph.groups):
                    found.append(graph.cost(more)[of] - now)
                    break
    return min(found, default=None)


def structure(rows: Rows, name: str, of: str, options: argparse.Namespace) -> None:
    """One network cropped; what it was promised and has, and what a step of it takes beside the dense one's."""
    key = f"{name}, {options.keep} of {of}, batch {options.step_batch}, {device_name(options.device)}"
    if not rows.wanted(key):
        return
    loaded = niwaki.models.load(STRUCTURES[name], seed=options.seed)
    outcome = niwaki.compress(
        loaded.model, loaded.example, method=PreCropping(), budget=Budget(keep=options.keep, of=of), seed=options.seed
    )
    plan, graph = outcome.plan, outcome.graph
    alive = niwaki.graph.plans.alive_of(graph, plan)
    room, limit = plan.promised[f"{of}_before"] * options.keep, plan.promised[of]
    nets = {"dense": loaded.model.to(options.device).train(), "cropped": outcome.model.to(options.device).train()}
    inputs = torch.randn(options.step_batch, *loaded.example.shape[1:], device=options.device)
    memory = {which: step_bytes(net, inputs) for which, net in nets.items()}
    steps = {which: step_of(net, inputs) for which, net in nets.items()}
    taken = in_turns(steps, runs=options.runs, warm_up=2)
    rows.add(
        key,
        {
            "what": "structure",
            "network": name,
            "of": of,
            "keep": options.keep,
            **{f"{n}_dense": plan.promised[f"{n}_before"] for n in ("params", "macs")},
            **{f"{n}_cropped": plan.promised[n] for n in ("params", "macs")},
            "counted": {n: outcome.after[n].value for n in ("params", "macs")},
            "unused": room - limit,
            "next_unit": next_unit(graph, plan, of),
            "passed": outcome.receipt.passed,
            "door": plan.door,
            "widths": {g.name: [g.units, int(alive[g.ids].sum())] for g in graph.groups if g.fixed is None},
            "step_ms": {which: times.median() for which, times in taken.items()},
            "step_quarters": {which: times.quarters() for which, times in taken.items()},
            "step_cpu_ms": None if inputs.is_cuda else cpu_time(steps, options.runs),
            "step_bytes": memory,
            "batch": options.step_batch,
            "runs": options.runs,
            "device": device_name(options.device),
        },
        seed=options.seed,
        threads=options.threads,
    )  # fmt: skip


def options_of() -> argparse.Namespace:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--stages", nargs="+", choices=("accuracy", "structures"), default=["accuracy", "structures"]
        )
        parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS))
        parser.add_argument("--shrinks", nargs="+", type=int, default=list(SHRINKS), help="times fewer parameters")
        parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
        parser.add_argument("--epochs", type=int, default=40)
        parser.add_argument("--limit", type=int, default=0, help="most steps of an epoch; 0 is all")
        parser.add_argument("--pictures", type=int, default=0, help="most test pictures; 0 is all")
        parser.add_argument("--batch", type=int, default=128)
        parser.add_argument("--stride", type=int, choices=(1, 2), default=1, help="of the first convolution")
        parser.add_argument("--device", default="cpu")
        parser.add_argument("--keep", type=float, default=0.3, help="of the structures")
        parser.add_argument("--step-batch", type=int, default=32, help="of the structures' training step")
        parser.add_argument("--runs", type=int, default=5, help="timed training steps")
        parser.add_argument("--draft", action="store_true", help="rows to runs/, to try something out")

    return arguments(__doc__ or "", cases=(*NETWORKS, *STRUCTURES), more=more)


def main() -> None:
    options = options_of()
    warnings.simplefilter("ignore", niwaki.errors.NothingChangedWarning)
    os.chdir(ROOT)
    rows = Rows("precropping", fresh=options.fresh, packages=("torchvision", "timm"), draft=options.draft)
    if not options.table:
        torch.set_num_threads(options.threads)
        wanted = options.only or [*NETWORKS, *STRUCTURES]
        names = [name for name in NETWORKS if name in wanted and "accuracy" in options.stages]
        if options.only is None and not options.device.startswith("cuda"):
            names = [name for name in names if name != "mobilenet_v2"]  # for a GPU
        if names:
            splits = niwaki.data.open(f"cifar10:{DATA}", normalisation="cifar10", seed=0, root=ROOT)
            task = Classification(splits, batch=options.batch, augment="flip_crop")
        for name, shrink, seed, arm in itertools.product(names, options.shrinks, options.seeds, options.arms):
            if arm != "dense" or shrink == options.shrinks[0]:
                trained(rows, arm, name, shrink if arm != "dense" else 1, seed, task, options)
        for name in STRUCTURES:
            if name in wanted and "structures" in options.stages:
                for of in ("params", "macs"):
                    structure(rows, name, of, options)
    if not options.draft:
        page(rows)


if __name__ == "__main__":
    main()
