"""One fact in a long text, at several depths and lengths: where a model, or its cache, still finds it."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from niwaki.errors import InputError
from niwaki.measure import Measurement
from niwaki.measure.measurement import device_name, evaluating
from niwaki.tasks import Task
from niwaki.tasks.facts import Facts, Filler, Page, answers_of, filling, seed_of
from niwaki.tasks.parts import SPLITS, counted, finite, known
from niwaki.tasks.reading import Reader, Whole
from niwaki.units import device_of


@final
@dataclass(frozen=True, eq=False)
class Needle(Task):
    """Whether one fact in running text is found again. A batch is a `Page` with one line and one question.

    Every pair of a length and a depth is asked about `trials` times, each with another text, key and value.

    Source: Kamradt 2023, "Needle in a haystack". Differs: the needle is a key and its value, and only the value counts.

    Raises:
        InputError: settings out of range, a length too short for the needle, or too little text to fill with.
    """

    facts: Facts
    """How the needle and the question are written; see `Facts.of_text`."""
    filler: Filler
    """The haystack: the splits of a text."""
    lengths: tuple[int, ...] = (512,)
    """Tokens of the context, the needle included."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Where the needle stands, as a share of the haystack before it, in [0, 1]."""
    trials: int = 16
    """Contexts of each length and depth."""
    batch: int = 8
    """Contexts in a batch."""
    seed: int = 0
    """Of all splits."""
    reader: Reader = field(default_factory=Whole)
    """How evaluation reads: `Whole()`, or `Cached(...)` for the context first, into a cache."""

    def __post_init__(self) -> None:
        for name in ("trials", "batch"):
            if (value := getattr(self, name)) < 1:
                raise InputError(f"Needle({name}={value})", do="give at least 1")
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise InputError(f"Needle(depths={self.depths})", do="give shares in [0, 1]")
        for name in ("depths", "lengths"):
            if len(set(given := getattr(self, name))) < len(given):
                raise InputError(f"Needle({name}={given})", found="one of them twice", do="give each once")
        if not self.lengths or min(self.lengths) < self.facts.line:
            found = f"a needle of {self.facts.line} tokens"
            raise InputError(f"Needle(lengths={self.lengths})", found=found, do="give lengths that it fits in")
        for split in SPLITS:
            blocks, room = getattr(self.filler, split).blocks, max(self.lengths) - self.facts.line
            if blocks.numel() < room + blocks.shape[1]:
                found, do = f"{blocks.numel()} tokens in the {split} split", "give a longer text"
                raise InputError(f"fill contexts with {room} tokens", found=found, do=do)

    @property
    def steps(self) -> int:
        return len(self.lengths) * len(self.depths) * math.ceil(self.trials / self.batch)

    def train_batches(self, seed: int) -> Iterator[Page]:
        """Every length and depth, in an order drawn by `seed`."""
        pages = list(self._pages("train", seed, self.trials))
        order = torch.randperm(len(pages), generator=torch.Generator().manual_seed(seed)).tolist()
        return (pages[at][2] for at in order)

    def calibration(self, n_batches: int, seed: int) -> list[Page]:
        if n_batches < 1:
            raise InputError(f"{n_batches} calibration batches", do="ask for at least 1")
        return list(islice(self.train_batches(seed), n_batches))

    def inputs(self, batch: Page) -> Tensor:
        return torch.cat([batch.context, batch.rest], 1)

    def example(self) -> Tensor:
        return self.inputs(next(self._pages("train", 0, 1))[2])

    def loss(self, model: nn.Module, batch: Page) -> Float[Tensor, ""]:
        """Mean cross-entropy of the answers' tokens, in nats."""
        scores, answers = answers_of(model, batch, Whole(), self.facts)
        return functional.cross_entropy(scores.flatten(0, 1).float(), answers.flatten())

    def evaluate(self, model: nn.Module, *, split: str = "test", limit: int | None = None) -> Measurement:
        """Needles found, in percent, over all lengths and depths; `limit` is the most trials of each.

        Raises:
            UnknownNameError: an unknown split.
            InputError: a limit below 1, or a model whose output does not fit.
            NotFiniteError: the model puts out NaN or infinite values.
            OutOfMemoryError: the device is too small for a batch.
        """
        return self.metrics(model, split=split, limit=limit)["accuracy"]

    def metrics(self, model: nn.Module, *, split: str = "test", limit: int | None = None) -> dict[str, Measurement]:
        """`accuracy in L tokens at depth D` for every pair, and `accuracy`; raises as `evaluate`."""
        trials = counted(known(split), limit, self.trials, of="trials")
        right: dict[tuple[int, float], int] = {}
        with evaluating(model):
            for length, depth, page in self._pages(split, self.seed, trials):
                scores, answers = answers_of(model, page, self.reader, self.facts)
                told = int((finite(scores, split).argmax(2) == answers).all(1).sum())
                right[length, depth] = right.get((length, depth), 0) + told
        place = device_name(device_of(model))

        def measured(name: str, found: int, asked: int, where: str) -> Measurement:
            share = found / asked
            what = f"share of {asked} needles found {where} of the {split} split; spread is the binomial standard error"
            spread = 100 * math.sqrt(share * (1 - share) / asked)
            return Measurement(name, 100 * share, "%", what, spread=spread, device=place)

        listed = {}
        for (length, depth), found in right.items():
            name = f"accuracy in {length} tokens at depth {depth:g}"
            listed[name] = measured(name, found, trials, f"in {length} tokens, {depth:.0%} of them before it,")
        where = f"in {', '.join(map(str, self.lengths))} tokens, {len(self.depths)} depths each,"
        total = measured("accuracy", sum(right.values()), trials * len(right), where)
        return {**listed, "accuracy": total}

    def _pages(self, split: str, order: int, trials: int) -> Iterator[tuple[int, float, Page]]:
        for length, depth in itertools.product(self.lengths, self.depths):
            generator = torch.Generator().manual_seed(seed_of(self.seed, split, order, length, depth))
            room = length - self.facts.line
            for first in range(0, trials, self.batch):
                size = min(self.batch, trials - first)
                hay = filling(getattr(self.filler, split).blocks, room, size, generator)
                gaps = hay.tensor_split([round(depth * room)], dim=1)
                yield length, depth, self.facts.page(list(gaps), questions=1, generator=generator)
