"""The lists of `coverage.py`: what each collection holds, as key -> source; empty where it is not installed."""

import importlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rows import ROOT

SMALL = 30_000_000
"""Parameters below which an architecture of timm is on the nightly list."""

FINDS = {"roi": "box_score_thresh=0.0&min_size=224&max_size=256", "dense": "score_thresh=0.0"}
"""Untrained detectors find nothing above their usual threshold, and the judge would compare nothing; the size as small
as the other networks' pictures."""


def torchvision_list() -> dict[str, str]:
    from torchvision import models

    found = {}
    for name in models.list_models():
        source = f"torchvision:{name}"
        if ".detection" in models.get_model_builder(name).__module__:
            if "rcnn" in name:
                arguments = FINDS["roi"]
            else:
                arguments = FINDS["dense"] + ("" if name.startswith("ssd") else "&min_size=224&max_size=256")
            found[source] = f"{source}?{arguments}"
        else:
            found[source] = source
    return found


def timm_list() -> dict[str, str]:
    """Of every module of timm, the architecture with the fewest parameters (built on the meta device)."""
    import timm

    names = []
    for module in timm.list_modules():
        sizes = dict(_timm_sizes(timm.list_models(module=module)))
        if sizes:
            names.append(min(sizes, key=lambda name: (sizes[name], name)))
    return {f"timm:{name}": f"timm:{name}" for name in names}


def timm_nightly() -> dict[str, str]:
    """Every architecture of timm below 30 million parameters."""
    import timm

    return {f"timm:{name}": f"timm:{name}" for name, size in _timm_sizes(timm.list_models()) if size < SMALL}


def _timm_sizes(names: list[str]) -> Iterator[tuple[str, int]]:
    import timm

    for name in names:
        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield name, sum(p.numel() for p in timm.create_model(name).parameters())
        except Exception:  # some need real numbers while they are built: those are not the smallest we look for
            continue


def transformers_list() -> dict[str, str]:
    """Small configs of true classes, written where `hf:` can read them."""
    configs = _optional("transformers_configs", "CONFIGS") or {}
    folder = ROOT / "runs" / "configs"
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, config in configs.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        found[f"hf:{name}"] = f"hf:{path.relative_to(ROOT)}"
    return found


YOLOS = ("yolov3", "yolov5", "yolov6", "yolov8", "yolov9", "yolov10", "yolo11", "yolo12", "yolo26")
TASKS = ("", "-seg", "-pose", "-obb", "-cls")


def ultralytics_list() -> dict[str, str]:
    """Sizes n and s (the smallest two where they are called otherwise) of every yaml of the package, and RT-DETR."""
    try:
        import ultralytics
    except ImportError:
        _say("ultralytics is not installed")
        return {}
    folder = Path(ultralytics.__file__).parent / "cfg" / "models"
    stems = {path.stem for path in folder.rglob("*.yaml")}
    found = {}
    for family in YOLOS:
        for task in TASKS:
            for size in ("t", "n", "s", "-tiny", "") if family in ("yolov3", "yolov9") else ("n", "s"):
                # one yaml serves all sizes, unless it has its size in its name
                if f"{family}{size}{task}" in stems or (size in ("n", "s") and f"{family}{task}" in stems):
                    found[f"ultralytics:{family}{size}{task}"] = f"ultralytics:{family}{size}{task}.yaml"
    found |= {f"ultralytics:{stem}": f"ultralytics:{stem}.yaml" for stem in sorted(stems) if stem.startswith("rtdetr")}
    return found


def darknet_list() -> dict[str, str]:
    files = sorted((ROOT / "benchmarks" / "darknet").glob("*.cfg"))
    if not files:
        _say("no cfg files in benchmarks/darknet")
    return {f"darknet:{path.stem}": f"darknet:{path.relative_to(ROOT)}" for path in files}


def _optional(module: str, name: str) -> dict[str, dict[str, object]] | None:
    try:
        found: dict[str, dict[str, object]] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        _say(f"{module}.{name}: {error}")
        return None
    return found


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


LISTS: dict[str, Callable[[], dict[str, str]]] = {
    "torchvision": torchvision_list,
    "timm": timm_list,
    "hf": transformers_list,
    "ultralytics": ultralytics_list,
    "darknet": darknet_list,
}
