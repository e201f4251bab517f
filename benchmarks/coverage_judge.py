"""One model of `coverage.py`: every question of the list asked in turn, and the same model given to the peer."""

import contextlib
import dataclasses
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rows import ROOT
from torch import Tensor, nn

import niwaki
from niwaki.export import export_onnx
from niwaki.measure.latency import at_batch
from niwaki.methods import Outcome
from niwaki.methods.job import Job
from niwaki.surgery import surgery_of
from niwaki.units import map_tensors, run, tensors_in

KEEP = 0.5
BAR = 1e-8
"""Largest difference of cut and mask, relative to the outputs' scale."""
MOVED = 1e-6
"""Share of their scale by which the cut must change the outputs, or equal outputs would prove nothing."""
SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
"""What is kept, in the order tried: where single groups can't be halved, the next larger share."""

RANDOM = niwaki.scores.Random()
TOSSES = 8
"""Training forwards toss coins (layers left out, noise before a router), and narrower dropouts draw fewer numbers: the
cut model's fall otherwise. A parameter counts that gets a gradient in one of so many runs."""


class Row(dict[str, Any]):
    """What is known so far; every note is printed at once, so that a later stage that dies loses nothing."""

    def note(self, **values: Any) -> None:
        self.update(values)
        print(json.dumps(values), flush=True)

    @contextlib.contextmanager
    def stage(self, name: str, *, may_fail: bool = False) -> Iterator[None]:
        """Time a stage (`name_s`); one that may fail alone leaves its error under its own name and lets the rest go
        on."""
        self.note(stage=name)
        clock = time.perf_counter()
        try:
            yield
        except Exception as error:
            if not may_fail:
                raise
            self.note(**{name: trouble(error)})
        self.note(**{f"{name}_s": time.perf_counter() - clock, "peak_gib": peak_gib()})


def trouble(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{'/'.join(frame.filename.split('/')[-2:])}:{frame.lineno}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]} ({where})"


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def judge(source: str, *, quick: bool, seed: int = 0) -> None:
    """Print the row of one model, as far as it comes."""
    torch.manual_seed(seed)
    row = Row(source=source)
    with row.stage("build"):
        loaded = niwaki.models.load(source, seed=seed)
        model, example = loaded.model, loaded.example
        fill_(model, seed)
        level_(model, example)
    before = sum(p.numel() for p in model.parameters())
    row.note(params=before, built_gib=peak_gib())
    with row.stage("trace"):
        graph = niwaki.trace(model, example)
    row.note(device=graph.device, unknown=sorted({u.operation for u in graph.unknown}), **reach(graph))
    with row.stage("choose"):
        scores = niwaki.score(graph, niwaki.collect(model, graph, RANDOM.needs), how=RANDOM)
        plan, share = closest(graph, scores, how=niwaki.budgets.Uniform())
    if plan is None:
        row.note(error="no group can be cut")
        return
    row.note(inexact=len(plan.inexact), share=share)
    with row.stage("cut"):
        small = niwaki.cut(model, plan)
    row.note(kept=sum(p.numel() for p in small.parameters()) / max(before, 1), cut_gib=peak_gib())
    with row.stage("verify"):
        first = judged(model, small, plan, example, seed=seed)
        row.note(door=first["door"], exact=first["exact"], difference=first["difference"], passed=first["passed"])
    with row.stage("moved"):
        moved = moves(model, small, example, seed)
        row.note(moved=moved, passed=row["passed"] and moved > MOVED)
    if not row["exact"]:  # the judge can only compare what is exact: the same once more, without the rest
        with row.stage("exact_part"):
            strict, _ = closest(graph, scores, how=niwaki.budgets.Uniform(), exact_only=True)
            row.note(exact_difference=None)
            if strict is not None:
                second = judged(model, niwaki.cut(model, strict), strict, example, seed=seed)
                row.note(
                    exact_difference=second["difference"],
                    exact_units=strict.promised["units"] / strict.promised["units_before"],
                    passed=row["passed"] and second["passed"],
                )
    with row.stage("uneven", may_fail=True):
        row.note(**uneven(model, graph, scores, example, seed))
    with row.stage("gradients", may_fail=True):
        row.note(gradients=gradients(model, small, example))
    with row.stage("train", may_fail=True):
        row.note(train=training(model, small, example))
    if not quick:
        with row.stage("save", may_fail=True):
            row.note(saved=saved_and_loaded(model, small, plan, graph, example, source, seed))
        with row.stage("export", may_fail=True):
            row.note(export=exported(model, small, example))
        if classifies(source):
            with row.stage("onnx", may_fail=True):
                row.note(onnx=to_onnx(model, small, example))
    row.note(stage="quick" if quick else "done")


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


