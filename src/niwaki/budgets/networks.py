"""Whole networks, measured on a target in turns with the uncut one."""

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from torch import nn

from niwaki.budgets.tables import Table
from niwaki.graph import ChannelGraph
from niwaki.graph.plans import alive_of
from niwaki.measure.measurement import evaluating
from niwaki.measure.target import Target, at_batch
from niwaki.plan import Plan
from niwaki.surgery import cut
from niwaki.units import device_of, map_tensors, tensors_in

UNCUT = "uncut"
RUNS = 12
"""Of each network, in turns; the shortest counts, as of a layer."""
Progress = Callable[[int, int, str], None]


@final
@dataclass(frozen=True, eq=False)
class Networks:
    """Measures whole networks, in turns with the uncut one."""

    model: nn.Module
    graph: ChannelGraph
    example: Any
    """At the target's batch, on the CPU."""
    known: Table
    target: Target
    progress: Progress | None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        example: Any,
        graph: ChannelGraph,
        *,
        target: Target,
        table: str | Path | None,
        progress: Progress | None,
    ) -> "Networks":
        """Of a model that may be elsewhere: it stays there.

        Raises:
            MissingExtraError: the target's runtime is not installed.
            InputError: `table` is of another machine or target.
            FileDamagedError: `table` is no such file.
        """
        target.need()
        if device_of(model).type != "cpu":  # targets are; a model that will be trained elsewhere stays there
            model = copy.deepcopy(model).cpu()
        known = Table.open(None if table is None else Path(table), target.machine())
        batched = map_tensors(at_batch(example, target.batch), lambda t: t.detach().cpu())
        return cls(model, graph, batched, known, target, progress)

    def measured(self, plans: Mapping[str, Plan | None]) -> list[tuple[np.ndarray, float]]:
        """What stays, and milliseconds (or joules), of the uncut network and of each that there is a plan of.

        The uncut network's first measurement counts; others are relative to it, so that the machine may have become
        faster or slower in between.
        """
        key = f"{self.graph.fingerprint} {json.dumps([list(t.shape) for t in tensors_in(self.example)])}"
        found: dict[str, float] = {
            str(one["plan"]): float(one["ms"]) for one in self.known.networks.setdefault(key, []) if "plan" in one
        }
        wanted = {  # of other groups (protected ones, say) the same share is another network
            f"{label} {_code(alive_of(self.graph, plan))}": plan for label, plan in plans.items() if plan is not None
        }
        if UNCUT not in found or not set(wanted) <= set(found):
            with self.target.threaded(), evaluating(self.model):
                calls = {UNCUT: self.target.open(self.model, self.example)}
                for number, (label, plan) in enumerate(wanted.items()):
                    if self.progress is not None:
                        self.progress(number, len(wanted), f"whole network, {label}")
                    calls[label] = self.target.open(cut(self.model, plan).eval(), self.example)
                times = self.target.amounts(calls, RUNS)
            now = min(times[UNCUT])
            base = found.setdefault(UNCUT, now)
            found |= {label: min(times[label]) / now * base for label in wanted}
            self.known.networks[key] = [{"plan": label, "ms": ms} for label, ms in found.items()]
            self.known.save()
        points = [(alive_of(self.graph, plan), found[label]) for label, plan in wanted.items()]
        return [(np.ones(self.graph.units.count, bool), found[UNCUT]), *points]


def _code(alive: np.ndarray) -> str:
    """Of the units that stay."""
    return hashlib.sha256(np.packbits(alive).tobytes()).hexdigest()[:8]
