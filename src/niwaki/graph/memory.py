"""What a plan takes in bytes: of its parameters and buffers, and at the peak of a forward.

Memory is taken by the call that first needs it and freed when nothing needs it any more, as the trace saw it: views and
what is computed in place take none. Sizes are products of widths, so both costs are exact.
"""

from dataclasses import replace

import numpy as np
from scipy.sparse import csr_matrix

from niwaki.graph.cost import Cost, Peak, Products, Term, Widths, joined, resolved
from niwaki.graph.rules.contraction import term
from niwaki.graph.trace import ChannelGraph
from niwaki.units import tensors_in


def with_bytes(graph: ChannelGraph) -> ChannelGraph:
    """`graph` with the cost "bytes": of all parameters and buffers at their types, tied ones once."""
    widths, ((factors, constants, _),) = resolved([state_terms(graph)])
    return _with(graph, widths, {"bytes": Products(factors, widths.rows, constants)})


def with_memory(graph: ChannelGraph) -> ChannelGraph:
    """`graph` with the cost "memory": parameters, buffers, inputs and what a forward has made, at its peak, in bytes.

    Not in it: what kernels take for themselves while they run. Where a block is left out, its input and its output
    are counted both at the block's last call, though they are one tensor then.
    """
    state, made = state_terms(graph), tensor_terms(graph)
    given = sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(graph.example))
    always = [*state, Term(given, ())]
    terms = [*always, *(size for size, _, _ in made)]
    widths, ((factors, constants, term_of),) = resolved([terms])
    times = max(len(graph.records), 1)
    born = np.zeros(len(terms), np.int64)
    died = np.full(len(terms), times, dtype=np.int64)
    for number, (_, *life) in enumerate(made, start=len(always)):
        born[number], died[number] = life
    start = born[term_of]
    lengths = died[term_of] - start
    items = np.repeat(np.arange(term_of.size), lengths)
    at = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths) + np.repeat(start, lengths)
    alive = csr_matrix((np.ones(items.size), (at, items)), shape=(times, term_of.size))
    return _with(graph, widths, {"memory": Peak(factors, widths.rows, constants, _telling(alive))})


def _with(graph: ChannelGraph, widths: Widths, costs: dict[str, Cost]) -> ChannelGraph:
    both, every = joined(graph.widths, graph.costs, widths, costs)
    return replace(graph, widths=both, costs=every)


def _telling(alive: csr_matrix) -> csr_matrix:
    """Times at which everything is there that is at a neighbouring time say all that the neighbour does."""
    sizes = np.diff(alive.indptr)
    common = np.asarray(alive[:-1].multiply(alive[1:]).sum(1)).ravel()
    keep = np.ones(sizes.size, bool)
    keep[1:] &= ~((common == sizes[1:]) & (sizes[1:] <= sizes[:-1]))  # less than before, nothing new
    keep[:-1] &= ~((common == sizes[:-1]) & (sizes[:-1] < sizes[1:]))
    return alive[np.flatnonzero(keep)]


def state_terms(graph: ChannelGraph) -> list[Term]:
    """Bytes of every parameter and buffer; none of a parameter whose block is gone."""
    units = graph.units.unit_of
    blocks = [(f"{block.path}.", graph.group(name).ids) for name, block in graph.inside.items()]

    def whole(tensor: str) -> np.ndarray | None:
        """The unit of the block that a tensor goes with, by all of its names."""
        return next((ids for path, ids in blocks if all(n.startswith(path) for n in graph.names[tensor])), None)

    terms = []
    for parameter in graph.parameters.values():
        constant, factors = parameter.itemsize, []
        blocked = next((axis for axis, count in parameter.blocks.items() if count > 1), None)
        for axis, size in enumerate(parameter.shape):
            seeds = parameter.seeds.get(axis)
            if seeds is None or size == 1:
                constant *= size
            elif blocked is not None and axis in (0, blocked):
                factors.append(units[seeds].reshape(parameter.blocks[blocked], -1))
            else:
                factors.append(units[seeds].reshape(1, -1))
        terms.append(_while(Term(constant, tuple(factors)), whole(parameter.name)))
    picking = {name: source[values] for name, source, values in graph.tables}
    for name, (elements, itemsize) in graph.integers.items():
        picked = (picking[name].reshape(1, -1),) if name in picking else ()
        terms.append(_while(Term(itemsize if picked else itemsize * elements, picked), whole(name)))
    return terms


def _while(size: Term, block: np.ndarray | None) -> Term:
    """The term, nothing where the block that it lies in is gone."""
    return size if block is None else Term(size.constant, (*size.factors, block.reshape(1, 1).astype(np.int32)))


def tensor_terms(graph: ChannelGraph) -> list[tuple[Term, int, int]]:
    """Bytes of all memory that calls of the forward took, from which call on it is there, and until before which."""
    stays = _blocks(graph)
    seen: set[int] = set()
    terms = []
    for record in graph.records:
        for value in record.outputs:
            memory = value.memory
            if memory is None or id(memory) in seen:
                continue
            seen.add(id(memory))
            size = term(memory.owner.shape, memory.owner.fields, memory.itemsize)
            size = Term(size.constant, tuple(graph.units.unit_of[factor] for factor in size.factors))
            end = len(graph.records) if memory.died is None else max(memory.died, memory.born + 1)
            terms.append((_while(size, stays.get(id(memory))), memory.born, min(end, len(graph.records))))
    return terms


def _blocks(graph: ChannelGraph) -> dict[int, np.ndarray]:
    """Memory that is taken inside of blocks and gone with them -> the block's unit. Their output stands for their input
    then, and stays."""
    found: dict[int, np.ndarray] = {}
    for name, block in graph.inside.items():
        made = [[value.memory for value in graph.records[at].outputs] for at in block.records]
        last = {id(memory) for memory in (made[-1] if made else ())}
        for memory in (memory for memories in made for memory in memories):
            if memory is not None and memory.born in block.records and id(memory) not in last:
                found[id(memory)] = graph.group(name).ids
    return found
