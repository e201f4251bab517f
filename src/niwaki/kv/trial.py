"""A cache before and after: bytes it holds, and time of a decoded token."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.errors import InputError
from niwaki.kv.cache import cache_bytes
from niwaki.measure import Measurement
from niwaki.measure.measurement import device_name, evaluating
from niwaki.units import device_of


def decoding(
    model: nn.Module, context: Tensor, caches: Sequence[Callable[[], Any]], *, steps: int = 16
) -> list[dict[str, Measurement]]:
    """`cache_bytes` and `decode_ms` of each kind of cache, `context`, `[batch, tokens]`, read and `steps` decoded.

    Caches take turns, step by step, so that a busy machine is busy for all; each is warmed up by two steps that are not
    timed. The decoded tokens are those that the first kind of cache gives, for all.

    Raises:
        InputError: fewer than one step.
    """
    if steps < 1:
        raise InputError(f"time {steps} decoded tokens", found="less than 1", do="give 1 or more")
    place = device_of(model)
    made = [new() for new in caches]
    times: list[list[float]] = [[] for _ in made]
    with evaluating(model), torch.no_grad():
        outputs = [model(context.to(place), past_key_values=cache, use_cache=True, logits_to_keep=1) for cache in made]
        held = [cache_bytes(cache) for cache in made]
        token = outputs[0].logits[:, -1:].argmax(-1)
        del outputs
        for step in range(steps + 2):
            following = token
            for number, cache in enumerate(made):
                _wait(place)
                start = time.perf_counter()
                found = model(token, past_key_values=cache, use_cache=True).logits
                _wait(place)
                if step >= 2:
                    times[number].append(1000 * (time.perf_counter() - start))
                if number == 0:
                    following = found[:, -1:].argmax(-1)
            token = following
    batch, tokens = context.shape
    where = f"{batch} x {tokens} tokens"
    return [
        {
            "cache_bytes": Measurement(
                "cache_bytes",
                float(count),
                "B",
                f"distinct storages that the cache keeps alive after a prompt of {where}",
                device=device_name(place),
            ),
            "decode_ms": Measurement(
                "decode_ms",
                statistics.median(taken),
                "ms",
                f"median of {steps} forward passes of one token each behind {where}, caches in turns; "
                "spread is half the distance of the quartiles",
                spread=_spread(taken),
                device=device_name(place),
            ),
        }
        for count, taken in zip(held, times, strict=True)
    ]


def _spread(taken: list[float]) -> float:
    if len(taken) < 2:
        return 0.0
    low, _, high = statistics.quantiles(taken, n=4)
    return (high - low) / 2


def _wait(place: torch.device) -> None:
    if place.type == "cuda":
        torch.cuda.synchronize(place)
