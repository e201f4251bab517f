"""Group channel pruning (GCP) and the YOLOv8 framework (CWD) on detectors, stage by stage, beside uniform L2.

One dense network is trained for each seed; every arm starts from it. The arms of a method leave one thing out each, and
train as long as the whole method does: epochs that are left out are added to the fine-tuning. Uniform L2 is cut to the
multiply-adds that the method's plan came to, at any widths or at multiples, and trained as long; so is the whole
network, uncut. With --last the
methods end with the fine-tuning; what follows is made apart, for several seeds, from the fine-tuned network of the
first arm: with attention maps of the dense network (SAD) or its channels (CWD), as the method has it, with what it
finds (outputs), or without it (none). Nothing is chosen on test pictures.

    python benchmarks/detectors.py --only yolov8n --arms CWD "CWD, no teacher" L2 --seeds 0 1 2 --device cuda
    python benchmarks/detectors.py --only yolov8n --size 160 --epochs 1 1 1 1 --steps 4 --seeds 0 --draft   # in minutes
"""

import argparse
import copy
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from detectors_page import RUNTIMES, page
from rows import ROOT, Rows, arguments
from torch import nn

import niwaki
from niwaki.distill import Distilled
from niwaki.measure.target import Target, in_turns
from niwaki.methods import GroupChannelPruning, YOLOv8CWD
from niwaki.methods.staged import shares_of
from niwaki.tasks import Detection
from niwaki.train import Checkpoints, Recovery, Speed

DATA = ROOT.parent / "shared" / "data"
FASTEST = "darknet:{data}/weights/coco-yolo-fastest-darknet/yolo-fastest-1.1{more}.cfg?classes={{classes}}"
NETWORKS = {
    **{f"yolov8{size}": f"ultralytics:yolov8{size}.yaml?nc={{classes}}" for size in "nsm"},
    "yolov4-tiny": "cfg:yolov4_tiny",
    "yolov4": "cfg:yolov4",
    "yolo-fastest": FASTEST.format(data="{data}", more=""),
    "yolo-fastest-xl": FASTEST.format(data="{data}", more="-xl"),
}
"""The last two have trained weights, of 80 classes: of --data coco no dense network is trained; for others their heads
are drawn anew, and the dense network is trained from there."""
SOURCES = {"bccd": "voc:{data}/detection/bccd/BCCD", "cars": "yolo:{made}", "coco": "yolo:{made}"}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {  # a rate is a share of the one asked for
    "GCP": ("gcp", {}),
    "GCP, constant pressure": ("gcp", {"pressing": "constant"}),
    "GCP, a third of the pressure": ("gcp", {"rate": 1 / 3}),
    "GCP, no pressure": ("gcp", {"sparse_epochs": 0}),
    "GCP, refitted": ("gcp", {"fold": "refit"}),
    "GCP, one group": ("gcp", {"groups": ("*",), "fractions": (0.5,)}),
    "GCP, no teacher": ("gcp", {"distil_epochs": 0}),
    "CWD": ("cwd", {}),
    "CWD, rising pressure": ("cwd", {"schedule": "increasing"}),
    "CWD, 300 times the pressure": ("cwd", {"rate": 300.0}),
    "CWD, no pressure": ("cwd", {"sparse_epochs": 0}),
    "CWD, no teacher": ("cwd", {"distil_epochs": 0}),
    "L2": ("l2", {}),
    "L2, multiples": ("l2", {"multiples": True}),
    "whole": ("whole", {}),
}
METHODS = ("CWD", "GCP")
"""Arms to whose multiply-adds those of L2 are cut."""
LAST = ("none", "SAD", "CWD", "outputs")
TEACHES = {"SAD": "gcp", "CWD": "cwd"}
"""Teachers that are a method's own, and whose."""


def splits_of(name: str, seed: int) -> Any:
    """Pictures with boxes; those without parts of their own are split by seed, frames of one video together."""
    if name == "bccd":
        return niwaki.data.open_boxes(SOURCES[name].format(data=DATA), seed=seed)
    folder = DATA / ("detection/aerial-cars" if name == "cars" else "coco256")
    names = folder / "aerial.names" if name == "cars" else DATA / "weights/coco-yolo-fastest-darknet/coco.names"
    said = ", ".join(f"'{word.strip()}'" for word in names.read_text(encoding="utf-8").splitlines() if word.strip())
    made = ROOT / "runs" / f"detectors-{name}.yaml"
    made.parent.mkdir(exist_ok=True)
    parts = "train: images" if name == "cars" else "train: images/train2017\nval: images/val2017"
    if name == "coco":  # its boxes do not lie where the yaml's readers look
        place = ROOT / "runs" / "coco256"
        place.mkdir(exist_ok=True)
        for link, target in (("images", "images"), ("labels", "boxes/labels")):
            if not (place / link).is_symlink():
                (place / link).symlink_to(folder / target)
        folder = place
    made.write_text(f"path: {folder}\n{parts}\nnames: [{said}]\n", encoding="utf-8")
    more = {"together": "prefix"} if name == "cars" else {}
    return niwaki.data.open_boxes(SOURCES[name].format(made=made), seed=seed, **more)


