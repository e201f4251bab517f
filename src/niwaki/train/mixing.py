"""Mixup and cutmix on a batch of labelled pictures."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from niwaki.errors import InputError
from niwaki.train.settings import Mix


def mixed(batch: Any, how: Mix, classes: int, generator: torch.Generator) -> Any:
    """(inputs [batch, c, h, w], labels [batch]) with pairs mixed, labels as shares [batch, classes]; or the batch as
    it is, where `how.probability` says so.

    Raises:
        InputError: a batch of another kind.
    """
    inputs, labels = _labelled(batch)
    chosen, which = torch.rand(2, generator=generator).tolist()
    if chosen >= how.probability:
        return batch
    cut = how.cutmix > 0 and (how.mixup == 0 or which < 0.5)
    partner = torch.randperm(len(inputs), generator=generator).to(inputs.device)
    share = beta(how.cutmix if cut else how.mixup, generator)
    if cut:
        inputs, share = pasted(inputs, inputs[partner], share, generator)
    else:
        inputs = inputs * share + inputs[partner] * (1 - share)
    targets = functional.one_hot(labels, classes).to(inputs.dtype)
    return inputs, targets * share + targets[partner.to(labels.device)] * (1 - share)


def pasted(
    inputs: Float[Tensor, "batch c h w"], others: Float[Tensor, "batch c h w"], share: float, generator: torch.Generator
) -> tuple[Float[Tensor, "batch c h w"], float]:
    """`inputs` with one rectangle of `others`, and the share of `inputs` that is left.

    The rectangle has the picture's proportions, an area of 1 - share, and its middle anywhere: what would lie outside
    is cut off, so that the share that is left is counted anew.
    """
    height, width = inputs.shape[-2:]
    half = (1 - share) ** 0.5 / 2
    y, x = (int(at) for at in (torch.rand(2, generator=generator) * torch.tensor([height, width])).tolist())
    top, bottom = max(0, y - int(height * half)), min(height, y + int(height * half))
    left, right = max(0, x - int(width * half)), min(width, x + int(width * half))
    result = inputs.clone()
    result[..., top:bottom, left:right] = others[..., top:bottom, left:right]
    return result, 1 - (bottom - top) * (right - left) / (height * width)


def beta(parameter: float, generator: torch.Generator) -> float:
    """A number from Beta(parameter, parameter)."""
    both = torch.full((2,), parameter, dtype=torch.float64)
    first, second = torch._standard_gamma(both, generator=generator).tolist()
    return first / (first + second) if first + second > 0 else 0.5  # both may underflow where parameter is tiny


def _labelled(batch: Any) -> tuple[Tensor, Tensor]:
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)
    if not pair or batch[0].dim() != 4 or batch[1].dim() != 1 or batch[1].is_floating_point():
        raise InputError(
            "mix pictures",
            found=f"a {type(batch).__name__} that is no pair of pictures [batch, c, h, w] and class numbers [batch]",
            do="leave mix out, or use a task of classification",
        )
    return batch[0], batch[1]
