"""Filters as vectors, batch norm folded in, and the inner products that reconstruction works on."""

from dataclasses import dataclass
from typing import Protocol, Self, TypeVar, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from niwaki.errors import InputError, NotFiniteError


class Vectors(Protocol):
    """What reconstruction asks of a layer's filters: of what they are made it need not know."""

    @property
    def bias(self) -> Float[Tensor, " units"]: ...
    @property
    def rank(self) -> int:
        """The most filters that can be independent."""

    @property
    def sums(self) -> Float[Tensor, " units"]:
        """What every filter makes of an input of ones, without its bias."""

    @property
    def squares(self) -> Float[Tensor, " units"]:
        """Every filter's inner product with itself."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: Int[Tensor, " some"]) -> Self: ...
    def dot(self, other: Self) -> Float[Tensor, "units others"]:
        """Inner products with other filters of the layer."""

    def same(self, other: Self) -> Bool[Tensor, " units"]:
        """Where the filter of the same number has the same numbers, bit for bit."""


Layer = TypeVar("Layer", bound=Vectors)


@final
@dataclass(frozen=True, eq=False)
class Filters:
    """A layer's filters as rows: `y_i = weight_i * X + bias_i`, X the layer's input.

    Any shape `[units, ...]` and any real type is taken; held are float64 `[units, rest]`, cut off from autograd.

    Raises:
        InputError: no filters, or shapes that do not belong together.
        NotFiniteError: a NaN or an infinity; names the first filter that has one.
    """

    weight: Float[Tensor, "units rest"]
    bias: Float[Tensor, " units"]

    def __post_init__(self) -> None:
        if self.weight.ndim == 0 or len(self.weight) == 0 or self.weight.numel() == 0:
            raise InputError(
                "filters of a layer", found=f"weight {list(self.weight.shape)}", do="give at least one filter"
            )
        if self.bias.shape != self.weight.shape[:1]:
            raise InputError(
                "filters of a layer",
                found=f"weight {list(self.weight.shape)} and bias {list(self.bias.shape)}",
                do="give one bias per filter",
            )
        object.__setattr__(self, "weight", _rows("weight", self.weight).reshape(len(self.weight), -1))
        object.__setattr__(self, "bias", _rows("bias", self.bias))

    @property
    def rank(self) -> int:
        return self.weight.shape[1]

    @property
    def sums(self) -> Float[Tensor, " units"]:
        return self.weight.sum(1)

    @property
    def squares(self) -> Float[Tensor, " units"]:
        return self.weight.square().sum(1)

    def __len__(self) -> int:
        return len(self.weight)

    def __getitem__(self, index: Int[Tensor, " some"]) -> "Filters":
        return Filters(self.weight[index], self.bias[index])

    def dot(self, other: "Filters") -> Float[Tensor, "units others"]:
        return self.weight @ other.weight.T

    def same(self, other: "Filters") -> Bool[Tensor, " units"]:
        return (self.weight == other.weight).all(1) & (self.bias == other.bias)


@final
@dataclass(frozen=True, eq=False)
class Composite:
    """An expanding layer and the depthwise one behind it as one layer; what lies between counts as linear.

    Channel i has the filter `outer(expand_i, depthwise_i)`, which is never formed: its inner products are the products
    of the two layers' inner products, its bias is `b_depthwise + sum(depthwise_i) b_expand`.

    Args:
        expand: filters of the expanding layer, one per depthwise filter (repeat them for a channel multiplier).
        depthwise: filters of the depthwise layer.

    Raises:
        InputError: not as many of the one as of the other.
    """

    expand: Vectors
    depthwise: Vectors

    def __post_init__(self) -> None:
        if len(self.expand) != len(self.depthwise):
            raise InputError(
                "join an expanding and a depthwise layer",
                found=f"{len(self.expand)} and {len(self.depthwise)} filters",
                do="give one filter of each per channel",
            )

    @property
    def bias(self) -> Float[Tensor, " units"]:
        return self.depthwise.bias + self.depthwise.sums * self.expand.bias

    @property
    def sums(self) -> Float[Tensor, " units"]:
        return self.expand.sums * self.depthwise.sums

    @property
    def rank(self) -> int:
        return self.expand.rank * self.depthwise.rank

    @property
    def squares(self) -> Float[Tensor, " units"]:
        return self.expand.squares * self.depthwise.squares

    def __len__(self) -> int:
        return len(self.expand)

    def __getitem__(self, index: Int[Tensor, " some"]) -> "Composite":
        return Composite(self.expand[index], self.depthwise[index])

    def dot(self, other: "Composite") -> Float[Tensor, "units others"]:
        return self.expand.dot(other.expand) * self.depthwise.dot(other.depthwise)

    def same(self, other: "Composite") -> Bool[Tensor, " units"]:
        return self.expand.same(other.expand) & self.depthwise.same(other.depthwise)


@final
@dataclass(frozen=True, eq=False)
class InnerProducts:
    """All that reconstruction in filter space needs to know of the targets and of the damaged channels.

    A kept channel counts as undamaged where its row of `cross` equals its row of `gram` bit for bit.

    Raises:
        InputError: shapes that do not belong together.
        NotFiniteError: a NaN or an infinity.
    """

    cross: Float[Tensor, "targets kept"]
    """Targets with damaged channels."""
    gram: Float[Tensor, "kept kept"]
    """Damaged channels with each other."""
    squares: Float[Tensor, " targets"]
    """Targets with themselves."""
    bias: Float[Tensor, " targets"]
    damaged_bias: Float[Tensor, " kept"]
    rank: int | None = None
    """The most channels that can be independent, where that is known."""

    def __post_init__(self) -> None:
        targets, kept = self.cross.shape
        expected = {"gram": (kept, kept), "squares": (targets,), "bias": (targets,), "damaged_bias": (kept,)}
        for name, shape in expected.items():
            if tuple(getattr(self, name).shape) != shape:
                raise InputError(
                    "inner products",
                    found=f"{name} {list(getattr(self, name).shape)}, cross {list(self.cross.shape)}",
                    do=f"give {name} of shape {list(shape)}",
                )
        for name in ("cross", *expected):
            object.__setattr__(self, name, _rows(name, getattr(self, name)))


def inner_products(target: Layer, damaged: Layer, kept: Int[Tensor, " kept"]) -> InnerProducts:
    """Inner products of a layer with what is left of it; `damaged[i]` is what became of `target[kept[i]]`.

    Raises:
        InputError: `kept` does not say that.
    """
    kept = checked(kept, len(target), len(damaged), device=target.bias.device)
    same = target[kept].same(damaged)
    cross, gram, squares = target.dot(damaged), damaged.dot(damaged), target.squares
    # the same bits, however the matrix product rounds: what is undamaged has a residual of exactly zero
    cross[kept[same]] = gram[same]
    squares[kept[same]] = gram.diagonal()[same]
    return InnerProducts(cross, gram, squares, target.bias, damaged.bias, target.rank)


def folded(
    weight: Float[Tensor, "units ..."],
    bias: Float[Tensor, " units"] | None = None,
    *,
    gamma: Float[Tensor, " units"] | None = None,
    beta: Float[Tensor, " units"] | None = None,
    mean: Float[Tensor, " units"] | None = None,
    variance: Float[Tensor, " units"] | None = None,
    eps: float = 1e-5,
) -> Filters:
    """A layer and the batch norm behind it as one: `w = gamma/sigma W`, `b = beta + gamma/sigma (bias - mean)`.

    `sigma = sqrt(variance + eps)`. What is None is not there: no mean and variance, no batch norm (sigma 1).

    Raises:
        InputError: only one of mean and variance, or a negative variance.
        NotFiniteError: a NaN or an infinity, also one that a variance and an eps of zero make.
    """
    if (mean is None) != (variance is None):
        raise InputError("fold a batch norm", found="only one of mean and variance", do="give both or neither")
    one = torch.ones(len(weight), dtype=torch.float64, device=weight.device)
    scale = one if gamma is None else gamma.detach().double()
    if variance is not None:
        if bool((variance < 0).any()):
            raise InputError("fold a batch norm", found=f"variance {float(variance.min()):.3g}", do="check the model")
        scale = scale / (variance.detach().double() + eps).sqrt()
    shift = (0 * one if bias is None else bias.detach().double()) - (
        0 * one if mean is None else mean.detach().double()
    )
    shift = scale * shift + (0 * one if beta is None else beta.detach().double())
    return Filters(weight.detach().double().reshape(len(weight), -1) * scale[:, None], shift)


def untrained(mean: Float[Tensor, " units"], variance: Float[Tensor, " units"]) -> bool:
    """Whether running statistics are still what a batch norm starts with: means 0, variances 1."""
    return bool((mean == 0).all() and (variance == 1).all())


def checked(
    kept: Int[Tensor, " kept"], targets: int, damaged: int, *, device: torch.device | None = None
) -> Int[Tensor, " kept"]:
    """`kept` as long integers on a device.

    Raises:
        InputError: empty, not distinct positions below `targets`, or not as many as there are damaged channels.
    """
    if kept.ndim != 1 or kept.is_floating_point() or kept.dtype == torch.bool:
        raise InputError(
            "say which channels are kept", found=f"{kept.dtype} {list(kept.shape)}", do="give their numbers, 1-d"
        )
    if not len(kept):
        raise InputError("reconstruct channels from none", found="kept is empty", do="keep at least one channel")
    if len(kept) != damaged:
        raise InputError(
            "say which channels are kept",
            found=f"{len(kept)} numbers, {damaged} damaged channels",
            do="give kept[i], the number of the target that damaged channel i was",
        )
    if int(kept.min()) < 0 or int(kept.max()) >= targets or len(kept.unique()) != len(kept):
        raise InputError(
            "say which channels are kept",
            found="numbers that repeat or lie outside",
            do=f"give distinct numbers from 0 to {targets - 1}",
        )
    return kept.long().to(device)


def _rows(name: str, values: Tensor) -> Tensor:
    """Real and finite, in float64."""
    if values.is_complex():
        raise InputError("reconstruct channels", found=f"{name} of {values.dtype}", do="give real numbers")
    values = values.detach().double()
    finite = values.isfinite()
    if not bool(finite.all()):
        first = int((~finite).reshape(len(values), -1).any(1).nonzero()[0, 0])
        raise NotFiniteError(
            "reconstruct channels", found="NaN or infinity", where=f"{name}, channel {first}", do="check the weights"
        )
    return values
