"""A second forward, in training mode: what only runs there shares widths with the rest."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from niwaki.errors import CannotCutError
from niwaki.graph.ends import fix_outputs
from niwaki.graph.recorder import Recorder
from niwaki.graph.running import quiet, watch
from niwaki.graph.skeleton import copy_with, like, walk, without_caches, without_hooks
from niwaki.graph.values import Parameter
from niwaki.units import device_of, map_tensors, run, tensors_in

log = logging.getLogger(__name__)

Twin = Callable[[], tuple[nn.Module, Any]]
"""Makes a copy of the model to run in real numbers, and what to run it on."""


def second_look(
    skeleton: nn.Module, inputs: Any, recorder: Recorder, parameters: dict[str, Parameter], *, meta: bool, real: Twin
) -> None:
    """What only runs while training (heads, embeddings of masks) shares widths too: label it by a forward in training
    mode, on real tensors (`real`) where that one reads numbers.
    """
    kept = (len(recorder.records), len(recorder.terms), len(recorder.unknown), len(recorder.calls))
    unseen = [parameter for parameter in parameters.values() if not parameter.seeds]
    looks: list[Callable[[], tuple[nn.Module, Any, bool]]] = [lambda: (skeleton, inputs, meta)]
    if meta:
        looks.append(lambda: (*real(), False))
    error: Exception | None = None
    try:
        for look in looks:
            try:
                network, given, shapes_only = look()
                _training(network)
                with quiet(network), torch.no_grad(), recorder, watch(recorder, meta=shapes_only):
                    output = run(network, given)
                fix_outputs(recorder, output)
                error = None
                break
            except Exception as failure:
                log.debug("no second look in training mode: %s: %s", type(failure).__name__, failure)
                error = failure
    finally:
        skeleton.eval()
        del (
            recorder.records[kept[0] :],
            recorder.terms[kept[1] :],
            recorder.unknown[kept[2] :],
            recorder.calls[kept[3] :],
        )
    if error is not None:  # the first look stands; what only this one saw, it saw in part
        for parameter in unseen:
            for labels in parameter.seeds.values():
                recorder.space.fix(labels, "the forward in training mode fails")


def _training(network: nn.Module) -> None:
    network.train()
    for module in network.modules():  # what keeps statistics refuses a single sample, and labels are the same
        if any(buffer.is_floating_point() for buffer in module.buffers(recurse=False)):
            module.training = False


def real_twin(model: nn.Module, example: Any, skeleton: nn.Module, recorder: Recorder) -> tuple[nn.Module, Any]:
    """A copy of the model in real numbers whose parameters have the labels of the skeleton's, and the example.

    Raises:
        CannotCutError: the model has no real numbers.
    """
    tensors = [*model.parameters(), *model.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        raise CannotCutError("run a model", found="tensors without numbers", do="load its weights")
    network = without_caches(without_hooks(copy_with(model, lambda t: like(t, t.detach().clone()))))
    recorder.modules += walk(network)
    for theirs, ours in (
        (skeleton.named_parameters(), network.named_parameters()),
        (skeleton.named_buffers(), network.named_buffers()),
    ):
        for (_, known), (_, tensor) in zip(theirs, ours, strict=True):
            recorder.know(tensor, recorder.value(known))
    place = device_of(model)
    inputs = map_tensors(example, lambda t: t.detach().to(place, copy=True))
    for tensor in tensors_in(inputs):
        recorder.value(tensor).why = "input of the model"
        recorder.value(tensor).constant = None
    return network, inputs
