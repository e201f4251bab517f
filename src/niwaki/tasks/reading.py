"""How a causal model reads a context and what follows it: in one go, or the context first, into a cache."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from niwaki.errors import InputError, OutOfMemoryError
from niwaki.tasks.outputs import logits_of
from niwaki.units import device_of

SHAPE = "[batch, tokens, vocabulary]"


class Reader(Protocol):
    """Scores of the token after each token of `rest`, which follows `context`."""

    def __call__(
        self, model: nn.Module, context: Int[Tensor, "batch before"], rest: Int[Tensor, "batch after"]
    ) -> Float[Tensor, "batch after vocabulary"]: ...


@final
@dataclass(frozen=True)
class Whole:
    """Both in one forward pass, without a cache: any module that scores every token."""

    def __call__(self, model: nn.Module, context: Tensor, rest: Tensor) -> Tensor:
        return _scores(model, torch.cat([context, rest], 1))[:, context.shape[1] :]


@final
@dataclass(frozen=True)
class Cached:
    """The context first, into a fresh cache; then what follows, against the cache.

    What a compressed cache costs is seen only so: compression leaves the scores of the context itself as they were.

    Raises:
        InputError: a step below 1.
    """

    new: Callable[[], Any] | None = None
    """Makes an empty cache (`past_key_values` of transformers); None takes the model's own kind."""
    step: int | None = None
    """Tokens of the rest in one forward pass; None takes all at once, 1 decodes one by one."""
    seen: Callable[[Any], None] | None = None
    """Called with the cache after each context, before anything follows: to count its bytes."""

    def __post_init__(self) -> None:
        if self.step is not None and self.step < 1:
            raise InputError(f"{self.step} tokens in a forward pass", do="give a step of at least 1, or None for all")

    def __call__(self, model: nn.Module, context: Tensor, rest: Tensor) -> Tensor:
        place = device_of(model)
        given = {} if self.new is None else {"past_key_values": self.new()}
        read = _called(model, context.to(place), use_cache=True, **given)
        cache = given.get("past_key_values", getattr(read, "past_key_values", None))
        if cache is None:
            found, do = f"a {type(model).__name__} that returns no cache", "use a causal model of transformers"
            raise InputError("read a context into a cache", found=found, do=do)
        if self.seen is not None:
            self.seen(cache)
        parts = rest.to(place).split(self.step or rest.shape[1], dim=1)
        scores = [logits_of(_called(model, part, use_cache=True, past_key_values=cache), SHAPE) for part in parts]
        return torch.cat(scores, 1)


def _called(model: nn.Module, tokens: Tensor, **given: Any) -> Any:
    try:
        return model(tokens, **given)
    except torch.OutOfMemoryError as cause:
        found = f"no memory left on {tokens.device} for {tokens.shape[0]} x {tokens.shape[1]} tokens"
        raise OutOfMemoryError("run the model", found=found, do="use a smaller batch") from cause
    except TypeError as cause:
        if "keyword argument" not in str(cause):
            raise
        found, do = f"a {type(model).__name__} that takes no cache", "use a causal model of transformers"
        raise InputError("read a context into a cache", found=found, do=do) from cause
    except IndexError as cause:
        found = f"tokens up to {int(tokens.max())}, {tokens.shape[1]} in a sequence: {cause}"
        do = "use a model with as many tokens and as long a context as the task"
        raise InputError("run a language model", found=found, do=do) from cause


def _scores(model: nn.Module, tokens: Tensor) -> Tensor:
    tokens = tokens.to(device_of(model))
    logits = logits_of(_called(model, tokens), SHAPE)
    if logits.dim() != 3 or logits.shape[:2] != tokens.shape:
        found, do = f"output of shape {tuple(logits.shape)} for tokens {tuple(tokens.shape)}", "use a causal model"
        raise InputError(f"scores {SHAPE}", found=found, do=do)
    return logits