def network_of(name: str, classes: int, options: argparse.Namespace, seed: int) -> Any:
    """The network, trained where weights lie beside it."""
    source, shape = NETWORKS[name], (3, options.size, options.size)
    if source.startswith("cfg:"):
        import darknet_cfgs

        file = ROOT / "runs" / f"{name}-{options.size}-{classes}.cfg"
        file.write_text(getattr(darknet_cfgs, source[4:])(options.size, classes=classes), encoding="utf-8")
        return niwaki.models.load(f"darknet:{file}", seed=seed)
    source = source.format(data=DATA, classes=classes)
    weights = source.removeprefix("darknet:").partition("?")[0].replace(".cfg", ".weights")
    beside = weights if name.startswith("yolo-f") else None
    return niwaki.models.load(source, seed=seed, shape=shape, checkpoint=beside)


def recovery(options: argparse.Namespace, seed: int, epochs: int, folder: Path | None = None) -> Recovery:
    """How everything here is trained."""
    kept = None if folder is None else Checkpoints()
    return Recovery(
        epochs=epochs, lr=options.lr, seed=seed, limit=options.steps or None, decayed="weights", clip=10.0,
        speed=Speed(precision=options.precision, channels_last=True),
        folder=None if folder is None else str(folder), checkpoints=kept,
    )  # fmt: skip


def dense_of(loaded: Any, task: Detection, options: argparse.Namespace, key: str, seed: int) -> nn.Module:
    """The trained network; its training goes on where it was stopped."""
    model: nn.Module = loaded.model.to(options.device)
    if (loaded.weights == "random" or loaded.drawn) and options.epochs[0]:
        how = recovery(options, seed, options.epochs[0], ROOT / "runs" / "detectors" / named(key))
        how(model.train(), task, resume=True, progress=said(f"{key}: dense"))
    return model.eval()


def method_of(arm: str, options: argparse.Namespace) -> Any:
    """The method of an arm; epochs that it leaves out are for fine-tuning."""
    kind, changed = ARMS[arm]
    _, sparse, tune, distil = options.epochs
    distil = 0 if options.last else distil
    epochs = {"sparse_epochs": sparse, "tune_epochs": tune, "distil_epochs": distil}
    left = sum(epochs[name] for name in epochs if changed.get(name) == 0)
    settings = {**epochs, "tune_epochs": tune + left, **changed, "rate": options.rate * changed.get("rate", 1)}
    if kind == "gcp":
        return GroupChannelPruning(dense_epochs=0, **settings)
    return YOLOv8CWD(dense_epochs=0, multiple=options.multiple, **settings)


def arm_row(
    rows: Rows,
    case: str,
    label: str,
    dense: nn.Module,
    task: Detection,
    arm: str,
    options: argparse.Namespace,
    seed: int,
    protect: Any,
) -> None:
    """One row: the stages of an arm with all figures of each, and times of what came out beside the dense network."""
    if not wanted(rows, case, label):
        return
    key = f"{case}, {label}"
    kind, changed = ARMS[arm]
    if kind == "l2":
        equal = label.removeprefix(f"{arm} at ")
        multiple = options.multiple if changed else 1
        budget = budget_of(rows, case, equal, options, multiple)
        stages, small, told = baseline(key, dense, task, options, seed, protect, budget)
        told |= {"equal": equal, "multiple": multiple}
    elif kind == "whole":
        small = copy.deepcopy(dense)
        stages, told = {"trained on": trained_on(key, small, task, options, seed)}, {}
    else:
        outcome = outcome_of(key, dense, task, method_of(arm, options), options, seed, protect)
        stages = {stage.stage: plain(stage.measurements) for stage in outcome.stages}
        small = outcome.model
        told = {name: outcome.details[name] for name in ("layer_groups", "losses_at_first") if name in outcome.details}
        told |= {"receipt": outcome.receipt.difference, "door": outcome.receipt.door}
    values = {
        "arm": label, "settings": vars_of(options), "dense": plain(figures(dense, task, options)), "stages": stages,
        **told, "file_bytes": {"dense": file_bytes(dense), "cut": file_bytes(small)},
        "times": times_of(dense, small, task, options),
    }  # fmt: skip
    rows.add(key, values, seed=seed, threads=options.threads)


