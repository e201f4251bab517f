"""Networks that were cut, back in ultralytics."""

import copy
from typing import Any

from torch import nn

from niwaki.errors import InputError
from niwaki.models.ultralytics import alone, package

SUFFIXES = {"detect": "", "segment": "-seg", "pose": "-pose", "obb": "-obb", "classify": "-cls"}


def as_yolo(model: nn.Module) -> Any:
    """A `YOLO` object of ultralytics that holds a copy of `model`: its `val`, `predict`, `export` and `save` are there.

    `save` is the package's own and pickles the whole network, which the package opens again as any of its files. Its
    `train` builds networks anew from their yaml, with the widths of before the cut: train with niwaki.

    Raises:
        InputError: no network of ultralytics (one that was cut by `torch.export` is none).
        MissingExtraError: ultralytics is not installed.

    Examples:
        >>> yolo = as_yolo(outcome.model)  # doctest: +SKIP
        >>> yolo.val(data="coco8.yaml"); yolo.export(format="onnx"); yolo.save("small.pt")  # doctest: +SKIP
    """
    tasks, _ = package()
    if not isinstance(model, tasks.BaseModel):
        found, do = (
            f"a {type(model).__name__}",
            "give one of ultralytics:NAME; one cut by torch.export is only run",
        )
        raise InputError("a YOLO object", found=found, do=do)
    task = tasks.guess_model_task(model)
    if task not in SUFFIXES:
        raise InputError("a YOLO object", found=f"a network for {task}", do=f"known: {', '.join(SUFFIXES)}")
    from ultralytics import YOLO
    from ultralytics.cfg import DEFAULT_CFG_DICT

    with alone():
        yolo = YOLO(f"yolov8n{SUFFIXES[task]}.yaml", task=task)  # the smallest; its network is put aside
    network: Any = copy.deepcopy(model).eval()
    for module in network.modules():
        if "export" in vars(module):
            module.export = False
    given = getattr(network, "args", None) or {}
    network.args = {**DEFAULT_CFG_DICT, **(given if isinstance(given, dict) else vars(given)), "task": task}
    network.task = task
    yolo.model = network
    name = str((getattr(network, "yaml", None) or {}).get("yaml_file") or "niwaki.yaml")
    yolo.model_name = yolo.overrides["model"] = network.args["model"] = name
    return yolo