def level_(model: nn.Module, example: Any) -> None:
    """Scale the weights of every layer, in the order they run, so that what it puts out has unit variance: a signal
    that dies on the way would hide what is cut behind it.
    """
    done: set[int] = set()

    def scale(layer: nn.Module, _: Any, output: Any) -> Any:
        if id(layer) in done or not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        done.add(id(layer))
        spread = float(output.std()) if output.numel() > 1 else 0.0
        if not (math.isfinite(spread) and spread > 0) or 0.2 < spread < 5:
            return output
        for tensor in layer.parameters():
            tensor.div_(spread)
        return output / spread

    layers = (nn.Linear, nn.modules.conv._ConvNd)
    with torch.no_grad(), contextlib.ExitStack() as hooks:
        for layer in (m for m in model.eval().modules() if isinstance(m, layers)):
            hooks.callback(layer.register_forward_hook(scale).remove)
        with contextlib.suppress(Exception):  # trace says what is wrong with a forward that fails
            run(model, example)


def reach(graph: Any) -> dict[str, Any]:
    """The shares of parameters in free groups, and of those free along both of their first axes; what is fixed, why."""
    buffers = {axis.tensor for axis in graph.axes if axis.buffer}
    free = {(m.tensor, m.axis) for g in graph.groups if g.fixed is None for m in g.members}
    tensors = {tensor for tensor, _ in free}
    total = max(graph.params, 1)
    why: dict[str, str] = {}
    for group in graph.groups:
        for member in group.members:
            if group.fixed is not None and member.tensor not in buffers:
                why.setdefault(member.tensor, group.fixed)
    shut: dict[str, int] = {}
    both = 0
    for name, shape in graph.shapes.items():
        if name in buffers or not shape:
            continue
        if name not in tensors:
            reason = why.get(name, "no call touched it" if name in graph.unused else "axes of one position, or buffers")
            shut[reason] = shut.get(reason, 0) + math.prod(shape)
        elif all((name, axis) in free or shape[axis] == 1 for axis in range(min(len(shape), 2))):
            both += math.prod(shape)
    return {
        "free": graph.free_params / total,
        "free_both": both / total,
        "fixed": {why: n / total for why, n in sorted(shut.items(), key=lambda item: -item[1])[:8]},
        "unused": len(graph.unused),
    }


def closest(graph: Any, scores: Any, *, how: Any, of: str = "units", exact_only: bool = False) -> tuple[Any, float]:
    """The plan for the smallest share that every group allows; None where nothing can be cut."""
    for share in SHARES:
        try:
            budget = niwaki.Budget(keep=share, of=of)
            return niwaki.choose(graph, scores, budget, how=how, exact_only=exact_only), share
        except niwaki.errors.BudgetError:
            continue
    return None, 1.0


def judged(model: nn.Module, small: nn.Module, plan: Any, example: Any, *, seed: int) -> dict[str, Any]:
    """Cut against mask. Different shapes of outputs are an error; so is an output without numbers."""
    receipt = niwaki.verify(model, small, plan, example, seed=seed)
    relative = receipt.difference / receipt.scale if receipt.scale > 0 else math.inf
    passed = receipt.passed and math.isfinite(relative) and (not receipt.exact or relative < BAR)
    return {"door": receipt.door, "exact": receipt.exact, "difference": relative, "passed": passed}


