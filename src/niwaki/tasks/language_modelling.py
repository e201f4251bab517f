"""The next token of a text, or hidden ones: cross-entropy, perplexity and token accuracy."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal, Protocol, final, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from niwaki.errors import InputError, NotFiniteError, OutOfMemoryError, UnknownNameError
from niwaki.measure import Measurement
from niwaki.measure.measurement import device_name, evaluating
from niwaki.tasks import Task
from niwaki.tasks.outputs import logits_of
from niwaki.tasks.parts import part_of
from niwaki.units import device_of, run

Batch = tuple[Tensor, Tensor]
Kind = Literal["causal", "masked"]
UNCOUNTED = -100
"""The label of a position that nothing is asked of; torch's own."""
KEPT, DRAWN = 0.1, 0.1
"""Of the picked positions, how many show their own token and how many a random one; the others show the mask token."""


class Blocks(Protocol):
    """Token sequences of one length, in batches; `niwaki.data.Tokens` is one."""

    def __len__(self) -> int: ...

    def batches(
        self, size: int, *, shuffle_seed: int | None = None, whole: bool = False
    ) -> Iterator[Int[Tensor, "batch length"]]: ...


class TokenSplits(Protocol):
    """Three splits of a text; `niwaki.data.TextSplits` is one."""

    @property
    def train(self) -> Blocks: ...

    @property
    def val(self) -> Blocks: ...

    @property
    def test(self) -> Blocks: ...

    @property
    def vocabulary(self) -> int: ...

    @property
    def mask(self) -> int | None: ...


