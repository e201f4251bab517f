"""Facts in a context and questions on them: how many are answered rightly, and at which depth."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from niwaki.errors import InputError
from niwaki.measure import Measurement
from niwaki.measure.measurement import device_name, evaluating
from niwaki.tasks import Task
from niwaki.tasks.facts import Facts, Filler, Page, Rows, answers_of, filling, seed_of
from niwaki.tasks.parts import SPLITS, counted, finite, known
from niwaki.tasks.reading import Reader, Whole
from niwaki.units import device_of


@final
@dataclass(frozen=True, eq=False)
class Retrieval(Task):
    """Which value was written beside a key. A batch is a `Page`: a context with `lines` facts, and questions on some.

    With `filler` the facts stand in running text, at random places; with one line that is a needle in a haystack.
    Splits are drawn by seeds that never meet, and fill from the same split of the text.

    Source: Li et al. 2023, LongEval, "line retrieval"; the needle: Kamradt 2023. Differs: several questions on one
    context, each seeing the ones before it with their true answers; values may be single tokens.

    Raises:
        InputError: settings out of range, more lines than keys or than fit, or too little text to fill with.
    """

    facts: Facts
    """How lines and questions are written; see `Facts.of_text`."""
    lines: int = 20
    """Facts in a context, each with a key of its own."""
    length: int | None = None
    """Tokens of a context, questions not counted; None: as many as the lines have."""
    questions: int = 8
    """Facts of a context that are asked for, at most `lines`."""
    filler: Filler | None = None
    """Text that the lines stand in; needed where `length` is more than they have."""
    batch: int = 16
    """Contexts in a batch."""
    sequences: int = 256
    """Contexts in one pass, of training and of each evaluation."""
    depths: int = 5
    """Equal parts of the context that accuracy is told for, each by itself."""
    seed: int = 0
    """Of all splits."""
    reader: Reader = field(default_factory=Whole)
    """How evaluation reads: `Whole()`, or `Cached(...)` for the context first, into a cache."""

    def __post_init__(self) -> None:
        for name in ("lines", "questions", "batch", "sequences", "depths"):
            if (value := getattr(self, name)) < 1:
                raise InputError(f"Retrieval({name}={value})", do="give at least 1")
        if self.questions > self.lines or self.lines > len(self.facts.keys):
            found = f"{self.lines} lines, {len(self.facts.keys)} keys"
            do = "ask for at most all lines, and write at most as many as there are keys"
            raise InputError(f"{self.questions} questions", found=found, do=do)
        room = self._filling
        if room < 0 or (room > 0 and self.filler is None):
            found = f"{self.lines} lines of {self.facts.line} tokens"
            do = "give a longer length" if room < 0 else "give filler=, a text, or leave the length out"
            raise InputError(f"contexts of {self.length} tokens", found=found, do=do)
        for split in SPLITS if room else ():
            blocks = self._rows(split)
            if blocks.numel() < room + blocks.shape[1]:
                found, do = f"{blocks.numel()} tokens in the {split} split", "give a longer text"
                raise InputError(f"fill contexts with {room} tokens", found=found, do=do)

    @property
    def steps(self) -> int:
        return max(1, self.sequences // self.batch)

    def train_batches(self, seed: int) -> Iterator[Page]:
        return self._pages("train", seed, self.steps * self.batch)

    def calibration(self, n_batches: int, seed: int) -> list[Page]:
        if n_batches < 1:
            raise InputError(f"{n_batches} calibration batches", do="ask for at least 1")
        return list(islice(self.train_batches(seed), n_batches))

    def inputs(self, batch: Page) -> Tensor:
        return torch.cat([batch.context, batch.rest], 1)

    def example(self) -> Tensor:
        return self.inputs(next(self._pages("train", 0, 1)))

    def loss(self, model: nn.Module, batch: Page) -> Float[Tensor, ""]:
        """Mean cross-entropy of the answers' tokens, in nats; nothing else is learnt."""
        scores, answers = answers_of(model, batch, Whole(), self.facts)
        return functional.cross_entropy(scores.flatten(0, 1).float(), answers.flatten())

    def evaluate(self, model: nn.Module, *, split: str = "test", limit: int | None = None) -> Measurement:
        """Answers that are right in every token, in percent; `limit` counts contexts.

        Raises:
            UnknownNameError: an unknown split.
            InputError: a limit below 1, or a model whose output does not fit.
            NotFiniteError: the model puts out NaN or infinite values.
            OutOfMemoryError: the device is too small for a batch.
        """
        return self.metrics(model, split=split, limit=limit)["accuracy"]

    def metrics(self, model: nn.Module, *, split: str = "test", limit: int | None = None) -> dict[str, Measurement]:
        """`accuracy at depth N` for each part of the context that was asked about, and `accuracy`."""
        count = counted(known(split), limit, self.sequences, of="contexts")
        right, depth = [], []
        with evaluating(model):
            for page in self._pages(split, self.seed, count):
                scores, answers = answers_of(model, page, self.reader, self.facts)
                told = (finite(scores, split).argmax(2) == answers).view(len(answers), self.questions, -1)
                right.append(told.all(2).double().cpu())
                depth.append(page.depth)
        return self._measured(torch.cat(right), torch.cat(depth), split, model)

    def _measured(self, right: Tensor, depth: Tensor, split: str, model: nn.Module) -> dict[str, Measurement]:
        """From `[contexts, questions]` each."""
        where = f"{self.lines} lines in {self._length} tokens, {len(right)} contexts of the {split} split"
        part = (depth * self.depths).ceil().clamp(1, self.depths)
        found = {}
        for name, taken in (
            *((f"accuracy at depth {n / self.depths:g}", part == n) for n in range(1, self.depths + 1)),
            ("accuracy", torch.ones_like(right, dtype=torch.bool)),
        ):
            if not (asked := int(taken.sum())):
                continue
            share = (right * taken).sum().item() / asked
            # contexts, not questions, are what repeats
            apart = ((right - share) * taken).sum(1).square().sum().sqrt().item() / asked
            what = f"share of {asked} questions answered rightly, {where}; spread is the standard error over contexts"
            place = device_name(device_of(model))
            found[name] = Measurement(name, 100 * share, "%", what, spread=100 * apart, device=place)
        return found

    @property
    def _length(self) -> int:
        return self.lines * self.facts.line if self.length is None else self.length

    @property
    def _filling(self) -> int:
        return self._length - self.lines * self.facts.line

    def _rows(self, split: str) -> Tensor:
        rows: Rows = getattr(self.filler, split)
        return rows.blocks

    def _pages(self, split: str, order: int, count: int) -> Iterator[Page]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, split, order))
        for first in range(0, count, self.batch):
            size = min(self.batch, count - first)
            yield self.facts.page(self._gaps(split, size, generator), questions=self.questions, generator=generator)

    def _gaps(self, split: str, size: int, generator: torch.Generator) -> list[Int[Tensor, "batch tokens"]]:
        """Text before each line and after the last; the places are the same for a whole batch."""
        room = self._filling
        if not room:
            return [torch.zeros(size, 0, dtype=torch.int64)] * (self.lines + 1)
        text = filling(self._rows(split), room, size, generator)
        ends = torch.randint(room + 1, (self.lines,), generator=generator).sort().values.tolist()
        return list(text.tensor_split(ends, dim=1))
