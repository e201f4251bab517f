"""How facts and questions about them are written in tokens, and pages of them made by chance."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, final

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from niwaki.errors import InputError
from niwaki.tasks.reading import Reader

LINE = "line {key}: REGISTER_CONTENT is <{value}>\n"
"""Of LongEval (Li et al. 2023, "How long can open-source LLMs truly promise on context length"), shortened."""
QUESTION = "What is <REGISTER_CONTENT> in line {key}? <"


class Rows(Protocol):
    """Blocks of neighbouring tokens; `niwaki.data.Tokens` is one."""

    @property
    def blocks(self) -> Shaped[Tensor, "n length"]: ...


class Filler(Protocol):
    """Three splits of a text; `niwaki.data.TextSplits` is one."""

    @property
    def train(self) -> Rows: ...

    @property
    def val(self) -> Rows: ...

    @property
    def test(self) -> Rows: ...


@final
@dataclass(frozen=True, eq=False)
class Facts:
    """A fact is `before key between value after`, a question `ask key tell`, answered by the value.

    Raises:
        InputError: no keys or values, or tokens below zero.

    Examples:
        >>> facts = Facts(torch.tensor([[1], [2]]), torch.tensor([[7], [8]]), after=(0,), ask=(9,))
        >>> facts.line, facts.question
        (3, 2)
    """

    keys: Int[Tensor, "keys tokens"]
    """All equally long, in tokens."""
    values: Int[Tensor, "values tokens"]
    """All equally long, in tokens."""
    before: tuple[int, ...] = ()
    between: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    ask: tuple[int, ...] = ()
    tell: tuple[int, ...] | None = None
    """Between the key of a question and its answer; None: as `between`."""

    def __post_init__(self) -> None:
        for name in ("keys", "values"):
            tokens = getattr(self, name)
            if tokens.dim() != 2 or not tokens.numel() or tokens.min() < 0:
                found = f"{name} of shape {tuple(tokens.shape)}"
                raise InputError("facts to retrieve", found=found, do="give rows of one token or more, from 0 up")

    @property
    def told(self) -> tuple[int, ...]:
        return self.between if self.tell is None else self.tell

    @property
    def line(self) -> int:
        """Tokens of a fact."""
        return len((*self.before, *self.between, *self.after)) + self.keys.shape[1] + self.values.shape[1]

    @property
    def question(self) -> int:
        """Tokens of a question, before its answer."""
        return len((*self.ask, *self.told)) + self.keys.shape[1]

    @property
    def vocabulary(self) -> int:
        """All tokens are below."""
        fixed = (*self.before, *self.between, *self.after, *self.ask, *self.told)
        return 1 + max(int(self.keys.max()), int(self.values.max()), *fixed, 0)

    @classmethod
    def of_text(
        cls,
        encode: Callable[[str], Sequence[int]],
        *,
        count: int = 100,
        line: str = LINE,
        question: str = QUESTION,
        first: int = 100,
    ) -> "Facts":
        """Facts as text: keys and values are the `count` numbers from `first` up, `encode` makes tokens of a text.

        Raises:
            InputError: the tokenizer joins a number with what stands beside it, or numbers differ in length.

        Examples:
            >>> facts = Facts.of_text(lambda text: list(text.encode()))
            >>> facts.line, facts.keys.shape, bytes(facts.before), bytes(facts.told)
            (36, torch.Size([100, 3]), b'line ', b'? <')
        """
        numbers = [str(number) for number in range(first, first + count)]
        written = [
            (n, list(encode(line.format(key=n, value=n))), list(encode(question.format(key=n)))) for n in numbers
        ]
        alone = [list(encode(n)) for n in numbers]
        if len({len(tokens) for tokens in alone}) != 1:
            do = "give a range whose numbers have as many tokens each"
            raise InputError(f"numbers {numbers[0]} to {numbers[-1]}", found="not equally many tokens", do=do)
        parts = {
            (_cut(tokens, own, 2), _cut(asked, own, 1)) for (_, tokens, asked), own in zip(written, alone, strict=True)
        }
        if len(parts) != 1 or None in next(iter(parts)):
            found = "a tokenizer that joins numbers with what stands beside them"
            raise InputError(f"facts written as {line!r}", found=found, do="put a line's end or a sign around numbers")
        fact, query = next(iter(parts))
        assert fact is not None and query is not None
        own = torch.tensor(alone)
        return cls(own, own.clone(), before=fact[0], between=fact[1], after=fact[2], ask=query[0], tell=query[1])

    def page(
        self, gaps: Sequence[Int[Tensor, "batch tokens"]], *, questions: int, generator: torch.Generator
    ) -> "Page":
        """Pages of `len(gaps) - 1` facts, a gap of other text before each and after the last, and questions on some."""
        batch, lines = len(gaps[0]), len(gaps) - 1
        keys = self.keys[
            torch.stack([torch.randperm(len(self.keys), generator=generator)[:lines] for _ in range(batch)])
        ]
        values = self.values[torch.randint(len(self.values), (batch, lines), generator=generator)]
        asked = torch.stack([torch.randperm(lines, generator=generator)[:questions] for _ in range(batch)])

        def fixed(tokens: tuple[int, ...]) -> Tensor:
            return torch.tensor(tokens, dtype=torch.int64).expand(batch, len(tokens))

        pieces, at, starts = [gaps[0]], gaps[0].shape[1], []
        for i in range(lines):
            starts.append(at)
            fact = (fixed(self.before), keys[:, i], fixed(self.between), values[:, i], fixed(self.after))
            pieces += [*fact, gaps[i + 1]]
            at += self.line + gaps[i + 1].shape[1]
        row = torch.arange(batch)
        rest = []
        for i in range(questions):
            key, value = keys[row, asked[:, i]], values[row, asked[:, i]]
            rest += [fixed(self.ask), key, fixed(self.told), value, fixed(self.after)]
        one = torch.zeros(self.question + self.values.shape[1] + len(self.after), dtype=torch.bool)
        one[self.question - 1 : self.question - 1 + self.values.shape[1]] = True
        depth = (torch.tensor(starts)[asked] + 1.0) / max(at, 1)
        return Page(torch.cat(pieces, 1), torch.cat(rest, 1), one.repeat(questions), depth)


@final
@dataclass(frozen=True, eq=False)
class Page:
    """Contexts with facts, and questions on them with their answers."""

    context: Int[Tensor, "batch before"]
    rest: Int[Tensor, "batch after"]
    """Questions, each with its answer."""
    telling: Bool[Tensor, " after"]
    """Tokens of the rest after which a token of an answer is due."""
    depth: Float[Tensor, "batch questions"]
    """Where the fact of a question starts, as a share of the context: near 0 at the beginning, 1 at its end."""


def filling(
    blocks: Shaped[Tensor, "n length"], room: int, size: int, generator: torch.Generator
) -> Int[Tensor, "batch room"]:
    """`size` pieces of neighbouring blocks, `room` tokens each, from places drawn by chance."""
    whole = math.ceil(room / blocks.shape[1])
    starts = torch.randint(len(blocks) - whole + 1, (size,), generator=generator).tolist()
    return torch.stack([blocks[start : start + whole].flatten()[:room].long() for start in starts])


def answers_of(
    model: nn.Module, page: "Page", reader: Reader, facts: Facts
) -> tuple[Float[Tensor, "batch told vocabulary"], Int[Tensor, "batch told"]]:
    """Scores where tokens of answers are due, and these tokens.

    Raises:
        InputError: a model of fewer tokens than the facts have.
    """
    at = page.telling.nonzero().flatten()
    scores = reader(model, page.context, page.rest)
    if scores.shape[2] < facts.vocabulary:
        found, do = f"a model of {scores.shape[2]} tokens", "use the model's own tokenizer for the facts"
        raise InputError(f"facts of tokens up to {facts.vocabulary - 1}", found=found, do=do)
    return scores[:, at.to(scores.device)], page.rest[:, at + 1].to(scores.device)


def seed_of(*parts: object) -> int:
    """A seed for torch that depends on every part."""
    return random.Random("/".join(map(str, parts))).getrandbits(63)


def _cut(tokens: list[int], own: list[int], times: int) -> tuple[tuple[int, ...], ...] | None:
    """What stands around `times` appearances of `own`, or None where it appears another number of times."""
    found, at, start = [], 0, 0
    while at + len(own) <= len(tokens):
        if tokens[at : at + len(own)] == own:
            found.append(tuple(tokens[start:at]))
            at = start = at + len(own)
        else:
            at += 1
    return (*found, tuple(tokens[start:])) if len(found) == times else None
