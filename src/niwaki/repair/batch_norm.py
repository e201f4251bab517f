"""Batch-norm statistics, estimated again after a cut."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn

from niwaki.errors import InputError, NotFiniteError
from niwaki.surgery.exported import Exported
from niwaki.units import device_of, map_tensors, run


@final
@dataclass(frozen=True)
class BatchNormStatistics:
    """Running means and variances as plain averages over the given batches, in place.

    Only batch norms are in training mode meanwhile; no weight changes. A model without batch norm is left as it is.
    Differs: through the exported door the whole graph runs in training mode (dropout included).

    Source: the re-estimation step of Yu and Huang 2019, arXiv:1903.05134, sec. 3.3 (post-statistics of batch norm).
    """

    def __call__(self, model: nn.Module, batches: Iterable[Any]) -> int:
        """Re-estimate from `batches` (inputs as the model takes them); returns how many batches were used.

        Raises:
            InputError: there are batch norms but no batches.
            NotFiniteError: a statistic became NaN or infinite; the old statistics are back.
        """
        running = {name: b for name, b in model.named_buffers() if name.endswith(("running_mean", "running_var"))}
        if not running:
            return 0
        before = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
        device = device_of(model)
        count = 0
        try:
            with torch.no_grad(), torch.random.fork_rng(), _only_statistics(model) as weigh:
                for batch in batches:
                    count += 1
                    weigh(count)
                    run(model, map_tensors(batch, lambda t: t.to(device)))
            if count == 0:
                raise InputError("re-estimate batch norm", found="no batches", do="give at least one batch of inputs")
            for name, buffer in running.items():
                if not bool(torch.isfinite(buffer).all()):
                    raise NotFiniteError(
                        "re-estimate batch norm", found="NaN or infinity", where=name, do="check the batches"
                    )
        except BaseException:
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    buffer.copy_(before[name])
            raise
        return count


@contextlib.contextmanager
def _only_statistics(model: nn.Module) -> Iterator[Any]:
    """Training mode for the statistics alone; gives a function to call with each batch's number."""
    modes = {module: module.training for module in model.modules()}
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momenta = {norm: norm.momentum for norm in norms}

    calls = dict.fromkeys(norms, 0)

    def before(norm: nn.Module, args: Any) -> None:
        calls[norm] += 1  # type: ignore[index]
        norm.momentum = 1.0 / calls[norm]  # type: ignore[index, assignment]

    def weigh(batch: int) -> None:
        if isinstance(model, Exported):
            model.set_momentum(1.0 / batch)

    handles = [norm.register_forward_pre_hook(before) for norm in norms]
    try:
        model.eval()
        if isinstance(model, Exported):
            model.train()
        for norm in norms:
            norm.training = True
        yield weigh
    finally:
        for handle in handles:
            handle.remove()
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        if isinstance(model, Exported):
            model.set_momentum(None)
        for module, mode in modes.items():
            module.training = mode