def moves(model: nn.Module, small: nn.Module, example: Any, seed: int) -> float:
    """By how much of their scale the cut changes the outputs; 1 where it changes how many there are (detections)."""
    generator = torch.Generator().manual_seed(seed + 1)

    def draw(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator).to(tensor) if tensor.is_floating_point() else tensor

    inputs = map_tensors(example, draw)
    with torch.no_grad():
        model.eval()
        small.eval()
        before, after = tensors_in(run(model, inputs)), tensors_in(run(small, inputs))
    if [t.shape for t in before] != [t.shape for t in after]:
        return 1.0
    pairs = [(a.double(), b.double()) for a, b in zip(before, after, strict=True) if a.numel() and not a.is_complex()]
    scale = max((float(a.abs().max()) for a, _ in pairs), default=0.0)
    gap = max((float((a - b).abs().max()) for a, b in pairs), default=0.0)
    return gap / scale if scale > 0 and math.isfinite(gap) else 0.0


def uneven(model: nn.Module, graph: Any, scores: Any, example: Any, seed: int) -> dict[str, Any]:
    """A second plan whose groups shrink very differently: each has a level of its own."""
    generator = torch.Generator().manual_seed(seed + 2)
    values = {}
    for name, old in scores.values.items():
        level = torch.rand(1, generator=generator) * 3
        values[name] = (level * torch.rand(old.shape, generator=generator) + 0.01).to(old)
    rough = dataclasses.replace(scores, values=values)
    plan, _ = closest(graph, rough, how=niwaki.budgets.GlobalRank())
    if plan is None:
        return {"uneven": None}
    found = judged(model, niwaki.cut(model, plan), plan, example, seed=seed + 3)
    if not found["exact"]:
        strict, _ = closest(graph, rough, how=niwaki.budgets.GlobalRank(), exact_only=True)
        if strict is not None:
            second = judged(model, niwaki.cut(model, strict), strict, example, seed=seed + 3)
            found = {**second, "passed": found["passed"] and second["passed"]}
    return {"uneven": found["passed"], "uneven_difference": found["difference"], "uneven_door": found["door"]}


def saved_and_loaded(
    model: nn.Module, small: nn.Module, plan: Any, graph: Any, example: Any, source: str, seed: int
) -> bool | str:
    """Whether the saved run loads in a fresh process and puts out the same bits."""
    budget = niwaki.Budget(keep=KEEP, of="units")
    job = Job(model=model, example=example, budget=(budget,), seed=seed, source=source)
    surgery = surgery_of(small)
    outcome = Outcome(
        model=small,
        plan=plan.with_mends(surgery.mends, surgery.door),
        receipt=niwaki.Receipt(0.0, 1.0, exact=True, inexact=(), door=surgery.door, inputs=1),
        before={},
        after={},
        stages=(),
        graph=graph,
        method={"name": "random"},
        job=job,
        surgery=surgery,
        history=None,
        seconds={},
    )
    with tempfile.TemporaryDirectory() as folder:
        outcome.save(Path(folder) / "run")
        words = [sys.executable, "-m", "niwaki", "load-check", f"{folder}/run", source, "--json"]
        told = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
        if told.returncode == 0 and json.loads(told.stdout)["equal"] is True:
            return True
        return " ".join((told.stderr or told.stdout).split())[-400:]


