"""Layers refitted one after another, each to the inputs that it gets from the network as it is cut so far."""

from collections import Counter
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from niwaki.errors import InputError, NotFiniteError
from niwaki.evidence.patches import drawn, patches, stock
from niwaki.repair.normal_equations import NormalEquations, raised
from niwaki.repair.readers import Readers, evaluating, input_of
from niwaki.surgery.record import surgery_of
from niwaki.units import device_of, map_tensors, run, tensors_in

ADD = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)
MUL = torch.ops.aten.mul.Tensor
PERMUTE, TRANSPOSE = torch.ops.aten.permute.default, torch.ops.aten.transpose.int
CHUNK = 1 << 14
"""Rows that are in float64 at a time."""
LEAST = 1e-3
"""Of the largest factor behind a layer: a channel with less of it can make up for nothing in a sum."""


@dataclass(eq=False)
class Target:
    """What a layer of the uncut network put out at drawn positions, and what it is added to."""

    rows: Float[Tensor, "positions outputs"]
    places: Tensor
    """The drawn positions, of all that there are in the order of the output with its channels last."""
    channel: int
    """Axis of the channels in the output, and in the input."""
    around: tuple[int, ...]
    """The input's shape without its channels."""
    number: tuple[int, int]
    """Of the layer, as operators are numbered."""
    behind: tuple[str | float, ...] = ()
    """What scales and shifts each channel before the sum: modules of batch norms, parameters that are factors, or
    numbers that are."""
    other: tuple[int, int, int] | None = None
    """What it is added to: which operator made it, and as which of its outputs."""
    back: tuple[int, ...] = ()
    """Order of that value's axes in which it is laid out as the layer's output."""
    addend: Float[Tensor, "positions outputs"] | None = None
    """That value in the uncut network."""

    def at(self, value: Tensor) -> Float[Tensor, "positions outputs"]:
        """A value laid out as the layer's output, at the drawn positions."""
        flat = value.detach().movedim(self.channel, -1).reshape(-1, value.shape[self.channel])
        return flat[self.places.to(flat.device)]


@dataclass(frozen=True)
class _Way:
    """How a tensor comes from a layer: channels scaled and shifted, axes in another order."""

    layer: str
    behind: tuple[str | float, ...]
    axes: tuple[int, ...]
    """Which axis of the layer's output each axis is."""


