"""Recovery with and without the uncut network as teacher: ResNet-20 on CIFAR-10, and a small Llama on stories.

Weights and data are read from ../shared/data. Everything is measured on validation parts: the test pictures and test
stories are not looked at. Both arms see the same batches in the same order.
"""

import argparse
import itertools
import math
import os
import statistics
import time
import warnings
from typing import Any

import torch
from cifar import network, task_of
from llama2c import Vocabulary
from rows import ROOT, Rows, arguments, prose, table

import niwaki
from niwaki.data import TextSplits, Tokens
from niwaki.distill import Features, Logits, Weighted
from niwaki.tasks import LanguageModelling, Task
from niwaki.train import Recovery

DATA = ROOT / "../shared/data"
LENGTH = 128
CASES = ("resnet20", "stories260k")
KEEP = {"resnet20": 0.5, "stories260k": 0.7}
ARMS: dict[str, dict[str, tuple[Weighted, ...]]] = {
    "resnet20": {
        "plain": (),
        "logits": (Weighted(Logits(4.0)),),
        "logits, features": (Weighted(Logits(4.0)), Weighted(Features(), 1.0, taps=("layer2", "layer3"))),
    },
    "stories260k": {"plain": (), "logits": (Weighted(Logits(2.0)),)},
}


def stories(options: argparse.Namespace) -> LanguageModelling:
    """Blocks of the sample's tokens: the first four fifths of the stories taken, then a tenth each."""
    said = (DATA / "text/tinystories-sample/ts_sample.txt").read_text(encoding="utf-8")[: options.characters]
    vocabulary = Vocabulary(DATA / "lm/stories260k/tok512.bin")
    listed = [story.strip() for story in said.split("<|endoftext|>") if story.strip()]
    ends = [0, int(0.8 * len(listed)), int(0.9 * len(listed)), len(listed)]
    parts = []
    for start, stop in itertools.pairwise(ends):
        tokens = torch.tensor([token for story in listed[start:stop] for token in vocabulary.tokens(story)])
        parts.append(Tokens(tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)))
    return LanguageModelling(TextSplits(*parts, LENGTH, len(vocabulary.numbers)), batch=options.sequences)


def case(name: str, options: argparse.Namespace) -> tuple[Any, Task, niwaki.methods.Method, dict[str, Any]]:
    """The trained network, its task, the method that cuts it, and the settings of its recovery."""
    if name == "resnet20":
        return network(name), task_of(options), niwaki.methods.Magnitude(p=2), {}
    model = niwaki.models.load(f"llama2c:{DATA / 'lm/stories260k/stories260K.bin'}").model
    model.config.use_cache = False
    settings = {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.0}
    return model, stories(options), niwaki.methods.Taylor(), settings


def figures(task: Task, model: Any, options: argparse.Namespace) -> dict[str, float]:
    return {key: m.value for key, m in task.metrics(model, split="val", limit=options.validate).items()}


