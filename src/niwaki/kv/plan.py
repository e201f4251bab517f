"""What a compressed cache will take, before anything is run: bytes per token, and from which length on it pays."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from niwaki.kv.cache import How, Load
from niwaki.kv.support import Site

LONGEST = 2**24
"""Tokens up to which a break-even length is looked for."""
RIPPLE = 64
"""Tokens within which a saving may go up and down as it grows, at least; what a `How` repeats by may be more."""
NOTICED = 0.05
"""Share of weights and cache together from which a saving is worth speaking of."""


@dataclass(frozen=True)
class CachePlan:
    """Bytes of a model's cache, whole and compressed; what is not of the layers that see all tokens is in both."""

    sites: tuple[Site, ...]
    how: How
    element: int
    """Bytes of one number as the model computes."""
    weights: int
    """Bytes of the model's parameters and buffers."""
    context: int | None = None
    """Tokens that the model was made for, where its configuration says it."""

    def full_bytes(self, load: Load) -> int:
        """Keys and values of all layers, whole, as a growing cache of transformers keeps them in memory.

        Of a prompt its sliding layers keep a view, and so all of it until the next token comes; from then on as many
        tokens as they look back.
        """
        return sum(_full(site, load, self.element) for site in self.sites)

    def bytes(self, load: Load) -> int:
        """The same compressed, to the byte."""
        known = Load(load.prompt, load.generated, load.batch, self.element)
        return sum(
            self.how.layer_bytes(site, known) if site.sliding is None else _full(site, load, self.element)
            for site in self.sites
        )

    @property
    def extra(self) -> int:
        """Bytes of weights that compression adds to the model."""
        return sum(self.how.extra_bytes(site, self.element) for site in self.sites if site.sliding is None)

    def at(self, tokens: int, batch: int = 1) -> Load:
        """A cache of so many tokens; where layers slide the last one is generated, so that they let the others go."""
        slides = tokens > 1 and any(site.sliding is not None for site in self.sites)
        return Load(tokens - slides, int(slides), batch)

    def per_token(self, *, at: int = 2**16) -> tuple[float, float]:
        """Bytes that a token of a long prompt takes, whole and compressed: the slope between `at` and twice as many."""
        loads = self.at(at), self.at(2 * at)
        full, ours = ((count(loads[1]) - count(loads[0])) / at for count in (self.full_bytes, self.bytes))
        return full, ours

    def break_even(self) -> int | None:
        """Tokens from which on cache and extra weights take fewer bytes than the whole cache; None: never."""
        return self._first(lambda load: self.bytes(load) + self.extra < self.full_bytes(load))

    def noticed(self) -> int | None:
        """Tokens from which on the saving is 5 % of the weights and the whole cache together; None: never."""

        def enough(load: Load) -> bool:
            full = self.full_bytes(load)
            return full - self.bytes(load) - self.extra >= NOTICED * (self.weights + full)

        return self._first(enough)

    def _first(self, true: Callable[[Load], bool]) -> int | None:
        """The smallest length from which on it is true.

        Halved between a length at which it is false and the longest; then looked at one by one, until it was true for
        two periods behind the last one at which it was not: groups and windows that fill go up and down.
        """
        low, high = 0, LONGEST
        if not true(self.at(high)):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if true(self.at(middle)) else (middle, high)
        tokens, scanned = high, max(RIPPLE, 2 * self.how.period)
        while tokens - high < scanned and tokens < LONGEST:
            tokens += 1
            if not true(self.at(tokens)):
                high = tokens + 1
        return high

    def facts(self, lengths: Sequence[int] = (1024, 4096, 16384, 65536)) -> dict[str, Any]:
        """Everything as plain numbers, for tables and JSON."""
        full, ours = self.per_token()
        return {
            "layers": len(self.sites),
            "layers that slide": sum(site.sliding is not None for site in self.sites),
            "context": self.context,
            "weights_bytes": self.weights,
            "extra_weights_bytes": self.extra,
            "bytes_per_token": full,
            "compressed_bytes_per_token": ours,
            "break_even_tokens": self.break_even(),
            "saving_5_percent_tokens": self.noticed(),
            "lengths": [
                {"tokens": n, "bytes": self.full_bytes(self.at(n)), "compressed_bytes": self.bytes(self.at(n))}
                for n in lengths
            ],
        }


def plan(model: Any, how: How) -> CachePlan:
    """What `how` will do to a model's cache; the model may lie on the meta device.

    Raises:
        UnsupportedModelError: a model that is not handled, with the reason.
        InputError: settings that its heads cannot have, or every layer slides.
    """
    from niwaki.kv.cache import layers_of
    from niwaki.kv.support import sites

    found = sites(model)
    layers_of(found, how)
    tensors = {id(one): one for one in (*model.parameters(), *model.buffers())}
    weights = sum(one.numel() * one.element_size() for one in tensors.values())
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return CachePlan(found, how, next(model.parameters()).element_size(), weights, context)


def _full(site: Site, load: Load, element: int) -> int:
    tokens = load.prompt + load.generated
    if site.sliding is not None:
        tokens = min(tokens, site.sliding) if load.generated else load.prompt
    return 2 * load.batch * site.kv_heads * tokens * site.head_dim * element
