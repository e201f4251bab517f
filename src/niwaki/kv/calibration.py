"""What a model's attention layers read: means of magnitudes and products, over batches of text."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from niwaki.errors import InputError, NotFiniteError
from niwaki.kv.attention import seen
from niwaki.kv.support import Site
from niwaki.measure.measurement import evaluating
from niwaki.units import device_of, map_tensors, run


@final
@dataclass(frozen=True, eq=False)
class Statistics:
    """Of the inputs of one attention module, which its keys and values are made of."""

    mean: Float[Tensor, " width"]
    """Of magnitudes, float64."""
    covariance: Float[Tensor, "width width"]
    """E[x^T x], float64; about zero, not about the mean."""
    tokens: int

    @property
    def full(self) -> bool:
        """Whether there were tokens enough for every direction to show."""
        return self.tokens >= len(self.mean)


class Inputs:
    """Collects what attention modules are called on: hooks in a `with`, removed at its end."""

    def __init__(self, found: Sequence[Site]) -> None:
        self.found = found
        self.hidden: dict[int, Tensor] = {}
        """Layer to `[batch, tokens, width]` of the last forward."""
        self.real: dict[int, Tensor | None] = {}
        """Layer to bool `[batch, tokens]` of it, False for padding; None where there is none."""
        self._hooks: list[Any] = []

    def __enter__(self) -> "Inputs":
        def hook(layer: int) -> Any:
            def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                hidden: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
                self.hidden[layer] = hidden.detach()
                self.real[layer] = real_tokens(kwargs.get("attention_mask"), hidden)

            return keep

        for site in self.found:
            self._hooks.append(site.module.register_forward_pre_hook(hook(site.layer), with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._hooks:
            handle.remove()
        self._hooks.clear()
        self.hidden.clear()
        self.real.clear()


def real_tokens(
    mask: Tensor | None, hidden: Float[Tensor, "batch tokens width"]
) -> Bool[Tensor, "batch tokens"] | None:
    """Which tokens are no padding, by the mask that an attention module is called with: what its last query sees."""
    if mask is None:
        return None
    told = mask.bool() if mask.dim() == 2 else seen(mask[:, 0, -1])
    return told[:, -hidden.shape[1] :].expand(len(hidden), -1)


def statistics(model: nn.Module, found: Sequence[Site], batches: Iterable[Any]) -> dict[int, Statistics]:
    """Layer to statistics over all tokens of the batches, padding left out.

    Batches are inputs of the model (see `niwaki.units.run`); padding is what their attention mask hides.

    Raises:
        InputError: no batches, or tokens that the model does not have.
        NotFiniteError: NaN or infinite inputs, with the layer.
    """
    means: dict[int, Tensor] = {}
    products: dict[int, Tensor] = {}
    tokens = dict.fromkeys((site.layer for site in found), 0)
    device = device_of(model)
    with evaluating(model), Inputs(found) as inputs:
        for batch in batches:
            placed(model, batch, device)
            for site in found:
                x, real = inputs.hidden[site.layer].flatten(0, -2), inputs.real[site.layer]
                x = x if real is None else x[real.flatten()]
                if not torch.isfinite(x).all():
                    do = "look for NaN in the weights, or use a wider type"
                    raise NotFiniteError("calibrate", found="NaN or infinite inputs", where=site.name, do=do)
                x = x.double()
                means[site.layer] = means.get(site.layer, 0) + x.abs().sum(0)
                products[site.layer] = products.get(site.layer, 0) + x.T @ x
                tokens[site.layer] += len(x)
    if not means:
        raise InputError("calibrate", found="no batches", do="give some text of the kind that the model is used on")
    return {
        layer: Statistics((means[layer] / count).cpu(), (products[layer] / count).cpu(), count)
        for layer, count in tokens.items()
    }


def placed(model: nn.Module, batch: Any, device: torch.device) -> None:
    """One forward of a batch, on the model's device."""
    try:
        run(model, map_tensors(batch, lambda tensor: tensor.to(device)))
    except IndexError as cause:
        do = "use text in the model's own tokens, no longer than its context"
        raise InputError("calibrate", found=f"tokens that the model does not have: {cause}", do=do) from cause
