"""Calls that count positions along two axes against each other: triangles of matrices, causal masks."""

from niwaki.graph.labels import varying
from niwaki.graph.rules.pointwise import meet
from niwaki.graph.rules.registry import Call, rule
from niwaki.graph.values import Labels, Value, join


@rule("tril", "triu")
def triangle(call: Call) -> Labels:
    """Rows against columns: what a matrix loses of both alike, its triangle loses."""
    matrix = call.value(call["self"])
    counted(call, (matrix, -2), (matrix, -1), "a triangle that counts its positions")
    return meet(call)


def counted(call: Call, one: tuple[Value, int], other: tuple[Value, int], what: str) -> None:
    """Tie the positions of two axes (counted from the end) where these are of one length; else fix both, as `what`."""
    space = call.space
    lines: list[tuple[Value, int, Labels]] = []
    for value, axis in (one, other):
        axis += len(value.shape)
        lines.append((value, axis, tuple(f for f in value.get(space) if f.shape[axis] > 1)))
    size = one[0].shape[one[1]]
    if size == other[0].shape[other[1]] and all(varying(f) == (axis,) for _, axis, fields in lines for f in fields):
        operands: list[tuple[tuple[int, ...], Labels, str]]
        operands = [((size,), tuple(f.reshape(-1) for f in fields), value.why) for value, _, fields in lines]
        for labels in join(space, operands, (size,)):
            if space.is_free(labels):
                space.unite(labels, space.new(size))  # as many as there are, not any number
        return
    for value, axis, fields in lines:
        bare = tuple(length if at == axis else 1 for at, length in enumerate(value.shape))
        join(space, [(value.shape, fields, value.why), (bare, (), what)], value.shape)