def study(rows: Rows, name: str, options: argparse.Namespace) -> None:
    """Cut once a seed, trained from there in every arm."""
    wanted = [
        (seed, arm, f"{name}, {arm}, {options.steps} steps of {size_of(name, options)}, seed {seed}")
        for seed in range(options.seeds)
        for arm in ARMS[name]
        if not options.arms or arm in options.arms
    ]
    if not any(rows.wanted(key) for *_, key in wanted):
        return
    model, task, method, settings = case(name, options)
    example = task.example() if name == "resnet20" else {"input_ids": task.example(), "use_cache": False}
    uncut = figures(task, model, options)
    print(name, "uncut", uncut, flush=True)
    for seed, arm, key in wanted:
        if not rows.wanted(key):
            continue
        recovery = Recovery(epochs=1, limit=options.steps, seed=seed, **settings)
        start = time.perf_counter()
        outcome = niwaki.compress(
            model, example, method=method, budget=niwaki.Budget(KEEP[name]), task=task, recovery=recovery,
            distill=ARMS[name][arm], seed=seed, limit=1,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        before = niwaki.cut(model, outcome.plan)
        repaired = niwaki.repair.BatchNormStatistics()(before, (task.inputs(b) for b in task.calibration(16, seed)))
        rows.add(
            key,
            {
                "what": "recovery",
                "case": name,
                "arm": arm,
                "method": type(method).__name__,
                "keep": KEEP[name],
                "uncut": uncut,
                "cut": figures(task, before, options),
                "batch_norm": bool(repaired),
                "recovered": figures(task, outcome.model, options),
                "steps": options.steps,
                "size": size_of(name, options),
                "validated": options.validate,
                "losses": outcome.history["epochs"][-1]["loss"] if outcome.history else None,
                "passed": outcome.receipt.passed,
                "macs": outcome.plan.promised["macs"] / outcome.plan.promised["macs_before"],
                "settings": outcome.settings()["recovery"],
                "distill": outcome.settings()["distill"],
                "seconds": seconds,
            },
            seed=seed,
            threads=options.threads,
        )


def size_of(name: str, options: argparse.Namespace) -> int:
    return options.batch if name == "resnet20" else options.sequences


def page(rows: Rows) -> None:
    """docs/benchmarks/distill.md from the rows."""
    text = prose("""
        # Recovery with a teacher

        Written by `python benchmarks/distill.py --table`; do not edit.

        A trained network is cut, batch norm is re-estimated (ResNet-20), and trained for a few steps: plainly, or with
        the uncut network as teacher. Every seed draws its own batches, which all arms share. Figures are of
        validation parts; nothing was chosen on test data, and none was looked at. *Spread* is from the lowest to the
        highest seed. The published weights of ResNet-20 were trained on all 50 000 training pictures, the validation
        part among them, and TinyStories is what the Llama was trained on: levels flatter both, arms compare. These are
        small runs on a busy CPU; they show that the teacher is heard, and no more than that.
    """)
    for name in CASES:
        mine = [row for row in rows.rows if row["case"] == name]
        if not mine:
            continue
        metric, unit = ("accuracy", "%") if name == "resnet20" else ("perplexity", "")
        whole = mine[0]
        text += f"## {name}, {whole['method']}, {whole['macs']:.3f} of the MACs\n\n"
        text += f"Uncut: {metric} {whole['uncut'][metric]:.2f} {unit} on {whole['validated']} validation samples.\n\n"
        lines = []
        for steps, size in sorted({(row["steps"], row["size"]) for row in mine}):
            for arm in ARMS[name]:
                runs = [row for row in mine if (row["arm"], row["steps"], row["size"]) == (arm, steps, size)]
                if not runs:
                    continue
                values = [row["recovered"][metric] for row in runs]
                cut = statistics.mean(row["cut"][metric] for row in runs)
                plain = {r["seed"]: r["recovered"][metric] for r in mine
                         if (r["arm"], r["steps"], r["size"]) == ("plain", steps, size)}  # fmt: skip
                gains = [row["recovered"][metric] - plain[row["seed"]] for row in runs if row["seed"] in plain]
                gain = f"{statistics.mean(gains):+.2f}" if gains and arm != "plain" else "-"
                error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 and arm != "plain" else None
                lines.append(
                    (
                        f"{steps} x {size}",
                        arm,
                        len(runs),
                        f"{cut:.2f}",
                        f"{statistics.mean(values):.2f} ({min(values):.2f}..{max(values):.2f})",
                        gain + ("" if error is None else f" ± {error:.2f}"),
                        f"{statistics.mean(row['seconds'] for row in runs):.0f}",
                    )
                )
        heads = ("steps x batch", "arm", "seeds", "before training", f"{metric} after (spread)", "against plain", "s")
        text += table(heads, lines) + "\n\n"
    rows.write(text)


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        for name, default, said in (
            ("steps", 100, "training steps"),
            ("batch", 128, "pictures in a batch"),
            ("sequences", 16, f"sequences of {LENGTH} tokens in a batch"),
            ("seeds", 3, "seeds"),
            ("validate", 2000, "validation samples looked at"),
            ("characters", 600_000, "of the stories that are read"),
        ):
            parser.add_argument(f"--{name}", type=int, default=default, help=f"{said} (default: %(default)s)")

        parser.add_argument("--arms", nargs="+", metavar="ARM", help="only these, such as plain and logits")

    options = arguments((__doc__ or "").splitlines()[0], cases=CASES, threads=1, more=more)
    warnings.simplefilter("ignore")
    os.chdir(ROOT)
    torch.set_num_threads(options.threads)
    rows = Rows("distill", fresh=options.fresh, packages=("accelerate", "transformers"))
    if not options.table:
        for name in options.only or CASES:
            study(rows, name, options)
    page(rows)


if __name__ == "__main__":
    main()
