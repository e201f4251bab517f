"""Low-rank projections of a model's keys and values: made from text, kept in a file with what they are for."""

import hashlib
import json
import logging
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, final, get_args

import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from niwaki.errors import FileDamagedError, InputError, UnknownNameError
from niwaki.kv.calibration import Statistics, statistics
from niwaki.kv.factors import Factors, Solver, asvd, factorised, rank_of, svd, whitened
from niwaki.kv.sources import Source, source_of
from niwaki.kv.support import Site, sites

log = logging.getLogger(__name__)
Initialisation = Literal["whitened", "asvd", "svd"]
FORMAT = "niwaki-cskv-2"
PIECE = 256
"""Rows of a weight that are in memory as whole numbers at once."""


@final
@dataclass(frozen=True)
class Shape:
    """What projections are of: whatever differs makes them projections for something else."""

    keep: float
    """Share of key channels."""
    values: float
    """Share of value channels."""
    init: Initialisation
    per_head: bool
    """Whether each head has factors of its own; joint over all heads otherwise, as published."""
    bits: int | None = None
    """Of the quantiser they were trained for; None where they were not."""
    window: int | None = None
    """Tokens of a group of that quantiser; None where they were not trained for one."""
    as_published: bool = False
    """Whether that quantiser is the authors', which no cache of ours has: for comparisons of errors only."""
    steps: int = 0
    """Of training."""

    @property
    def quantiser(self) -> str:
        """What they were trained for, in words."""
        return f"bits={self.bits}, window={self.window}" + (", as_published=True" if self.as_published else "")


@final
@dataclass(frozen=True, eq=False)
class Projections:
    """Factors of the keys and the values of every layer that keeps all tokens."""

    layers: Mapping[int, tuple[Factors, Factors]]
    """Layer to keys and values."""
    shape: Shape
    fingerprint: str
    """Of the model's key and value weights."""

    def nbytes(self) -> int:
        """Bytes of the factors in memory: what comes on top of the model."""
        return sum(factors.nbytes() for pair in self.layers.values() for factors in pair)

    @property
    def outlined(self) -> bool:
        """Whether they are sizes without numbers, to plan with."""
        return not self.fingerprint

    def check(self, model: nn.Module) -> None:
        """
        Raises:
            InputError: they were made for other weights.
        """
        if self.outlined:
            return
        if (found := fingerprint_of({site.layer: source_of(site) for site in growing(model)})) != self.fingerprint:
            do = "project this model: niwaki.kv.project(model, batches, keep=...)"
            what, where = f"weights {found}, not {self.fingerprint}", f"a {type(model).__name__}"
            raise InputError("compress a cache with these projections", found=what, where=where, do=do)

    def save(self, file: str | Path) -> None:
        """As safetensors, float32; written aside and renamed."""
        tensors = {}
        for layer, pair in self.layers.items():
            for name, factors in zip(("keys", "values"), pair, strict=True):
                tensors[f"{layer}.{name}.down"] = factors.down.float().cpu().contiguous()
                tensors[f"{layer}.{name}.up"] = factors.up.float().cpu().contiguous()
        told = {"format": FORMAT, "shape": json.dumps(asdict(self.shape)), "fingerprint": self.fingerprint}
        path = Path(file)
        aside = path.with_name(path.name + ".part")
        save_file(tensors, str(aside), told)
        aside.replace(path)

    @classmethod
    def load(cls, file: str | Path) -> "Projections":
        """What `save` wrote.

        Raises:
            InputError: no such file.
            FileDamagedError: another kind of file, or a damaged one.
        """
        path = Path(file).expanduser()
        if not path.is_file():
            raise InputError("read projections", found="no such file", where=str(path), do="check the path")
        try:
            with safe_open(str(path), "pt") as opened:
                told = opened.metadata() or {}
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
            if told.get("format") != FORMAT:
                raise ValueError(f"format {told.get('format')!r}")
            shape = Shape(**json.loads(told["shape"]))
            layers = {
                int(layer): (
                    Factors(tensors[f"{layer}.keys.down"], tensors[f"{layer}.keys.up"]),
                    Factors(tensors[f"{layer}.values.down"], tensors[f"{layer}.values.up"]),
                )
                for layer in sorted({name.split(".")[0] for name in tensors}, key=int)
            }
            for factors in (one for pair in layers.values() for one in pair):
                if factors.up.dim() != 3 or factors.rank != factors.groups * factors.up.shape[1]:
                    raise ValueError("factors that do not fit each other")
            return cls(layers, shape, told["fingerprint"])
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as cause:
            do = "give a file that niwaki.kv.Projections.save wrote"
            raise FileDamagedError("read projections", found=str(cause), where=str(path), do=do) from cause