class _Operators(TorchDispatchMode):
    """Numbers the operators of a forward from each layer on, so that a kernel chosen otherwise shifts few of them.

    A layer counts as one: with a bias added it may run others. Inside of it none are counted or looked at.
    """

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        self.names: list[list[Any]] = [[None]]
        """Layers that ran, each with the operators behind it; before the first one is none."""
        self.paused = False
        self.handles: list[RemovableHandle] = []
        for name, module in modules.items():
            if stock(module):
                self.handles.append(module.register_forward_pre_hook(self._starts(name), with_kwargs=True))
                self.handles.append(module.register_forward_hook(self._ends(name)))

    def _starts(self, name: str) -> Any:
        def hear(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.paused = True
            self.starts(name, module, input_of(args, kwargs).detach())

        return hear

    def _ends(self, name: str) -> Any:
        def hear(module: nn.Module, args: Any, out: Tensor) -> None:
            self.names.append([])
            self.after([out], self.ends(name, module, out))
            self.names[-1].append(name)
            self.paused = False

        return hear

    def starts(self, name: str, module: nn.Module, x: Tensor) -> None:
        """Hear of a layer that is about to run, and its input."""

    def ends(self, name: str, module: nn.Module, out: Tensor) -> Any:
        """Hear of what a layer put out; `after` gets what is returned."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        told = self.before(func, args, kwargs)
        out = func(*args, **kwargs)
        self.after(tensors_in(out), told)
        self.names[-1].append(func)
        return out

    @property
    def number(self) -> tuple[int, int]:
        """Of the operator at hand: layers so far, operators behind the last one."""
        return len(self.names) - 1, len(self.names[-1])

    def before(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Look at an operator before it runs; `after` gets what is returned. What it writes in place is gone then."""

    def after(self, outputs: list[Tensor], told: Any) -> None:
        raise NotImplementedError


class _Whole(_Operators):
    """A forward of the uncut network: targets of its layers, and the sums that they go into."""

    def __init__(self, model: nn.Module, layers: Container[str], most: int, seed: int) -> None:
        modules = dict(model.named_modules())
        super().__init__(modules)
        self.layers, self.most, self.seed = layers, most, seed
        self.targets: dict[str, Target] = {}
        self.calls: Counter[str] = Counter()
        self.inputs: dict[str, tuple[int, ...]] = {}
        """Layers that run, and the shapes of what they were given."""
        self.wrote: Any = WeakIdKeyDictionary()
        """Tensor -> the operator that wrote it last, and which of its outputs it is."""
        self.ways: Any = WeakIdKeyDictionary()
        self.read: Any = WeakIdKeyDictionary()
        """Tensors on their way from layers that were read."""
        self.branches: set[str] = set()
        """Layers of which something is read by several: what they put out is not for one sum alone."""
        self.factors = {(p.data_ptr(), p.numel()): name for name, p in model.named_parameters()}
        for name, module in modules.items():
            plain = isinstance(module, _BatchNorm) and type(module).forward is _BatchNorm.forward
            if plain and module.running_mean is not None:
                self.handles.append(module.register_forward_hook(self._norm(name), with_kwargs=True))

    def before(self, func: Any, args: Any, kwargs: Any) -> _Way | None:
        for tensor in tensors_in((args, kwargs)):
            if (passing := self.ways.get(tensor)) is not None:
                if tensor in self.read:
                    self.branches.add(passing.layer)
                self.read[tensor] = True
        first, second = (*args[:2], None, None)[:2]
        way = self.ways.get(first) if isinstance(first, Tensor) else None
        other = self.ways.get(second) if isinstance(second, Tensor) else None
        if way is None and other is None:
            return None
        if func in ADD and not kwargs and isinstance(second, Tensor) and first.shape == second.shape:
            self._added(way, second)
            self._added(other, first)
        elif func is MUL and isinstance(second, (int, float)) and way is not None:
            return _Way(way.layer, (*way.behind, float(second)), way.axes)
        elif func is MUL and isinstance(second, Tensor):
            return self._scaled(way, first, second) or self._scaled(other, second, first)
        elif func is PERMUTE and way is not None:
            return _Way(way.layer, way.behind, tuple(way.axes[axis] for axis in second))
        elif func is TRANSPOSE and way is not None:
            axes = list(way.axes)
            axes[args[1]], axes[args[2]] = axes[args[2]], axes[args[1]]
            return _Way(way.layer, way.behind, tuple(axes))
        return None

    def after(self, outputs: list[Tensor], told: _Way | None) -> None:
        for place, tensor in enumerate(outputs):
            self.wrote[tensor] = (*self.number, place)
            self.ways.pop(tensor, None)
        if told is not None:
            self.ways[outputs[0]] = told

    def _added(self, way: _Way | None, other: Tensor) -> None:
        """What comes from a layer is added to a value; of use if that was there before the layer ran."""
        made = self.wrote.get(other)
        if way is None or made is None:
            return
        target = self.targets[way.layer]
        if target.other is None and made[:2] < target.number:
            target.behind, target.other = way.behind, made
            target.back = tuple(way.axes.index(axis) for axis in range(len(way.axes)))
            target.addend = target.at(other.permute(target.back))

    def _scaled(self, way: _Way | None, value: Tensor, factor: Tensor) -> _Way | None:
        """A value's channels are multiplied by a parameter of one number each, or one for all."""
        if way is None:
            return None
        name = self.factors.get((factor.data_ptr(), factor.numel()))
        shape = [1] * (value.dim() - factor.dim()) + list(factor.shape)
        channel = way.axes.index(self.targets[way.layer].channel)
        fits = all(count in {1, value.shape[channel] if axis == channel else 1} for axis, count in enumerate(shape))
        return _Way(way.layer, (*way.behind, name), way.axes) if fits and name is not None else None

    def starts(self, name: str, module: nn.Module, x: Tensor) -> None:
        self.inputs[name] = tuple(x.shape)

    def ends(self, name: str, module: nn.Module, out: Tensor) -> _Way | None:
        self.calls[name] += 1
        if name not in self.layers or self.calls[name] > 1:
            return None
        channel = out.dim() - 1 - (0 if isinstance(module, nn.Linear) else module.weight.dim() - 2)  # type: ignore[operator, union-attr]
        of = out.numel() // out.shape[channel]
        places = drawn(of, self.most, torch.Generator().manual_seed(self.seed))
        around = _around(self.inputs.pop(name), channel)
        target = Target(out.new_empty(0), places, channel, around, self.number)
        target.rows = target.at(out).clone()
        self.targets[name] = target
        return _Way(name, (), tuple(range(out.dim())))

    def _norm(self, name: str) -> Any:
        def hear(module: nn.Module, args: Any, kwargs: Any, out: Tensor) -> None:
            way = self.ways.get(input_of(args, kwargs))
            if way is not None and way.axes[1] == self.targets[way.layer].channel:
                self.ways[out] = _Way(way.layer, (*way.behind, name), way.axes)

        return hear


class _Small(_Operators):
    """A forward of the cut network beside the uncut one's; keeps values that its layers are added to."""

    def __init__(
        self,
        small: nn.Module,
        names: list[list[Any]],
        targets: dict[str, Target],
        refit: Callable[[str, nn.Module, Tensor, Target, Tensor | None], str | None],
    ) -> None:
        modules = dict(small.named_modules())
        super().__init__(modules)
        self.expected, self.targets, self.refit = names, targets, refit
        self.same = True
        """Whether the operators since the last layer were the uncut network's."""
        self.wanted = Counter(target.other for target in targets.values() if target.other is not None)
        self.kept: dict[tuple[int, int, int], Tensor] = {}
        self.unsettled: set[str] = set()
        """Norms behind layers that were refitted."""
        for name, module in modules.items():
            if isinstance(module, _BatchNorm) and module.affine and module.running_mean is not None:
                self.handles.append(module.register_forward_pre_hook(self._norm(name), with_kwargs=True))

    def before(self, func: Any, args: Any, kwargs: Any) -> None:
        layer, number = self.number
        expected = self.expected[layer][number : number + 1] if layer < len(self.expected) else None
        self.same = self.same and expected == [func]

    def starts(self, name: str, module: nn.Module, x: Tensor) -> None:
        target = self.targets.pop(name, None)
        if target is not None and _around(tuple(x.shape), target.channel) == target.around:
            norm = self.refit(name, module, x, target, self._addend(target))
            self.unsettled |= {norm} if norm is not None else set()

    def ends(self, name: str, module: nn.Module, out: Tensor) -> None:
        layer, _ = self.number
        self.same = layer < len(self.expected) and self.expected[layer][0] == name

    def after(self, outputs: list[Tensor], told: None) -> None:
        for place, tensor in enumerate(outputs):
            if self.same and self.wanted[*self.number, place]:
                self.kept[*self.number, place] = tensor

    def _norm(self, name: str) -> Any:
        def hear(module: nn.Module, args: Any, kwargs: Any) -> None:
            if name in self.unsettled:
                self.paused = True
                _settle(module, input_of(args, kwargs).detach())
                self.paused = False

        return hear

    def _addend(self, target: Target) -> Float[Tensor, "positions outputs"] | None:
        """What the layer of a target is added to; None where it was not found."""
        key = target.other
        if key is None or key not in self.kept:
            return None
        value = self.kept[key]
        self.wanted[key] -= 1
        if not self.wanted[key]:
            del self.kept[key]
        return target.at(value.permute(target.back))


def refit_in_turn(
    readers: Readers,
    batches: Sequence[Any],
    *,
    ridge: float,
    raises: int,
    most: int,
    largest: int,
    settle: bool,
    seed: int,
) -> set[str]:
    """Refit all layers of a cut network in place, in the order in which they run, to what the uncut ones put out.

    Inputs are those of the network as it is cut and refitted so far. Where a layer's output, or what batch norms and
    factors of channels make of it, is added to a value that was there before, the target of the sum is the uncut sum:
    the layer also makes up for what that value lost. Left alone: layers that are called more than once or not at all,
    with a shared weight, outputs that the cut has scaled or more than `largest` inputs.

    With `settle` batch norms behind refitted layers then hold the statistics of what goes into them, and compute what
    they did: to estimate them again changes little, and training starts from what was fitted.

    Source: He et al. 2017, arXiv:1707.06168, sec. 3.1 (inputs of the cut network), sec. 3.2 (residual branches).

    Args:
        batches: inputs of the model, put together to one batch.
        most: positions that are drawn for a layer.

    Returns:
        Names of the layers that were refitted.

    Raises:
        InputError: batches that can't be put together.
        NotFiniteError: an input or output of a layer is NaN or infinite.
    """
    model, small, modules, own = readers.model, readers.small, readers.whole, readers.modules
    example = map_tensors(_together(batches), lambda tensor: tensor.to(device_of(model)))
    layers = [
        name
        for name, module in modules.items()
        if stock(module)
        and name in own
        and name not in readers.shared
        and module._parameters.get("weight") is not None
        and f"{name}.weight" not in readers.scaled
        and own[name].weight[0].numel() <= largest  # type: ignore[index, operator, union-attr]
    ]
    whole = _Whole(model, set(layers), most, seed)
    with evaluating(model, whole.handles), whole:
        run(model, example)
    targets = {name: target for name, target in whole.targets.items() if whole.calls[name] == 1 and len(target.rows)}
    for name in whole.branches & targets.keys():
        targets[name].other, targets[name].addend, targets[name].behind = None, None, ()
    scaled = {str(entry["tensor"]) for entry in surgery_of(small).scaled}
    for name in list(targets):
        names = (*targets[name].behind, *filter(None, [readers.follows.get(name)]))
        if any(f"{one}.{leaf}" in scaled or one in scaled for one in names for leaf in ("weight", "bias")):
            del targets[name]  # what stands behind it is of another scale than it was

    done: set[str] = set()

    def refit(name: str, module: nn.Module, x: Tensor, target: Target, addend: Tensor | None) -> str | None:
        rows = patches(module, x, most, torch.Generator().manual_seed(seed))
        _refit(name, module, rows, _Wanted(name, target, addend, readers), readers, ridge, raises)
        done.add(name)
        return readers.follows.get(name) if settle else None

    beside = _Small(small, whole.names, targets, refit)
    with evaluating(small, beside.handles), beside:
        run(small, example)
    return done


def _refit(
    name: str,
    layer: nn.Module,
    rows: Float[Tensor, "positions inputs"],
    wanted: "_Wanted",
    readers: Readers,
    ridge: float,
    raises: int,
) -> None:
    """Change a layer's weight and constant by least squares, so that it puts out what is wanted for its inputs."""
    weight: Tensor = layer.weight.detach()  # type: ignore[assignment, operator, union-attr]
    groups = int(getattr(layer, "groups", 1))
    flat = weight.double().reshape(groups, len(weight) // groups, -1)  # [groups, outputs, inputs]
    constant = layer.bias.detach().double() if layer.bias is not None else 0.0  # type: ignore[operator, union-attr]
    outputs, inputs = flat.shape[1:]
    halves = []
    for first, end in ((0, len(rows) // 2), (len(rows) // 2, len(rows))):
        sums = NormalEquations.of(flat)
        for start in range(first, end, CHUNK):
            at = slice(start, min(start + CHUNK, end))
            part = rows[at].double().unflatten(1, (groups, inputs)).movedim(1, 0)
            aim = (wanted[at] - constant).unflatten(1, (groups, outputs)).movedim(1, 0)
            sums.add(part, aim - part @ flat.mT)
        halves.append(sums)
    one, other = halves
    both = one + other
    if not bool(both.inputs.isfinite().all() and both.missing.isfinite().all()):
        do = "look for it in the batches and in the weights"
        raise NotFiniteError("refit layers", found="an input or output that is NaN or infinite", where=name, do=do)
    change, shift = both.solved(raised(one, other, ridge, raises))
    weight.add_(change.mT.reshape(weight.shape).to(weight.dtype))
    readers.shift(name, shift.flatten())


def _settle(norm: Any, x: Float[Tensor, "batch channels ..."]) -> None:
    """Give a batch norm the statistics of what goes into it, and a scale and shift by which it computes what it did.

    What is refitted varies less than what it stands for. Left with the old statistics, a norm would put that out as it
    is now but, once they are estimated again or in training, larger than was fitted.
    """
    places = [axis for axis in range(x.dim()) if axis != 1]
    if x.numel() < 2 * x.shape[1]:
        return  # one position has no variance
    variance, mean = torch.var_mean(x.double(), places)
    scale = norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()
    shift = norm.bias.double() + scale * (mean - norm.running_mean.double())
    norm.weight.copy_(scale * (variance + norm.eps).sqrt())
    norm.bias.copy_(shift)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)


class _Wanted:
    """What the cut layer is to put out: behind it the uncut layer's channels that stay, and in sum with the value that
    it is added to the uncut sum. Slices of positions give float64 `[positions, outputs]`.
    """

    def __init__(
        self, name: str, target: Target, addend: Float[Tensor, "positions outputs"] | None, readers: Readers
    ) -> None:
        behind = target.behind
        norm = readers.follows.get(name)
        if norm is not None and norm not in behind and readers.whole[norm].running_mean is not None:
            behind, addend = (norm,), None
        self.rows, self.keep = target.rows, readers.rows(name)
        self.sums = (target.addend, addend) if target.addend is not None and addend is not None else None
        self.before = _affine(behind, readers.whole, target.rows)
        self.factor, self.constant = _affine(behind, readers.modules, target.rows)
        self.useful = self.factor.abs() > LEAST * self.factor.abs().max()

    def __getitem__(self, part: slice) -> Float[Tensor, "positions outputs"]:
        rows = self.rows[part].double()
        aim = rows * self.before[0] + self.before[1]
        if self.sums is not None:
            aim = aim + self.sums[0][part]
        if self.keep is not None:
            aim, rows = aim[:, self.keep], rows[:, self.keep]
        if self.sums is not None:
            aim = aim - self.sums[1][part]
        factor = self.factor.where(self.useful, torch.ones_like(self.factor))
        return torch.where(self.useful, (aim - self.constant) / factor, rows)


def _affine(behind: tuple[str | float, ...], modules: dict[str, nn.Module], like: Tensor) -> tuple[Tensor, Tensor]:
    """Factor and constant of each channel that batch norms and factors come to, float64."""
    factor, constant = (like.new_full((), value, dtype=torch.float64) for value in (1.0, 0.0))
    for name in behind:
        if isinstance(name, float):
            factor, constant = factor * name, constant * name
            continue
        norm: Any = modules.get(name)
        if norm is not None:
            mean, variance = norm.running_mean.double(), norm.running_var.double()
            scale = (variance + norm.eps).rsqrt()
            if norm.weight is not None:
                scale = scale * norm.weight.detach().double()
            factor, constant = factor * scale, (constant - mean) * scale
            if norm.bias is not None:
                constant = constant + norm.bias.detach().double()
        else:
            path, _, leaf = name.rpartition(".")
            scale = modules[path].get_parameter(leaf).detach().double().flatten()
            factor, constant = factor * scale, constant * scale
    return factor, constant


def _around(shape: tuple[int, ...], channel: int) -> tuple[int, ...]:
    """A shape without its channels."""
    return shape[:channel] + shape[channel + 1 :]


def _together(batches: Sequence[Any]) -> Any:
    """Batches put together to one, along the first axis of every tensor."""
    if not batches:
        raise InputError("refit layers", found="no batches", do="give at least one batch of inputs")
    leaves = [tensors_in(batch) for batch in batches]
    shapes = {tuple(tuple(leaf.shape[1:]) if leaf.dim() else None for leaf in each) for each in leaves}
    if len(shapes) > 1 or None in next(iter(shapes)):
        kinds = [", ".join("one number" if shape is None else str(shape) for shape in each) for each in shapes]
        raise InputError(
            f"refit layers in turn on {len(batches)} batches",
            found=f"{len(kinds)} kinds of shapes, which can't be put together: {'; '.join(sorted(kinds)[:4])}",
            where="LeastSquares(inputs='cut'), which runs on all batches at once",
            do="give batches whose tensors differ in their first axis only, or inputs='whole'",
        )
    whole = iter([torch.cat(each) for each in zip(*leaves, strict=True)])
    return map_tensors(batches[0], lambda tensor: next(whole))
