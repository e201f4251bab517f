"""Where the scores are in what a network puts out."""

from typing import Any

from torch import Tensor

from niwaki.errors import InputError


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
