"""The lists of `coverage.py`: what each collection holds, as key -> source; empty where it is not installed."""

import importlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator

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
    weights = {name: next(iter(models.get_model_weights(name)), None) for name in models.list_models()}
    sizes = {name: known.meta["num_params"] if known is not None else 0 for name, known in weights.items()}
    for name in sorted(sizes, key=lambda name: (sizes[name], name)):  # the smallest first
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
    """Of every module of timm, the architecture with the fewest parameters (built on the meta device, which takes
    minutes: the list is kept in runs/ for the next time).
    """
    import timm

    kept = ROOT / "runs" / f"timm-{timm.__version__}.json"
    names: list[str] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else []
    for module in timm.list_modules() if not names else ():
        sizes = dict(_timm_sizes(timm.list_models(module=module)))
        if sizes:
            names.append(min(sizes, key=lambda name: (sizes[name], name)))
    kept.parent.mkdir(exist_ok=True)
    kept.write_text(json.dumps(names) + "\n", encoding="utf-8")
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


def ultralytics_list() -> dict[str, str]:
    """Sizes n and s of every version and task, from the package's own yaml files, and RT-DETR."""
    from ultralytics_names import names

    try:
        sources = names()
    except ImportError as error:
        _say(f"ultralytics: {error}")
        return {}
    return {source.removesuffix(".yaml"): source for source in sources}


def darknet_list() -> dict[str, str]:
    """Cfgs written where `darknet:` can read them."""
    from darknet_cfgs import CFGS

    folder = ROOT / "runs" / "darknet"
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, write in CFGS.items():
        path = folder / f"{name}.cfg"
        path.write_text(write(), encoding="utf-8")
        found[f"darknet:{name}"] = f"darknet:{path.relative_to(ROOT)}"
    return found


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
