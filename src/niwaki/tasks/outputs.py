"""Running a network on a batch, and where the scores are in what it puts out."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.errors import InputError, OutOfMemoryError
from niwaki.units import run


def outputs_of(model: nn.Module, inputs: Tensor) -> Any:
    """What a model puts out for a batch, which is moved to its device and kind of number.

    Raises:
        OutOfMemoryError: the device is too small for the batch.
    """
    like = next((p for p in model.parameters() if p.is_floating_point()), inputs)
    try:
        return run(model, inputs.to(like.device, like.dtype))
    except torch.OutOfMemoryError as cause:
        found = f"no memory left on {like.device} for a batch of {len(inputs)}"
        raise OutOfMemoryError("run the model", found=found, do="use a smaller batch") from cause


def named_outputs(output: Any, names: Sequence[str]) -> dict[str, Any]:
    """What a model puts out under each name: in a mapping, as named fields, in their order in a tuple or list, or as
    the one tensor of one name; None where there is nothing."""
    if isinstance(output, Mapping):
        listed: list[Any] = [output.get(name) for name in names]
    elif isinstance(output, (tuple, list)) and len(output) == len(names) and not hasattr(output, "_fields"):
        listed = list(output)
    elif isinstance(output, Tensor) and len(names) == 1:
        listed = [output]
    else:
        listed = [getattr(output, name, None) for name in names]
    return dict(zip(names, listed, strict=True))


def logits_of(output: Any, shape: str = "[batch, classes]") -> Tensor:
    """The class scores in what a model puts out: a tensor, something with `logits`, or the first of several."""
    if isinstance(output, Tensor):
        return output
    named = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return named
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    raise InputError(
        "class scores from the model",
        found=f"an output of type {type(output).__name__}",
        do=f"return a tensor {shape}, or something with one as `logits`",
    )