def project(
    model: nn.Module,
    batches: Iterable[Any] | None,
    *,
    keep: float = 0.2,
    values: float | None = None,
    init: Initialisation = "whitened",
    per_head: bool = False,
) -> Projections:
    """Low-rank projections of a model's keys (`keep` of their channels) and values (`values`; as the keys if None).

    `batches` are inputs of the model (tokens `[batch, length]`), of the kind of text that it will be used on; "svd"
    takes none. "whitened" has the least error on them that the rank allows; with fewer tokens than channels "asvd" is
    taken instead, with a warning.

    Raises:
        UnsupportedModelError: a model that is not handled, with the reason.
        InputError: a share that leaves nothing, no batches, tokens that the model does not have.
        NotFiniteError: NaN or infinite weights or inputs.
    """
    if init not in get_args(Initialisation):
        raise UnknownNameError.of("initialisation", init, get_args(Initialisation))
    values = keep if values is None else values
    found = growing(model)
    for site in found:  # before anything is run
        for share in (keep, values):
            rank_of(share, site.kv_heads, site.head_dim)
    known: dict[int, Statistics] = {}
    if init != "svd":
        known = statistics(model, found, () if batches is None else batches)
        if init == "whitened" and (thin := [one for one in known.values() if not one.full]):
            message = (
                f"{thin[0].tokens} calibration tokens for {len(thin[0].mean)} channels are too few for the whitened "
                "factors: ASVD is taken instead; give more text"
            )
            warnings.warn(message, UserWarning, stacklevel=2)
            init = "asvd"
    layers, sources = {}, {}
    for site in found:
        source = sources[site.layer] = source_of(site)
        solver = _solver(init, known.get(site.layer), site)
        groups = site.kv_heads if per_head else 1
        ranks = (rank_of(share, site.kv_heads, site.head_dim) for share in (keep, values))
        keys_and_values = [
            factorised(weight.T, rank, solver, groups=groups)
            for weight, rank in zip((source.keys, source.values), ranks, strict=True)
        ]
        layers[site.layer] = (keys_and_values[0], keys_and_values[1])
        log.info("projected %s", site.name)
    return Projections(layers, Shape(keep, values, init, per_head), fingerprint_of(sources))


def outlined(
    model: nn.Module, *, keep: float = 0.2, values: float | None = None, per_head: bool = False
) -> Projections:
    """The sizes of `project`'s result, on the meta device, for `niwaki.kv.plan`; the model may lie there too.

    Raises:
        UnsupportedModelError: a model that is not handled, with the reason.
        InputError: a share that leaves nothing.
    """
    shares = keep, keep if values is None else values
    layers = {}
    for site in growing(model):
        width, groups = source_of(site).width, site.kv_heads if per_head else 1
        ranks = [rank_of(share, site.kv_heads, site.head_dim) for share in shares]
        down, up = (
            [torch.empty(width, rank, device="meta") for rank in ranks],
            [
                torch.empty(groups, rank // groups, site.kv_heads // groups * site.head_dim, device="meta")
                for rank in ranks
            ],
        )
        layers[site.layer] = (Factors(down[0], up[0]), Factors(down[1], up[1]))
    return Projections(layers, Shape(*shares, "whitened", per_head), "")


def growing(model: nn.Module) -> list[Site]:
    """The attention modules whose cache grows: sliding layers keep few tokens, and are left alone."""
    return [site for site in sites(model) if site.sliding is None]


def fingerprint_of(sources: Mapping[int, Source]) -> str:
    """Of every number of all key and value weights, as float32."""
    digest = hashlib.sha256()
    for layer, source in sorted(sources.items()):
        for weight in (source.keys, source.values):
            digest.update(f"{layer} {tuple(weight.shape)}".encode())
            digest.update(_sums(weight).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _sums(weight: Tensor) -> Int[Tensor, " rows"]:
    """A sum for each row, of its numbers' bits times an odd number for each column, modulo 2^64.

    Exact and the same on every device; a change of one number always shows, since an odd factor loses no bit.
    """
    odd = torch.arange(weight.shape[1], device=weight.device) * 0x5851F42D4C957F2C + 0x14057B7EF767814F
    bits = (piece.float().contiguous().view(torch.int32).long() for piece in weight.split(PIECE))
    return torch.cat([(piece * odd).sum(dim=1) for piece in bits])


def _solver(init: Initialisation, known: Statistics | None, site: Site) -> Solver:
    if init == "svd" or known is None:
        return svd
    if not known.mean.any():
        do = "check the model: nothing reaches this layer"
        raise InputError("calibrate", found="inputs that are all zero", where=site.name, do=do)
    return asvd(known.mean) if init == "asvd" else whitened(known.covariance)
