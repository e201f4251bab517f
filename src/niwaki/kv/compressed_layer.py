"""One layer of a compressed cache: an old part with fewer tokens, channels or bits, and a whole one behind it."""

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from niwaki.errors import InputError, NotFiniteError, NothingChangedWarning
from niwaki.kv.attention import Call, attend
from niwaki.kv.dense import Dense, Rows
from niwaki.kv.eviction import Tokens
from niwaki.kv.layer import KVLayer
from niwaki.kv.observation import Observation
from niwaki.kv.segments import Segment
from niwaki.kv.settings import Settings
from niwaki.kv.support import Site


class CompressedLayer(KVLayer):
    """Stores a prompt compressed, and generated tokens whole, or compressed too once enough of them are there."""

    def __init__(self, settings: Settings, site: Site) -> None:
        super().__init__()
        self.settings, self.site = settings, site
        self._clear()

    def _clear(self) -> None:
        self.old: Segment | None = None
        self.whole: Segment | None = None
        self._weights: Tensor | None = None
        """Attention that the stored tokens got so far, float32 `[batch, heads, tokens]`, where a policy goes by it."""
        self._chosen = 0
        """Tokens that channels or tokens were chosen by, all of the prompt: they cannot be taken back. 0: none were."""
        self._cropping = False
        """Whether somebody said, before the prompt came, that guesses follow it and may be taken back."""
        self._undecided: Call | None = None
        """The prompt with such guesses, until it is known which of them stay."""

    def take(self, call: Call) -> Tensor:
        asked = self._repeated(call)
        if self.whole is None:
            output = call.own(call.keys, call.values)
            if self._cropping:
                self._undecided, self.whole = asked, _everything(asked).compact()
            else:
                self._fill(asked)
        else:
            output = self._step(asked, call)
        self._renew()
        return output

    def _renew(self) -> None:
        self.parts = tuple(part for part in (self.old, self.whole) if part is not None)

    def _repeated(self, call: Call) -> Call:
        """With keys and values per query head, where the choice is made so."""
        times = self.site.heads // self.site.kv_heads
        if self.settings.channels is None or not self.settings.channels.per_query_head or times == 1:
            return call
        keys, values = (rows.repeat_interleave(times, dim=1) for rows in (call.keys, call.values))
        return replace(call, keys=keys, values=values)

    def _fill(self, call: Call) -> None:
        """The prompt: evict, choose channels, store."""
        real = call.real()
        if real is not None and not bool(real[:, -1].all()):
            do = "pad on the left (tokenizer.padding_side = 'left')"
            raise InputError("compress a prompt", found="padding on the right", where=self.site.name, do=do)
        kept = self._evicted(Observation(call, _everything(call), real))
        count = kept.tokens - self.settings.whole(kept.tokens)
        chosen = kept.tokens < call.new
        self._say_if_all_stay(call.new, kept.tokens)
        keys = values = None
        if not count:
            self._say_nothing_was_done(call.new)
        elif self.settings.channels is not None:
            keys, values = self.settings.channels.choose(Observation(call, kept, real), self.site)
            chosen |= keys is not None or values is not None
        self._chosen = call.new if chosen else 0
        if keys is None and values is None and self.settings.bits is None and kept.positions is None:
            count = 0  # nothing is left out: one piece, which the model's own attention can read
        self.whole = kept.stretch(count, kept.tokens).compact()
        if count:
            self.old = self._stored(kept.stretch(0, count), keys, values)

    def _evicted(self, seen: Observation) -> Segment:
        """The tokens of the prompt that stay."""
        policy, prompt, kept = self.settings.tokens, seen.prompt, seen.kept
        if policy is None or (policy.budget(prompt) >= prompt and not policy.ongoing):
            return kept
        weights = None
        if policy.asks != "nothing":
            weights = seen.attention(policy.window if policy.asks == "window" else None)[1]
            if not torch.isfinite(weights).all():
                do = "look for an overflow in the model; load it in bfloat16 or float32"
                raise NotFiniteError("score tokens", found="attention that is not finite", where=self.site.name, do=do)
        batch, heads = seen.call.keys.shape[:2]
        places = torch.arange(prompt, device=seen.call.keys.device).expand(batch, heads, -1)
        budget = policy.budget(prompt)
        index = policy.choose(_tokens(places, weights, seen.real, prompt, budget), budget)
        if policy.ongoing and weights is not None:
            self._weights = weights.gather(-1, index)
        return replace(
            kept, keys=kept.keys.take(index), values=kept.values.take(index), positions=index.to(torch.int32)
        )

    def _say_if_all_stay(self, prompt: int, kept: int) -> None:
        """A policy that judges the prompt alone has had its turn, also where more of it comes in a second call."""
        policy = self.settings.tokens
        if not self.speaks or policy is None or policy.ongoing or kept < prompt or policy.keep == 1.0:
            return
        message = f"a prompt of {prompt} tokens, which {policy} keeps all: no token is evicted in this cache"
        warnings.warn(message, NothingChangedWarning, stacklevel=2)

    def _say_nothing_was_done(self, prompt: int) -> None:
        if self.speaks and self.settings.channels is not None:
            message = (
                f"a prompt of {prompt} tokens, of which the last {self.settings.recent} are stored whole: "
                "no channel is left out in this cache"
            )
            warnings.warn(message, NothingChangedWarning, stacklevel=2)

    def _stored(self, rows: Segment, keys: Tensor | None, values: Tensor | None) -> Segment:
        """Compact and, where asked, packed: only the channels `keys` and `values`."""
        thin = (_columns(rows.keys.read(), keys), _columns(rows.values.read(), values))
        if self.settings.bits is not None:
            packed: Sequence[Rows] = self.settings.bits.pack(*thin)
        else:  # chosen channels are a copy already
            chosen = zip(thin, (keys, values), strict=True)
            packed = [Dense.of(one) if which is None else Dense(one) for one, which in chosen]
        positions = None if rows.positions is None else rows.positions.clone()
        return replace(
            rows,
            keys=packed[0],
            values=packed[1],
            key_channels=keys,
            value_channels=values,
            positions=positions,
        )

    def _step(self, call: Call, asked: Call) -> Tensor:
        """Further tokens attend to what is stored and to each other, and are stored whole; then old ones move."""
        if self._undecided is not None:
            self._decide(0)
        assert self.whole is not None
        places = None
        if self.whole.positions is not None:
            places = torch.arange(self.seen, self.seen + call.new, dtype=torch.int32, device=call.keys.device)
            places = places.expand(*call.keys.shape[:2], -1)
        self.whole = self.whole.append(call.keys, call.values, positions=places)
        if self.old is None and self.whole.plain and asked is call:
            output = asked.own(self.whole.keys.read(), self.whole.values.read())
        else:
            parts = [part for part in (self.old, self.whole) if part is not None]
            done = _in_one_kernel(call, parts) if self.settings.fused and self._weights is None else None
            output, sums = (done, []) if done is not None else attend(call, parts, sums=self._weights is not None)
            if self._weights is not None:
                self._weights = pad(self._weights, (0, call.new)) + torch.cat(sums, dim=-1)
        self._flush()
        self._evict_again(call)
        return output

    def _flush(self) -> None:
        """Old tokens of the whole part become like the prompt's, in stretches of `flush`."""
        settings, whole = self.settings, self.whole
        assert whole is not None
        if not settings.flush or (self.old is None and settings.bits is None and settings.tokens is None):
            return
        count = max(0, whole.tokens - settings.recent) // settings.flush * settings.flush
        if not count:
            return
        moved = whole.stretch(0, count)
        self.whole = whole.stretch(count, whole.tokens).compact()
        if self.old is None:
            self.old = self._stored(moved, None, None)
        else:
            self.old = self.old.append(
                _columns(moved.keys.read(), self.old.key_channels),
                _columns(moved.values.read(), self.old.value_channels),
                positions=moved.positions,
            )

    def _evict_again(self, call: Call) -> None:
        """What a policy that goes on takes from the old part; the whole part counts, and stays."""
        policy = self.settings.tokens
        if policy is None or not policy.ongoing or self.old is None or self.whole is None:
            return
        seen = self.seen + call.new
        budget = policy.budget(seen)
        stays = max(0, budget - self.whole.tokens)
        if self.old.tokens <= stays:
            return
        assert self.old.positions is not None
        old = self.old.tokens
        weights = None if self._weights is None else self._weights[..., :old]
        index = policy.choose(_tokens(self.old.positions.long(), weights, call.real(), seen, budget), stays)
        self.old = replace(
            self.old,
            keys=self.old.keys.take(index),
            values=self.old.values.take(index),
            positions=self.old.positions.gather(-1, index),
        )
        if self._weights is not None and weights is not None:
            self._weights = torch.cat((weights.gather(-1, index), self._weights[..., old:]), dim=-1)

    def tensors(self) -> Iterator[Tensor]:
        yield from super().tensors()
        if self._undecided is not None:
            yield from (self._undecided.query, self._undecided.keys, self._undecided.values)
        if self._weights is not None:
            yield self._weights

    def rebatch(self, index: Tensor) -> None:
        self.old = None if self.old is None else self.old.batch(index)
        self.whole = None if self.whole is None else self.whole.batch(index)
        if self._undecided is not None:
            found, do = "guesses that are not judged yet", "reorder after the first crop"
            raise InputError("reorder a batch", found=found, where=self.site.name, do=do)
        if self._weights is not None:
            self._weights = self._weights.index_select(0, index.to(self._weights.device))
        self._renew()

    def reset(self) -> None:
        super().reset()
        self._clear()

    def activate_past_recording(self) -> None:
        """Speculative decoding: the prompt will come with guesses behind it; the choice waits until they are judged."""
        self._cropping = self.whole is None

    def _decide(self, guesses: int) -> None:
        """The choice that waited, by the prompt without its last `guesses` tokens."""
        call, self._undecided, self._cropping = self._undecided, None, False
        assert call is not None
        stays = call.new - guesses
        self._fill(
            replace(
                call,
                query=call.query[:, :, :stays],
                keys=call.keys[:, :, :stays],
                values=call.values[:, :, :stays],
                mask=None if call.mask is None else call.mask[:, :, :stays, :stays],
            )
        )
        self._renew()

    def forget(self, count: int) -> None:
        """
        Raises:
            InputError: the prompt's own tokens were chosen with those that shall go, or others were evicted for them.
        """
        if count == self.seen:
            self._clear()
            self._renew()
            return
        if self._undecided is not None:
            self._decide(count)
            return
        if not count:
            return
        if self.settings.tokens is not None and self.settings.tokens.ongoing:
            found = f"{type(self.settings.tokens).__name__} evicts others for every new one"
            raise InputError("take tokens back", found=found, where=self.site.name, do="use SnapKV, or no speculation")
        if self.seen - count < self._chosen:
            found = f"channels or tokens were chosen by all {self._chosen} tokens of the prompt"
            do = "take back fewer; for speculative decoding give generate a cache: past_key_values=ThinKCache(model)"
            raise InputError("take tokens of the prompt back", found=found, where=self.site.name, do=do)
        assert self.whole is not None
        if count > self.whole.tokens:
            if self.old is None or self.old.positions is not None:
                found, do = f"{self.whole.tokens} tokens that were not evicted from", "take back fewer"
                raise InputError(f"take {count} tokens back", found=found, where=self.site.name, do=do)
            self.old = self.old.first(self.old.tokens - (count - self.whole.tokens))
            self.whole = replace(self.whole, start=self.old.tokens)
        self.whole = self.whole.first(max(0, self.whole.tokens - count))
        self._renew()


def _everything(call: Call) -> Segment:
    """The call's own keys and values, uncopied."""
    return Segment(Dense(call.keys.detach()), Dense(call.values.detach()), call.values.shape[-1], start=0)


def _in_one_kernel(call: Call, parts: list[Segment]) -> Tensor | None:
    """By the fused kernel; None where it cannot."""
    if not call.query.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return None
    from niwaki.kv import fused

    return fused.decode(call, parts) if fused.suits(call, parts) else None


def _tokens(places: Tensor, weights: Tensor | None, real: Tensor | None, seen: int, budget: int) -> Tokens:
    first = torch.zeros(places.shape[0], dtype=torch.long, device=places.device)
    if real is None:
        return Tokens(places, weights, None, first, seen, budget)
    of_tokens = real[:, None].expand(-1, places.shape[1], -1).gather(-1, places)
    return Tokens(places, weights, of_tokens, real.long().argmax(dim=-1), seen, budget)


def _columns(rows: Tensor, channels: Tensor | None) -> Tensor:
    """Channels `[batch, heads, kept]` of `[batch, heads, tokens, width]`; all of them if None."""
    if channels is None:
        return rows
    return rows.gather(-1, channels.long()[:, :, None].expand(-1, -1, rows.shape[2], -1))
