"""Darknet's own files: binary weights in and out, and the cfg of a network that was cut."""

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from niwaki.errors import FileDamagedError, InputError, making
from niwaki.models.checkpoint import refuse_not_finite
from niwaki.models.darknet_cfg import Section, parse
from niwaki.models.darknet_net import Convolution, Darknet

VERSION = (0, 2, 5)
"""Written: the first version whose count of pictures seen has 64 bits is 0.2."""


def load_weights_(model: nn.Module, file: str | Path) -> None:
    """Puts a darknet weights file into `model`; all of it or, with an error, nothing.

    Raises:
        InputError, FileDamagedError: see `read_weights`.
        NotFiniteError: NaN in it, or infinite parameters.
    """
    state = read_weights(model, file)
    refuse_not_finite(state, {name for name, _ in model.named_parameters()}, where=str(file))
    model.load_state_dict({**model.state_dict(), **state})


def read_weights(model: nn.Module, file: str | Path) -> dict[str, Tensor]:
    """Names and tensors of a darknet weights file, as the layers of `model` take them up.

    The file has three whole numbers (version), how many pictures were seen, and for every convolution in order its
    bias, then with a batch norm scale, mean and variance, then its kernel; 32-bit numbers, lowest byte first.

    Raises:
        InputError: no such file, or a network that is none of a cfg.
        FileDamagedError: shorter or longer than the network.
    """
    path = Path(file).expanduser()
    if not isinstance(model, Darknet):
        found, do = f"a {type(model).__name__}", "give a checkpoint with names"
        raise InputError("read darknet weights", found=found, where=str(path), do=do)
    there, needed = weights_bytes(path), needed_bytes(model)
    if there != needed:
        found = f"{there} bytes after the header, the network has {needed}"
        do = "get the file again, or give the cfg" if there < needed else "give the cfg"
        raise _damaged(path, found, f"{do} that these weights were trained with")
    flat = np.frombuffer(path.read_bytes()[-needed:], "<f4").astype(np.float32)
    state: dict[str, Tensor] = {}
    at = 0
    for name, tensor in _slots(model):
        state[name] = torch.from_numpy(flat[at : at + tensor.numel()]).view(tensor.shape)
        at += tensor.numel()
    return state


def weights_bytes(file: str | Path) -> int:
    """Bytes of a weights file after its header.

    Raises:
        InputError: no such file.
        FileDamagedError: not even a header.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise InputError("read darknet weights", found="no such file", where=str(path), do="name a .weights file")
    length = path.stat().st_size
    if length < 16:
        raise _damaged(path, f"{length} bytes, not even a header", "get the file again")
    with path.open("rb") as opened:
        major, minor, _ = np.frombuffer(opened.read(12), "<i4").tolist()
    return length - (20 if major * 10 + minor >= 2 and major < 1000 and minor < 1000 else 16)


def needed_bytes(model: Darknet) -> int:
    """Bytes of a network's weights in such a file."""
    return 4 * sum(tensor.numel() for _, tensor in _slots(model))


def save_darknet(model: nn.Module, file: str | Path) -> tuple[Path, Path]:
    """Writes FILE.weights and the FILE.cfg that fits it: the one it was built from, with the widths it has now.

    Returns the two paths. Both are written to temporary names first.

    Raises:
        InputError: the network is none of a cfg (one that was cut by `torch.export` is none), or has widths that a cfg
            cannot say.
        NotFiniteError: NaN or infinity in the weights.
    """
    if not isinstance(model, Darknet):
        found, do = f"a {type(model).__name__}", "save it as a run (Outcome.save)"
        raise InputError("write darknet files", found=found, do=do)
    weights = Path(file).with_suffix(".weights")
    text = cfg_of(model)
    names = {name for name, _ in model.named_parameters()}
    refuse_not_finite(model.state_dict(), names, where="the model")
    twin = Darknet(parse(text, str(weights.with_suffix(".cfg"))))
    here, there = ({name: tuple(t.shape) for name, t in m.state_dict().items()} for m in (model, twin))
    if here != there:
        odd = next(name for name in here if here[name] != there.get(name))
        found = f"{odd} is {here[odd]}, by its cfg {there.get(odd)}"
        raise InputError("write darknet files", found=found, do="save it as a run (Outcome.save)")
    header = np.array(VERSION, "<i4").tobytes() + np.zeros(1, "<u8").tobytes()
    body = b"".join(t.detach().cpu().float().numpy().astype("<f4").tobytes() for _, t in _slots(model))
    with making(weights.parent):
        weights.parent.mkdir(parents=True, exist_ok=True)
        for path, content in ((weights, header + body), (weights.with_suffix(".cfg"), text.encode())):
            aside = path.with_name(f".{path.name}.{os.getpid()}")
            try:
                aside.write_bytes(content)
                aside.replace(path)
            finally:
                aside.unlink(missing_ok=True)
    return weights.with_suffix(".cfg"), weights


def cfg_of(model: Darknet) -> str:
    """The cfg of a network, with the filters and groups its convolutions have now."""
    return "\n".join(_written(*pair) for pair in zip(model.sections, (None, *model.layers), strict=True))


def _written(section: Section, layer: nn.Module | None) -> str:
    options = dict(section.options)
    if isinstance(layer, Convolution):
        options["filters"] = str(layer.conv.out_channels)
        if "groups" in options or layer.conv.groups > 1:
            options["groups"] = str(layer.conv.groups)
    return "".join(f"{line}\n" for line in (f"[{section.kind}]", *(f"{k}={v}" for k, v in options.items())))


def _slots(model: Darknet) -> list[tuple[str, Tensor]]:
    """Names and tensors in the order of a weights file."""
    found: list[tuple[str, Tensor | None]] = []
    for i, layer in enumerate(model.layers):
        if not isinstance(layer, Convolution):
            continue
        name, conv, norm = f"layers.{i}", layer.conv, layer.bn
        if norm is None:
            found.append((f"{name}.conv.bias", conv.bias))
        else:
            found += [(f"{name}.bn.bias", norm.bias), (f"{name}.bn.weight", norm.weight)]
            found += [(f"{name}.bn.running_mean", norm.running_mean), (f"{name}.bn.running_var", norm.running_var)]
        found.append((f"{name}.conv.weight", conv.weight))
    return [(name, tensor) for name, tensor in found if tensor is not None]


def _damaged(path: Path, found: str, do: str) -> FileDamagedError:
    return FileDamagedError("read darknet weights", found=found, where=str(path), do=do)
