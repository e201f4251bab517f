"""The second door: `torch.export`'s graph with cut parameters and the size constants that the labels prove wrong.

The result is an ordinary `nn.Module` under the user's parameter names. It holds one graph for evaluation and, where the
model exports in training mode too, one for training; it is saved as plain JSON and safe tensors.
"""

import copy
import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from niwaki.graph import ChannelGraph
from niwaki.graph.ends import seed
from niwaki.graph.groups import components, rows_of_grids
from niwaki.graph.labels import LabelSpace
from niwaki.graph.recorder import Recorder
from niwaki.graph.running import quiet
from niwaki.graph.skeleton import copy_with, identity, shared, to_meta
from niwaki.graph.trace import note_constant
from niwaki.graph.values import Parameter
from niwaki.plan import Plan, apply_cuts, decode_example
from niwaki.surgery.blocks import leave_out_
from niwaki.surgery.check import example_of, retrace, unregister
from niwaki.surgery.evidence import Sizes
from niwaki.surgery.graph_json import Program, compile_program, program_of
from niwaki.surgery.record import Surgery, remember
from niwaki.surgery.rewrite import Refused, rewrite
from niwaki.units import device_of, map_tensors

log = logging.getLogger(__name__)


class Exported(nn.Module):
    """A cut model as a rewritten graph. Call it like the original; parameters keep their names.

    `train()` uses the graph exported in training mode; where there is none, it raises.
    """

    def __init__(
        self, tensors: dict[str, Tensor], trainable: dict[str, bool], programs: dict[bool, Program], note: str = ""
    ) -> None:
        super().__init__()
        placed: dict[int, Tensor] = {}  # a tensor under two names stays one parameter
        for name, tensor in tensors.items():
            if name in trainable and id(tensor) not in placed:
                known = isinstance(tensor, nn.Parameter)
                placed[id(tensor)] = tensor if known else nn.Parameter(tensor, requires_grad=trainable[name])
            _place(self, name, placed.get(id(tensor), tensor), trainable.get(name))
        self._programs = programs
        self._note = note
        self._codes = {mode: compile_program(program) for mode, program in programs.items()}
        self._fit: tuple[torch.dtype, torch.device] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._refit()
        code = self._codes.get(self.training)
        if code is None:
            raise RuntimeError(f"this exported model has no training graph: {self._note}; call eval() first")
        return code(self, args, kwargs)

    def _refit(self) -> None:
        """Follow a move: constants of the graphs that name the old floating type or device name the new one."""
        tensor = next((t for t in (*self.parameters(), *self.buffers()) if t.is_floating_point()), None)
        fit = (tensor.dtype, tensor.device) if tensor is not None else None
        if fit is not None and fit != self._fit:
            self._programs = {mode: program.fitted(*fit) for mode, program in self._programs.items()}
            self._codes = {mode: compile_program(program) for mode, program in self._programs.items()}
            self._fit = fit

    @property
    def trains(self) -> bool:
        """Whether there is a graph of training mode."""
        return True in self._programs

    def set_momentum(self, momentum: float | None) -> None:
        """Weight of the next batch in running statistics; None brings the exported one back."""
        self._refit()
        code = self._programs.get(True)
        if code is not None:
            self._codes[True] = compile_program(code if momentum is None else code.with_momentum(momentum))

    def to_json(self) -> dict[str, Any]:
        return {
            "note": self._note,
            "programs": {("train" if mode else "eval"): p.to_json() for mode, p in self._programs.items()},
        }


def rebuild(data: dict[str, Any], tensors: dict[str, Tensor], trainable: dict[str, bool]) -> Exported:
    """The module `to_json` described, with these tensors.

    Raises:
        FileDamagedError: a call outside ATen, or a graph that does not hold together.
    """
    programs = {key == "train": Program.from_json(value) for key, value in data["programs"].items()}
    return Exported(tensors, trainable, programs, str(data.get("note", "")))


