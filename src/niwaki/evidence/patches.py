"""What layers multiply their weights by: which layers those are, and their inputs as rows."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

STOCK = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
"""What adds its bias to weight times input, and nothing else."""


def stock(module: nn.Module | None) -> bool:
    """Whether a layer is linear or a convolution that is not transposed, with the forward that it has in PyTorch."""
    return isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and type(module).forward in STOCK


def patches(
    layer: nn.Module, x: Float[Tensor, "..."], most: int, generator: torch.Generator
) -> Float[Tensor, "positions inputs"]:
    """What a linear layer or plain convolution multiplies its weight by, a row for each position that it puts out.

    Args:
        most: rows at most; of more, so many are drawn.

    Returns:
        Inputs in the order of the flattened weight: channels, then places of the kernel.
    """
    if isinstance(layer, nn.Linear):
        rows = x.reshape(-1, x.shape[-1])
        return rows[drawn(len(rows), most, generator).to(x.device)]
    spatial = layer.weight.dim() - 2  # type: ignore[operator, union-attr]
    x = x if x.dim() == spatial + 2 else x[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)  # type: ignore[arg-type]
    shapes = zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)  # type: ignore[arg-type]
    for axis, (kernel, stride, dilation) in enumerate(shapes, start=2):
        x = x.unfold(axis, (kernel - 1) * dilation + 1, stride)[..., ::dilation]
    places = (x.shape[0], *x.shape[2 : 2 + spatial])
    index = torch.unravel_index(drawn(torch.Size(places).numel(), most, generator).to(x.device), places)
    return x.movedim(1, spatial + 1)[index].flatten(1)


def drawn(of: int, most: int, generator: torch.Generator) -> Tensor:
    """Positions in order, of so many: all of them, or `most` that are drawn."""
    return torch.arange(of) if of <= most else torch.randperm(of, generator=generator)[:most].sort().values
