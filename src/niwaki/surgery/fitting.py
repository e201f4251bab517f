"""Shapes that a forward computes from another width than their own: views that no longer fit are made to.

An attention module may lay its heads side by side as wide as its input, or share that width out among them, which is
right until either is cut. Where a view would fail, and the trace of the whole model shows what became of its axes, the
cut copy's module takes that shape. It is an instance of its class still; the check traces it like everything else.
"""

import functools
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from niwaki.graph import ChannelGraph
from niwaki.graph.labels import varying
from niwaki.graph.values import Value
from niwaki.surgery.evidence import Sizes

Mend = dict[str, Any]
Moved = tuple[tuple[int, int, int], ...]
"""Axes whose size the plan says: which, the old size, the new one (the same where nothing goes)."""
Shape = tuple[int, Moved, int, Moved]
"""Number of axes of what is viewed and those of them that the plan sizes, and the same of the view."""
NAMES = ("view", "_unsafe_view", "reshape", "_reshape_alias", "view_copy")
VIEWS = (Tensor.view, Tensor.reshape, torch.reshape)


def shapes_of(graph: ChannelGraph, sizes: Sizes) -> dict[str, list[Shape]]:
    """Module path -> the shapes that the views made there have now."""
    found: dict[str, dict[Shape, None]] = {}
    for record in graph.records:
        if record.name not in NAMES:
            continue
        given, made = record.inputs[0], record.outputs[0]
        if moved := _sized(made, sizes):
            shape = len(given.shape), _sized(given, sizes), len(made.shape), moved
            found.setdefault(record.module, {})[shape] = None
    return {path: list(shapes) for path, shapes in found.items()}


def _sized(value: Value, sizes: Sizes) -> Moved:
    """Axes along which the labels vary: how long they are follows from the plan alone. Where anything grows, only those
    that change: a view that was right is not to be saved from a number that was made wrong.
    """
    after = sizes.of(value)
    if sizes.grows:
        axes = {axis for axis, size in enumerate(value.shape) if size != after[axis]}
    elif value.parameter is not None:
        axes = set(value.parameter.seeds)
    else:
        axes = {axis for labels in value.fields for axis in varying(labels)}
    return tuple((axis, value.shape[axis], after[axis]) for axis in sorted(axes))


class Fit(TorchFunctionMode):
    """Views that do not fit take a known shape that does; what fits is left alone.

    The shape is the first whose changed axes were asked for as they were. Where a forward asks for what it made of yet
    another width (heads of so many, as they share out the width of its input), it is the one shape of the sizes that
    the plan says, if there is but one.
    """

    def __init__(self, shapes: Sequence[Shape]) -> None:
        super().__init__()
        self.shapes = shapes

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in VIEWS:
            sizes = args[1:] or tuple(kwargs.get(name) for name in ("size", "shape") if name in kwargs)
            sizes = tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (list, tuple)) else sizes
            if sizes and not isinstance(sizes[0], torch.dtype):
                return func(args[0], self.fitted(args[0], sizes))
        elif func is F.multi_head_attention_forward:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)

    def fitted(self, tensor: Tensor, sizes: Sequence[int]) -> Sequence[int]:
        if -1 in sizes or math.prod(sizes) == tensor.numel():
            return sizes  # what is left open may fit one batch and not the next: nothing is made of it
        known = [shape for shape in self.shapes if shape[0] == tensor.dim() and shape[2] == len(sizes)]
        for _, before, _, moved in known:
            moved, before = _changed(moved), _changed(before)
            if any(tensor.shape[axis] != new for axis, _, new in before):
                continue
            other = _resized(sizes, moved)
            if all(sizes[axis] == old for axis, old, _ in moved) and math.prod(other) == tensor.numel():
                return other
        others = [
            _resized(sizes, moved)
            for _, before, _, moved in known
            if all(tensor.shape[axis] == new for axis, _, new in before)
        ]
        fit = [other for other in others if math.prod(other) == tensor.numel()]
        return fit[0] if fit and all(other == fit[0] for other in fit) else sizes


def _changed(moved: Moved) -> Moved:
    return tuple([entry for entry in moved if entry[1] != entry[2]])


def _resized(sizes: Sequence[int], moved: Moved) -> list[int]:
    news = {axis: new for axis, _, new in moved}
    return [news.get(axis, size) for axis, size in enumerate(sizes)]


