"""What training leaves behind: the weights of before or all of the new ones, and everything else as it was."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from niwaki.errors import OutOfMemoryError
from niwaki.train.state import random_kept
from niwaki.units import device_of


@contextmanager
def all_or_nothing(model: nn.Module, there: torch.device) -> Iterator[None]:
    """Afterwards modes, device, gradients and random state (of the CPU, and of the device that computes) are those of
    before, and after an error the numbers too.
    """
    device = device_of(model)
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        with random_kept(there):
            yield
    except BaseException:
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.copy_(before[name])
        raise
    finally:
        for parameter, _ in gradients:
            parameter.grad = None
        if device_of(model) != device:
            model.to(device)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, training in modes:
            module.training = training


@contextmanager
def prepared(accelerator: Any, model: nn.Module) -> Iterator[nn.Module]:
    """Inside, the model as accelerate wants it; afterwards nothing of accelerate is left on it."""
    names = ("_is_accelerate_prepared", "_original_forward", "forward")
    own = {name: vars(model)[name] for name in names if name in vars(model)}
    try:
        yield accelerator.prepare(model)
    finally:
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        accelerator.free_memory()
        for name in names:
            vars(model).pop(name, None)
        vars(model).update(own)


@contextmanager
def channels_last(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Inside, weights of four axes have their channels last in memory; afterwards those that had not have not."""
    changed = [p for p in model.parameters() if p.dim() == 4 and wanted and p.is_contiguous()]
    try:
        for parameter in changed:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        for parameter in changed:
            parameter.data = parameter.data.contiguous()


@contextmanager
def translated(device: torch.device) -> Iterator[None]:
    """Errors of torch that are the machine's limits, as ours."""
    try:
        yield
    except torch.OutOfMemoryError as cause:
        do = "use smaller batches; the model is as before"
        raise OutOfMemoryError(f"train on {device}", found="no memory left", do=do) from cause