def outcome_of(
    key: str, dense: nn.Module, task: Detection, method: Any, options: argparse.Namespace, seed: int, protect: Any
) -> Any:
    """What a method makes of the dense network; what was trained before is not trained again."""
    last = next(n for n in (method.distil_epochs, method.tune_epochs, method.sparse_epochs) if n)
    return niwaki.compress(
        dense, task.example().to(options.device), method=method,
        budget=niwaki.Budget(options.keep, of=options.of), task=task, recovery=recovery(options, seed, last),
        protect=protect, seed=seed, limit=options.limit, steps=said(key), weights="trained here",
        partial=ROOT / "runs" / "detectors" / named(key),
    )  # fmt: skip


def last_keys(key: str, options: argparse.Namespace) -> dict[tuple[str, int], str]:
    """Of the last stage of an arm: (teacher, seed) -> its row's key."""
    said = {one: f"outputs {options.outputs:g}" if one == "outputs" else one for one in options.last}
    more = {one: f"{key}, {name} {options.epochs[3]}" for one, name in said.items()}
    return {(one, of): f"{name}, seed {of} of it" for of in options.last_seeds for one, name in more.items()}


def last_rows(
    rows: Rows, key: str, dense: nn.Module, task: Detection, options: argparse.Namespace, seed: int, protect: Any
) -> None:
    """A row for each teacher and seed of the last stage, from the fine-tuned network of one arm."""
    keys = last_keys(key, options)
    if not any(rows.wanted(name) for name in keys.values()):
        return
    method = method_of(options.arms[0], options)
    tuned = outcome_of(key, dense, task, method, options, seed, protect)
    before = plain(tuned.after)
    for (one, of), name in keys.items():
        if not rows.wanted(name):
            continue
        student = copy.deepcopy(tuned.model)
        taught: Any = task
        if one in TEACHES:
            taught = Distilled(task, dense, method.losses(tuned.graph), tuned.plan, student, seed=of)
        elif one == "outputs":
            taught = replace(method, outputs=options.outputs).taught(task, dense)
        shares = {} if taught is task else shares_of(taught, student, tuned.job)
        how = recovery(options, of, options.epochs[3], ROOT / "runs" / "detectors" / named(name))
        history = how(student.train(), taught, resume=True, progress=said(name)).to_json()
        stages = {"fine-tuning": before, one: plain(figures(student.eval(), task, options))}
        values = {"arm": options.arms[0], "last": one, "settings": vars_of(options),
                  "dense": plain(figures(dense, task, options)), "stages": stages, "losses_at_first": shares,
                  "loss": [epoch["loss"] for epoch in history["epochs"]]}  # fmt: skip
        rows.add(name, values, seed=of, threads=options.threads)


def labels_of(rows: Rows, case: str, options: argparse.Namespace) -> dict[str, str]:
    """What the rows of a case are called -> its arm: one of L2 for each method that is asked for, or has a row."""
    there = [one for one in METHODS if one in options.arms or rows.get(f"{case}, {one}")]
    equals = [f"macs of {one}" for one in there] or ["keep"]
    found = {}
    for arm in options.arms:
        labels = [f"{arm} at {equal}" for equal in equals] if ARMS[arm][0] == "l2" else [arm]
        found |= dict.fromkeys(labels, arm)
    return found


def wanted(rows: Rows, case: str, label: str) -> bool:
    """Whether a row has still to be made; older ones of L2 do not have in their keys what they were cut to."""
    older = rows.get(f"{case}, L2")
    made = older is not None and label == f"L2 at {older['equal']}" and not rows.fresh
    return rows.wanted(f"{case}, {label}") and not made


def budget_of(rows: Rows, case: str, equal: str, options: argparse.Namespace, multiple: int) -> niwaki.Budget:
    """What uniform L2 is cut to: the multiply-adds at the end of a method's arm, or what is asked for."""
    whole = rows.get(f"{case}, {equal.removeprefix('macs of ')}")
    if whole is None:
        return niwaki.Budget(options.keep, of=options.of, multiple=multiple)
    return niwaki.Budget.at_most(list(whole["stages"].values())[-1]["macs"], "macs", multiple=multiple)


