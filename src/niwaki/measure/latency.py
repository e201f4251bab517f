"""How long one forward pass takes on this machine."""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn

from niwaki.errors import InputError
from niwaki.measure.measurement import Measurement, Meter, device_name, evaluating
from niwaki.measure.target import at_batch
from niwaki.units import device_of, run, tensors_in


@contextmanager
def with_threads(count: int | None) -> Iterator[None]:
    """Inside, torch uses so many CPU threads in an operation; None leaves their number."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


@final
@dataclass(frozen=True)
class Latency(Meter):
    """Median wall-clock time of one forward pass, PyTorch eager, after warm-up; spread is the interquartile range."""

    runs: int = 30
    """Timed passes; the median of 30 is stable to a few percent on an idle machine."""
    warm_up: int = 5
    """Passes before the clock starts: allocators, kernel choice and caches settle in the first few."""
    threads: int | None = None
    """CPU threads inside an operation; None leaves the process as it is."""
    batch: int | None = None
    """Samples in the pass: the example's first one, repeated. None takes the example as it is."""

    def __post_init__(self) -> None:
        for field, least in (("runs", 1), ("warm_up", 0), ("threads", 1), ("batch", 1)):
            value = getattr(self, field)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise InputError(f"Latency({field}={value!r})", found="not a whole number", do=f"give {least} or more")

    @property
    def name(self) -> str:
        return "latency" if self.batch is None else f"latency_batch_{self.batch}"

    def __call__(self, model: nn.Module, example: Any) -> Measurement:
        device = device_of(model)
        if device.type == "meta":
            raise InputError("latency of a model on the meta device", found="no real tensors", do="load it to a device")
        example = example if self.batch is None else at_batch(example, self.batch)
        with evaluating(model), with_threads(self.threads):
            for _ in range(self.warm_up):
                run(model, example)
            times = [self._once(model, example, device) for _ in range(self.runs)]
            threads = torch.get_num_threads()
        quarters = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
        samples = next((tensor.shape[0] for tensor in tensors_in(example) if tensor.dim() > 0), 1)
        dtype = next((str(p.dtype).removeprefix("torch.") for p in model.parameters()), "float32")
        return Measurement(
            name=self.name,
            value=statistics.median(times),
            unit="ms",
            definition=f"median wall-clock time of a forward pass, PyTorch eager, {dtype}, batch {samples}, "
            f"{threads} CPU threads, {self.runs} runs after {self.warm_up} of warm-up; "
            "spread is the interquartile range",
            spread=quarters[2] - quarters[0],
            device=device_name(device),
        )

    @staticmethod
    def _once(model: nn.Module, example: Any, device: torch.device) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run(model, example)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) * 1e3
