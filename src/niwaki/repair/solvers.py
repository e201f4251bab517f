"""The closed forms by name, as the network-wide reconstruction asks them: one site and reader at a time."""

from dataclasses import replace
from typing import Literal

from niwaki.errors import InputError
from niwaki.repair.activation_space import ActivationSpace
from niwaki.repair.diagonal import Diagonal
from niwaki.repair.filter_space import FilterSpace
from niwaki.repair.filters import untrained
from niwaki.repair.merge import Merge
from niwaki.repair.mixing import Mixing
from niwaki.repair.neuron_merging import NeuronMerging
from niwaki.repair.reconstruction import Channels, Solver

How = Literal["filter", "filter_positive", "diagonal", "activation", "merge", "neuron_merging", "none"]


def solver(how: How, *, bias_weight: float = 0.01, ridge: float = 0.008) -> Solver | None:
    """What `reconstruct_network` calls for each site and reader; None for "none".

    Args:
        bias_weight, ridge: of "filter", "filter_positive" and "diagonal".
    """
    if how == "none":
        return None
    if how == "activation":
        return behind_activation
    if how == "neuron_merging":
        return as_published
    block: FilterSpace | Diagonal | Merge
    if how == "diagonal":
        block = Diagonal(bias_weight, ridge)
    elif how == "merge":
        block = Merge()
    else:
        block = FilterSpace(bias_weight, ridge, non_negative=how == "filter_positive")
    return lambda seen: block(seen.target, seen.damaged, seen.kept)


def behind_activation(seen: Channels) -> Mixing:
    """Form B with the activation and the statistics of this site.

    Without a batch norm the layer's input is taken to be white and of mean 0, and the result says so.

    Raises:
        InputError: statistics of a batch norm that was never trained.
    """
    name, bend = seen.bend
    block = ActivationSpace(activation=name if name in ("relu", "identity") else bend)
    if seen.mean is None or seen.std is None:
        mixing = block(
            seen.target, seen.damaged, seen.kept, mean=seen.target.bias, deviation=seen.target.squares.sqrt()
        )
        told = "no batch norm: its inputs are taken to be white"
        return replace(mixing, remarks=(*mixing.remarks, told))
    if "mean" in seen.norm and untrained(seen.norm["mean"], seen.norm["variance"]):
        raise InputError(
            "rebuild activations from batch-norm statistics",
            found="statistics look untrained: means 0 and variances 1",
            do="give trained weights, or use solve=filter",
        )
    return block(seen.target, seen.damaged, seen.kept, mean=seen.mean, deviation=seen.std)


def as_published(seen: Channels) -> Mixing:
    """Neuron Merging by its authors' arithmetic; merged by folded filters where that has no batch norm to go by."""
    if not {"gamma", "beta"} <= set(seen.norm):
        mixing = Merge()(seen.target, seen.damaged, seen.kept)
        return replace(
            mixing, remarks=(*mixing.remarks, "no scale and shift of a batch norm: merged by folded filters")
        )
    return NeuronMerging()(seen.raw, seen.kept, **seen.norm, eps=seen.eps)
