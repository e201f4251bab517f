"""The networks of ultralytics that coverage looks at: every version and task, the two smallest sizes."""

SIZES = ("n", "s")
TASKS = ("", "-seg", "-pose", "-obb", "-cls")


def names() -> list[str]:
    """Sources, those that the installed package does not have left out."""
    from niwaki.models.ultralytics import alone

    with alone():
        import ultralytics
    from pathlib import Path

    known = {path.stem for path in (Path(ultralytics.__file__).parent / "cfg" / "models").rglob("*.yaml")}
    listed = ["yolov3", "yolov3-tiny", "yolov3-spp"]
    for version in ("yolov5", "yolov5-p6", "yolov6", "yolov8", "yolo11", "yolo12", "yolo26"):
        stem, dash, kind = version.partition("-")
        for task in TASKS:
            if stem + dash + kind + task in known:
                listed += [f"{stem}{size}{dash}{kind}{task}" for size in SIZES]
    listed += ["yolov8n-p2", "yolov8n-p6", "yolov8n-ghost", "yolo26n-sem", "yolo26n-depth", "yolo26n-p2"]
    listed += ["yolov9t", "yolov9s", "yolov9c", "yolov9c-seg", "yolov10n", "yolov10s"]
    listed += ["rtdetr-l", "rtdetr-resnet50", "yolov8n-rtdetr"]
    return [f"ultralytics:{name}.yaml" for name in listed if name in known or _unsized(name) in known]


def _unsized(name: str) -> str:
    """yolo11n-seg is a size of yolo11-seg."""
    first, dash, rest = name.partition("-")
    return first[:-1] + dash + rest