def _attention(query: Tensor, key: Tensor, value: Tensor, embed_dim: int, heads: int, *rest: Any, **named: Any) -> Any:
    """Torch's attention of projections by themselves, whose widths it takes to be that of the input."""
    names = (
        "in_proj_weight", "in_proj_bias", "bias_k", "bias_v", "add_zero_attn", "dropout_p", "out_proj_weight",
        "out_proj_bias", "training", "key_padding_mask", "need_weights", "attn_mask", "use_separate_proj_weight",
        "q_proj_weight", "k_proj_weight", "v_proj_weight", "static_k", "static_v", "average_attn_weights", "is_causal",
    )  # fmt: skip
    given = dict(zip(names, rest, strict=False)) | named
    weights: list[Any] = [given.get(f"{part}_proj_weight") for part in "qkv"]
    odd = ("bias_k", "bias_v", "add_zero_attn", "static_k", "static_v", "key_padding_mask", "is_causal")
    if (
        any(weight is None for weight in weights)
        or all(weight.shape[0] == embed_dim for weight in weights)
        or any(given.get(name) not in (None, False) for name in odd)
        or not given.get("need_weights", True)
        or query.dim() != 3
    ):
        return F.multi_head_attention_forward(query, key, value, embed_dim, heads, *rest, **named)
    bias = given.get("in_proj_bias")
    biases = (None, None, None) if bias is None else bias.split([weight.shape[0] for weight in weights])
    parts = zip((query, key, value), weights, biases, strict=True)
    # [tokens, batch, heads x size] -> [batch x heads, tokens, size]
    q, k, v = (F.linear(x, w, b) for x, w, b in parts)
    q, k, v = (x.view(x.shape[0], x.shape[1] * heads, x.shape[2] // heads).transpose(0, 1) for x in (q, k, v))
    scores = q * math.sqrt(1.0 / q.shape[-1])
    mask = given.get("attn_mask")
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, float("-inf"))
    if mask is not None and mask.dim() == 2:
        mask = mask.unsqueeze(0)
    scores = (
        torch.bmm(scores, k.transpose(-2, -1)) if mask is None else torch.baddbmm(mask, scores, k.transpose(-2, -1))
    )
    shares = F.softmax(scores, dim=-1)
    if given.get("training", True) and given["dropout_p"] > 0.0:
        shares = F.dropout(shares, p=given["dropout_p"])
    y = torch.bmm(shares, v).transpose(0, 1).contiguous().view(query.shape[0] * query.shape[1], -1)
    out = F.linear(y, given["out_proj_weight"], given["out_proj_bias"]).view(query.shape[0], query.shape[1], -1)
    shares = shares.view(query.shape[1], heads, query.shape[0], -1)
    return out, shares.mean(dim=1) if given.get("average_attn_weights", True) else shares


@functools.cache
def fitting(kind: Any) -> Any:
    """The class of this name whose forward runs with views made to fit; instances are rebuilt from `kind`."""

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with Fit(self.fitted_shapes):
            return kind.forward(self, *args, **kwargs)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        return _blank, (kind,), self.__dict__

    body = {"forward": forward, "__reduce_ex__": __reduce_ex__, "__module__": kind.__module__, "__doc__": kind.__doc__}
    made = type(kind.__name__, (kind,), {**body, "__qualname__": kind.__qualname__})
    assert issubclass(made, kind)
    return made


def _blank(kind: Any) -> nn.Module:
    made = fitting(kind)
    blank: nn.Module = made.__new__(made)
    return blank


def is_fitting(module: nn.Module) -> bool:
    return "fitted_shapes" in vars(module)


def fit_(module: nn.Module, shapes: Iterable[Any]) -> None:
    """Make `module` one whose views are made to fit.

    Raises:
        TypeError: the shapes (of a file) are not whole numbers.
    """
    read: list[Shape] = [(n, _read(before), axes, _read(moved)) for n, before, axes, moved in shapes]
    if not all(type(n) is int for a, before, b, moved in read for n in (a, b, *itertools.chain(*before, *moved))):
        raise TypeError("shapes that are no whole numbers")
    if not is_fitting(module):
        kind: Any = type(module)
        module.__class__ = fitting(kind)
    module.fitted_shapes = read  # type: ignore[assignment]


def may_fit(problem: str) -> bool:
    """Whether a forward may have failed at a view that can be made to fit: not at one that leaves a size open."""
    return re.search(r"shape '\[[^]]*-1[^]]*\]' is invalid", problem) is None


def _read(moved: Iterable[Iterable[Any]]) -> Moved:
    return tuple((axis, old, new) for axis, old, new in moved)


def fits(model: nn.Module, where: str, table: Mapping[str, list[Shape]]) -> list[Mend]:
    """Let the module at `where` and others of its class make their views fit, where the trace knows such as change."""
    modules = dict(model.named_modules())
    while where and type(modules[where]).__module__.startswith("torch.nn."):  # whose caller gave it a wrong shape
        where = where.rpartition(".")[0]
    kind = type(modules[where])
    mends: list[Mend] = []
    for path, module in modules.items():
        if type(module) is kind and path in table and not is_fitting(module):
            shapes = [[a, list(map(list, before)), b, list(map(list, moved))] for a, before, b, moved in table[path]]
            mends.append({"module": path, "class": "Fitting", "settings": {"shapes": shapes}})
    return mends
