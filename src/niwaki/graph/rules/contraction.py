"""Matrix products, and what linear, matmul, einsum and tensordot become: tied along the contracted axis."""

from collections import Counter
from dataclasses import replace
from math import prod

import numpy as np
from torch import Tensor

from niwaki.graph.cost import Term
from niwaki.graph.labels import varying
from niwaki.graph.rules.registry import Call, rule
from niwaki.graph.values import Labels, Value, covers, join, merge

NOT_ZERO = "a value that is not zero at zero enters a product of two activations"


def contract(call: Call, left: Value, right: Value, pattern: str) -> Labels:
    """Labels of `einsum(pattern, left, right)`, with its cost; letters missing from the result are contracted.

    Contracted positions of the two operands are tied. Labels that also run along other axes leave slabs on those.
    """
    inputs, out = pattern.split("->")
    a_letters, b_letters = inputs.split(",")
    sizes = dict(zip(a_letters, left.shape, strict=True)) | dict(zip(b_letters, right.shape, strict=True))
    loop = sorted(sizes)
    gone = tuple(loop.index(letter) for letter in loop if letter not in out)
    shape = tuple(sizes[letter] for letter in loop)

    def lay(labels: np.ndarray, letters: str) -> np.ndarray:
        order = sorted(range(len(letters)), key=lambda i: letters[i])
        present = [letters[i] for i in order]
        spread = labels.transpose(order)
        return spread.reshape([spread.shape[present.index(c)] if c in present else 1 for c in loop])

    operands = []
    for value, letters in ((left, a_letters), (right, b_letters)):
        fields = value.get(call.space)
        if value.direct:
            for labels in fields:
                axes = varying(labels)
                if len(axes) == 1:
                    call.space.role(labels, "out" if letters[axes[0]] in out else "in")
        operands.append(
            (tuple(sizes[c] if c in letters else 1 for c in loop), tuple(lay(f, letters) for f in fields), value.why)
        )
    space = call.space
    if not (left.zero or right.zero):
        for _, fields, _ in operands:
            for labels in fields:
                axes = tuple(axis for axis in varying(labels) if axis in gone)
                if axes:
                    space.mark_inexact(labels, axes, NOT_ZERO)
    fields = join(space, operands, shape)
    call.terms.append(term(shape, fields))
    result: list[np.ndarray] = []
    for labels in fields:
        rest = call.drop(labels, gone)
        if rest is not None:
            merge(space, result, rest)
    letters_left = [c for c in loop if c in out]
    moved = []
    for labels in result:
        kept = labels.reshape([labels.shape[i] for i, c in enumerate(loop) if c in out])
        moved.append(kept.transpose([letters_left.index(c) for c in out]))
    call.zero = all(
        value.zero or not any(letters[axis] in out for labels in value.get(space) for axis in varying(labels))
        for value, letters in ((left, a_letters), (right, b_letters))
    )
    return tuple(moved)


def term(shape: tuple[int, ...], fields: Labels, constant: int = 1) -> Term:
    """Cost of a loop nest of this shape: constant axes multiply, labelled ones count what stays."""
    largest: list[np.ndarray] = []
    for labels in sorted(fields, key=lambda f: -len(varying(f))):
        axes = set(varying(labels))
        if not any(axes <= set(varying(other)) for other in largest):
            largest.append(labels)
    covered = Counter(axis for labels in largest for axis in varying(labels))
    shared = {axis for axis, times in covered.items() if times > 1}
    factors = []
    for labels in largest:  # grids that share rows are counted row by row
        rows = tuple(axis for axis in varying(labels) if axis in shared)
        rest = tuple(axis for axis in range(labels.ndim) if axis not in rows)
        count = prod(labels.shape[axis] for axis in rows)
        factors.append(labels.transpose(rows + rest).reshape(count, -1))
    return Term(constant * prod(size for axis, size in enumerate(shape) if axis not in covered), tuple(factors))


@rule(
    "mm",
    "bmm",
    "matmul",
    "dot",
    "mv",
    "vdot",
    "outer",
    "ger",
    "linear",
    "addmm",
    "baddbmm",
    "addbmm",
    "addmv",
    "addmm_",
    "baddbmm_",
    "_addmm_activation",
    "addr",
    "_int_mm",
    "chain_matmul",
)
def matrix_product(call: Call) -> Labels | None:
    name = call.name.rstrip("_")
    bias: Tensor | None = None
    if name == "linear":
        x, w = call.value(call["input"]), call.value(call["weight"])
        bias = call["bias"]
        lead = "abcdefgh"[: len(x.shape) - 1]
        labels = contract(call, x, w, f"{lead}k,nk->{lead}n" if len(w.shape) == 2 else f"{lead}k,k->{lead}")
    else:
        tensors = [t for t in call.args if isinstance(t, Tensor)]
        if name in ("addmm", "baddbmm", "addbmm", "addmv", "_addmm_activation", "addr"):
            bias, *tensors = tensors
        a, b = (call.value(t) for t in tensors[:2])
        pattern = {
            (1, 1): "m,n->mn" if name in ("outer", "ger", "addr") else "k,k->",
            (2, 1): "mk,k->m",
            (2, 2): "mk,kn->mn",
            (3, 3): "bmk,bkn->mn" if name == "addbmm" else "bmk,bkn->bmn",
        }.get((len(a.shape), len(b.shape)))
        if pattern is None:
            return None
        labels = contract(call, a, b, pattern)
    if bias is None:
        return labels
    value = call.value(bias)
    if value.direct:
        for array in value.get(call.space):
            call.space.role(array, "out")
    product_zero = call.zero
    fields = value.get(call.space)
    result = join(
        call.space,
        [(call.shape, labels, "an axis that no parameter spans"), (value.shape, fields, value.why)],
        call.shape,
    )
    added = value.zero and covers(call.space, fields, result)
    call.zero = product_zero and (added or (call.has("beta") and call["beta"] == 0))
    return result


@rule("_grouped_mm", "grouped_mm_fallback")
def grouped_product(call: Call) -> Labels | None:
    """Rows of one operand sorted by expert, each run times the matrix of its expert (offsets are data).

    Which expert a row meets depends on the data, so that experts stay; their widths are those of any product.
    """
    names = ("self", "mat2") if call.has("mat2") else ("input", "weight")
    a, b = (call.value(call[name]) for name in names)
    if (len(a.shape), len(b.shape)) != (2, 3) or (call.has("bias") and call["bias"] is not None):
        return None
    fields = []
    for labels in b.get(call.space):
        if labels.shape[0] > 1:
            call.fix(call.space.marker(labels, (0,)), "experts chosen by data")
        if varying(labels) != (0,):
            fields.append(np.take(labels, 0, axis=0))
    step = 16 // call.args[0].element_size()  # the kernels ask for rows that begin at multiples of 16 bytes
    across = 2 if call[names[1]].stride(-1) == 1 else 1
    for value, axis in ((a, 1), (b, across)):
        for labels in value.get(call.space):
            if varying(labels) == (axis,) and labels.size % step == 0:
                call.space.multiple(labels, step)
    expert = replace(b, shape=b.shape[1:], fields=tuple(fields), parameter=None)
    return contract(call, a, expert, "mk,kn->mn")
