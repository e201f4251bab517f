"""Reductions and softmax: a labelled axis is dropped or kept, and marked inexact where the value changes."""

import numpy as np
from torch import Tensor

from niwaki.graph.labels import varying
from niwaki.graph.rules.registry import Call, rule
from niwaki.graph.values import Labels, merge

SUMS = ("sum", "nansum", "norm", "linalg_vector_norm", "count_nonzero")
"""Zeros add nothing to these, so removing what is zero is exact."""


@rule(
    *SUMS,
    "mean",
    "nanmean",
    "amax",
    "amin",
    "max",
    "min",
    "prod",
    "logsumexp",
    "var",
    "std",
    "var_mean",
    "std_mean",
    "any",
    "all",
    "argmax",
    "argmin",
    "median",
    "nanmedian",
    "mode",
    "aminmax",
    "quantile",
    "_log_softmax_backward_data",
    "kthvalue",
)
def reduce(call: Call) -> list[Labels]:
    value = call.value(call.args[0])
    ndim = len(value.shape)
    given = call["dim"] if call.has("dim") else None
    axes: tuple[int, ...]
    if given is None or (isinstance(given, (list, tuple)) and not given):
        axes = tuple(range(ndim))
    else:
        axes = tuple(axis % max(ndim, 1) for axis in (given if isinstance(given, (list, tuple)) else [given]))
    keep = bool(call["keepdim"]) if call.has("keepdim") else False
    order = call["ord"] if call.has("ord") else call["p"] if call.has("p") else 2
    negative = isinstance(order, (int, float)) and not isinstance(order, bool) and order <= 0
    exact = call.name in SUMS and value.zero and not negative
    kept: list[np.ndarray] = []
    for labels in value.get(call.space):
        across = tuple(axis for axis in varying(labels) if axis in axes)
        if across and call.name in ("argmax", "argmin"):
            call.space.held.append((labels.ravel(), "its positions are numbers that forward goes on with"))
        if across and not exact:
            call.space.mark_inexact(labels, across, f"{call.name} is taken across it")
        rest = call.drop(labels, axes)
        if rest is not None:
            merge(call.space, kept, rest)  # of two grids that shared their rows, one may be left with nothing else
    out = [f if keep else f.reshape([n for a, n in enumerate(f.shape) if a not in axes]) for f in kept]
    call.zero = value.zero and call.name in (*SUMS, "mean", "amax", "amin", "max", "min", "prod")
    tensors = [call.result] if isinstance(call.result, Tensor) else call.result
    return [tuple(out) for _ in tensors]


@rule(
    "_softmax",
    "softmax",
    "_log_softmax",
    "log_softmax",
    "_safe_softmax",
    "cumsum",
    "cumprod",
    "logcumsumexp",
    "cummax",
    "cummin",
    "cumsum_",
    "_masked_softmax",
    "renorm",
)
def along_axis(call: Call) -> list[Labels]:
    """Computed along an axis that stays."""
    value = call.value(call.args[0])
    axis = call["dim"] % max(len(value.shape), 1) if call["dim"] is not None else len(value.shape) - 1
    fields = value.get(call.space)
    for labels in fields:
        across = tuple(a for a in varying(labels) if (a == axis) != (call.name == "renorm"))
        if across:
            call.space.mark_inexact(labels, across, f"{call.name.strip('_')} runs along it")
    call.zero = value.zero and call.name.startswith("cumsum")
    return [fields for _ in ([call.result] if isinstance(call.result, Tensor) else call.result)]


@rule(
    "sort",
    "argsort",
    "topk",
    "msort",
    "unique",
    "unique2",
    "_unique2",
    "bincount",
    "histc",
    "searchsorted",
    "bucketize",
)
def by_order(call: Call) -> list[Labels]:
    """Positions change with the data: a labelled axis is fixed, the others pass."""
    value = call.value(call.args[0])
    ndim = max(len(value.shape), 1)
    axis = call["dim"] % ndim if call.has("dim") and call["dim"] is not None else None
    kept = []
    for labels in value.get(call.space):
        if axis is None or labels.shape[axis] > 1:
            call.fix(labels, f"{call.name} orders it by value")
        else:
            kept.append(labels)
    results = [call.result] if isinstance(call.result, Tensor) else [t for t in call.result if isinstance(t, Tensor)]
    same_rank = all(t.dim() == ndim for t in results)
    if not same_rank:
        for labels in kept:
            call.fix(labels, f"{call.name} orders it by value")
    return [tuple(kept) if same_rank else () for _ in results]


@rule("_local_scalar_dense", "item", "equal", "is_nonzero", "allclose")
def read(call: Call) -> Labels:
    """A number read out in forward: what it was computed from is fixed."""
    for item in call.args:
        if isinstance(item, Tensor):
            for labels in call.value(item).get(call.space):
                call.fix(labels, "its value is read by forward")
    return ()
