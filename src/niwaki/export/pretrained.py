"""Cut models of transformers as the folders that transformers itself writes and reads."""

from pathlib import Path
from typing import Any

from torch import nn

from niwaki.models.fitted import fitted_config, write_pretrained

__all__ = ["export_pretrained", "fitted_config"]


def export_pretrained(model: nn.Module, folder: str | Path, example: Any, *, force: bool = False) -> nn.Module:
    """Write a cut model of transformers with `save_pretrained`, and read it back with `from_pretrained`.

    Its configuration gets the new sizes where it can say them. Which of its numbers those are is found by evidence:
    a configuration is right when the class, built from it, has the cut model's tensors. The folder appears only after
    the model that was read back gave the same bits on `example`; that model is returned, and needs no niwaki.

    Raises:
        InputError: not a model of transformers, or one that the exported door made.
        CannotCutError: no configuration says these sizes (layers of different widths, for one); the message has
            the tensors that do not fit. `Outcome.save` writes any cut model.
        RunExistsError: the folder exists and `force` is not given.
        MissingExtraError: transformers is not installed.

    Examples:
        >>> export_pretrained(small, "runs/small", {"input_ids": tokens})  # doctest: +SKIP
        LlamaForCausalLM(...)
    """
    return write_pretrained(model, folder, example, force=force)
