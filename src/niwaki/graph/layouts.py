"""Shapes of results that plain arithmetic tells: for many operators, kernels on the meta device are slow Python.

What type a result has, no arithmetic tells. An operator is asked that once for each choice of its arguments' types, and
whether its result has the shape worked out here as well; where it has not, it is asked every time.
"""

from collections.abc import Callable
from functools import cache, lru_cache
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from niwaki.graph.rules.pointwise import is_pointwise

META = torch.device("meta")
TENSORS = frozenset({Tensor, nn.Parameter})
NUMBERS = frozenset({int, float, bool})
SETTINGS = frozenset({str, type(None), torch.dtype, torch.device, torch.layout})

Shape = tuple[int, ...]
Types = tuple[torch.dtype, ...]
Guess = Callable[..., "tuple[Shape, ...] | None"]
"""Takes the arguments of a call that are given by place; None where it can't tell."""


class Unnamed(Exception):
    """An argument that no key can stand for."""


def guessed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `func` makes of these tensors on the meta device, or None where only the operator can tell."""
    known = _facts.get(id(func))
    if known is None:
        known = _facts[id(func)] = Facts(func, guess_of(func), in_place(func), {})
    guess, types_of = known.guess, known.types
    if guess is None or (kwargs and any(isinstance(value, Tensor) for value in kwargs.values())):
        return None
    shapes = guess(*args)
    if shapes is None:
        return None
    try:
        key = tuple([_kind(value) for value in args]), tuple([(k, _kind(v)) for k, v in kwargs.items()])
    except Unnamed:
        return None
    if key not in types_of:
        types_of[key] = _asked(func, args, kwargs, shapes)
    types = types_of[key]
    if types is None:
        return None
    if known.in_place:
        return args[0] if args[0].shape == shapes[0] else None
    if len(types) == 1:
        return torch.empty(shapes[0], dtype=types[0], device=META)
    made = [torch.empty(shape, dtype=dtype, device=META) for shape, dtype in zip(shapes, types, strict=True)]
    return tuple(made)


class Facts(NamedTuple):
    """What is known of an operator."""

    func: Any
    guess: Guess | None
    in_place: bool
    types: dict[Any, Types | None]
    """Types of its arguments -> types of its results, or None where their shapes are other ones."""


_facts: dict[int, Facts] = {}
"""By the ids of operators, which live as long as this does: those are found sooner."""


def _asked(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: tuple[Shape, ...]) -> Types | None:
    result = func(*args, **kwargs)
    tensors = [result] if isinstance(result, Tensor) else list(result)
    shaped = [tuple(t.shape) for t in tensors] == [tuple(shape) for shape in shapes]
    right = shaped and (result is args[0] if in_place(func) else all(map(_plain, tensors)))
    return tuple(t.dtype for t in tensors) if right else None


def _kind(value: Any) -> Any:
    """What of an argument decides the type of a result. How many of a kind are in a list does not."""
    kind = type(value)
    if kind in TENSORS:
        return value.dtype
    if kind in NUMBERS:
        return kind
    if kind in SETTINGS:
        return value
    if kind is list or kind is tuple:
        kinds = frozenset(map(type, value))
        return kinds if kinds <= NUMBERS else frozenset(map(_kind, value))
    raise Unnamed


@cache
def guess_of(func: Any) -> Guess | None:
    """How the shapes of an operator's results are worked out, or None where nobody knows."""
    name, returns = func.overloadpacket.__name__, [str(value.type) for value in func._schema.returns]
    if func.namespace != "aten" or (func._schema.is_mutable and not in_place(func)):
        return None
    return _pointwise if returns == ["Tensor"] and is_pointwise(func, name) else GUESSES.get(name)


@cache
def in_place(func: Any) -> bool:
    """Whether an operator writes to its first argument, nowhere else, and gives that back."""
    written = [a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments]
    return written[:1] == [True] and not any(written[1:]) and func.overloadpacket.__name__.endswith("_")