def baseline(
    key: str,
    dense: nn.Module,
    task: Detection,
    options: argparse.Namespace,
    seed: int,
    protect: Any,
    budget: niwaki.Budget,
) -> tuple[dict[str, Any], nn.Module, dict[str, Any]]:
    """Every layer loses its smallest filters, to a budget; then it is trained for as many epochs as a method."""
    example = task.example().to(options.device)
    graph = niwaki.trace(dense, example, protect=protect)
    how = niwaki.scores.Magnitude(p=2)
    scores = niwaki.score(graph, niwaki.collect(dense, graph, how.needs), how=how)
    plan = niwaki.choose(graph, scores, budget, how=niwaki.budgets.Uniform(), splits="even")
    small = niwaki.cut(dense, plan)
    receipt = niwaki.verify(dense, small, plan, example)
    assert receipt.passed, receipt
    stages = {"cut": plain(figures(small, task, options))}
    niwaki.repair.BatchNormStatistics()(small, (task.inputs(batch) for batch in task.calibration(16, seed)))
    stages["batch-norm"] = plain(figures(small, task, options))
    stages["fine-tuning"] = trained_on(key, small, task, options, seed)
    return stages, small, {"receipt": receipt.difference, "door": receipt.door}


def trained_on(key: str, model: nn.Module, task: Detection, options: argparse.Namespace, seed: int) -> dict[str, float]:
    """Train a network in place for as long as a method does; its figures."""
    folder = ROOT / "runs" / "detectors" / named(key)
    how_long = recovery(options, seed, sum(options.epochs[1 : 3 if options.last else 4]), folder)
    how_long(model.train(), task, resume=True, progress=said(key))
    return plain(figures(model.eval(), task, options))


def figures(model: nn.Module, task: Detection, options: argparse.Namespace) -> dict[str, Any]:
    """Counts, and precision on test pictures."""
    found = niwaki.measure(model, task.example().to(options.device), meters=niwaki.measure.COUNTS)
    return found | task.metrics(model, limit=options.limit)


def plain(measurements: Mapping[str, Any]) -> dict[str, float]:
    return {name.replace(" ", "_"): measured.value for name, measured in measurements.items()}


def file_bytes(model: nn.Module) -> int:
    """Of the weights as safetensors."""
    with tempfile.TemporaryDirectory() as folder:
        from niwaki.train.checkpoints import save_weights

        save_weights(model, Path(folder) / "model.safetensors")
        return (Path(folder) / "model.safetensors").stat().st_size


def times_of(dense: nn.Module, small: nn.Module, task: Detection, options: argparse.Namespace) -> dict[str, Any]:
    """Pictures a second of both in each runtime, in turns, batch 1; on the CPU, and on the GPU where there is one."""
    if not options.runs:
        return {}
    example, found = task.example().cpu(), {}
    for runtime in RUNTIMES:
        target = Target(runtime, threads=options.threads)  # type: ignore[arg-type]
        try:
            with target.threaded(), target.running(dense, example) as one, target.running(small, example) as other:
                taken = in_turns({"dense": one, "cut": other}, runs=options.runs)
        except niwaki.errors.NiwakiError as error:
            found[runtime] = {"failed": str(error)}
            continue
        found[runtime] = fps(taken)
    if options.device.startswith("cuda"):
        place = example.to(options.device)

        def call(model: nn.Module) -> Callable[[], None]:
            def once() -> None:
                with torch.no_grad():
                    model(place)
                torch.cuda.synchronize()

            return once

        found["cuda"] = fps(in_turns({"dense": call(dense.eval()), "cut": call(small.eval())}, runs=options.runs))
    return {**found, "load": round(os.getloadavg()[0], 1)}


def fps(taken: Mapping[str, list[float]]) -> dict[str, float]:
    """Pictures a second, and how many times as fast: the median over turns."""
    pairs = zip(taken["dense"], taken["cut"], strict=True)
    return {
        **{name: round(1000 / statistics.median(values), 2) for name, values in taken.items()},
        "times_as_fast": round(statistics.median(one / other for one, other in pairs), 3),
    }


def said(what: str) -> Callable[[int, int, str], None]:
    """Tells of every fiftieth step."""
    return lambda done, of, words: None if done % 50 and done < of else print(f"{what}: {done} of {of}", flush=True)


def named(key: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in key)


