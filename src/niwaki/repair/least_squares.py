"""What removed channels told, predicted from those that stay, in the weights of the layers that read them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, final, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from niwaki.errors import InputError, NotFiniteError
from niwaki.evidence.patches import patches
from niwaki.plan import Plan
from niwaki.repair.in_turn import refit_in_turn
from niwaki.repair.readers import Readers, listen

Inputs = Literal["whole", "cut"]


@final
@dataclass(frozen=True)
class LeastSquares:
    """Layers that lose inputs are refitted to what they put out before, over given batches.

    Of a layer `W x + b` with inputs x (of a convolution: patches), of which z stay, the weights and constant that
    minimise the mean square of `W x - W' z - c`, with a price on leaving the weights it had. Inputs are the uncut
    model's, unless others are asked for. By a large ridge nothing is left but the constants: `FoldedConstants("mean")`.

    Readers are linear layers and plain convolutions; others are left alone and returned by name.

    Source: He et al. 2017, arXiv:1707.06168, sec. 3.1 (the weights for given channels), 3.2 (residual branches).
    Differs: a ridge, a constant, and inputs of the uncut network unless `inputs="cut"`.
    """

    ridge: float = 1e-2
    """Price of leaving the weights, as a share of the mean variance of an input that stays."""
    raises: int = 5
    """Of layers in turn (`inputs="cut"`): how often the ridge may be raised tenfold, as long as each half of the
    positions is met better by what is solved from the other half. It keeps a layer of many inputs from few batches."""
    samples: int = 4096
    """Positions (tokens, pixels) that are drawn from a batch for a layer; where it has fewer, all are taken."""
    largest: int = 8192
    """Most inputs (channels times places of the kernel) of a layer that is refitted, as all of them are set against
    each other: 0.5 GiB for 8192. A larger one takes the constants alone."""
    seed: int = 0
    """Of the draws."""
    settle: bool = True
    """Of layers in turn: batch norms behind them take over the statistics of what was fitted, with scales and shifts by
    which they compute what they did. Else what was fitted lasts until the norms are estimated again, or trained."""
    inputs: Inputs = "whole"
    """Of the uncut network, one pass for all layers ("whole"); or then, of all layers in turn, of the network as it is
    cut and refitted so far ("cut"), which also makes up in residual branches for what the sum lost. The batches are
    put together to one for it; what layers put out at the drawn positions is held, 4 bytes a number."""

    def __post_init__(self) -> None:
        if not self.ridge > 0:
            raise InputError(f"LeastSquares(ridge={self.ridge!r})", found="not above 0", do="give a positive number")
        if self.inputs not in get_args(Inputs):
            found = f"known: {', '.join(get_args(Inputs))}"
            raise InputError(f"LeastSquares(inputs={self.inputs!r})", found=found, do="use one")
        for name in ("samples", "largest"):
            if (count := getattr(self, name)) < 1:
                raise InputError(f"LeastSquares({name}={count!r})", found="fewer than 1", do="give 1 or more")
        if self.raises < 0:
            raise InputError(f"LeastSquares(raises={self.raises!r})", found="fewer than 0", do="give 0 or more")

    def __call__(
        self,
        model: nn.Module,
        small: nn.Module,
        plan: Plan,
        *,
        batches: Iterable[Any],
        optimizer: torch.optim.Optimizer | None = None,
    ) -> tuple[str, ...]:
        """Refit `small` in place; returns the layers that lose inputs and could not be refitted.

        Args:
            batches: inputs of the model; a thousand pictures will do.
            optimizer: one in use for `small`; biases that are added join the group of their layer's weight.

        Raises:
            InputError: no batches, a model that was not cut through the eager door, or another model's optimiser.
            NotFiniteError: an input of a layer is NaN or infinite.
        """
        batches = list(batches) if self.inputs == "cut" else batches
        readers = Readers(model, small, plan, optimizer, what="refit layers")
        seen: dict[str, _Moments] = {}
        generator = torch.Generator().manual_seed(self.seed)

        def hear(name: str, module: nn.Module, x: Tensor) -> None:
            rows = patches(module, x, self.samples, generator)
            seen.setdefault(name, _Moments(rows, self.largest)).add(rows)

        listen(model, readers.gone, batches, hear, what="refit layers")
        for name, gone in readers.gone.items():
            if (
                name not in seen or not seen[name].count
            ):  # its weight is read without a call of the layer, as attention does with its output
                readers.skipped.append(name)
                continue
            weight = readers.weight(name)  # [outputs, inputs, ...]
            stay = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
            stay[gone] = False
            each = weight[0, 0].numel()
            places = stay.repeat_interleave(each)
            predicted, constant = seen.pop(name).predicted(places, self.ridge, name)
            taken = weight.flatten(1).double()[:, ~places]
            with torch.no_grad():
                now: Tensor = readers.modules[name].weight  # type: ignore[assignment, union-attr]
                change = (taken @ predicted).reshape(len(now), -1, *now.shape[2:])
                now.index_add_(1, readers.first(name), change.to(now.dtype))  # of a unit's copies the first one
            readers.shift(name, taken @ constant)
        if isinstance(batches, list) and self.inputs == "cut":
            most = self.samples * len(batches)
            counts = {"raises": self.raises, "most": most, "largest": self.largest, "seed": self.seed}
            done = refit_in_turn(readers, batches, ridge=self.ridge, settle=self.settle, **counts)
            readers.skipped = [name for name in readers.skipped if name not in done]
        return tuple(dict.fromkeys(readers.skipped))


class _Moments:
    """Sums over rows of inputs, float64; of products only where there are few enough inputs."""

    def __init__(self, rows: Float[Tensor, "positions inputs"], largest: int) -> None:
        inputs = rows.shape[1]
        self.total = torch.zeros(inputs, dtype=torch.float64, device=rows.device)
        self.products = self.total.new_zeros(inputs, inputs) if inputs <= largest else None
        self.count = 0

    def add(self, rows: Float[Tensor, "positions inputs"]) -> None:
        rows = rows.double()
        self.total += rows.sum(0)
        if self.products is not None:
            self.products.addmm_(rows.T, rows)
        self.count += len(rows)

    def predicted(self, stay: Bool[Tensor, " inputs"], ridge: float, name: str) -> tuple[Tensor, Tensor]:
        """What does not stay as `P z + c` of what does: `[gone, stay]` and `[gone]`."""
        mean = self.total / self.count
        if not bool(mean.isfinite().all()):
            do = "look for it in the batches and in the weights"
            raise NotFiniteError("refit layers", found="an input that is NaN or infinite", where=name, do=do)
        if self.products is None:
            return mean.new_zeros(int((~stay).sum()), int(stay.sum())), mean[~stay]
        moments = self.products / self.count - mean[:, None] * mean
        own, cross = moments[stay][:, stay], moments[stay][:, ~stay]
        level = own.diagonal().mean()
        own.diagonal().add_(ridge * level if level > 0 else 1.0)
        predicted = torch.cholesky_solve(cross, torch.linalg.cholesky(own)).T
        return predicted, mean[~stay] - predicted @ mean[stay]
