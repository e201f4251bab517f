"""An exported graph as plain data: ATen calls, operators that compute, a few of Python's, never code from a file."""

import copy
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from niwaki.errors import FileDamagedError

OPERATORS = {
    name: getattr(operator, name)
    for name in (
        "getitem",
        "add",
        "sub",
        "mul",
        "floordiv",
        "truediv",
        "mod",
        "neg",
        "pow",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "and_",
        "or_",
    )
}
NAME = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")
PATH = re.compile(r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$")
NAMESPACES = ("aten",)


@dataclass
class Program:
    """A graph over named tensors, with how arguments flatten and outputs unflatten."""

    graph: fx.Graph
    inputs: int
    in_spec: Any
    """Structure of `(args, kwargs)`: nested {"tuple": [...]}, {"list": [...]}, {"dict": {...}}, "leaf" and "none"."""
    out_spec: Any
    """Structure of the result; outputs of other classes come back as dictionaries or tuples."""

    def to_json(self) -> dict[str, Any]:
        return {
            "inputs": self.inputs,
            "in_spec": self.in_spec,
            "out_spec": self.out_spec,
            "nodes": [
                {
                    "op": n.op,
                    "name": n.name,
                    "target": _target_name(n),
                    "args": _encode(n.args),
                    "kwargs": _encode(n.kwargs),
                }
                for n in self.graph.nodes
            ],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Program":
        """Raises FileDamagedError for anything but ATen calls on named tensors."""
        graph = fx.Graph()
        nodes: dict[str, fx.Node] = {}
        try:
            for item in data["nodes"]:
                name, op = item["name"], item["op"]
                if not NAME.fullmatch(name) or op not in ("placeholder", "get_attr", "call_function", "output"):
                    raise FileDamagedError(
                        "read a saved graph", found=f"node {name!r} ({op})", do="save the model again"
                    )
                target = _target(op, item["target"])
                args, kwargs = _decode(item["args"], nodes), _decode(item["kwargs"], nodes)
                if op == "call_function":
                    check_call(target, kwargs, item["target"])
                elif op == "placeholder" and (item["target"] != name or args or kwargs):
                    raise FileDamagedError(
                        "read a saved graph", found=f"input {item['target']!r}", do="save the model again"
                    )
                elif op in ("get_attr", "output") and kwargs:
                    raise FileDamagedError(
                        "read a saved graph", found=f"arguments of {name}", do="save the model again"
                    )
                nodes[name] = graph.create_node(op, target, tuple(args), kwargs, name=name)
            graph.lint()
            check_spec(data["in_spec"])
            check_spec(data["out_spec"])
            return cls(graph, int(data["inputs"]), data["in_spec"], data["out_spec"])
        except FileDamagedError:
            raise
        except Exception as error:
            raise FileDamagedError(
                "read a saved graph", found=f"{type(error).__name__}: {error}", do="save the model again"
            ) from error

    def fitted(self, dtype: torch.dtype, device: torch.device) -> "Program":
        """The program with its floating dtype and device constants replaced by these."""
        graph = copy.deepcopy(self.graph)

        def change(value: Any) -> Any:
            if isinstance(value, torch.device):
                return device
            return dtype if isinstance(value, torch.dtype) and value.is_floating_point else value

        for node in graph.nodes:
            node.args = fx.node.map_aggregate(node.args, change)
            node.kwargs = fx.node.map_aggregate(node.kwargs, change)
        return Program(graph, self.inputs, self.in_spec, self.out_spec)

    def with_momentum(self, momentum: float) -> "Program":
        """The program whose batch norms weigh the next batch by `momentum`."""
        graph = copy.deepcopy(self.graph)
        for node in graph.nodes:
            if (
                node.op == "call_function"
                and "batch_norm" in _target_name(node)
                and any(a.name == "momentum" for a in node.target._schema.arguments)
            ):
                _momentum(node, momentum)
        return Program(graph, self.inputs, self.in_spec, self.out_spec)


def _momentum(node: fx.Node, momentum: float) -> None:
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    at = names.index("momentum")
    if at < len(node.args):
        node.update_arg(at, momentum)
    else:
        node.update_kwarg("momentum", momentum)


def program_of(exported: ExportedProgram) -> tuple[Program, dict[str, Tensor]]:
    """The program of an export, its parameters read by name, and the constants it brings along (name -> tensor)."""
    graph = copy.deepcopy(exported.graph)
    _inline(graph, exported.graph_module)
    signature = exported.graph_signature
    constants: dict[str, Tensor] = {}
    users: list[fx.Node] = []
    given = [n for n in graph.nodes if n.op == "placeholder"]
    for node, spec in zip(given, signature.input_specs, strict=True):  # in order: a copied graph may rename them
        if spec.kind == InputKind.USER_INPUT:
            users.append(node)
            continue
        target = str(spec.target)
        if spec.kind == InputKind.CONSTANT_TENSOR or (
            spec.kind == InputKind.BUFFER and target not in exported.state_dict
        ):
            tensor = exported.constants[target]
            if spec.kind == InputKind.CONSTANT_TENSOR and _is_number(tensor):
                how = {"dtype": tensor.dtype, "device": tensor.device}
                with graph.inserting_before(min(node.users, default=node)):  # the first that takes it
                    number = graph.call_function(torch.ops.aten.full.default, ([], tensor.item()), how)
                node.replace_all_uses_with(number)
                graph.erase_node(node)
                continue
            if target not in exported.state_dict and spec.kind == InputKind.CONSTANT_TENSOR:
                target = "constant_" + target.replace(".", "_")
                constants[target] = tensor.detach().clone()
        with graph.inserting_before(node):
            new = graph.create_node("get_attr", target, name=f"at_{node.name}")
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    output = next(n for n in graph.nodes if n.op == "output")
    kinds = [spec.kind for spec in signature.output_specs]
    results = list(output.args[0])
    for spec, result in zip(signature.output_specs, results, strict=True):
        if spec.kind in (OutputKind.BUFFER_MUTATION,):
            with graph.inserting_before(output):
                place = graph.create_node("get_attr", str(spec.target))
                graph.call_function(torch.ops.aten.copy_.default, (place, result))
    output.args = (tuple(r for r, kind in zip(results, kinds, strict=True) if kind == OutputKind.USER_OUTPUT),)
    for node in list(graph.nodes):  # checks of the example's sizes are of no use in the cut model
        if node.op == "call_function" and getattr(node.target, "__name__", "") in (
            "_assert_scalar.default",
            "_assert_tensor_metadata.default",
        ):
            graph.erase_node(node)
    for node in graph.nodes:  # a view that fits one kernel's memory layout does not fit another's
        if node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
            node.target = torch.ops.aten.reshape.default
    for node in graph.nodes:
        node.meta = {}
        if node.op == "placeholder":
            node.target = node.name
            node.args = ()
    spec_in, spec_out = exported.call_spec.in_spec, exported.call_spec.out_spec
    return Program(graph, len(users), encode_spec(spec_in), encode_spec(spec_out)), constants


def _is_number(tensor: Tensor) -> bool:
    """One number, written in forward: part of the program, not a tensor that the cut model keeps."""
    return tensor.shape == () and not tensor.is_meta and not tensor.is_complex()


def _inline(graph: fx.Graph, owner: Any) -> None:
    """Put blocks that an export wraps (no_grad, autocast switched off) in place of their calls."""
    for node in list(graph.nodes):
        kind = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        if kind not in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
            continue
        at = next(i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr")
        if kind == "wrap_with_autocast" and node.args[2]:
            raise FileDamagedError(
                "keep an exported graph", found="a block under autocast", do="call the model without it"
            )
        block = owner.get_submodule(str(node.args[at].target))
        inner = copy.deepcopy(block.graph)
        _inline(inner, block)
        names = dict(zip([n for n in inner.nodes if n.op == "placeholder"], node.args[at + 1 :], strict=True))
        with graph.inserting_before(node):
            results = graph.graph_copy(inner, names)
        parts = results if isinstance(results, (list, tuple)) else (results,)
        for user in list(node.users):
            user.replace_all_uses_with(parts[user.args[1]])
            graph.erase_node(user)
        wrapped = node.args[at]
        graph.erase_node(node)
        if not wrapped.users:
            graph.erase_node(wrapped)


def compile_program(program: Program) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]:
    """A function `f(module, args, kwargs)` that runs the program on the module's tensors."""
    for node in program.graph.nodes:
        _target(node.op, _target_name(node))
    code = program.graph.python_code("self")
    space = dict(code.globals)
    exec(compile(code.src, "<exported graph>", "exec"), space)
    body = space["forward"]
    names = list(program.in_spec["tuple"][1]["dict"]) if isinstance(program.in_spec, dict) else []

    def call(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if set(kwargs) != set(names):
            raise TypeError(f"this exported model takes the keyword arguments {names}, got {list(kwargs)}")
        flat = pytree.tree_leaves((args, {name: kwargs[name] for name in names}))
        if len(flat) != program.inputs:
            raise TypeError(f"this exported model takes {program.inputs} tensors, got {len(flat)}")
        return build_spec(program.out_spec, iter(body(module, *flat)))

    return call


def encode_spec(spec: Any) -> Any:
    """A pytree's structure as plain data."""
    if spec.is_leaf():
        return "leaf"
    children = spec.children() if callable(getattr(spec, "children", None)) else spec.children_specs
    parts = [encode_spec(child) for child in children]
    kind = spec.type
    if kind is type(None):
        return "none"
    if kind in (tuple, list):
        return {kind.__name__: parts}
    keys = spec.context
    if (
        isinstance(keys, (list, tuple))
        and len(keys) == 2
        and isinstance(keys[1], (list, tuple))
        and len(keys[1]) == len(parts)
    ):
        keys = keys[1]  # default dictionaries: (factory, keys)
    if isinstance(keys, (list, tuple)) and len(keys) == len(parts) and all(isinstance(key, str) for key in keys):
        return {"dict": dict(zip(keys, parts, strict=True))}
    return {"tuple": parts}


def check_spec(spec: Any) -> None:
    """Raises FileDamagedError unless `spec` is what `encode_spec` writes."""
    if spec in ("leaf", "none"):
        return
    if isinstance(spec, dict) and len(spec) == 1:
        ((kind, items),) = spec.items()
        if kind in ("tuple", "list") and isinstance(items, list):
            for item in items:
                check_spec(item)
            return
        if kind == "dict" and isinstance(items, dict):
            for item in items.values():
                check_spec(item)
            return
    raise FileDamagedError("read a saved graph", found=f"structure {str(spec)[:80]}", do="save the model again")


def build_spec(spec: Any, leaves: Any) -> Any:
    """The structure filled with the next leaves."""
    if spec == "leaf":
        return next(leaves)
    if spec == "none":
        return None
    ((kind, items),) = spec.items()
    if kind == "dict":
        return {key: build_spec(item, leaves) for key, item in items.items()}
    parts = [build_spec(item, leaves) for item in items]
    return tuple(parts) if kind == "tuple" else parts


TEXTS = {
    "rounding_mode",
    "approximate",
    "reduction",
    "reduce",
    "mode",
    "padding_mode",
    "padding",
    "indexing",
    "equation",
    "ord",
    "side",
    "driver",
    "p",
}
"""Arguments of ATen calls that may hold text. A call that takes any other (a file name) is refused."""


def check_call(target: Any, kwargs: Any, name: str) -> None:
    """Raises FileDamagedError for a call that takes a file's name, or for keyword arguments it does not have."""
    if not isinstance(target, torch._ops.OpOverload):
        if kwargs:
            raise FileDamagedError(
                "read a saved graph", found=f"keyword arguments of {name}", do="save the model again"
            )
        return
    known = {argument.name: argument for argument in target._schema.arguments}
    texts = [n for n, argument in known.items() if "str" in str(argument.type) and n not in TEXTS]
    if texts or not set(kwargs) <= set(known):
        raise FileDamagedError(
            "read a saved graph", found=f"a call of {name} with {sorted(kwargs)}", do="save the model again"
        )


def _target_name(node: fx.Node) -> str:
    if node.op != "call_function":
        return str(node.target)
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target.name()) + "|" + node.target._overloadname
    for name, function in OPERATORS.items():
        if node.target is function:
            return f"operator.{name}"
    if node.target in (torch.sym_max, torch.sym_min, torch.sym_not):
        return f"torch.{node.target.__name__}"
    raise FileDamagedError(
        "write an exported graph", found=f"a call of {node.target}", do="only ATen calls can be kept"
    )


def _target(op: str, name: str) -> Any:
    if op == "get_attr":
        if not PATH.fullmatch(name) or "__" in name:
            raise FileDamagedError("read a saved graph", found=f"tensor name {name!r}", do="save the model again")
        return name
    if op == "output" and name != "output":
        raise FileDamagedError("read a saved graph", found=f"output {name!r}", do="save the model again")
    if op != "call_function":
        return name
    if name.startswith("operator."):
        if name[9:] not in OPERATORS:
            raise FileDamagedError("read a saved graph", found=f"a call of {name}", do="save the model again")
        return OPERATORS[name[9:]]
    if name in ("torch.sym_max", "torch.sym_min", "torch.sym_not"):
        return getattr(torch, name[6:])
    full, _, overload = name.partition("|")
    space, _, rest = full.partition("::")
    packet = rest.split(".")[0]
    if not all(map(NAME.fullmatch, (space, packet, overload))):
        raise FileDamagedError("read a saved graph", found=f"a call of {name}", do="save the model again")
    found = getattr(getattr(getattr(torch.ops, space), packet, None), overload, None)
    if found is None or (space not in NAMESPACES and not _computes(found)):
        raise FileDamagedError(
            "read a saved graph",
            found=f"a call of {name}",
            do="only ATen calls are accepted, and operators of the model's package that compute tensors of tensors",
        )
    return found


COMPUTED = frozenset(
    kind.format(base)
    for base in ("Tensor", "int", "float", "bool", "number")
    for kind in ("{}", "Optional[{}]", "List[{}]", "Optional[List[{}]]")
)


def _computes(func: Any) -> bool:
    """Whether an operator that some package registered takes tensors and numbers, gives tensors, and writes nothing: it
    can't be told to open a file."""
    schema = func._schema
    return (
        bool(schema.returns)
        and all(value.alias_info is None for value in (*schema.arguments, *schema.returns))
        and all(str(value.type) in COMPUTED for value in (*schema.arguments, *schema.returns))
    )


_DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}


def _encode(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, torch.layout):
        return {"layout": str(value).removeprefix("torch.")}
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value).removeprefix("torch.")}
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return {"float": str(value)}
    if isinstance(value, slice):
        return {"slice": [_encode(value.start), _encode(value.stop), _encode(value.step)]}
    if isinstance(value, dict):
        return {"dict": {key: _encode(item) for key, item in value.items()}}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    if isinstance(value, (int, float, str, bool, type(None))):
        return value
    raise FileDamagedError(
        "write an exported graph", found=f"an argument of type {type(value).__name__}", do="report this model"
    )


def _decode(value: Any, nodes: dict[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, item),) = value.items()
    if kind == "node":
        return nodes[item]
    if kind == "dtype":
        return _DTYPES[item]
    if kind == "device":
        return torch.device(item)
    if kind == "layout":
        return {"strided": torch.strided, "sparse_coo": torch.sparse_coo}[item]
    if kind == "memory_format":
        return {
            "contiguous_format": torch.contiguous_format,
            "channels_last": torch.channels_last,
            "preserve_format": torch.preserve_format,
            "channels_last_3d": torch.channels_last_3d,
        }[item]
    if kind == "float":
        return float(item)
    if kind == "slice":
        return slice(*(_decode(part, nodes) for part in item))
    if kind == "dict":
        return {key: _decode(part, nodes) for key, part in item.items()}
    raise FileDamagedError("read a saved graph", found=f"an argument {kind!r}", do="save the model again")