@final
@dataclass(frozen=True, eq=False)
class LanguageModelling(Task):
    """What comes next (causal), or what was hidden (masked). A batch is (tokens, labels), both [batch, length].

    Models are called on the tokens alone and give scores [batch, length, vocabulary]. Labels stand where they are to be
    told: those of a causal model are the tokens moved by one, so that its scores are compared with what follows.

    Source of the masking: Devlin et al. 2019, arXiv:1810.04805, sec. 3.1: of the picked tokens 80 % are hidden, 10 %
    are replaced by a random one, 10 % stay. Differs: at least one token of every sequence is picked.

    Raises:
        InputError: an empty training split, a setting out of range, or no mask token for kind="masked".
        UnknownNameError: an unknown kind.

    Examples:
        >>> import niwaki.data
        >>> splits = niwaki.data.TextSplits(*[niwaki.data.Tokens(torch.tensor([[0, 1, 2, 3]]))] * 3, 4, vocabulary=4)
        >>> task = LanguageModelling(splits, batch=1)
        >>> model = nn.Embedding(4, 4)  # the scores of the next token, by the last one alone
        >>> with torch.no_grad():
        ...     nothing = model.weight.zero_()
        >>> round(task.loss(model, task.calibration(1, 0)[0]).item(), 4)  # the logarithm of four tokens
        1.3863
    """

    splits: TokenSplits
    """Where the tokens come from; see `niwaki.data.open_text`."""
    batch: int = 16
    """Sequences in a batch, in training and in evaluation."""
    kind: Kind = "causal"
    """"causal": each token from those before it; "masked": picked tokens from all others."""
    share: float = 0.15
    """For "masked": the share of tokens that are picked, in (0, 1); 0.15 is the source's."""
    seed: int = 0
    """For "masked": which tokens are picked in evaluation, the same each time."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UnknownNameError.of("kind of language modelling", self.kind, get_args(Kind))
        if self.batch < 1:
            raise InputError(f"LanguageModelling(batch={self.batch})", do="give a batch of at least 1")
        if not 0 < self.share < 1:
            raise InputError(f"LanguageModelling(share={self.share})", do="give a share in (0, 1)")
        if self.kind == "masked" and self.splits.mask is None:
            found, do = "splits without a mask token", "niwaki.data.open_text(..., mask=256)"
            raise InputError("hide tokens", found=found, do=do)
        if not len(self.splits.train):
            raise InputError("train a language model", found="an empty training split", do="give some training text")

    @property
    def nonnegative(self) -> bool:
        return True

    @property
    def steps(self) -> int:
        return max(1, len(self.splits.train) // self.batch)

    def train_batches(self, seed: int) -> Iterator[Batch]:
        """One shuffled pass; a last batch that is not full is left out. `seed` also picks what is hidden."""
        return self._labelled(self.splits.train.batches(self.batch, shuffle_seed=seed, whole=True), seed)

    def calibration(self, n_batches: int, seed: int) -> list[Batch]:
        if n_batches < 1:
            raise InputError(f"{n_batches} calibration batches", do="ask for at least 1")
        return list(islice(self.train_batches(seed), n_batches))

    def inputs(self, batch: Batch) -> Tensor:
        return batch[0]

    def example(self) -> Tensor:
        return next(self.splits.train.batches(1))

    def loss(self, model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
        """Mean cross-entropy over all labelled positions, in nats."""
        logits, labels = self._logits(model, batch)
        return functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=UNCOUNTED)

    def evaluate(self, model: nn.Module, *, split: str = "test", limit: int | None = None) -> Measurement:
        """Token accuracy in percent, on a split or its first `limit` sequences.

        Raises:
            InputError: an unknown or empty split, or a model whose output does not fit.
            NotFiniteError: the model puts out NaN or infinite values.
            OutOfMemoryError: the device is too small for a batch.
        """
        return self.metrics(model, split=split, limit=limit)["accuracy"]

    def metrics(self, model: nn.Module, *, split: str = "test", limit: int | None = None) -> dict[str, Measurement]:
        """`perplexity` and `accuracy`, in one pass; raises as `evaluate`."""
        part, count = part_of(self.splits, split, limit, of="sequences")
        blocks: Blocks = part
        nats, tokens, right = [], [], []
        with evaluating(model):
            for number, batch in enumerate(self._labelled(blocks.batches(self.batch), self.seed)):
                take = count - number * self.batch
                if take <= 0:
                    break
                logits, labels = self._logits(model, (batch[0][:take], batch[1][:take]))
                scores, asked = logits.double().transpose(1, 2), labels != UNCOUNTED
                lost = functional.cross_entropy(scores, labels, ignore_index=UNCOUNTED, reduction="none")
                nats.append(lost.sum(1).cpu())
                tokens.append(asked.sum(1).cpu())
                right.append(((logits.argmax(2) == labels) & asked).sum(1).cpu())
        return self._measured(torch.cat(nats), torch.cat(tokens), torch.cat(right), split, len(blocks), model)

    def _measured(
        self, nats: Tensor, tokens: Tensor, right: Tensor, split: str, whole: int, model: nn.Module
    ) -> dict[str, Measurement]:
        """From sums by sequence, `[sequences]` each."""
        if not nats.isfinite().all():
            do = "look for NaN in the weights, or for a precision that is too small"
            raise NotFiniteError(f"evaluate on the {split} split", found="NaN or infinite outputs", do=do)
        total = int(tokens.sum())
        loss, share = (nats.sum() / total).item(), (right.sum() / total).item()
        what = "the next one" if self.kind == "causal" else f"what was hidden ({self.share:g} of them)"
        where = f"{total} tokens in {len(nats)} of {whole} sequences of the {split} split, {what}"
        device = device_name(device_of(model))
        # sequences, not tokens, are what repeats: tokens of one are alike
        apart = (nats - loss * tokens).square().sum().sqrt().item() / total
        odd = (right - share * tokens).square().sum().sqrt().item() / total
        return {
            "perplexity": Measurement(
                "perplexity",
                math.exp(min(loss, 700.0)),  # beyond, a double has no number for it
                "",
                f"exponential of the mean cross-entropy over {where}; spread is the standard error over sequences",
                spread=math.exp(min(loss, 700.0)) * apart,
                device=device,
            ),
            "accuracy": Measurement(
                "accuracy",
                100 * share,
                "%",
                f"share of tokens guessed first, over {where}; spread is the standard error over sequences",
                spread=100 * odd,
                device=device,
            ),
        }

    def _labelled(self, batches: Iterator[Tensor], seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        for tokens in batches:
            yield self._next(tokens) if self.kind == "causal" else self._hidden(tokens, generator)

    @staticmethod
    def _next(tokens: Int[Tensor, "batch length"]) -> Batch:
        end = torch.full((len(tokens), 1), UNCOUNTED)
        return tokens, torch.cat([tokens[:, 1:], end], 1)

    def _hidden(self, tokens: Int[Tensor, "batch length"], generator: torch.Generator) -> Batch:
        assert self.splits.mask is not None
        chance = torch.rand(tokens.shape, generator=generator)
        picked = chance < self.share
        picked |= (chance == chance.min(1, keepdim=True).values) & ~picked.any(1, keepdim=True)
        fate = torch.rand(tokens.shape, generator=generator)
        drawn = torch.randint(self.splits.vocabulary, tokens.shape, generator=generator)
        shown = torch.where(fate < 1 - KEPT - DRAWN, self.splits.mask, torch.where(fate < 1 - KEPT, drawn, tokens))
        return torch.where(picked, shown, tokens), torch.where(picked, tokens, UNCOUNTED)

    def _logits(self, model: nn.Module, batch: Batch) -> tuple[Float[Tensor, "batch length vocabulary"], Tensor]:
        place = device_of(model)
        tokens, labels = batch[0].to(place), batch[1].to(place)
        try:
            output = run(model, tokens)
        except torch.OutOfMemoryError as cause:
            found = f"no memory left on {place} for a batch of {len(tokens)} x {tokens.shape[1]} tokens"
            raise OutOfMemoryError("run the model", found=found, do="use a smaller batch") from cause
        except IndexError as cause:
            found = f"tokens up to {int(tokens.max())}, {tokens.shape[1]} in a sequence: {cause}"
            do = "use a model with as many tokens and as long a context as the text"
            raise InputError("run a language model", found=found, do=do) from cause
        logits = logits_of(output, "[batch, tokens, vocabulary]")
        if logits.dim() != 3 or logits.shape[:2] != tokens.shape or logits.shape[2] <= int(labels.max()):
            found = f"output of shape {tuple(logits.shape)} for tokens {tuple(tokens.shape)} up to {int(labels.max())}"
            do = "use a model that scores every token of its vocabulary at each position"
            raise InputError("scores [batch, tokens, vocabulary]", found=found, do=do)
        return logits, labels