def vars_of(options: argparse.Namespace) -> dict[str, Any]:
    names = ("size", "batch", "epochs", "steps", "lr", "rate", "keep", "of", "multiple", "precision", "device", "limit")
    return {name: getattr(options, name) for name in names}


def run(rows: Rows, options: argparse.Namespace, name: str) -> None:
    for seed in options.seeds:
        splits = splits_of(options.data, options.split_seed)
        loaded = network_of(name, len(splits.classes), options, seed)
        fit: Any = "squash" if name.startswith("yolo-f") else "letterbox"
        task = Detection(splits, loaded.detector, size=options.size, fit=fit, batch=options.batch)
        if options.plain_pictures:
            task = replace(task, augment=None)
        short = f", {options.steps} steps" if options.steps else ""
        epochs = "+".join(map(str, options.epochs[: 3 if options.last else 4]))
        base = f"{name} on {options.data} at {options.size}, {epochs} epochs{short}, seed {seed}"
        case = f"{base}, keep {options.keep} of {options.of}"
        labels, first = labels_of(rows, case, options), f"{case}, {options.arms[0]}"
        if not any(wanted(rows, case, label) for label in labels) and not any(
            rows.wanted(key) for key in last_keys(first, options).values()
        ):
            continue
        dense = dense_of(loaded, task, options, base, seed)
        for label, arm in labels.items():
            arm_row(rows, case, label, dense, task, arm, options, seed, loaded.protect)
        if options.last:
            last_rows(rows, first, dense, task, options, seed, loaded.protect)


def more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", choices=tuple(SOURCES), default="bccd", help="pictures (default: %(default)s)")
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=["CWD", "L2"], metavar="ARM",
                        help="of: " + "; ".join(ARMS))  # fmt: skip
    parser.add_argument("--last", nargs="+", choices=LAST, default=[], metavar="TEACHER",
                        help="end the arms with the fine-tuning, and teach the first one's network by: "
                             + ", ".join(LAST))  # fmt: skip
    parser.add_argument("--last-seeds", nargs="*", type=int, default=[0, 1, 2], help="of the last stage")
    parser.add_argument("--outputs", type=float, default=1e-3, help="weight of the outputs (default: %(default)s)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of weights and order")
    parser.add_argument("--split-seed", type=int, default=0, help="of parts that the data do not have")
    parser.add_argument("--size", type=int, default=320, help="of the frame, in pixels (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="pictures in a batch (default: %(default)s)")
    parser.add_argument("--epochs", nargs=4, type=int, default=[100, 50, 50, 50], metavar="N",
                        help="dense, sparse, fine-tuning, distilling (default: %(default)s)")  # fmt: skip
    parser.add_argument("--steps", type=int, default=0, help="at most so many batches an epoch; 0 is all")
    parser.add_argument("--lr", type=float, default=0.01, help="highest learning rate (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=1e-4, help="of the pressure (default: %(default)s)")
    parser.add_argument("--keep", type=float, default=0.27, help="share that stays (default: %(default)s)")
    parser.add_argument("--of", default="params", help="of what (default: %(default)s)")
    parser.add_argument("--multiple", type=int, default=8, help="of channels, for CWD (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=None, help="test pictures at most")
    parser.add_argument("--runs", type=int, default=30, help="timed passes; 0 times nothing (default: %(default)s)")
    parser.add_argument("--precision", default="fp32", help="fp32, bf16 or fp16 (default: %(default)s)")
    parser.add_argument("--plain-pictures", action="store_true", help="no mosaic, no flips")
    parser.add_argument("--draft", action="store_true", help="rows in runs/, not in benchmarks/results")
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=usual, help="default: %(default)s")


def main() -> None:
    options = arguments((__doc__ or "").splitlines()[0], cases=tuple(NETWORKS), more=more)
    if any(TEACHES.get(one, kind) != kind for one in options.last for kind in [ARMS[options.arms[0]][0]]):
        raise SystemExit(f"--last {' '.join(options.last)}: {options.arms[0]} does not teach so")
    torch.set_num_threads(options.threads)
    packages = ("onnxruntime", "openvino", "ultralytics", "pycocotools")
    rows = Rows("detectors", fresh=options.fresh, packages=packages, draft=options.draft)
    if not options.table:
        for name in options.only or ["yolov8n"]:
            run(rows, options, name)
    if not options.draft:
        page(rows, (__doc__ or "").split("\n\n    ")[0])


if __name__ == "__main__":
    main()
