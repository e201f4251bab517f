"""One partner among the kept channels for every removed one."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from niwaki.repair.filters import InnerProducts
from niwaki.repair.mixing import Mixing, share, start_squares, unit_rows


def merged(
    products: InnerProducts,
    kept: Int[Tensor, " kept"],
    cosine: Float[Tensor, "targets kept"],
    scale: Float[Tensor, "targets kept"],
    mismatch: Float[Tensor, "targets kept"],
    *,
    threshold: float,
    balance: float,
) -> Mixing:
    """The mixture in which every removed channel is `scale` times its best partner; ties go to the earlier one.

    A partner whose cosine is below the threshold, or whose scale is not a number, is none. Errors are those of the
    filters, without biases.

    Args:
        products: for the errors.
        cosine, scale, mismatch: of every target with every kept channel.
    """
    usable = scale.isfinite() & mismatch.isfinite()
    mismatch = mismatch.where(usable, torch.inf)
    least = mismatch.amin(1, keepdim=True)
    most = mismatch.where(usable, -torch.inf).amax(1, keepdim=True)
    spread = (most - least).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    level = ((mismatch - least) / spread.where(spread > 0, 1.0)).where(usable, torch.inf)
    score = (balance * (1 - cosine) + (1 - balance) * level).where(usable, torch.inf)
    partner = score.argmin(1, keepdim=True)  # [targets, 1]
    taken = usable.gather(1, partner) & (cosine.gather(1, partner) >= threshold)
    matrix = torch.zeros_like(cosine).scatter(1, partner, scale.gather(1, partner).where(taken, 0.0))
    matrix[kept] = unit_rows(kept, cosine)[kept]
    factor, cross = matrix.gather(1, partner)[:, 0], products.cross.gather(1, partner)[:, 0]
    before = start_squares(products.cross, products.gram, products.squares, kept)
    after = products.squares - 2 * factor * cross + factor.square() * products.gram.diagonal()[partner[:, 0]]
    after[kept] = before[kept]
    return Mixing(matrix, kept, share(before, products.squares), share(after, products.squares), products.squares)