def _place(root: nn.Module, name: str, tensor: Tensor, trainable: bool | None) -> None:
    """Register `tensor` under its dotted name; `trainable` None makes it a buffer."""
    *path, leaf = name.split(".")
    module = root
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module._modules[part]  # type: ignore[assignment]
    if trainable is None:
        module.register_buffer(leaf, tensor)
    elif isinstance(tensor, nn.Parameter):
        module.register_parameter(leaf, tensor)
    else:
        module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=trainable))


def cut_exported(model: nn.Module, plan: Plan, graph: ChannelGraph, alive: np.ndarray) -> tuple[nn.Module | None, str]:
    """The cut model through this door, or None with the reason."""
    example = decode_example(plan.example, str(device_of(model)))
    known = graph.exports
    if plan.dropped:  # another program than the model's own
        model, known = copy_with(model, shared), {}
        leave_out_(model, plan.dropped)
    programs: dict[bool, Program] = {}
    note = ""
    cuts = plan.by_tensor()
    tensors: dict[str, Tensor] = {}
    trainable: dict[str, bool] = {}
    for mode in (False, True):
        try:
            if mode not in known:
                known[mode] = program_of(_export(model, example, train=mode))
            program, constants = copy.deepcopy(known[mode])
            _rewrite(program, constants, model, graph, alive, example)
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"
            if not mode:
                return None, reason
            note = reason
            log.info("no training graph: %s", reason)
            continue
        programs[mode] = program
        tensors.update({name: tensor for name, tensor in constants.items() if name not in tensors})
    names: dict[Any, str] = {}
    made: dict[str, Tensor] = {}
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        first = names.setdefault(identity(tensor), name)
        if first != name:
            made[name] = made[first]
            if isinstance(tensor, nn.Parameter):
                trainable[name] = tensor.requires_grad
            continue
        data = tensor.detach()
        data = apply_cuts(data, cuts[name], name).contiguous() if name in cuts else data.clone()
        if isinstance(tensor, nn.Parameter):
            made[name] = nn.Parameter(data, requires_grad=tensor.requires_grad)
            trainable[name] = tensor.requires_grad
        else:
            made[name] = data
    small = Exported({**made, **tensors}, trainable, programs, note)
    small.train(model.training) if (not model.training or True in programs) else small.eval()
    seen = retrace(small, graph, alive, example_of(graph, model), meta=graph.device == "meta", loose=tensors)
    if seen.problem is not None:
        return None, seen.problem
    remember(small, Surgery("exported", graph=small.to_json()))
    return small, ""


def _export(model: nn.Module, example: Any, *, train: bool) -> ExportedProgram:
    """Export with a free batch where the model allows it."""
    skeleton = copy_with(model, lambda t: shared(t) if isinstance(t, nn.Parameter) else t.detach().clone())
    skeleton.train(train)
    for parameter in skeleton.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example, dict):
        kwargs = example
    elif isinstance(example, tuple):
        args = example
    else:
        args = (example,)

    def grow(tensor: Tensor) -> Tensor:
        """At least two samples: a batch of one would be taken for a constant."""
        if tensor.dim() > 0 and tensor.shape[0] == 1:
            return tensor.expand(2, *tensor.shape[1:]).contiguous()
        return tensor

    def free(tensor: Tensor) -> Any:
        return {0: Dim.AUTO} if tensor.dim() > 0 else None

    error: Exception | None = None
    import warnings

    with warnings.catch_warnings(), quiet(skeleton):
        warnings.simplefilter("ignore")
        for dynamic in (True, False):
            try:
                if dynamic:
                    a, k = map_tensors(args, grow), map_tensors(kwargs, grow)
                    return torch.export.export(
                        skeleton, a, k, dynamic_shapes=_shapes(skeleton, a, k, free), strict=False
                    )
                return torch.export.export(skeleton, args, kwargs, strict=False)
            except Exception as failure:
                error = failure
    assert error is not None
    raise error


