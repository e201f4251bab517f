"""The judge of a search: losses of a network with some channels at zero, which are those of the network cut."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, Protocol, final, get_args

import numpy as np
import torch
from torch import Tensor, nn

from niwaki.budgets.atoms import Grids, make_atoms
from niwaki.errors import CannotCutError, InputError, Setting
from niwaki.evidence import Evidence, views
from niwaki.graph import ChannelGraph
from niwaki.graph.plans import cuts_of, plan_of, with_slabs
from niwaki.graph.skeleton import copy_with, identity, like
from niwaki.measure.measurement import evaluating
from niwaki.plan import apply_cuts
from niwaki.scores import Scores
from niwaki.search.greedy import SPREAD, Candidate, Choice, Found, Partial, loss_of
from niwaki.search.prefix import Prefixes
from niwaki.surgery import cut
from niwaki.surgery.exported import Exported
from niwaki.surgery.mask import zero_
from niwaki.tasks.scalars import scalars
from niwaki.units import tensors_in

CLOSE = 1e-3
"""How near the losses of a cut network come to those of the masked one, relative: float32, over many layers."""
SAFE = 1 + 1e-9
"""How far above its bound a sum has to be to end an evaluation: rounding in another order decides nothing."""
TRIED = 0.3
"""Share of a group that its contribution is measured by."""
Statistics = Literal["running", "batch"]
ALONE = "more than 1 value per channel"
"""How torch says that a batch has no statistics."""


class Losses(Protocol):
    """What is asked of a task; `niwaki.tasks.Task` has it."""

    def losses(self, model: nn.Module, batch: Any) -> dict[str, Tensor]: ...

    def inputs(self, batch: Any) -> Any: ...


@final
class Masked:
    """Judges candidates of one network on fixed batches: totals of each task's loss over all samples.

    What is gone for good is really cut, so that the network to evaluate shrinks with the search. Of the group in turn
    the channels of a candidate are zeroed in place, and nothing that comes before the group's first layer is computed
    again: the losses are those of the cut network, but for rounding. Groups whose removal is more than zeroing (those
    under layer norm) are cut for every candidate.

    Within a group those go first whose filters are smallest: the sum over the layers that put them out of the filters'
    mean absolute weight (norm=2: root mean square), on the network as already cut. An order is kept once it was tested.

    Source: Ye et al. 2023, arXiv:2303.11923 (the saliency of coupled filters). Differs: masking and kept prefixes take
    the place of a new network for each candidate; the tested channels are those that go (the published code ranks anew
    at the end).

    Args:
        model: left alone.
        batches: what losses are summed over; of training data.
        norm: of filters, 1 or 2.
        grids: what goes where an axis is a grid: whole rows (heads, groups) or equally many columns of every row.
        exact_only: leave groups whole whose removal changes more than zeroing does.
        alive: units that are there at the start, bool `[units]`; None for all.
        memory: bytes that may be held, over all batches, of what layers before the group in turn put out; 0: nothing.
        quick: on CPUs, lay weights of convolutions out with their channels last and fold batch norms into them, where
            that says the same of the first batch.
        nonnegative: whether no loss of a batch is ever below 0: then a candidate with bounds is left as soon as the
            batches seen are above one of them, those first that weigh most.
        statistics: what batch norms normalise by: their running statistics, or those of each batch itself, which are
            the candidate's own as if they had been estimated again. Where a network is cut as an exported graph, all of
            it is in training mode then.

    Raises:
        InputError: no batches; later, losses that are no scalars, or below 0 where none was to be; statistics of
            batches of one value, or of a network that is cut as an exported graph which can't train, or then draws
            numbers.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        task: Losses,
        batches: Sequence[Any],
        *,
        norm: int = 1,
        grids: Grids = "rows",
        exact_only: bool = False,
        alive: np.ndarray | None = None,
        memory: int = 2 << 30,
        quick: bool = True,
        nonnegative: bool = False,
        statistics: Statistics = "running",
    ) -> None:
        if not batches:
            raise InputError("search by losses", found="no batches", do="give at least one")
        if statistics not in get_args(Statistics):
            do = f"give one of {', '.join(get_args(Statistics))}"
            raise InputError((Setting("statistics", statistics),), found="no kind of statistics", do=do)
        self.model, self.graph, self.task, self.batches = model, graph, task, batches
        self.norm, self.memory, self.statistics = norm, memory, statistics
        self.quick, self._proved, self.nonnegative = quick, False, nonnegative
        self.heavy = list(range(len(batches)))
        """Batches, those first that made up the most of a loss when all were last seen."""
        self.orders: dict[str, list[np.ndarray]] = {}
        """Group -> the sets of units that go, lowest first, of groups that were ranked."""
        self._start = np.ones(graph.units.count, bool) if alive is None else alive
        neutral = {g.name: torch.ones(g.units, dtype=torch.float64) for g in graph.groups if g.fixed is None}
        atoms, self.left_whole = make_atoms(
            graph, Scores(neutral, {}), grids=grids, exact_only=exact_only, bundle="mean"
        )
        self._atoms: dict[str, list[np.ndarray]] = {}
        self._least: dict[str, int] = {}
        self.whole: dict[str, int] = {}
        """Group -> how many of what goes of it the whole network has."""
        for number, name in enumerate(atoms.pools):
            mine = [atoms.units[int(at)] for at in np.flatnonzero(atoms.pool == number)]
            there = [units for units in mine if self._start[units].all()]
            self.whole[name] = len(mine)
            if len(there) > 1:
                self._atoms[name], self._least[name] = there, int(atoms.least[number])
            else:
                self.left_whole[name] = "one is left"
        self.asked = self.seen = 0
        """Evaluations so far, and batches in them."""
        self._running: _Network | None = None
        self._first: dict[bytes, dict[str, float]] = {}
        """Losses on the first batch of candidates of the group in turn."""
        self._told: tuple[bytes, dict[str, float]] | None = None
        """What of the network was left, and its losses over all batches, as an earlier search told."""

    def choices(self) -> list[Choice]:
        """Groups by the multiply-adds of the whole network that go with 30 % of each alone, the most first.

        Source: Ye et al. 2023 (the overview figure). Differs: counted, not measured on networks cut for it.
        """
        before, found = self.macs(self._start), []
        for name, atoms in self._atoms.items():
            count = max(1, min(int(len(atoms) * TRIED), len(atoms) - self._least[name]))
            alive = self._start.copy()
            alive[np.concatenate(self.order(name, self._start)[:count])] = False
            found.append(Choice(name, len(atoms), self._least[name], before - self.macs(alive)))
        self.orders.clear()  # ranked on the network as it was: it is asked again when a group's turn comes
        return sorted(found, key=lambda choice: -choice.value)

    def macs(self, alive: np.ndarray) -> float:
        return self.graph.cost(with_slabs(self.graph, alive.copy()))["macs"]

    def cost(self, counts: Mapping[str, int]) -> dict[str, float]:
        """What the network costs with so many of each group gone, whichever these are; nothing is ranked."""
        alive = self._start.copy()
        for group, count in counts.items():
            for units in self._atoms[group][: max(count, 0)]:
                alive[units] = False
        return dict(self.graph.cost(with_slabs(self.graph, alive)))

    def kept(self, gone: Mapping[str, int]) -> np.ndarray:
        """Which units are there when so many of each group are gone; bool `[units]`. Groups not ranked yet are ranked
        in the order given."""
        alive = self._start.copy()
        for group, count in gone.items():
            order = self.order(group, alive)
            for units in order[:count]:
                alive[units] = False
        return with_slabs(self.graph, alive)

    def order(self, group: str, alive: np.ndarray) -> list[np.ndarray]:
        """What goes of a group, lowest first, by the filters of what is alive."""
        if group not in self.orders:
            atoms = self._atoms[group]
            value = self._filters(group, alive)
            numbers = np.array([value[units][~np.isnan(value[units])].mean() for units in atoms])
            ranked = np.lexsort((-np.arange(len(atoms)), numbers))  # of equal ones the lower index stays
            self.orders[group] = [atoms[int(at)] for at in ranked]
        return self.orders[group]

    def _filters(self, group: str, alive: np.ndarray) -> np.ndarray:
        """Size of the filters that put out each unit; NaN for units of other groups; float64 `[units]`."""
        taken = np.concatenate(self._atoms[group])
        value = np.full(self.graph.units.count, np.nan)
        mine = [g for g in self.graph.groups if g.fixed is None and np.isin(g.ids, taken).any()]
        tensors = {member.tensor for g in mine for member in g.members}
        weights, ones = {}, {}
        for name, tensor in self.model.named_parameters():
            if name in tensors:
                cuts = cuts_of(self.graph, name, with_slabs(self.graph, alive.copy()))
                weights[name] = zero_(tensor.detach().clone(), cuts)
                ones[name] = zero_(torch.ones_like(tensor.detach()), cuts)
        sizes = {view.group.name: view for view in views(self.graph, Evidence(ones))}
        for view in views(self.graph, Evidence(weights)):
            if view.group not in mine:
                continue
            counts = sizes[view.group.name].powers(1)
            rows = [
                (sums / number.clamp(min=1)).pow(1 / self.norm)
                for sums, number, role, vector in zip(
                    view.powers(self.norm), counts, view.roles, view.biases, strict=True
                )
                if role == "out" and not vector
            ]
            if not rows:  # nothing puts them out but what is held by no weight: judged by all that holds them
                rows = [sums / number.clamp(min=1) for sums, number in zip(view.powers(1), counts, strict=True)]
            value[view.group.ids] = torch.stack(rows).sum(0).numpy() if rows else 0.0
        return value

    def __call__(self, candidate: Candidate) -> dict[str, float]:
        """Totals of the losses by task, over all samples."""
        if not self.asked and self.statistics == "batch":
            self._try()
        gone = self.kept(candidate.gone)
        if self._running is None or not np.array_equal(self._running.alive, gone):
            self._running = None  # its memory goes first
            self._running = _Network(self, gone)
            self._agree(self._running)
        if candidate.group is None or not candidate.count:
            return self._running.losses()
        order = self.order(candidate.group, gone)
        alive = gone.copy()
        for units in order[: candidate.count]:
            alive[units] = False
        alive = with_slabs(self.graph, alive)
        if not (self._running.maskable and self.exact(alive, gone)):
            return _Network(self, alive).losses(bounds=candidate.bounds)
        found = self._running.losses(candidate.group, alive, np.concatenate(order), bounds=candidate.bounds)
        if not isinstance(found, Partial):
            self._first[alive.tobytes()] = self._running.first
        return found

    def losses(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """What the task says of a network on a batch, as it may say it."""
        return scalars(self.task.losses(model, batch), where=f"{type(self.task).__name__}.losses")

    def hold(self, losses: Mapping[str, float]) -> None:
        """Hold the task to what it promised of its losses."""
        for task, loss in losses.items() if self.nonnegative else ():
            if loss < 0:
                do = "leave nonnegative out of the task: it promises that no loss is below 0"
                raise InputError(f"search by {loss_of(task)}", found=f"it is {loss:g} on a batch, below 0", do=do)

    def weigh(self, sums: Mapping[int, Mapping[str, float]]) -> None:
        """See those batches first from now on that make up the most of any loss."""
        totals = _total(sums)

        def share(number: int) -> float:
            return max((loss / totals[task] for task, loss in sums[number].items() if totals[task] > 0), default=0.0)

        self.heavy = sorted(sums, key=lambda number: (-share(number), number))

    def recall(self, found: Found) -> None:
        """Of a search that goes on: what was cut before is held to what its masked form said then."""
        taken = [step.taken for step in found.steps if step.taken is not None]
        if taken:
            self._told = self.kept(found.gone).tobytes(), taken[-1].losses

    def settle(self, gone: Mapping[str, int]) -> None:
        """Hold the last cut, too, to what its masked form said; raises as a call does."""
        alive = self.kept(gone)
        none = self._told is None if self._running is None else np.array_equal(self._running.alive, alive)
        if not none:
            self._running = None
            self._running = _Network(self, alive)
            self._agree(self._running)

    def _try(self) -> None:
        """Cut one of every group, and leave it again: what statistics of batches can't be had of is refused at once."""
        alive = self._start.copy()
        for name, atoms in self._atoms.items():
            if len(atoms) > self._least[name]:
                alive[atoms[-1]] = False
        with suppress(CannotCutError):  # all at once may be too much
            _Network(self, with_slabs(self.graph, alive))

    def _agree(self, network: "_Network") -> None:
        """Hold what was cut to what its masked form said, on the first batch; of an earlier search, on all.

        Raises:
            CannotCutError: they are apart: what was decided by the masked form was decided by something else.
        """
        key = network.alive.tobytes()
        masked, most = self._first.get(key), 1
        self._first.clear()
        if masked is None and self._told is not None and self._told[0] == key:
            masked, most = self._told[1], len(self.batches)
        self._told = None
        if masked is None:
            return
        found = network.losses(most=most)
        for task, loss in masked.items():
            apart = abs(found[task] - loss)
            if not apart <= CLOSE * max(abs(loss), CLOSE):
                same = "batch" if most == 1 else "batches"
                raise CannotCutError(
                    f"search by losses of {type(self.model).__name__}",
                    found=f"{task} is {loss:.6g} masked and {found[task]:.6g} cut, on the same {same}",
                    where="the network as cut so far",
                    do=("have the loss read outputs only, or protect the group: ", Setting("protect")),
                )

    def exact(self, alive: np.ndarray, gone: np.ndarray) -> bool:
        """Whether zeroing what is not alive, of what was there, equals its removal."""
        went = alive != gone
        return not any(went[g.ids].any() and not g.exact for g in self.graph.groups)


@final
class _Network:
    """The network with what is gone cut off, and its evaluations with more of it at zero."""

    def __init__(self, judge: Masked, alive: np.ndarray) -> None:
        self.judge, self.alive = judge, alive
        self.maskable = True
        """Whether more of it can be zeroed, by the names of the whole one's tensors."""
        self.model, self.physical = self._made(alive)
        self.own = dict(self.model.named_parameters())
        self.prefixes = Prefixes(
            lambda batch: judge.losses(self.model, batch),
            judge.batches,
            list(self.own.values()),
            judge.memory,
            judge.quick,
        )
        self.group: str | None = None
        self.first: dict[str, float] = {}
        """Losses on the first batch, of the last evaluation."""
        self.changed: dict[str, Tensor] = {}
        """What the group in turn lies on, as it was."""
        if judge.statistics == "batch" and isinstance(self.model, Exported):
            self._steady(self.model)

    def _steady(self, model: Exported) -> None:
        """Refuse a graph that, in training mode as a whole, is none or says something else every time.

        Raises:
            InputError: it could not be exported so, or draws numbers there.
        """
        found = ""
        if not model.trains:
            found = "it is cut as an exported graph, and could not be exported in training mode"
        else:
            first, again = (self.losses(most=1) for _ in range(2))
            apart = {task: abs(again[task] - loss) / max(abs(loss), CLOSE) for task, loss in first.items()}
            worst = max(apart, key=apart.__getitem__)
            if not apart[worst] <= SPREAD:
                found = (
                    "it is cut as an exported graph, which is in training mode as a whole then, and draws numbers "
                    f"there, as dropout does: two evaluations of {worst} are {apart[worst]:.2g} of it apart"
                )
        if found:
            raise InputError(
                f"search in {type(self.judge.model).__name__} by statistics of batches",
                found=found,
                do=("give ", Setting("statistics", "running")),
            )

    def _made(self, alive: np.ndarray) -> tuple[nn.Module, bool]:
        """The cut network under the names of the whole one; a copy of this with zeros where it can't be had."""
        judge = self.judge
        if alive.all():
            return copy_with(judge.model, _cloned), True
        small = cut(judge.model, plan_of(judge.graph, alive))
        if {name for name, _ in small.named_parameters()} == {name for name, _ in judge.model.named_parameters()}:
            return small, True
        if not judge.exact(alive, np.ones_like(alive)):  # zeros would say something else
            self.maskable = False
            return small, True
        names = {identity(tensor): name for name, tensor in judge.model.named_parameters()}

        def zeroed(tensor: Tensor) -> Tensor:
            copy, name = _cloned(tensor), names.get(identity(tensor))
            if name is not None:
                zero_(copy.data, cuts_of(judge.graph, name, alive))
            return copy

        return copy_with(judge.model, zeroed), False

    def losses(
        self,
        group: str | None = None,
        alive: np.ndarray | None = None,
        every: Any = (),
        *,
        most: int | None = None,
        bounds: Mapping[str, float] | None = None,
    ) -> dict[str, float]:
        """Totals over the first `most` batches, with what is not `alive` at zero; `every` is what may go of `group`."""
        judge = self.judge
        if group is None:
            self._whole()
        elif group != self.group:
            self._turn(group, every)
        if alive is not None:
            self._zero(alive)
        sums: dict[int, dict[str, float]] = {}
        bounds = (bounds or {}) if judge.nonnegative else {}
        judge.asked += 1
        with self._judged():
            torch.manual_seed(judge.asked)  # what draws numbers says another loss every time, and is found out
            for number in judge.heavy if most is None else range(most):
                batch = judge.batches[number]
                try:
                    found = judge.losses(self.model, batch) if group is None else self.prefixes(number)
                except ValueError as error:
                    if judge.statistics == "running" or ALONE not in str(error):
                        raise
                    said, do = (
                        f"{error}; batch {number}",
                        ("give larger batches, or ", Setting("statistics", "running")),
                    )
                    raise InputError("search by statistics of batches", found=said, do=do) from error
                samples = _samples(judge.task.inputs(batch))
                sums[number] = {task: float(loss) * samples for task, loss in found.items()}
                judge.seen += 1
                judge.hold(sums[number])
                if bounds and len(sums) < len(judge.batches):
                    sofar = _total(sums)
                    if any(sofar.get(task, 0.0) > SAFE * bound for task, bound in bounds.items()):
                        return Partial(sofar)
        self.first = sums[0]
        if most is None:
            judge.weigh(sums)
        return _total(sums)

    @contextmanager
    def _judged(self) -> Iterator[None]:
        """Inside, the network is as losses are asked of it; no statistics change."""
        norms = [m for m in self.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        tracked = [norm.track_running_stats for norm in norms]
        batch = self.judge.statistics == "batch"
        exported = self.model if batch and isinstance(self.model, Exported) else None
        with evaluating(self.model):
            try:
                if exported is not None:
                    exported.train().set_momentum(0.0)
                for norm in norms if batch else ():
                    norm.training, norm.track_running_stats = True, False
                yield
            finally:
                if exported is not None:
                    exported.set_momentum(None)
                for norm, tracks in zip(norms, tracked, strict=True):
                    norm.track_running_stats = tracks

    def _whole(self) -> None:
        """What a candidate zeroed is as it was."""
        with torch.no_grad():
            for name, tensor in self.changed.items():
                self.own[name].copy_(tensor)

    def _turn(self, group: str, every: np.ndarray) -> None:
        """`group` is next: what it lies on is remembered, and how much of the forward comes before it."""
        self._whole()
        graph, alive = self.judge.graph, self.alive.copy()
        alive[every] = False
        left, there = (np.append(flags, True) for flags in (with_slabs(graph, alive), self.alive))
        touched = {a.tensor for a in graph.axes if a.tensor in self.own and (left[a.units] != there[a.units]).any()}
        self.changed = {name: self.own[name].detach().clone() for name in sorted(touched)}
        self.group = group
        with self._judged():
            if self.judge.quick and not self.judge._proved:
                self.judge.quick, self.judge._proved = self.prefixes.proved(), True
            self.prefixes.begin([self.own[name] for name in self.changed])

    def _zero(self, alive: np.ndarray) -> None:
        """The group's weights with zeros where a unit is not alive."""
        graph = self.judge.graph
        with torch.no_grad():
            for name, tensor in self.changed.items():
                shape = graph.shapes[name]
                stays = zero_(torch.ones(shape, dtype=tensor.dtype, device=tensor.device), cuts_of(graph, name, alive))
                if self.physical:
                    stays = apply_cuts(stays, list(cuts_of(graph, name, self.alive)), name)
                self.own[name].copy_(tensor * stays)


def _cloned(tensor: Tensor) -> Tensor:
    return like(tensor, tensor.detach().clone())


def _total(sums: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """Over batches, in their order."""
    totals: dict[str, float] = {}
    for number in sorted(sums):
        for task, loss in sums[number].items():
            totals[task] = totals.get(task, 0.0) + loss
    return totals


def _samples(inputs: Any) -> int:
    """How many samples a batch has: rows of its first tensor."""
    found = tensors_in(inputs)
    return len(found[0]) if found and found[0].dim() else 1
