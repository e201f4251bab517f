"""Pooling, up-sampling, padding by reflection, sampling on a grid: the channel axis passes on."""

import numpy as np
from torch import Tensor

from niwaki.graph.labels import varying
from niwaki.graph.rules.registry import Call, rule
from niwaki.graph.values import Labels, join, merge

NAMES = (
    [
        f"{kind}{rank}d"
        for rank in (1, 2, 3)
        for kind in (
            "avg_pool",
            "max_pool",
            "adaptive_avg_pool",
            "_adaptive_avg_pool",
            "adaptive_max_pool",
            "upsample_nearest",
            "_upsample_nearest_exact",
            "reflection_pad",
            "replication_pad",
            "fractional_max_pool",
            "mkldnn_max_pool",
            "lp_pool",
        )
    ]
    + [f"max_pool{rank}d_with_indices" for rank in (2, 3)]
    + [
        "upsample_linear1d",
        "upsample_bilinear2d",
        "upsample_bicubic2d",
        "upsample_trilinear3d",
        "_upsample_bilinear2d_aa",
        "_upsample_bicubic2d_aa",
        "max_unpool2d",
        "max_unpool3d",
    ]
)


@rule(*NAMES)
def spatial(call: Call) -> list[Labels]:
    value = call.value(call.args[0])
    rank = 3 if "3d" in call.name else 1 if "1d" in call.name else 2
    first = len(value.shape) - rank
    kept = []
    for labels in value.get(call.space):
        inside = tuple(axis for axis in varying(labels) if axis >= first)
        if inside and len(inside) == len(varying(labels)):
            call.fix(labels, "space")
            continue
        for axis in inside:  # phases of a channel laid out in space go with their channel
            call.space.tie(labels, axis)
            labels = np.take(labels, [0], axis=axis)
        call.space.needed.append(labels)
        kept.append(labels)
    call.zero = value.zero
    results = [call.result] if isinstance(call.result, Tensor) else [t for t in call.result if isinstance(t, Tensor)]
    return [tuple(kept) for _ in results]


@rule("roi_align", "_roi_align", "roi_pool")
def regions(call: Call) -> list[Labels]:
    """Pooled in boxes `[boxes, 5]` given beside the pictures: one picture a box, with the channels of the pictures."""
    value, boxes = call.value(call.args[0]), call.value(call.args[1])
    for labels in boxes.get(call.space):
        call.fix(labels, "where it is pooled")
    kept = []
    for labels in value.get(call.space):
        for axis in (2, 3):
            if labels.shape[axis] > 1 and labels.shape[1] > 1:  # phases of a channel go with their channel
                call.space.tie(labels, axis)
                labels = np.take(labels, [0], axis=axis)
        if varying(labels) == (1,):
            kept.append(labels)
        else:
            call.fix(labels, "pictures and places are picked by boxes")
    call.zero = value.zero and call.name != "roi_pool"
    results = [call.result] if isinstance(call.result, Tensor) else list(call.result)
    return [tuple(kept) for _ in results]


@rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d", "cudnn_grid_sampler")
def sampled(call: Call) -> Labels:
    """Values at places of a picture: samples meet pictures one by one, channels pass on, places come with the grid."""
    picture, grid = call.value(call.args[0]), call.value(call.args[1])
    rank = len(picture.shape)
    shape = (*picture.shape[:2], *grid.shape[1:])  # [samples, channels, places..., coordinates]
    of_picture = []
    for labels in picture.get(call.space):
        inside = tuple(axis for axis in varying(labels) if axis >= 2)
        if inside:
            call.fix(call.space.marker(labels, inside), "space")
        rest = call.drop(labels, inside)
        if rest is not None:
            of_picture.append(rest.reshape((*rest.shape, 1)))
    of_grid = tuple(labels.reshape((labels.shape[0], 1, *labels.shape[1:])) for labels in grid.get(call.space))
    operands = [
        ((*picture.shape[:2], *(1 for _ in range(rank - 1))), tuple(of_picture), picture.why),
        ((grid.shape[0], 1, *grid.shape[1:]), of_grid, grid.why),
        ((*(1 for _ in range(rank)), grid.shape[-1]), (), "the coordinates of a place"),
    ]
    call.zero = picture.zero
    result: list[np.ndarray] = []
    for labels in join(call.space, operands, shape):
        rest = call.drop(labels, (rank,))
        if rest is not None:
            # each place has coordinates, which stay: places are removed with their sample (a head) or not at all
            places = tuple(axis for axis in varying(rest) if 2 <= axis < rank)
            if places:
                call.fix(call.space.marker(rest, places), "the number of places that are read")
            merge(call.space, result, rest.reshape(rest.shape[:rank]))
    return tuple(result)
