"""Channels laid out in space and space in channels: shuffles, sliding windows, and their way back."""

import numpy as np

from niwaki.graph.labels import varying
from niwaki.graph.rules.movement import move, normal, separate, view
from niwaki.graph.rules.registry import Call, rule
from niwaki.graph.values import Labels


@rule("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle")
def shuffle(call: Call) -> Labels:
    value = call.value(call["self"])
    call.zero = value.zero
    *lead, c, h, w = value.shape
    n = len(lead)
    inner: tuple[int, ...]
    order: tuple[int, ...]
    if call.name == "pixel_shuffle":
        r = int(call["upscale_factor"])
        inner, order = (c // (r * r), r, r, h, w), (0, 3, 1, 4, 2)
    elif call.name == "pixel_unshuffle":
        r = int(call["downscale_factor"])
        inner, order = (c, h // r, r, w // r, r), (0, 2, 4, 1, 3)
    else:
        g = int(call["groups"])
        inner, order = (g, c // g, h, w), (1, 0, 2, 3)
    middle = (*lead, *inner)
    places = (*range(n), *(n + axis for axis in order))
    arrays = []
    for labels in value.get(call.space):
        labels = view(call, labels, value.shape, middle)
        call.space.grid(labels)
        if call.name == "pixel_shuffle":  # phases of a channel laid out in space go with their channel
            for axis in (n + 1, n + 2):
                call.space.tie(labels, axis)
                labels = np.take(labels, [0], axis=axis)
        labels = labels.transpose(places)
        arrays.append(view(call, labels, tuple(middle[a] for a in places), call.shape))
    return separate(call, arrays)


@rule("unfold", "unfold_copy")
def unfold(call: Call) -> Labels:
    """Sliding windows along one axis, the window appended as the last axis."""
    value = call.value(call["self"])
    axis = normal(call["dimension"], call["self"].dim())
    call.zero = value.zero
    size, step = int(call["size"]), int(call["step"])

    def change(labels: np.ndarray) -> np.ndarray:
        if labels.shape[axis] == 1:
            return labels[..., None]
        windows = np.lib.stride_tricks.sliding_window_view(labels, size, axis)
        return windows[(slice(None),) * axis + (slice(None, None, step),)]

    return move(call, change)


@rule("im2col")
def im2col(call: Call) -> Labels:
    """Windows of a picture laid out as channels x kernel: a grid of rows (channels) and kernel positions."""
    value = call.value(call["self"])
    call.zero = value.zero
    kernel = int(np.prod(call["kernel_size"]))
    arrays = []
    for labels in value.get(call.space):
        if varying(labels) and any(axis >= labels.ndim - 2 for axis in varying(labels)):
            call.fix(labels, "space")
            continue
        if labels.shape[-3] > 1:
            labels = np.repeat(labels, kernel, axis=-3)
        arrays.append(labels.reshape(*labels.shape[:-2], 1))
    return separate(call, arrays)


@rule("col2im")
def col2im(call: Call) -> Labels:
    """The way back: the positions of a channel's windows are added up in space, so they go with their channel."""
    value = call.value(call["self"])
    call.zero = value.zero
    kernel = int(np.prod(call["kernel_size"]))
    arrays = []
    for labels in value.get(call.space):
        if labels.shape[-1] > 1:
            call.fix(labels, "space")
            continue
        *lead, channels, _ = labels.shape
        if channels > 1:
            grid = labels.reshape(*lead, channels // kernel, kernel)
            call.space.tie(grid, grid.ndim - 1)
            labels = grid[..., :1]
        arrays.append(labels[..., None])
    return separate(call, arrays)
