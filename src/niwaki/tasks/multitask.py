"""Several things told of one picture: a head for each, with its own loss and metrics."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, final

import torch
from torch import Tensor, nn

from niwaki.errors import InputError, NotFiniteError
from niwaki.measure import Measurement
from niwaki.measure.measurement import device_name, evaluating
from niwaki.tasks import Task
from niwaki.tasks.heads import Head
from niwaki.tasks.outputs import named_outputs, outputs_of
from niwaki.tasks.parts import part_of
from niwaki.units import device_of

Batch = tuple[Tensor, dict[str, Tensor]]


class Samples(Protocol):
    """Pictures with named targets, in batches; `niwaki.data.Samples` is one."""

    def __len__(self) -> int: ...

    def batches(self, size: int, *, shuffle_seed: int | None = None, whole: bool = False) -> Iterator[Batch]: ...


class SampleSplits(Protocol):
    """Three splits; `niwaki.data.SampleSplits` is one."""

    @property
    def train(self) -> Samples: ...

    @property
    def val(self) -> Samples: ...

    @property
    def test(self) -> Samples: ...


@final
@dataclass(frozen=True, eq=False)
class Multitask(Task):
    """Several heads on one network. A batch is (pictures, targets by head).

    The loss is the weighted sum of the heads' losses. The network puts out a dictionary (or named fields) with each
    head's name, or a tuple in the order of the heads.

    Source of the summary with a reference: Maninis et al. 2019, arXiv:1904.08918 (the average per-task drop).

    Raises:
        InputError: no heads, a name twice, an empty training split, a reference that does not fit.
    """

    splits: SampleSplits
    """Where the pictures and targets come from; see `niwaki.data.open_samples`."""
    heads: tuple[Head, ...]
    """What is told: `niwaki.tasks.Segmentation`, `Boundary`, `Depth`, `Normals`, or a `Head` of your own."""
    batch: int = 8
    """Pictures in a batch, in training and in evaluation."""
    reference: Mapping[str, float] | None = None
    """Head -> the first of its figures for the network to compare with (say, uncut): `evaluate` then gives the mean
    gain over heads in percent of these. None: the mean of the heads' percentages."""

    def __post_init__(self) -> None:
        names = [head.name for head in self.heads]
        if not names or len(set(names)) < len(names):
            raise InputError(f"Multitask with heads {names}", do="give at least one head, each with a name of its own")
        if self.batch < 1:
            raise InputError(f"Multitask(batch={self.batch})", do="give a batch of at least 1")
        if not len(self.splits.train):
            raise InputError("train several tasks", found="an empty training split", do="give some training pictures")
        if self.reference is not None:
            wrong = sorted(set(names) ^ set(self.reference))
            if wrong or not all(value > 0 for value in self.reference.values()):
                found, do = f"odd: {', '.join(wrong) or 'a value not above 0'}", "give one figure above 0 for each head"
                raise InputError("compare with a reference", found=found, do=do)

    @property
    def nonnegative(self) -> bool:
        return all(head.nonnegative for head in self.heads)

    @property
    def steps(self) -> int:
        return max(1, len(self.splits.train) // self.batch)

    def train_batches(self, seed: int) -> Iterator[Batch]:
        """One shuffled pass; a last batch that is not full is left out."""
        return self.splits.train.batches(self.batch, shuffle_seed=seed, whole=True)

    def calibration(self, n_batches: int, seed: int) -> list[Batch]:
        if n_batches < 1:
            raise InputError(f"{n_batches} calibration batches", do="ask for at least 1")
        return list(islice(self.train_batches(seed), n_batches))

    def inputs(self, batch: Batch) -> Tensor:
        return batch[0]

    def example(self) -> Tensor:
        return next(self.splits.train.batches(1))[0]

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Each head's loss, not yet weighted."""
        outputs, targets = self._outputs(model, batch[0]), batch[1]
        return {head.name: head.loss(outputs[head.name], self._target(targets, head)) for head in self.heads}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The heads' losses, weighted and summed."""
        found = self.losses(model, batch)
        return torch.stack([head.weight * found[head.name] for head in self.heads]).sum()

    def evaluate(self, model: nn.Module, *, split: str = "test", limit: int | None = None) -> Measurement:
        """The summary: "gain" with a reference, "score" without; both in percent.

        Raises:
            InputError: an unknown or empty split, or outputs that do not fit.
            NotFiniteError: the model puts out NaN or infinite values, or no pixel of a head has a target.
            OutOfMemoryError: the device is too small for a batch.
        """
        return list(self.metrics(model, split=split, limit=limit).values())[-1]

    def metrics(self, model: nn.Module, *, split: str = "test", limit: int | None = None) -> dict[str, Measurement]:
        """Every head's figures as HEAD_FIGURE, then the summary; raises as `evaluate`."""
        part, count = part_of(self.splits, split, limit, of="pictures")
        samples: Samples = part
        sums: dict[str, Tensor] = {}
        with evaluating(model):
            for number, (inputs, targets) in enumerate(samples.batches(self.batch)):
                take = count - number * self.batch
                if take <= 0:
                    break
                outputs = self._outputs(model, inputs[:take])
                for head in self.heads:
                    output = outputs[head.name]
                    if not output.isfinite().all():
                        do = "look for NaN in the weights, or for a precision that is too small"
                        raise NotFiniteError(f"evaluate {head.name}", found="NaN or infinite outputs", do=do)
                    new = head.sums(output, self._target(targets, head)[:take]).cpu()
                    sums[head.name] = new if head.name not in sums else sums[head.name] + new
        where = f"{count} of {len(samples)} pictures of the {split} split"
        return self._measured(sums, where, device_name(device_of(model)))

    def _measured(self, sums: dict[str, Tensor], where: str, device: str) -> dict[str, Measurement]:
        found: dict[str, Measurement] = {}
        shares, gains = [], []
        for head in self.heads:
            figures = head.figures(sums[head.name])
            for name, (value, unit, definition) in figures.items():
                if math.isnan(value):
                    do = "give data with targets for every head"
                    raise NotFiniteError(f"evaluate {head.name}", found="no pixel with a target", where=where, do=do)
                label = f"{head.name}_{name}"
                found[label] = Measurement(label, value, unit, f"{definition}; {where}", device=device)
            values = [figure.value for figure in figures.values()]
            shares.append(values[-1])
            if self.reference is not None:
                gain = values[0] / self.reference[head.name] - 1
                gains.append(100 * (gain if head.higher else -gain))
        listed = ", ".join(head.name for head in self.heads)
        if self.reference is None:
            said = f"mean over {listed} of each head's percentage (the last of its figures); {where}"
            found["score"] = Measurement("score", sum(shares) / len(shares), "%", said, device=device)
        else:
            said = f"mean over {listed} of the gain over the reference in percent of it; {where}"
            found["gain"] = Measurement("gain", sum(gains) / len(gains), "%", said, device=device)
        return found

    def _outputs(self, model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
        output = outputs_of(model, inputs)
        names = [head.name for head in self.heads]
        by_name = named_outputs(output, names)
        if missing := [name for name, value in by_name.items() if not isinstance(value, Tensor)]:
            found = f"a {type(output).__name__} without {', '.join(missing)}"
            do = f"return a dictionary with {', '.join(names)}, or a tuple in this order"
            raise InputError("outputs of several heads", found=found, do=do)
        return by_name

    @staticmethod
    def _target(targets: dict[str, Tensor], head: Head) -> Tensor:
        if head.name not in targets:
            raise InputError(
                f"targets of {head.name}", found=f"known: {', '.join(targets)}", do="name heads as the data do"
            )
        return targets[head.name]
