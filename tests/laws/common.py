"""What several laws need: plans of many kinds, double precision, snapshots, and an independent referee for costs."""

import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import niwaki
from niwaki.graph.plans import plan_of
from niwaki.methods.one_shot import OneShot
from niwaki.units import map_tensors, run, tensors_in
from zoo import Case

GRIDS = ("rows", "columns")


def has_free_units(graph: Any) -> bool:
    return any(group.fixed is None for group in graph.groups)


def neutral_scores(model: nn.Module, graph: Any) -> Any:
    """Scores of the first score that needs no evidence or only weights, as a container for the law's own values."""
    how = next(how for how in score_blocks() if not needs_gradients(how))
    return niwaki.score(graph, niwaki.collect(model, graph, how.needs), how=how)


VERBS = {"kv": {"choose", "pack", "layer"}}
"""What blocks of a role are asked for, where it is not a call."""


def block_classes(role: str) -> list[Any]:
    """Every block that a role lists: concrete dataclasses that are called; abstract types and values are not."""
    folder = getattr(niwaki, role)
    found = []
    for name in folder.__all__:
        thing = getattr(folder, name)
        verbs = VERBS.get(role, {"__call__"})
        called = isinstance(thing, type) and any(verbs & set(vars(base)) for base in thing.__mro__)
        if called and dataclasses.is_dataclass(thing) and not getattr(thing, "__abstractmethods__", None):
            found.append(thing)
    return found


def score_blocks() -> list[Any]:
    """Every score of units there is, with its default settings."""
    return [cls() for cls in block_classes("scores") if issubclass(cls, niwaki.scores.Score)]


def budget_blocks() -> list[Any]:
    """Every rule there is, with its default settings."""
    return [cls() for cls in block_classes("budgets") if issubclass(cls, niwaki.budgets.Rule)]


def method_blocks() -> list[Any]:
    """Every method, its trainings one epoch long, in any widths; those that take any network come first."""
    found = []
    for cls in block_classes("methods"):
        short = {f.name: 1 for f in dataclasses.fields(cls) if f.name.endswith("_epochs") or f.name == "multiple"}
        found.append(cls(**short))
    return sorted(found, key=lambda method: not isinstance(method, OneShot))


def needs_gradients(block: Any) -> bool:
    return any("grad" in need.name.lower() for need in block.needs)


def random_scores(model: nn.Module, graph: Any, seed: int, *, uneven: bool = True) -> Any:
    """Random scores; uneven ones give each group a level of its own, so that widths shrink very differently."""
    generator = torch.Generator().manual_seed(seed)
    scores = neutral_scores(model, graph)
    values = {}
    for name, old in scores.values.items():
        level = torch.rand(1, generator=generator) * 3 if uneven else torch.ones(1)
        values[name] = (level * torch.rand(old.shape, generator=generator) + 0.01).to(old)
    return dataclasses.replace(scores, values=values)


def choose(graph: Any, scores: Any, budget: Any, **settings: Any) -> Any:
    """`niwaki.choose` without the warning that nothing changed, and with a default rule."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", niwaki.errors.NothingChangedWarning)
        return niwaki.choose(graph, scores, budget, how=settings.pop("how", niwaki.budgets.GlobalRank()), **settings)


KINDS = (("macs", 0.5, False), ("units", 0.3, True), ("params", 0.6, True), ("units", 0.8, True))
"""Budget, share, and whether groups shrink very differently."""


def plans(model: nn.Module, graph: Any, *, seed: int = 0, kinds: int = len(KINDS)) -> Iterator[tuple[str, Any]]:
    """Plans of several kinds, each by rows and by columns of grids: even and uneven widths, few and many units."""
    if not has_free_units(graph):
        return
    for grids in GRIDS:
        for of, keep, uneven in KINDS[:kinds]:
            scores = random_scores(model, graph, seed, uneven=uneven)
            seed += 1
            plan, share = closest(graph, scores, keep, of=of, grids=grids)
            yield f"{grids}, keep {share} of {of}, scores {seed - 1}", plan
    if graph.blocks:
        alive = np.ones(graph.units.count, bool)
        alive[np.concatenate([block.ids for block in graph.blocks])] = False
        yield "every block left out", plan_of(graph, alive)
        scores = random_scores(model, graph, seed)
        plan, share = closest(graph, scores, 0.6, of="params", blocks="also")
        yield f"blocks too, keep {share} of params, scores {seed}", plan


def closest(graph: Any, scores: Any, keep: float, *, of: str, **settings: Any) -> tuple[Any, float]:
    """The plan for `keep`, or for the next larger share that this graph can be cut to."""
    while True:
        try:
            return choose(graph, scores, niwaki.Budget(keep=keep, of=of), **settings), keep
        except niwaki.errors.BudgetError:
            assert keep < 1.0, "even keeping everything was refused"
            keep = min(1.0, round(keep + 0.1, 2))


class AnyTask(niwaki.tasks.Task):
    """A task for any network of the zoo: bring the outputs near 0.3, over a few batches like the example."""

    def __init__(self, example: Any) -> None:
        self.batches = [example, *(like(fresh(example, seed), example) for seed in (1, 2))]

    @property
    def steps(self) -> int:
        return len(self.batches)

    def train_batches(self, seed: int) -> Iterator[Any]:
        order = torch.randperm(len(self.batches), generator=torch.Generator().manual_seed(seed))
        return iter([self.batches[i] for i in order])

    def calibration(self, n_batches: int, seed: int) -> list[Any]:
        return self.batches[:n_batches]

    def inputs(self, batch: Any) -> Any:
        return batch

    def example(self) -> Any:
        return self.batches[0]

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        total = sum(((t - 0.3) ** 2).mean() for t in tensors_in(run(model, batch)))
        assert isinstance(total, Tensor)
        return total

    def evaluate(self, model: nn.Module, *, split: str = "test", limit: int | None = None) -> Any:
        with torch.no_grad():
            value = float(self.loss(model, self.batches[0]))
        return niwaki.Measurement("distance", value, "1", "mean squared distance of the outputs from 0.3")


def like(example: Any, pattern: Any) -> Any:
    """`example` in the precision of `pattern`."""
    precision = next((t.dtype for t in tensors_in(pattern) if t.is_floating_point()), torch.float32)
    return map_tensors(example, lambda t: t.to(precision) if t.is_floating_point() else t)


def double(example: Any) -> Any:
    return map_tensors(example, lambda t: t.double() if t.is_floating_point() else t)


def fresh(example: Any, seed: int) -> Any:
    """Other inputs of the same shapes; token numbers are permuted, real values drawn again, both in float64."""
    generator = torch.Generator().manual_seed(seed)

    def change(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        order = torch.randperm(tensor.numel(), generator=generator)
        return tensor.flatten()[order].reshape(tensor.shape)

    return map_tensors(example, change)


def outputs(model: nn.Module, example: Any) -> list[Tensor]:
    with torch.no_grad():
        return [t.detach().clone() for t in tensors_in(run(model, map_tensors(example, torch.clone)))]


def difference(left: list[Tensor], right: list[Tensor]) -> float:
    """Largest difference, relative to the largest value of the tensor (or to one)."""
    assert len(left) == len(right) and left, "different numbers of outputs"
    worst = 0.0
    for a, b in zip(left, right, strict=True):
        assert a.shape == b.shape, f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
        assert bool(torch.isfinite(a).all()) and bool(torch.isfinite(b).all()), "not finite"
        worst = max(worst, float((a - b).abs().max() / max(1.0, float(a.abs().max()))))
    return worst


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Fused kernels off, so that PyTorch's counter sees every product: attention, encoder layers, recurrent layers."""
    fast, fused = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    torch.backends.mha.set_fastpath_enabled(False)
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        with sdpa_kernel([SDPBackend.MATH]):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch.backends.mkldnn.enabled = fused


