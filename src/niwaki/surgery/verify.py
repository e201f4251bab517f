"""`verify`: the judge. Cut and masked model in float64 on fresh inputs."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.errors import CannotCutError, InputError
from niwaki.graph.skeleton import copy_with, like, without_caches
from niwaki.plan import Plan, apply_cuts
from niwaki.surgery.cut import cut
from niwaki.surgery.exported import Exported
from niwaki.surgery.inside import inside, steadied
from niwaki.surgery.mask import mask
from niwaki.surgery.record import Surgery, find_surgery
from niwaki.surgery.wide import Wide
from niwaki.units import Receipt, agrees, device_of, map_tensors, run, tensors_in


def verify(
    model: nn.Module,
    small: nn.Module,
    plan: Plan,
    example: Any,
    *,
    seed: int = 0,
    inputs: int = 1,
    tolerance: float = 1e-9,
) -> Receipt:
    """Compare `small` with `mask(model, plan)`: eval mode, float64, fresh inputs shaped like `example`.

    Floating inputs are drawn from a normal distribution; integer inputs below the example's largest value. Where it is
    not known what was done to `small` (a copy, a model read by other means), the plan is cut once more to see.

    Raises:
        PlanMismatchError: the plan is for another model.
        InputError: outputs differ in number or shape, or a model is on the meta device: it has nothing to compare.
        CannotCutError: `small` fails on inputs that the model takes: its forward went another way than the example's.
    """
    if inputs < 1:
        raise InputError(f"verify on {inputs} inputs", found="nothing to compare", do="give inputs=1 or more")
    held = (*model.named_parameters(), *model.named_buffers(), *small.named_parameters(), *small.named_buffers())
    for name, tensor in held:
        if tensor.is_meta:
            raise InputError(
                "verify a cut model",
                found="a model on the meta device holds no numbers to compare",
                where=name,
                do="load the weights on a real device and cut there; the plan is the same",
            )
    judge = in_float64(mask(model, plan)).eval()
    accused = in_float64(small).eval()
    surgery = find_surgery(small) or _supposed(model, small, plan)
    _unround(model, small, accused, plan, surgery)
    generator = torch.Generator().manual_seed(seed)
    difference = scale = 0.0
    numbers = 0
    with torch.no_grad():
        for _ in range(inputs):
            fresh = fresh_like(example, generator, device_of(model))
            with Wide():
                right = tensors_in(run(judge, fresh))
                left = tensors_in(_run_cut(accused, fresh, plan))
                if not plan.inexact and not _agree(left, right, tolerance):
                    left, rounding, size = steadied(accused, fresh, inside(judge, fresh), tolerance)
                    difference, scale = max(difference, rounding), max(scale, size)
            if [t.shape for t in left] != [t.shape for t in right]:
                raise InputError(
                    "verify a cut model",
                    found=f"outputs {[tuple(t.shape) for t in left]}",
                    where=f"expected {[tuple(t.shape) for t in right]}",
                    do="cut the same model with the same plan",
                )
            pairs = [(a, b) for a, b in zip(left, right, strict=True) if a.numel()]
            if not pairs:  # a detector that finds nothing: what its parts say in shapes that the cut left alone
                with Wide():
                    theirs, ours = inside(judge, fresh), inside(accused, fresh)
                both = [(ours[key], theirs[key]) for key in theirs.keys() & ours.keys()]
                pairs = [(a, b) for a, b in both if a.shape == b.shape and a.numel()]
            for a, b in pairs:
                numbers += a.numel()
                gap, size = _apart(a, b)
                difference, scale = max(difference, gap), max(scale, size)
    names = tuple(f"{group}: {why}" for group, why in plan.inexact.items())
    return Receipt(
        difference,
        scale,
        exact=not names,
        inexact=names,
        door=surgery.door,
        inputs=inputs,
        tolerance=tolerance,
        numbers=numbers,
    )


def _run_cut(accused: nn.Module, inputs: Any, plan: Plan) -> Any:
    """What the cut model puts out where the masked one did."""
    try:
        return run(accused, inputs)
    except RuntimeError as cause:
        reads = plan.graph.data_reads if plan.graph is not None else ()
        raise CannotCutError(
            f"verify a cut {plan.model}",
            found=f"it fails on inputs that the uncut one takes: {str(cause).splitlines()[0][:200]}",
            where="; ".join(map(str, reads)) or "its forward",
            do="protect what a forward reaches only on other inputs, or trace it on an example that takes that way",
        ) from cause


def _apart(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Largest difference, infinite where only one is finite, and the largest finite value of `b`."""
    wide = torch.complex128 if a.dtype.is_complex else torch.float64
    a, b = a.to(wide), b.to(wide)
    gap = (a - b).abs()
    gap = torch.where(a == b, torch.zeros_like(gap), gap)  # equal infinities
    return (
        float(torch.nan_to_num(gap, nan=float("inf")).max()),
        float(torch.nan_to_num(b.abs(), nan=0.0, posinf=0.0).max()),
    )