def backward(network: nn.Module, arguments: Any, seed: int = 0) -> set[str]:
    """Names of the parameters that have a gradient, after a backward through all outputs."""
    network.zero_grad(set_to_none=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        outputs = [t for t in tensors_in(run(network, arguments)) if t.is_floating_point() and t.requires_grad]
        torch.stack([t.float().square().mean() for t in outputs if t.numel()]).sum().backward()
    return {name for name, p in network.named_parameters() if p.grad is not None}


def gradients(model: nn.Module, small: nn.Module, example: Any) -> bool:
    """Whether every parameter that has a gradient in the model has one in the cut model."""
    return backward(model.eval(), example) <= backward(small.eval(), example)


def training(model: nn.Module, small: nn.Module, example: Any) -> bool | str:
    """The same in training mode, on two samples (one makes no batch statistics), with targets where those are asked."""
    held = [(buffer, buffer.clone()) for m in (model, small) for buffer in m.buffers()]  # running statistics move
    reason = ""
    try:
        for inputs in candidates(example):
            try:
                wanted = backward(model.train(), inputs)
            except Exception as error:
                reason = reason or trouble(error)
                continue
            small.train()
            for seed in range(TOSSES):
                wanted -= backward(small, shuffled(inputs, seed) if seed else inputs, seed)
                if not wanted:
                    return True
            return False
        return f"the original does not run: {reason}"[:200]
    finally:
        model.eval()
        small.eval()
        for buffer, before in held:
            buffer.copy_(before)


def shuffled(inputs: Any, seed: int) -> Any:
    """The same tokens in another order: a router of other widths sends them to other experts."""
    generator = torch.Generator().manual_seed(seed)

    def shuffle(tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.int64:
            return tensor
        return tensor.flatten()[torch.randperm(tensor.numel(), generator=generator)].reshape(tensor.shape)

    return map_tensors(inputs, shuffle)


def candidates(example: Any) -> Iterator[Any]:
    """Inputs to try training on."""
    if isinstance(example, list):
        generator = torch.Generator().manual_seed(0)
        images = [torch.rand(image.shape, generator=generator) for image in (*example, *example)]
        yield images, [target(image) for image in images]
    else:
        with contextlib.suppress(Exception):
            yield at_batch(example, 2)
    yield example


def target(image: Tensor) -> dict[str, Tensor]:
    """One box with its mask and keypoints."""
    height, width = image.shape[-2:]
    mask = torch.zeros(1, height, width, dtype=torch.uint8)
    mask[:, height // 4 : height // 2, width // 4 : width // 2] = 1
    points = torch.tensor([[width / 3, height / 3, 1.0]]).expand(1, 17, 3)
    return {
        "boxes": torch.tensor([[width / 4, height / 4, width / 2, height / 2]]),
        "labels": torch.ones(1, dtype=torch.int64),
        "masks": mask,
        "keypoints": points,
    }


def exported(model: nn.Module, small: nn.Module, example: Any) -> bool | str:
    """Whether `torch.export` takes the cut model, if it takes the original."""

    def take(network: nn.Module) -> None:
        named = isinstance(example, dict)
        arguments = () if named else example if isinstance(example, tuple) else (example,)
        with torch.no_grad():
            torch.export.export(network.eval(), arguments, kwargs=example if named else None, strict=False)

    return as_original(model, small, take)


def to_onnx(model: nn.Module, small: nn.Module, example: Any) -> bool | str:
    """Whether ONNX Runtime computes what the cut model computes, if it does so for the original."""

    def take(network: nn.Module) -> None:
        with tempfile.TemporaryDirectory() as folder:
            export_onnx(network.eval(), example, Path(folder) / "model.onnx")

    return as_original(model, small, take)


def as_original(model: nn.Module, small: nn.Module, take: Any) -> bool | str:
    try:
        take(small)
    except Exception as error:
        told = trouble(error)
        try:
            take(model)
        except Exception as original:
            return f"the original neither: {trouble(original)}"[:200]
        return told
    return True


def classifies(source: str) -> bool:
    """A classifier of torchvision's in plain floating point."""
    if not source.startswith("torchvision:"):
        return False
    from torchvision import models

    name = source.removeprefix("torchvision:").partition("?")[0]
    return models.get_model_builder(name).__module__.count(".") == 2


def heads(model: nn.Module, shapes: list[tuple[int, ...]]) -> list[nn.Module]:
    """Layers that the peer must be told to leave alone: those as wide as an output (its examples do the same)."""
    wide = {shape[1] for shape in shapes if len(shape) > 1}
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))]
    return [m for m in layers if (m.out_features if isinstance(m, nn.Linear) else m.out_channels) in wide] or layers[
        -1:
    ]