def _plain(tensor: Any) -> bool:
    """A tensor on the meta device whose elements lie in their order, one behind the other."""
    if type(tensor) not in TENSORS or not tensor.is_meta or tensor.layout is not torch.strided:
        return False
    return _in_order(tensor.shape, tensor.stride())


@lru_cache(maxsize=4096)
def _in_order(shape: Shape, strides: tuple[int, ...]) -> bool:
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if stride != step:
            return False
        step *= size
    return step > 0


def _pointwise(*args: Any) -> tuple[Shape, ...] | None:
    tensors = [value for value in args if isinstance(value, Tensor)]
    if not tensors or tensors[0] is not args[0] or not all(tensor.dim() and _plain(tensor) for tensor in tensors):
        return None
    shape: Shape = tensors[0].shape
    for tensor in tensors[1:]:
        if tensor.shape != shape:
            pairs = list(zip_longest(reversed(shape), reversed(tensor.shape), fillvalue=1))
            if any(a != b and a != 1 and b != 1 for a, b in pairs):
                return None
            shape = tuple([max(pair) for pair in reversed(pairs)])
    return (shape,)


def _convolution(x: Any, weight: Any, bias: Any, *settings: Any) -> tuple[Shape, ...] | None:
    stride, padding, dilation, transposed, _, groups = settings
    rank = weight.dim() - 2
    if transposed or not (_plain(x) and _plain(weight)) or x.dim() != rank + 2 or weight.shape[0] % groups:
        return None
    if weight.shape[1] * groups != x.shape[1] or not (bias is None or bias.shape == weight.shape[:1]):
        return None
    if any(len(given) != rank for given in (stride, padding, dilation)):
        return None
    axes = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    space = [(size + 2 * pad - far * (taps - 1) - 1) // step + 1 for size, taps, step, pad, far in axes]
    return ((x.shape[0], weight.shape[0], *space),) if all(size > 0 for size in space) else None


def _cat(tensors: Any, axis: int = 0) -> tuple[Shape, ...] | None:
    if not tensors or not all(map(_plain, tensors)) or any(t.dim() != tensors[0].dim() for t in tensors):
        return None
    shapes = [list(tensor.shape) for tensor in tensors]
    if not -len(shapes[0]) <= axis < len(shapes[0]):
        return None
    length = sum(shape[axis] for shape in shapes)
    for shape in shapes:
        shape[axis] = length
    return (tuple(shapes[0]),) if all(shape == shapes[0] for shape in shapes) else None


def _product(first: Any, second: Any) -> tuple[Shape, ...] | None:
    """A matrix times another."""
    if not (first.is_meta and second.is_meta and first.dim() == second.dim() == 2):
        return None
    return ((first.shape[0], second.shape[1]),) if first.shape[1] == second.shape[0] else None


def _added_product(added: Any, first: Any, second: Any) -> tuple[Shape, ...] | None:
    shapes = _product(first, second)
    return shapes if shapes and tuple(added.shape) in (shapes[0], shapes[0][1:]) and added.is_meta else None


def _mean(x: Any, axes: Any = None, keep: bool = False) -> tuple[Shape, ...] | None:
    if not axes or not _plain(x) or any(not -x.dim() <= axis < x.dim() for axis in axes):
        return None
    gone = {axis % x.dim() for axis in axes}
    if len(gone) < len(axes):
        return None
    return (tuple(1 if a in gone else n for a, n in enumerate(x.shape) if keep or a not in gone),)


def _length(x: Any, _: Any = 2, axes: Any = None, keep: bool = False, *rest: Any) -> tuple[Shape, ...] | None:
    """The norms of what lies along axes, of all of them where none is named."""
    return None if rest else _mean(x, axes or [*range(x.dim())], keep)


def _group_norm(x: Any, weight: Any, bias: Any, *settings: Any) -> tuple[Shape, ...] | None:
    pictures, channels, places, groups, _ = settings
    given = [tensor for tensor in (weight, bias) if tensor is not None]
    if not _plain(x) or x.shape[:2] != (pictures, channels) or any(tensor.shape != (channels,) for tensor in given):
        return None
    if groups < 1 or channels % groups or x.numel() != pictures * channels * places:
        return None
    return x.shape, (pictures, groups), (pictures, groups)


def _batch_norm(x: Any, weight: Any, bias: Any, *statistics: Any) -> tuple[Shape, ...] | None:
    """One that takes the statistics of what comes in; where it is given them there are none to give."""
    *known, training, _, _ = statistics
    given = [tensor for tensor in (weight, bias, *known) if tensor is not None]
    if not training or not _plain(x) or x.dim() < 2 or x.numel() <= x.shape[1]:
        return None  # of one position a channel there are no statistics, and the operator may say so
    if any(tensor.shape != x.shape[1:2] for tensor in given):
        return None
    return x.shape, x.shape[1:2], x.shape[1:2]


def _resized(x: Any, size: Any, *_: Any) -> tuple[Shape, ...] | None:
    """A picture of another size."""
    if type(size) not in (list, tuple) or len(size) != 2 or min(size) < 1 or not _plain(x) or x.dim() != 4:
        return None
    return ((*x.shape[:2], *size),)


def _layer_norm(x: Any, inner: Any, weight: Any, bias: Any, *_: Any) -> tuple[Shape, ...] | None:
    """What it gives lies in order, whatever order its input lies in."""
    inner, given = tuple(inner), [tensor for tensor in (weight, bias) if tensor is not None]
    if (
        not x.is_meta
        or not x.numel()
        or x.shape[-len(inner) :] != inner
        or any(tensor.shape != inner for tensor in given)
    ):
        return None
    statistic = (*x.shape[: -len(inner)], *[1] * len(inner))
    return x.shape, statistic, statistic


def _along(x: Any, axis: int, *_: Any) -> tuple[Shape, ...] | None:
    """What is of the shape of its input: softmax, cumulative sums."""
    return (x.shape,) if _plain(x) and -x.dim() <= axis < x.dim() else None


def _every(x: Any, *settings: Any) -> tuple[Shape, ...] | None:
    """One answer of a whole tensor."""
    return ((),) if _plain(x) and not settings else None


def _max_pool(
    x: Any, window: Any, stride: Any = (), padding: Any = (0, 0), dilation: Any = (1, 1), ceil: bool = False
) -> tuple[Shape, ...] | None:
    lists = (window, stride or window, padding, dilation)
    if ceil or not _plain(x) or x.dim() != 4 or any(len(values) != 2 for values in lists):
        return None
    axes = list(zip(x.shape[2:], *lists, strict=True))
    if any(2 * pad > taps for _, taps, _, pad, _ in axes):
        return None
    space = [(size + 2 * pad - far * (taps - 1) - 1) // step + 1 for size, taps, step, pad, far in axes]
    return ((*x.shape[:2], *space),) * 2 if min(space) > 0 else None


def _average_pool(
    x: Any, window: Any, stride: Any = (), padding: Any = (0, 0), ceil: bool = False, *_: Any
) -> tuple[Shape, ...] | None:
    shapes = _max_pool(x, window, stride, padding, (1, 1), ceil)
    return shapes and shapes[:1]


GUESSES: dict[str, Guess] = {
    "convolution": _convolution,
    "cat": _cat,
    "mm": _product,
    "addmm": _added_product,
    "mean": _mean,
    "native_layer_norm": _layer_norm,
    "_safe_softmax": _along,
    "_softmax": _along,
    "_log_softmax": _along,
    "cumsum": _along,
    "all": _every,
    "any": _every,
    "max_pool2d_with_indices": _max_pool,
    "avg_pool2d": _average_pool,
    "linalg_vector_norm": _length,
    "native_group_norm": _group_norm,
    "native_batch_norm": _batch_norm,
    "upsample_nearest2d": _resized,
    "_upsample_nearest_exact2d": _resized,
    "upsample_bilinear2d": _resized,
    "upsample_bicubic2d": _resized,
}
