"""An example for a network of transformers, by what its forward takes and what its configuration says of sizes."""

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.errors import InputError
from niwaki.graph.skeleton import copy_with, shared, to_meta
from niwaki.units import Example, device_of, map_tensors, run

TOKENS = 16  # long enough for attention to matter, short enough to trace at once
SAMPLES = 16000  # of audio in a second, unless the configuration says otherwise
PIXELS = 224  # what image networks are published for
BINS = 80  # of a spectrogram, unless the configuration says otherwise
FRAMES = 100  # one second of a spectrogram

Inputs = dict[str, Any]


def example_for(model: Any, shape: tuple[int, ...] | None, asked: str) -> Example:
    """Keyword arguments of the kinds that the forward names; the first in likelihood that the forward accepts.

    Raises:
        InputError: it first takes something of another kind.
    """
    config, takes = model.config, inspect.signature(model.forward).parameters
    first: str = getattr(model, "main_input_name", "input_ids")
    makers = {"input_ids": _tokens, "pixel_values": _pictures, "input_values": _sound, "input_features": _spectrogram}
    if first not in makers:
        do = "build it in a factory of yours that returns (model, example)"
        raise InputError(f"an example for {asked}", found=f"a model that takes {first!r} first", do=do)
    choices = {first: makers[first](config, shape)}
    second = "pixel_values" if first == "input_ids" else "input_ids" if first == "pixel_values" else ""
    if second in takes and _setting(config, "vocab_size") and _setting(config, "image_size"):
        choices[second] = makers[second](config, None)  # a model of text and pictures
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
        choices["decoder_input_ids"] = [torch.zeros(1, TOKENS // 4, dtype=torch.int64)]
    extra = {"use_cache": False} if "use_cache" in takes and getattr(config, "use_cache", False) else {}
    ways = [dict(zip(choices, way, strict=True)) | extra for way in itertools.product(*choices.values())]
    if len(ways) == 1:
        return ways[0]
    skeleton = copy_with(model, to_meta).eval()  # a trial costs no memory there, where the forward allows it
    again = copy_with(model, shared).eval()  # a forward may leave marks on its model
    trials = ((way, network) for network in (skeleton, again) for way in ways)
    return next((way for way, network in trials if _accepted(network, way)), ways[0])


def _accepted(model: nn.Module, inputs: Inputs) -> bool:
    device = device_of(model)
    try:
        with torch.no_grad():
            run(model, map_tensors(inputs, lambda tensor: tensor.to(device)))
    except Exception:  # whatever a forward says to shapes that it does not like
        return False
    return True


def _configs(config: Any) -> Iterator[Any]:
    """A configuration and those inside it."""
    yield config
    for name in getattr(config, "sub_configs", {}):
        if getattr(config, name, None) is not None:
            yield from _configs(getattr(config, name))


def _setting(config: Any, *names: str) -> Any:
    """The first of these settings that is there, outermost configuration first; None where there is none."""
    for part in _configs(config):
        for name in names:
            if (value := getattr(part, name, None)) is not None:
                return value
    return None


def _tokens(config: Any, shape: tuple[int, ...] | None) -> list[Tensor]:
    """[1, tokens]. Where pictures take the places of a token of their own there are as many of it as they need."""
    vocabulary = _setting(config, "vocab_size") or 2
    length = min(TOKENS, _setting(config, "max_position_embeddings") or TOKENS)
    plain = (torch.arange(length) % vocabulary).unsqueeze(0)
    places, token = _setting(config, "image_seq_length"), _setting(config, "image_token_id", "image_token_index")
    return [plain] if places is None or token is None else [torch.full((1, places), token), plain]


def _pictures(config: Any, shape: tuple[int, ...] | None) -> list[Tensor]:
    """[1, channels, height, width]"""
    size = _setting(config, "image_size") or PIXELS
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return [torch.zeros(1, *(shape or (_setting(config, "num_channels") or 3, height, width)))]


def _sound(config: Any, shape: tuple[int, ...] | None) -> list[Tensor]:
    """[1, samples], with channels or as a spectrogram."""
    if shape:
        return [torch.zeros(1, *shape)]
    samples = _setting(config, "sampling_rate") or SAMPLES
    found = [torch.zeros(1, samples), torch.zeros(1, _setting(config, "audio_channels") or 1, samples)]
    return [*reversed(_spectrogram(config, None)), *found] if _setting(config, "num_mel_bins") else found


def _spectrogram(config: Any, shape: tuple[int, ...] | None) -> list[Tensor]:
    """[1, bins, frames] or [1, frames, bins]"""
    if shape:
        return [torch.zeros(1, *shape)]
    bins = _setting(config, "num_mel_bins", "input_feat_per_channel") or BINS
    positions = getattr(config, "max_source_positions", None)
    lengths = dict.fromkeys(
        (*((2 * positions, positions) if positions else ()), _setting(config, "max_length"), FRAMES)
    )
    sizes = [size for n in lengths if n for size in ((bins, n), (n, bins))]
    return [torch.zeros(1, *size) for size in sizes]
