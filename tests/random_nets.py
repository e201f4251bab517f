"""Random small architectures: a description (plain data), the network it stands for, and a hypothesis strategy.

A description is `{"input": shape, "seed": n, "nodes": [[kind, settings, inputs, module], ...], "outputs": [values]}`.
Value 0 is the input and every node appends its results; `module` numbers the module of a node, so that two nodes
with one number share it. Print a failing description and `build` it again anywhere.
"""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from networks.pieces import PIECES, Piece, Shape
from networks.registry import randomize_, reals

Description = dict[str, Any]


class RandomNet(nn.Module):
    """Runs the nodes of a description one after the other."""

    def __init__(self, description: Description) -> None:
        super().__init__()
        self.description = description
        self.parts = nn.ModuleList()
        known: set[int] = set()
        shapes: list[Shape] = [tuple(description["input"])]
        for kind, settings, inputs, module in description["nodes"]:
            if module not in known:
                known.add(module)
                self.parts.append(PIECES[kind].build(settings, shapes[inputs[0]]))
            shapes.extend(results(kind, settings, [shapes[i] for i in inputs]))

    def forward(self, x: Tensor) -> Any:
        values = [x]
        for _, _, inputs, module in self.description["nodes"]:
            result = self.parts[module](*(values[i] for i in inputs))
            values.extend(result if isinstance(result, tuple) else (result,))
        outputs = tuple(values[i] for i in self.description["outputs"])
        return outputs if len(outputs) > 1 else outputs[0]


def results(kind: str, settings: dict[str, Any], inputs: list[Shape]) -> list[Shape]:
    return PIECES[kind].shape(settings, *inputs)


def build(description: Description) -> tuple[nn.Module, Tensor]:
    """The network of a description, with random parameters from its seed, and an example of batch 2."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(description["seed"])
        model = RandomNet(description)
    model = randomize_(model, seed=description["seed"]).eval()
    return model, reals(2, *description["input"], seed=description["seed"] + 1)()


INPUTS: list[Shape] = [(3, 8, 8), (4, 6), (4, 4, 4), (4, 6), (2, 6, 4), (5,)]
OFTEN = {"conv": 3, "attention": 4, "add": 3, "cat": 2, "flatten": 2, "tokens": 2}
REUSABLE = ("conv", "linear", "attention", "gate", "token_mix")


def partners(piece: Piece, kind: str, shape: Shape, shapes: list[Shape]) -> list[int]:
    """Values that a second operand may be."""
    if kind == "cat":
        rest = (lambda s: s[:-1]) if len(shape) == 2 else (lambda s: s[1:])
        width = sum(shape)
        return [i for i, s in enumerate(shapes) if len(s) == len(shape) and rest(s) == rest(shape) and width <= 40]
    return [i for i, s in enumerate(shapes) if s == shape]


@st.composite
def descriptions(draw: st.DrawFn, least: int = 3, most: int = 9) -> Description:
    """Descriptions with `least` to `most` random nodes and one or two heads."""

    def pick(values: list[Any]) -> Any:
        return draw(st.sampled_from(values))

    shapes: list[Shape] = [pick(INPUTS)]
    nodes: list[list[Any]] = []
    modules: list[tuple[str, dict[str, Any], Shape]] = []

    def append(kind: str, settings: dict[str, Any], inputs: list[int], module: int | None = None) -> None:
        if module is None:
            module = len(modules)
            modules.append((kind, settings, shapes[inputs[0]]))
        nodes.append([kind, settings, inputs, module])
        shapes.extend(results(kind, settings, [shapes[i] for i in inputs]))

    stem = {"out": draw(st.integers(4, 10)), "bias": True}  # the widths of the input can't change, so widen it first
    if len(shapes[0]) == 3:
        append("conv", {**stem, "groups": 1, "size": 3, "stride": pick([1, 2])}, [0])
    else:
        append("linear", stem, [0])
    for _ in range(draw(st.integers(least, most))):
        # mostly the newest value, sometimes an older one: a graph rather than a chain
        source = len(shapes) - 1 if draw(st.integers(0, 3)) else draw(st.integers(0, len(shapes) - 1))
        shape = shapes[source]
        again = [i for i, (kind, _, seen) in enumerate(modules) if kind in REUSABLE and seen == shape]
        if again and draw(st.integers(0, 5)) == 0:
            number = pick(again)
            append(modules[number][0], modules[number][1], [source], number)
            continue
        fitting = [name for name, piece in PIECES.items() if len(shape) in piece.ranks and piece.fits(shape)]
        kind = pick([name for name in fitting for _ in range(OFTEN.get(name, 1))])
        inputs = [source]
        if PIECES[kind].inputs == 2:
            inputs.append(pick(partners(PIECES[kind], kind, shape, shapes) or [source]))
            if shapes[inputs[1]] == shape and draw(st.booleans()):
                inputs.reverse()
        append(kind, PIECES[kind].draw(shape, pick), inputs)

    # a head reads the last value, or a cut-off part of the graph, so that most widths are not outputs
    outputs = []
    for source in {len(shapes) - 1, draw(st.integers(0, len(shapes) - 1))}:
        if draw(st.integers(0, 9)) == 0:
            outputs.append(source)
        elif len(shapes[source]) == 3:
            append("conv", {"out": 2, "groups": 1, "size": 1, "stride": 1, "bias": True}, [source])
            outputs.append(len(shapes) - 1)
        else:
            append("linear", {"out": 3, "bias": True}, [source])
            outputs.append(len(shapes) - 1)
    return {"input": list(shapes[0]), "seed": draw(st.integers(0, 999)), "nodes": nodes, "outputs": outputs}
