"""Layer-wise training of low-rank projections: keys and values are to come out as the model's own."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from niwaki.errors import InputError
from niwaki.kv.calibration import Inputs, placed
from niwaki.kv.factors import Factors
from niwaki.kv.low_rank import joined, sliced
from niwaki.kv.packed import Grid
from niwaki.kv.projections import Projections, growing
from niwaki.kv.sources import source_of
from niwaki.kv.straight_through import reference, through
from niwaki.kv.support import Site
from niwaki.train import History, Recovery
from niwaki.train.loop import Progress
from niwaki.units import device_of

PUBLISHED = Recovery(
    epochs=1, lr=5e-5, optimizer="adamw", schedule="linear", warmup=0.0, weight_decay=0.0, momentum=0.9, clip=1.0
)
"""The authors' settings: those of the Trainer of transformers, one pass, a batch of one sequence."""


class Text(Protocol):
    """Batches and what of them the model is called on; every `niwaki.tasks.Task` is one."""

    @property
    def steps(self) -> int: ...

    def train_batches(self, seed: int) -> Iterator[Any]: ...

    def inputs(self, batch: Any) -> Any: ...


@final
@dataclass(frozen=True)
class Rounding:
    """Quantisation that the training is to see: what `CSKV(bits=, window=)` will store.

    Raises:
        InputError: see `Grid`; a window of 0 tokens that is not a multiple of 8.
    """

    bits: int = 4
    """2, 4 or 8."""
    window: int = 32
    """Tokens of a group of keys; 0: per token."""
    as_published: bool = False
    """Whether to round as the authors' code does, whose zero point breaks groups without 0; for comparison only."""

    def __post_init__(self) -> None:
        Grid(self.bits, "tokens", self.window or 32)

    def keys(self, rows: Tensor, heads: int) -> Tensor:
        """`[batch, groups, tokens, rank of group]`: per channel over `window` tokens."""
        if not self.window:
            return self.values(rows, heads)
        if not self.as_published:
            return through(rows, Grid(self.bits, "tokens", self.window))
        whole = rows.shape[2] - rows.shape[2] % self.window
        blocks = rows[:, :, :whole].unflatten(2, (-1, self.window))
        return torch.cat((reference(blocks, self.bits, dim=3).flatten(2, 3), rows[:, :, whole:]), dim=2)

    def values(self, rows: Tensor, heads: int) -> Tensor:
        """The same per token, over a head's slice."""
        cut = sliced(rows, heads)
        if self.as_published:
            return joined(reference(cut, self.bits), rows.shape[1])
        return joined(through(cut, Grid(self.bits, "channels", -(-cut.shape[-1] // 8) * 8)), rows.shape[1])


class Reconstruction(nn.Module):
    """The factors as parameters; nothing of the model is one, so that no gradient and no checkpoint reaches it."""

    def __init__(self, projections: Projections) -> None:
        super().__init__()
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for layer, pair in projections.layers.items():
            for name, factors in zip(("keys", "values"), pair, strict=True):
                self.down[f"{layer}_{name}"] = nn.Parameter(factors.down.clone())
                self.up[f"{layer}_{name}"] = nn.Parameter(factors.up.clone())

    def factors(self, layer: int) -> tuple[Factors, Factors]:
        keys, values = (Factors(self.down[f"{layer}_{n}"], self.up[f"{layer}_{n}"]) for n in ("keys", "values"))
        return keys, values


@final
class LayerWise:
    """The sum over layers of the mean squared errors of keys and values, on the inputs that the model itself has.

    Every layer sees the teacher's inputs, so that all are independent. Keys are compared before norm and rotation:
    rotation keeps lengths, so that it is the same error afterwards.

    Source: CSKV (arXiv:2409.10593), eq. 1 and 2.
    """

    def __init__(self, model: nn.Module, text: Text, rounding: Rounding | None = None) -> None:
        self.model, self.text, self.rounding = model, text, rounding
        self.found = growing(model)
        self.sources = {site.layer: source_of(site) for site in self.found}

    @property
    def steps(self) -> int:
        return self.text.steps

    def train_batches(self, seed: int) -> Iterator[Any]:
        return map(self.text.inputs, self.text.train_batches(seed))

    def loss(self, trained: nn.Module, batch: Any) -> Float[Tensor, ""]:
        bare: Any = getattr(trained, "module", trained)  # DDP keeps it there
        errors = self.errors({site.layer: bare.factors(site.layer) for site in self.found}, batch, device_of(trained))
        return torch.stack([keys + values for keys, values in errors.values()]).sum()

    def errors(
        self, factors: dict[int, tuple[Factors, Factors]], batch: Any, device: torch.device
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Layer to mean squared errors of keys and of values, over tokens that are no padding."""
        if device_of(self.model) != device:
            self.model.to(device)
            self.sources = {site.layer: source_of(site) for site in self.found}
        with Inputs(self.found) as seen:
            with torch.no_grad():
                placed(self.model, batch, device)
            return {
                site.layer: self._errors(site, factors[site.layer], seen.hidden[site.layer], seen.real[site.layer])
                for site in self.found
            }

    def _errors(
        self, site: Site, pair: tuple[Factors, Factors], x: Tensor, real: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Padding has a part in the groups that are rounded, as in a cache, and none in the errors."""
        found = []
        exact = self.sources[site.layer].projected(x)
        rounders = (None, None) if self.rounding is None else (self.rounding.keys, self.rounding.values)
        for factors, wanted, rounded in zip(pair, exact, rounders, strict=True):
            c = factors.compressed(x.to(factors.down.dtype))
            if rounded is not None:
                rows = c.unflatten(-1, (factors.groups, -1)).transpose(1, 2)
                c = rounded(rows, site.kv_heads).transpose(1, 2).flatten(2)
            made = factors.restored(c)
            made, wanted = (made, wanted) if real is None else (made[real], wanted[real])
            found.append(functional.mse_loss(made.float(), wanted.float()))
        return found[0], found[1]


def reconstruct(
    model: nn.Module,
    projections: Projections,
    text: Text,
    *,
    how: Recovery = PUBLISHED,
    rounding: Rounding | None = None,
    progress: Progress | None = None,
    resume: bool = False,
) -> tuple[Projections, History]:
    """The projections trained on the text, and how it went; the model is left as it is.

    Without `rounding` "whitened" projections are the optimum already, on their calibration text. With it training sees
    what `CSKV(bits=, window=)` stores, and the result is for these settings only. Runs on accelerate, resumable:
    see `niwaki.train.Recovery`.

    Raises:
        InputError: projections for another model, or trained for another quantiser; see `Recovery` for more.
    """
    projections.check(model)
    shape = projections.shape
    told = (None, None, False) if rounding is None else (rounding.bits, rounding.window, rounding.as_published)
    if shape.bits is not None and told != (shape.bits, shape.window, shape.as_published):
        found = f"projections trained for {shape.quantiser}"
        raise InputError("train projections", found=found, do="go on with the same rounding, or start from new ones")
    frozen = [parameter.requires_grad for parameter in model.parameters()]
    training, place = model.training, device_of(model)
    trained = Reconstruction(projections).to(place)
    try:
        model.eval().requires_grad_(False)
        history = how(trained, LayerWise(model, text, rounding), progress=progress, resume=resume)
    finally:
        for parameter, wanted in zip(model.parameters(), frozen, strict=True):
            parameter.requires_grad_(wanted)
        model.train(training).to(place)
    layers = {
        layer: tuple(Factors(one.down.detach().cpu(), one.up.detach().cpu()) for one in trained.factors(layer))
        for layer in projections.layers
    }
    steps = shape.steps + sum(int(epoch["steps"]) for epoch in history.epochs)
    shape = replace(shape, bits=told[0], window=told[1], as_published=told[2], steps=steps)
    return replace(projections, layers=layers, shape=shape), history  # type: ignore[arg-type]


def errors_of(
    model: nn.Module, projections: Projections, batches: Sequence[Any], rounding: Rounding | None = None
) -> dict[int, tuple[float, float]]:
    """Layer to mean squared errors of keys and values on inputs of the model, all of one shape."""
    if not batches:
        raise InputError("measure errors of projections", found="no batches", do="give some text")
    judge = LayerWise(model, _NoText(), rounding)
    sums: dict[int, list[float]] = {layer: [0.0, 0.0] for layer in projections.layers}
    device = device_of(model)
    layers = {
        layer: tuple(Factors(one.down.to(device), one.up.to(device)) for one in pair)
        for layer, pair in projections.layers.items()
    }
    for batch in batches:
        with torch.no_grad():
            found = judge.errors(layers, batch, device)  # type: ignore[arg-type]
        for layer, pair in found.items():
            for i, error in enumerate(pair):
                sums[layer][i] += float(error) / len(batches)
    return {layer: (keys, values) for layer, (keys, values) in sums.items()}


class _NoText:
    steps = 0

    def train_batches(self, seed: int) -> Iterator[Any]:
        return iter(())

    def inputs(self, batch: Any) -> Any:
        return batch
