"""Which of the open integers of a model's modules change: a search that is led by the first call that goes wrong."""

from collections.abc import Callable, Iterator
from itertools import combinations, product
from math import prod
from typing import NamedTuple

from niwaki.graph import ChannelGraph
from niwaki.surgery.check import Retrace, by_module, differs
from niwaki.surgery.evidence import Sizes
from niwaki.surgery.modules import Mend, Option

MOST_ATTEMPTS = 64
"""Ways to set open integers that are tried before the other door."""


FEW = 32
"""So many ways to set the integers near a wrong call are tried all."""

FAR = 6
"""So many ways to set integers elsewhere are tried: of modules that were called, neither hold the wrong call nor lie
inside, and whose own calls all do what they should, so that only what they hand on could be wrong."""


class Attempt(NamedTuple):
    """One way to set the integers, and how far the cut model then is what the plan means."""

    picks: tuple[int, ...]
    """Choice of every place."""
    seen: Retrace
    agreed: int
    """Calls that do what the trace says, in each module up to the first that does not."""
    wrong: str
    """Module of the first call that does not."""
    off: frozenset[str]
    """Modules that make a call which does not, or other calls than they did."""
    read: tuple[int, ...]
    """Places that may have had a part in it."""

    def same(self, picks: tuple[int, ...]) -> bool:
        """Whether it goes the same with these picks: nobody read what is picked otherwise."""
        return all(picks[i] == self.picks[i] for i in self.read)


def search(found: list[Option], judge: Callable[[list[Mend]], Retrace], graph: ChannelGraph, sizes: Sizes) -> Retrace:
    """The first way whose model the judge has nothing against; if none is found, the one that came furthest.

    Starts with the likeliest choices. Where a call goes wrong, the integers of its module and of those around it are
    the first to be set otherwise; what brings the forward further stays.
    """
    places = [place for option in found for place in option.places]
    choices = [option.choices for option in found for _ in option.places]
    sets, start = [], 0
    for option in found:
        sets.append(tuple(range(start, start + len(option.places))))
        start += len(option.places)
    tried: list[Attempt] = []

    def attempt(picks: tuple[int, ...]) -> Attempt:
        mends = [
            {"module": path, "attribute": attribute, "value": options[pick]}
            for (path, attribute), options, pick in zip(places, choices, picks, strict=True)
        ]
        seen = judge(mends)
        far = agreement(seen, graph, sizes) if seen.problem else (0, "", frozenset[str]())
        tried.append(Attempt(picks, seen, *far, read=reads(seen)))
        return tried[-1]

    def reads(seen: Retrace) -> tuple[int, ...]:
        return tuple(i for i, place in enumerate(places) if seen.read is None or place in seen.read)

    def idle(path: str, seen: Retrace) -> bool:
        """Whether a module of which the forward makes calls was not called before it failed: it handed on nothing."""
        return bool(seen.where) and path in graph.features and path not in seen.ran

    def moves(best: Attempt) -> Iterator[tuple[int, ...]]:
        """Neighbouring ways, the nearest to the wrong call first."""
        picks, wrong, off = best.picks, best.wrong, best.off
        steps = [_steps(path, wrong) for path, _ in places]
        order = sorted(sets, key=lambda held: min(steps[i] for i in held))
        near = [held for held in order if min(steps[i] for i in held) <= 1]
        alone: list[tuple[int, ...]] = [(i,) for held in near if len(held) > 1 for i in held if steps[i] <= 1]

        def ways(listed: list[tuple[int, ...]]) -> list[tuple[tuple[int, ...], int]]:
            return [(held, pick) for held in listed for pick in range(len(choices[held[0]]))]

        pairs = [pair for pair in combinations(ways(near), 2) if pair[0][0] != pair[1][0]]
        every: list[tuple[tuple[tuple[int, ...], int], ...]] = []
        if prod(len(choices[held[0]]) for held in near) <= FEW:  # heads, their keys' and their size are set together
            every = list(product(*(ways([held]) for held in near)))
        further = order[len(near) :]
        kin = [held for held in further if any(_kin(places[i][0], path) for i in held for path in off)]
        others = [held for held in further if held not in kin]
        rest = ways([held for held in others if not all(idle(places[i][0], best.seen) for i in held)])
        for move in (
            *((way,) for way in (*ways(near), *ways(alone))),
            *pairs,
            *every,
            *((way,) for way in ways(kin)),
            *((way,) for way in [way for way in rest if picks[way[0][0]] != way[1]][:FAR]),
        ):
            made = list(picks)
            for held, pick in move:
                for i in held:
                    made[i] = pick
            yield tuple(made)

    best = attempt((0,) * len(places))
    while best.seen.problem is not None:
        for picks in moves(best):
            if any(other.same(picks) for other in tried):
                continue
            if len(tried) >= MOST_ATTEMPTS:
                return best.seen
            other = attempt(picks)
            if other.seen.problem is None or other.agreed > best.agreed:
                best = other
                break
        else:
            return best.seen
    return best.seen


def _steps(path: str, wrong: str) -> int:
    """How far two modules are apart in the tree of modules."""
    a, b = path.split(".") if path else [], wrong.split(".") if wrong else []
    common = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return len(a) + len(b) - 2 * common


def _kin(path: str, other: str) -> bool:
    """Whether one of two modules lies in the other."""
    return f"{path}.".startswith(f"{other}." if other else "") or f"{other}.".startswith(f"{path}." if path else "")


def agreement(seen: Retrace, graph: ChannelGraph, sizes: Sizes) -> tuple[int, str, frozenset[str]]:
    """How many calls do what the trace says, the module of the first that does not, and all modules that are off.

    Where a module makes other calls than it did, nobody can tell which are wrong: what follows there does not count.
    """
    if seen.agreed is not None:
        wrong = seen.where if seen.wrong is None else seen.wrong
        return seen.agreed, wrong, frozenset({*seen.off, wrong, seen.where})
    before = by_module(graph.records)
    order = {id(record): i for i, record in enumerate(seen.records)}
    agreed, first, wrong, off = 0, len(seen.records), seen.where, set[str]()
    for module, made in by_module(seen.records).items():
        if len(made) > len(before.get(module, ())):
            off.add(module)
        for was, now in zip(before.get(module, ()), made, strict=False):
            if differs(was, now, graph, sizes):
                if was.name == now.name and order[id(now)] < first:
                    first, wrong = order[id(now)], module
                off.add(module)
                break
            agreed += 1
    return agreed, wrong, frozenset({*off, wrong})
