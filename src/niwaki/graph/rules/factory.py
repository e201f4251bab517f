"""Tensors made in forward: uniform ones fit any width, others hold one value per position and are fixed."""

from niwaki.graph.rules.registry import Call, rule
from niwaki.graph.values import Labels


@rule(
    "zeros",
    "ones",
    "full",
    "empty",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "empty_memory_format",
    "scalar_tensor",
)
def uniform(call: Call) -> Labels:
    shape = call.shape
    call.zero = call.name in ("zeros", "new_zeros", "empty", "new_empty", "empty_strided")
    arrays = []
    for axis, size in enumerate(shape):
        if size > 1:
            labels = call.space.free(size, zero=call.zero)
            arrays.append(labels.reshape([size if a == axis else 1 for a in range(len(shape))]))
    return tuple(arrays)


@rule("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "randint_like")
def like(call: Call) -> Labels:
    value = call.value(call["self"])
    call.zero = call.name in ("zeros_like", "empty_like")
    return value.get(call.space)


@rule(
    "arange",
    "linspace",
    "logspace",
    "rand",
    "randn",
    "randint",
    "randperm",
    "eye",
    "normal",
    "tril_indices",
    "triu_indices",
    "hann_window",
    "hamming_window",
    "multinomial",
    "nonzero",
)
def per_position(call: Call) -> Labels:
    call.recorder.why = f"a constant made in forward by {call.name}"
    return ()