def _agree(left: list[Tensor], right: list[Tensor], tolerance: float) -> bool:
    if [t.shape for t in left] != [t.shape for t in right]:
        return False
    found = [_apart(a, b) for a, b in zip(left, right, strict=True) if a.numel()]
    gap, size = (max((one[which] for one in found), default=0.0) for which in (0, 1))
    return agrees(gap, size, tolerance)


def _supposed(model: nn.Module, small: nn.Module, plan: Plan) -> Surgery:
    """The surgery of a model that has none on record: what a cut by the plan does, which is always the same."""
    door = "exported" if isinstance(small, Exported) else "eager"
    held = {name: tensor.detach() for name, tensor in small.named_parameters() if tensor.is_floating_point()}
    meant = sliced_tensors(model, plan, held.keys() & dict(model.named_parameters()).keys())
    if all(torch.equal(held[name].double(), tensor.to(held[name].device)) for name, tensor in meant.items()):
        return Surgery(door)  # nothing was scaled
    try:
        again = find_surgery(cut(model, plan))
    except CannotCutError:
        again = None
    return again if again is not None and again.door == door else Surgery(door)


def _unround(model: nn.Module, small: nn.Module, accused: nn.Module, plan: Plan, surgery: Surgery) -> None:
    """Scaled slices in float64 as they were meant, where `small` holds exactly their rounding.

    A factor folded into float32 weights is rounded there (about 1e-7); the judge asks whether the surgery is right.
    """
    scaled = surgery.scaled
    if not scaled:
        return
    meant = sliced_tensors(model, plan, {str(entry["tensor"]) for entry in scaled})
    for entry in scaled:
        name = str(entry["tensor"])
        meant[name] = scale_slices(meant[name], entry)
    held, judged = (
        dict(small.named_parameters(remove_duplicate=False)),
        dict(accused.named_parameters(remove_duplicate=False)),
    )
    with torch.no_grad():
        for name, tensor in meant.items():
            limit = 4 * torch.finfo(held[name].dtype).eps
            if bool(((held[name].double() - tensor).abs() <= limit * tensor.abs()).all()):
                judged[name].copy_(tensor)


def sliced_tensors(model: nn.Module, plan: Plan, names: set[str]) -> dict[str, Tensor]:
    """The cut parameters of these names, in float64."""
    cuts, own = plan.by_tensor(), dict(model.named_parameters(remove_duplicate=False))
    return {name: apply_cuts(own[name].detach().double(), cuts.get(name, []), name) for name in names}


def scale_slices(tensor: Tensor, entry: Mapping[str, Any]) -> Tensor:
    """`tensor` with the slices that a surgery's entry names multiplied by its factor."""
    shape = [1] * tensor.dim()
    shape[entry["axis"]] = tensor.shape[entry["axis"]]
    factor = torch.ones(tensor.shape[entry["axis"]], dtype=torch.float64)
    factor[torch.tensor(entry["positions"], dtype=torch.long)] = entry["factor"]
    return tensor * factor.reshape(shape).to(tensor.device)


def in_float64(model: nn.Module) -> nn.Module:
    """A copy with floating tensors in float64."""

    def change(tensor: Tensor) -> Tensor:
        data = tensor.detach()
        return like(tensor, data.double() if data.dtype.is_floating_point else data.clone())

    return without_caches(copy_with(model, change))


def fresh_like(example: Any, generator: torch.Generator, device: torch.device, *, wide: bool = True) -> Any:
    """Random inputs with the example's shapes; float64 where it is floating, or its own types if not `wide`."""

    def draw(tensor: Tensor) -> Tensor:
        if tensor.dtype.is_floating_point:
            numbers = torch.randn(tuple(tensor.shape), generator=generator, dtype=torch.float64)
            return numbers.to(device, torch.float64 if wide else tensor.dtype)
        if tensor.dtype == torch.bool or tensor.is_meta:
            return torch.ones(tuple(tensor.shape), dtype=tensor.dtype, device=device)
        low, high = (int(tensor.min()), int(tensor.max())) if tensor.numel() else (0, 0)
        if low == high:
            return tensor.detach().to(device)
        return torch.randint(low, high + 1, tuple(tensor.shape), generator=generator).to(
            device=device, dtype=tensor.dtype
        )

    return map_tensors(example, draw)
