"""One layer of a CSKV cache: old tokens as low-rank projections, a window of whole ones behind them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from niwaki.errors import InputError
from niwaki.kv.attention import Call, Inputs, attend
from niwaki.kv.cache import Load
from niwaki.kv.dense import Dense
from niwaki.kv.factors import Factors
from niwaki.kv.layer import KVLayer
from niwaki.kv.low_rank import LowRank, Restoring, sliced
from niwaki.kv.packed import Grid, Packed
from niwaki.kv.segments import Segment
from niwaki.kv.sources import Source
from niwaki.kv.support import Site

OFFSET = 4
"""Bytes that say how far a sequence is padded."""
CHECKED = 8
"""Tokens of a prompt whose keys are made again, to see that they are made as we think."""
AGREES = {torch.float16: 2e-2, torch.bfloat16: 8e-2}
"""How far they may differ, of the largest; other types: 1e-3."""


@dataclass(frozen=True)
class Schedule:
    """When tokens leave the window.

    Sliding: the last `window` are whole. Tumbling: a block of `window` is whole until it is full, then leaves at once.
    With `blocks` (keys are packed by `window` tokens) a sliding window gives away whole blocks and has `window` to
    `2 * window - 1` tokens.
    """

    window: int
    tumbling: bool
    blocks: bool

    def leaving(self, tokens: int) -> int:
        """How many of so many whole tokens leave, after a step.

        Examples:
            >>> [Schedule(32, False, False).leaving(n) for n in (31, 33, 70)]
            [0, 1, 38]
            >>> [Schedule(32, True, False).leaving(n) for n in (31, 32, 70)]
            [0, 32, 64]
            >>> [Schedule(32, False, True).leaving(n) for n in (63, 64, 70)]
            [0, 32, 32]
        """
        if self.window == 0:
            return tokens
        if self.tumbling:
            return tokens // self.window * self.window
        over = max(0, tokens - self.window)
        return over // self.window * self.window if self.blocks else over


@dataclass(frozen=True)
class Window:
    """The newest tokens, whole, with their projections for when they leave."""

    whole: Segment
    keys: Dense
    values: Dense

    @property
    def tokens(self) -> int:
        return self.whole.tokens

    def logits(self, query: Tensor) -> Tensor:
        return self.whole.logits(query)

    def mix(self, weights: Tensor) -> Tensor:
        return self.whole.mix(weights)

    def columns(self) -> int | Tensor:
        return self.whole.columns()

    def append(self, other: "Window") -> "Window":
        whole = self.whole.append(other.whole.keys.read(), other.whole.values.read())
        return Window(whole, self.keys.append(other.keys.read()), self.values.append(other.values.read()))

    def first(self, count: int) -> "Window":
        return Window(self.whole.first(count), self.keys.first(count), self.values.first(count))

    def without(self, count: int) -> "Window":
        """Copies of all but the first `count` tokens."""
        keys, values = Dense.of(self.keys.rows[:, :, count:]), Dense.of(self.values.rows[:, :, count:])
        return Window(self.whole.stretch(count, self.tokens).compact(), keys, values)

    def batch(self, index: Tensor) -> "Window":
        return Window(self.whole.batch(index), self.keys.batch(index), self.values.batch(index))

    def tensors(self) -> Iterator[Tensor]:
        yield from self.whole.tensors()
        yield from self.keys.tensors()
        yield from self.values.tensors()


@dataclass(frozen=True)
class Packing:
    """The grids of packed projections; None where they stay in the model's type."""

    keys: Grid | None
    values: Grid | None
    slices: int
    """Parts of a token's projection that have a scale of their own: one for each head."""

    def nbytes(self, tokens: int, rank: int, grid: Grid | None, element: int) -> int:
        """Bytes of so many tokens' projections."""
        if grid is None:
            return tokens * rank * element
        return self.slices * grid.nbytes(tokens, rank // self.slices)

    def rows(self, rows: Tensor, grid: Grid | None) -> Dense | Packed:
        if grid is None:
            return Dense.of(rows)
        return Packed.of(sliced(rows, self.slices) if grid.axis == "channels" else rows, grid)


class WholeLayer(KVLayer):
    """Everything as it is, and the model's own attention."""

    def take(self, call: Call) -> Tensor:
        if self.parts:
            (known,) = self.parts
            assert isinstance(known, Segment)
            whole = known.append(call.keys, call.values)
        else:
            whole = Segment.whole(call.keys, call.values, start=0)
        self.parts = (whole,)
        return call.own(whole.keys.read(), whole.values.read())


class CSKVLayer(KVLayer):
    """Prompts are attended to as the model does it; what is generated, against projections and a window."""

    wants_inputs = True

    def __init__(self, site: Site, source: Source, how: Restoring, *, schedule: Schedule, packing: Packing) -> None:
        super().__init__()
        self.site, self.source, self.how = site, source, how
        self.schedule, self.packing = schedule, packing
        self.heard: Callable[[Load], None] = lambda load: None
        """Called by the layer that speaks, with what a prompt puts into the cache."""
        self._clear()

    def __deepcopy__(self, memo: dict[int, object]) -> "CSKVLayer":
        """What is stored is never changed in place, so that a copy may share it."""
        twin = CSKVLayer(self.site, self.source, self.how, schedule=self.schedule, packing=self.packing)
        twin.__dict__.update(self.__dict__)
        return twin

    def _clear(self) -> None:
        self.old: LowRank | None = None
        self.window: Window | None = None
        self.offset: Tensor | None = None

    def take(self, call: Call) -> Tensor:
        inputs = call.inputs
        if inputs is None or inputs.positions is None:
            found, do = "a model whose layers do not hand positions on", "use a Llama-shaped model"
            raise InputError("project keys", found=found, where=self.site.name, do=do)
        self._place(call, inputs)
        first = self.window is None
        if first:
            self._check(call, inputs)
            if self.speaks:
                self.heard(Load(call.new, batch=len(call.query), element=call.keys.element_size()))
        new = self._new(call, inputs)
        if self.old is None:
            window = new if self.window is None else self.window.append(new)
            # a prompt, or all tokens still whole: the model's own attention
            output = call.own(window.whole.keys.read(), window.whole.values.read())
        else:
            assert self.window is not None
            window = self.window.append(new)
            output, _ = attend(call, (self.old, window))
        self._move(window, copied=not first)
        self.parts = (self.window,) if self.old is None else (self.old, self.window)  # type: ignore[assignment]
        return output

    def _new(self, call: Call, inputs: Inputs) -> Window:
        """The call's own tokens, their keys and values not copied."""
        hidden = inputs.hidden.detach()
        rows = [self._compressed(hidden, factors) for factors in (self.how.keys, self.how.values)]
        keys, values = Dense(call.keys.detach()), Dense(call.values.detach())
        whole = Segment(keys, values, self.site.head_dim, start=self.seen)
        return Window(whole, Dense(rows[0]), Dense(rows[1]))

    @staticmethod
    def _compressed(hidden: Tensor, factors: Factors) -> Tensor:
        rows = factors.compressed(hidden.to(factors.down.dtype))
        return rows.unflatten(-1, (factors.groups, -1)).transpose(1, 2)  # [batch, groups, tokens, rank of group]

    def _move(self, window: Window, *, copied: bool) -> None:
        """What leaves the window becomes its projections."""
        count = self.schedule.leaving(window.tokens)
        if not count:
            self.window = window if copied else window.without(0)
            return
        keys, values = window.keys.rows[:, :, :count], window.values.rows[:, :, :count]
        if self.old is None:
            rows = self.packing.rows(keys, self.packing.keys), self.packing.rows(values, self.packing.values)
            assert self.offset is not None
            self.old = LowRank(*rows, how=self.how, offset=self.offset)
        else:
            self.old = self.old.append(keys, values)
        left = window.without(count)
        self.window = replace(left, whole=replace(left.whole, start=window.whole.start + count))

    def _place(self, call: Call, inputs: Inputs) -> None:
        """Finds how far places are ahead of positions, and refuses positions that do not follow each other."""
        assert inputs.positions is not None
        batch = call.query.shape[0]
        places = torch.arange(self.seen, self.seen + call.new, device=call.query.device)
        ahead = (places[None] - inputs.positions.to(places.device)).expand(batch, -1)
        if self.offset is None:
            # the last token of a sequence that was padded on the left is never padding
            self.offset = ahead[:, -1].to(torch.int32).clone()
        if not self.speaks:
            return  # all layers get the same positions
        wrong = ahead != self.offset[:, None]
        if (real := call.real()) is not None:
            wrong = wrong & real[:, self.seen :]
            if not bool(real[:, -1].all()):
                do = "pad on the left (tokenizer.padding_side = 'left')"
                raise InputError("compress a prompt", found="padding on the right", where=self.site.name, do=do)
        if bool(wrong.any()):
            found = "positions that do not follow each other"
            do = "give one sequence per row, padded on the left, and let the model count positions"
            raise InputError("turn restored keys to their positions", found=found, where=self.site.name, do=do)

    def _check(self, call: Call, inputs: Inputs) -> None:
        """Makes a few keys and values again from the weights: what cannot be made again cannot be restored."""
        assert inputs.positions is not None
        hidden = inputs.hidden[:, -CHECKED:].detach()
        positions = inputs.positions[:, -CHECKED:].expand(len(hidden), -1)
        keys, values = self.source.projected(hidden)
        keys = self.how.finished(keys, positions)
        if self.how.value_bias is not None:
            values = values + self.how.value_bias
        values = values.unflatten(-1, (-1, self.site.head_dim)).transpose(1, 2)
        for name, made, found in (("keys", keys, call.keys), ("values", values, call.values)):
            found = found[:, :, -CHECKED:]
            apart = (made - found).abs().amax() / found.abs().amax().clamp(min=1e-12)
            if not bool(apart <= AGREES.get(found.dtype, 1e-3)):
                what = (
                    f"{name} that are not hidden states times weights, normed and rotated (apart by {float(apart):.2g})"
                )
                do = "use a plain Llama-shaped model; fold adapters into the weights"
                raise InputError("project keys and values", found=what, where=self.site.name, do=do)

    def tensors(self) -> Iterator[Tensor]:
        yield from super().tensors()
        if self.offset is not None:
            yield self.offset

    def rebatch(self, index: Tensor) -> None:
        super().rebatch(index)
        if self.offset is not None:
            self.offset = self.offset.index_select(0, index.to(self.offset.device))
        self._from_parts()

    def reset(self) -> None:
        super().reset()
        self._clear()

    def forget(self, count: int) -> None:
        """Tokens taken back; those that had left the window do not come back into it.

        Raises:
            InputError: packed keys, and not to a multiple of their groups.
        """
        if count == self.seen:
            self.parts = ()
            self._clear()
            return
        window = self.window
        assert window is not None
        if count <= window.tokens:
            window, old = window.first(window.tokens - count), self.old
        else:
            assert self.old is not None
            old = self.old.first(self.old.tokens - (count - window.tokens))
            window = window.first(0)
            window = replace(window, whole=replace(window.whole, start=old.tokens))
        self.old, self.window = old, window
        self.parts = (window,) if old is None else (old, window)

    def _from_parts(self) -> None:
        """After the parts were changed from outside."""
        if self.parts:
            self.window = self.parts[-1]  # type: ignore[assignment]
            self.old = self.parts[0] if len(self.parts) > 1 else None  # type: ignore[assignment]