def counted_macs(model: nn.Module, example: Any) -> int:
    """Multiply-adds of one forward, by PyTorch's own counter (it asks for gradients of what wants some)."""
    wanting = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in wanting:
            parameter.requires_grad_(False)
        with plain_kernels(), torch.no_grad(), FlopCounterMode(display=False) as counter:
            run(model, example)
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return flops // 2


def counted_params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under every name, also those that are not saved."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return dict(named)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal shape, type and bytes (so that a NaN equals itself and -0 does not equal 0)."""
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    if a.is_meta:
        return True
    left, right = a.detach().contiguous().reshape(-1), b.detach().contiguous().reshape(-1)
    return left.numel() == 0 or torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def trace(case: Case, *, exact: bool = False) -> tuple[nn.Module, Any, Any]:
    """Model, example and graph of a case; `exact` means in float64."""
    model, example = case.make(), case.example()
    if exact:
        model, example = model.double(), double(example)
    return model, example, niwaki.trace(model, example)


def apply_cuts(tensor: Tensor, entries: list[dict[str, Any]]) -> Tensor:
    """A plan's `cuts` of one tensor with nothing but `index_select`, as a stranger to niwaki would apply them.

    With `blocks`, axis 0 is divided evenly into blocks and each has its own indices along the axis. With `values` the
    tensor is a table of positions, and these are what is left of it, renumbered.
    """
    for entry in entries:
        if "values" in entry:
            return torch.tensor(entry["values"], dtype=tensor.dtype)
    whole = {
        entry["axis"]: torch.tensor(entry["keep"], dtype=torch.long) for entry in entries if entry.get("blocks", 1) == 1
    }
    blocked = [entry for entry in entries if entry.get("blocks", 1) > 1]
    if not blocked:
        for axis, keep in whole.items():
            tensor = tensor.index_select(axis, keep)
        for entry in entries:  # lists of positions are renumbered after the selection
            if "values" in entry:
                tensor = torch.tensor(entry["values"], dtype=tensor.dtype)
        return tensor
    (entry,) = blocked
    rows = whole.pop(0, torch.arange(tensor.shape[0]))
    size = tensor.shape[0] // entry["blocks"]
    parts = []
    for number, block in enumerate(tensor.split(size)):
        mine = rows[rows // size == number] % size
        if mine.numel():
            parts.append(block.index_select(0, mine).index_select(entry["axis"], torch.tensor(entry["keep"][number])))
    tensor = torch.cat(parts)
    for axis, keep in whole.items():
        tensor = tensor.index_select(axis, keep)
    return tensor


def cuts_by_tensor(plan: Any) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for entry in plan.cuts:
        found.setdefault(entry["tensor"], []).append(entry)
    return found


def stays(tensor: Tensor, entries: list[dict[str, Any]]) -> Tensor:
    """Which elements of a tensor a plan keeps; bool, of the tensor's shape."""
    numbers = torch.arange(tensor.numel()).reshape(tensor.shape)
    entries = [{key: value for key, value in entry.items() if key != "values"} for entry in entries]
    kept = torch.zeros(tensor.numel(), dtype=torch.bool)
    kept[apply_cuts(numbers, entries).flatten()] = True
    return kept.reshape(tensor.shape)
