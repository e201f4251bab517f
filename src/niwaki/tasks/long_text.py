"""Perplexity of a text with long context: a window slides, and only what has context enough is scored."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from niwaki.errors import InputError
from niwaki.measure import Measurement
from niwaki.measure.measurement import device_name, evaluating
from niwaki.tasks import Task
from niwaki.tasks.facts import Filler
from niwaki.tasks.parts import SPLITS, counted, finite, known
from niwaki.tasks.reading import Reader, Whole
from niwaki.units import device_of


class Window(NamedTuple):
    """Neighbouring tokens: some to read, the next to be told."""

    context: Int[Tensor, "batch before"]
    rest: Int[Tensor, "batch after"]


@final
@dataclass(frozen=True, eq=False)
class LongText(Task):
    """How well tokens are told that have `length - stride` tokens or more before them. A batch is a `Window`.

    Windows of `length` tokens start every `stride` tokens; of each the last `stride` are scored: every token of the
    split once, but for the first `length - stride` and, at the end, fewer than `stride` that fill no window. With
    `reader=Cached(...)` they are read against the cache of what comes before them, which is where a compressed cache
    shows.

    Raises:
        InputError: a stride that is not 1 to `length - 1`, or too little text for one window.
    """

    splits: Filler
    """Where the tokens come from; see `niwaki.data.open_text`. Its blocks are joined again."""
    length: int = 1024
    """Tokens of a window; no more than the model's context."""
    stride: int = 256
    """Tokens of a window that are scored: from 1, the most exact and slowest, to `length - 1`."""
    batch: int = 4
    """Windows in a batch."""
    reader: Reader = field(default_factory=Whole)
    """How evaluation reads: `Whole()`, or `Cached(...)` for the context first, into a cache."""

    def __post_init__(self) -> None:
        if not 1 <= self.stride < self.length or self.batch < 1:
            found = f"length {self.length}, batch {self.batch}"
            raise InputError(f"a stride of {self.stride}", found=found, do="give 1 to length - 1, and a batch from 1")
        for split in SPLITS:
            if (count := getattr(self.splits, split).blocks.numel()) < self.length:
                found, do = f"{count} tokens in the {split} split", "give a longer text or a smaller length"
                raise InputError(f"windows of {self.length} tokens", found=found, do=do)

    @property
    def steps(self) -> int:
        return max(1, self._count("train") // self.batch)

    def train_batches(self, seed: int) -> Iterator[Window]:
        order = torch.randperm(self._count("train"), generator=torch.Generator().manual_seed(seed))
        return self._windows("train", order)

    def calibration(self, n_batches: int, seed: int) -> list[Window]:
        if n_batches < 1:
            raise InputError(f"{n_batches} calibration batches", do="ask for at least 1")
        return list(islice(self.train_batches(seed), n_batches))

    def inputs(self, batch: Window) -> Tensor:
        return torch.cat(batch, 1)

    def example(self) -> Tensor:
        return self.inputs(next(self._windows("train", torch.zeros(1, dtype=torch.int64))))

    def loss(self, model: nn.Module, batch: Window) -> Float[Tensor, ""]:
        """Mean cross-entropy of the scored tokens, in nats."""
        scores, told = self._scores(model, batch, Whole())
        return functional.cross_entropy(scores.flatten(0, 1).float(), told.flatten())

    def evaluate(self, model: nn.Module, *, split: str = "test", limit: int | None = None) -> Measurement:
        """Share of the scored tokens that are guessed first, in percent; `limit` counts windows.

        Raises:
            UnknownNameError: an unknown split.
            InputError: a limit below 1, or a model whose output does not fit.
            NotFiniteError: the model puts out NaN or infinite values.
            OutOfMemoryError: the device is too small for a batch.
        """
        return self.metrics(model, split=split, limit=limit)["accuracy"]

    def metrics(self, model: nn.Module, *, split: str = "test", limit: int | None = None) -> dict[str, Measurement]:
        """`perplexity` and `accuracy` of the scored tokens, in one pass; raises as `evaluate`."""
        whole = self._count(known(split))
        count = counted(split, limit, whole, of="windows")
        nats, right = [], []
        with evaluating(model):
            for window in self._windows(split, torch.arange(count)):
                scores, told = self._scores(model, window, self.reader)
                lost = functional.cross_entropy(scores.double().transpose(1, 2), told, reduction="none")
                nats.append(lost.mean(1).cpu())
                right.append((scores.argmax(2) == told).double().mean(1).cpu())
        lost, hit = torch.cat(nats), torch.cat(right)
        perplexity = math.exp(min(finite(lost, split).mean().item(), 700.0))  # beyond, a double has no number for it
        error = 1 / math.sqrt(count)
        where = (
            f"{count * self.stride} tokens, each with {self.length - self.stride} to {self.length - 1} before it, in "
            f"{count} of {whole} windows of the {split} split; spread is the standard error over windows"
        )
        place = device_name(device_of(model))
        return {
            "perplexity": Measurement(
                "perplexity",
                perplexity,
                "",
                f"exponential of the mean cross-entropy over {where}",
                spread=perplexity * lost.std(correction=0).item() * error,
                device=place,
            ),
            "accuracy": Measurement(
                "accuracy",
                100 * hit.mean().item(),
                "%",
                f"share of tokens guessed first, over {where}",
                spread=100 * hit.std(correction=0).item() * error,
                device=place,
            ),
        }

    def _scores(self, model: nn.Module, window: Window, reader: Reader) -> tuple[Tensor, Tensor]:
        """Scores of the tokens to be told, `[batch, stride, vocabulary]`, and these tokens."""
        # the first of them is told by the context's last token, which is read with them
        read = torch.cat([window.context[:, -1:], window.rest[:, :-1]], 1)
        scores = reader(model, window.context[:, :-1], read)
        if scores.shape[2] <= int(window.rest.max()):
            found, do = f"a model of {scores.shape[2]} tokens", "use the model's own tokenizer"
            raise InputError(f"tell tokens up to {int(window.rest.max())}", found=found, do=do)
        return scores, window.rest.to(scores.device)

    def _count(self, split: str) -> int:
        tokens: int = getattr(self.splits, split).blocks.numel()
        return (tokens - self.length) // self.stride + 1

    def _windows(self, split: str, order: Tensor) -> Iterator[Window]:
        tokens = getattr(self.splits, split).blocks.flatten()
        for part in order.split(self.batch):
            rows = torch.stack([tokens[at : at + self.length] for at in (part * self.stride).tolist()]).long()
            yield Window(rows[:, : -self.stride], rows[:, -self.stride :])