def _shapes(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], free: Any) -> Any:
    def spec(value: Any) -> Any:
        if isinstance(value, Tensor):
            return free(value)
        if isinstance(value, dict):
            return {key: spec(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(spec(item) for item in value)
        return None

    import inspect

    names = list(inspect.signature(module.forward).parameters.values())
    table: dict[str, Any] = {}
    for i, value in enumerate(args):
        if i < len(names) and names[i].kind == inspect.Parameter.VAR_POSITIONAL:
            table[names[i].name] = tuple(spec(v) for v in args[i:])
            break
        table[names[i].name] = spec(value)
    for key, value in kwargs.items():
        table[key] = spec(value)
    return table


def _rewrite(
    program: Program,
    constants: dict[str, Tensor],
    model: nn.Module,
    graph: ChannelGraph,
    alive: np.ndarray,
    example: Any,
) -> None:
    """Run the exported graph under the recorder and correct every size that the labels prove wrong."""
    root = nn.Module()
    memo: dict[Any, Tensor] = {}
    pairs: list[tuple[Tensor, Tensor]] = []
    every = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
        *constants.items(),
    )
    for name, tensor in every:
        if identity(tensor) not in memo:
            memo[identity(tensor)] = to_meta(tensor)
            pairs.append((tensor, memo[identity(tensor)]))
        stand_in = memo[identity(tensor)]
        _place(root, name, stand_in, tensor.requires_grad if isinstance(tensor, nn.Parameter) else None)
    space = LabelSpace()
    recorder = Recorder(space)
    parameters = seed(recorder, root)
    unregister(recorder, parameters, {name: memo[identity(tensor)] for name, tensor in constants.items()})
    for real, twin in pairs:
        note_constant(recorder, real, twin)
    inputs = map_tensors(example, lambda t: t.to("meta"))
    flat, _ = pytree.tree_flatten(_as_call(inputs))
    traced = _Traced(root, program.graph, recorder)
    with quiet(model), torch.no_grad(), recorder:
        traced.run(*flat)
    stays = _stays(space, parameters, graph, alive)
    rewrite(program.graph, traced.seen, Sizes(stays, frozenset(name for name, _, _ in graph.tables)))


def _as_call(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, dict):
        return (), example
    return (example, {}) if isinstance(example, tuple) else ((example,), {})


class _Traced(fx.Interpreter):
    """Runs a graph and remembers what the recorder knows of every node's result."""

    def __init__(self, root: nn.Module, graph: fx.Graph, recorder: Recorder) -> None:
        super().__init__(root, garbage_collect_values=False, graph=graph)
        self.recorder = recorder
        self.seen: dict[str, Any] = {}

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": torch.device("meta")}
        args = tuple(torch.device("meta") if isinstance(item, torch.device) else item for item in args)
        return super().call_function(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.seen[n.name] = map_tensors(result, self.recorder.value) if not isinstance(result, (int, float)) else result
        return result


def _stays(space: LabelSpace, parameters: dict[str, Parameter], graph: ChannelGraph, alive: np.ndarray) -> np.ndarray:
    """Whether each label of a trace stays, by the units of the graph's parameters it is tied to."""
    rows_of_grids(space)
    component = components(space.count, space.strict)
    stays = np.ones(int(component.max(initial=0)) + 1, dtype=bool)
    padded = np.append(alive, True)
    for axis in graph.axes:
        parameter = parameters.get(axis.tensor)
        if parameter is None or axis.axis not in parameter.seeds:
            continue
        seeds = parameter.seeds[axis.axis]
        if seeds.size != axis.units.size:
            raise Refused(f"axis {axis.axis} of {axis.tensor} is read in another way than in the trace")
        gone = ~padded[axis.units]
        stays[component[seeds[gone]]] = False
    # slabs without parameters go when all they span is gone
    for a, b in space.slabs["row"]:
        live = np.zeros(stays.size, bool)
        np.logical_or.at(live, component[a], stays[component[b]])
        known = np.zeros(stays.size, bool)
        known[component[a]] = True
        stays &= ~known | live
    return stays[component]
