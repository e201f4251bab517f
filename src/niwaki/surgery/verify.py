"""`verify`: the judge. Cut and masked model in float64 on fresh inputs."""

from typing import Any

import torch
from torch import Tensor, nn

from niwaki.errors import InputError
from niwaki.graph.skeleton import copy_with, like
from niwaki.plan import Plan
from niwaki.surgery.mask import mask
from niwaki.surgery.record import surgery_of
from niwaki.units import Receipt, device_of, map_tensors, run, tensors_in


def verify(model: nn.Module, small: nn.Module, plan: Plan, example: Any, *, seed: int = 0, inputs: int = 1, tolerance: float = 1e-9) -> Receipt:
    """Compare `small` with `mask(model, plan)`: eval mode, float64, fresh inputs shaped like `example`.

    Floating inputs are drawn from a normal distribution; integer inputs below the example's largest value.

    Raises:
        PlanMismatchError: the plan is for another model.
        InputError: outputs differ in number or shape.
    """
    judge = in_float64(mask(model, plan)).eval()
    accused = in_float64(small).eval()
    generator = torch.Generator().manual_seed(seed)
    difference = scale = 0.0
    with torch.no_grad():
        for _ in range(inputs):
            fresh = fresh_like(example, generator, device_of(model))
            right = tensors_in(run(judge, fresh))
            left = tensors_in(run(accused, fresh))
            if [t.shape for t in left] != [t.shape for t in right]:
                raise InputError("verify a cut model", found=f"outputs {[tuple(t.shape) for t in left]}",
                                 where=f"expected {[tuple(t.shape) for t in right]}", do="cut the same model with the same plan")
            for a, b in zip(left, right, strict=True):
                if a.dtype.is_floating_point and a.numel():
                    gap = (a - b).abs()
                    gap = torch.where(a == b, torch.zeros_like(gap), gap)  # equal infinities
                    difference = max(difference, float(torch.nan_to_num(gap, nan=float("inf")).max()))
                    scale = max(scale, float(torch.nan_to_num(b, nan=0.0, posinf=0.0, neginf=0.0).abs().max()))
    names = tuple(f"{group}: {why}" for group, why in plan.inexact.items())
    return Receipt(difference, scale, exact=not names, inexact=names, door=surgery_of(small).door, inputs=inputs, tolerance=tolerance)


def in_float64(model: nn.Module) -> nn.Module:
    """A copy with floating tensors in float64."""
    def change(tensor: Tensor) -> Tensor:
        data = tensor.detach()
        return like(tensor, data.double() if data.dtype.is_floating_point else data.clone())

    return copy_with(model, change)


def fresh_like(example: Any, generator: torch.Generator, device: torch.device) -> Any:
    """Random inputs with the example's shapes; float64 where it is floating."""
    def draw(tensor: Tensor) -> Tensor:
        if tensor.dtype.is_floating_point:
            return torch.randn(tuple(tensor.shape), generator=generator, dtype=torch.float64).to(device)
        if tensor.dtype == torch.bool or tensor.is_meta:
            return torch.ones(tuple(tensor.shape), dtype=tensor.dtype, device=device)
        low, high = (int(tensor.min()), int(tensor.max())) if tensor.numel() else (0, 0)
        if low == high:
            return tensor.detach().to(device)
        return torch.randint(low, high + 1, tuple(tensor.shape), generator=generator).to(device=device, dtype=tensor.dtype)

    return map_tensors(example, draw)
