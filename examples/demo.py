"""The built-in job: train a small network on the bundled digits, compress it twelve ways, prove and measure every one.

`make demo` runs this. It writes runs/demo: one folder per run, model.onnx, and report.html over all of them. Nothing is
downloaded. It shows how niwaki works, not which method is best: digits are too easy for that, and after an epoch of
training random choices are as good as any.
"""

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from digits_resnet import digits_resnet
from rich.console import Console
from rich.table import Table
from torch import nn

import niwaki
from niwaki.methods import Magnitude, Method, NormScale, Outcome, Random, Taylor

SOURCE = "python:examples/digits_resnet.py:digits_resnet"
METHODS: tuple[Method, ...] = (Magnitude(), NormScale(), Taylor(), Random())
BUDGETS = (0.7, 0.5, 0.3)
SEEDS_OF_RANDOM = 3
STAGES = ("cut", "batch-norm", "recovery")
HEADS = ("method", "keep", "before", "cut", "+ batch norm", "+ 1 epoch", "MACs promised, counted", "cut - mask", "s")
console = Console(width=None if sys.stdout.isatty() else 150)


def train(task: niwaki.tasks.Classification, *, epochs: int) -> nn.Module:
    """The network to be compressed, from random weights."""
    torch.manual_seed(0)
    model = digits_resnet()
    history = niwaki.train.Recovery(epochs=epochs, lr=0.05)(model, task)
    console.print(
        f"trained {len(task.splits.train)} digits for {epochs} epochs: last loss {history.losses[-1]:.4f}, "
        f"{sum(epoch['seconds'] for epoch in history.epochs):.1f} s"
    )
    return model.eval()


def compress(model: nn.Module, task: niwaki.tasks.Classification, method: Method, keep: float, seed: int) -> Outcome:
    """One run: trace, score, choose, cut, verify, re-estimate batch norm, train for an epoch, measure."""
    return niwaki.compress(
        model, task.example(), method=method, budget=niwaki.Budget(keep=keep, of="macs"), task=task,
        recovery=niwaki.train.Recovery(epochs=1, lr=0.02, seed=seed), seed=seed, source=SOURCE, command="make demo",
    )  # fmt: skip


def row(method: str, keep: float, runs: Sequence[tuple[Outcome, float]]) -> tuple[str, ...]:
    """One line of the table; several seeds become a mean with the span of their accuracies."""
    outcomes = [outcome for outcome, _ in runs]
    after = [{stage.stage: stage.measurements["accuracy"].value for stage in o.stages} for o in outcomes]
    promised = [o.plan.promised["macs"] for o in outcomes]
    counted = [int(o.after["macs"].value) for o in outcomes]
    if promised != counted:
        raise SystemExit(f"{method}, keep {keep}: the plan promised {promised} MACs, PyTorch counts {counted}")
    return (
        method if len(runs) == 1 else f"{method}, {len(runs)} seeds",
        f"{keep:.1f}",
        f"{outcomes[0].before['accuracy'].value:.1f}",
        *(spread([a[stage] for a in after]) for stage in STAGES),
        f"{max(promised):,} = {max(counted):,}",
        f"{max(o.receipt.difference for o in outcomes):.0e}",
        f"{sum(seconds for _, seconds in runs):.1f}",
    )


def spread(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.0f}..{max(values):.0f})"


def check_reload(outcome: Outcome, folder: Path, task: niwaki.tasks.Classification) -> None:
    """The saved run, rebuilt in memory without tracing, must put out the same bits."""
    again = niwaki.load(folder, digits_resnet).eval()
    inputs, _ = task.calibration(1, seed=1)[0]
    with torch.no_grad():
        equal = torch.equal(outcome.model.eval()(inputs), again(inputs))
    if not equal:
        raise SystemExit(f"{folder}: the reloaded model computes something else")
    console.print(f"reloaded {folder}: outputs equal bit for bit on {len(inputs)} digits")


def export(outcome: Outcome, file: Path, task: niwaki.tasks.Classification) -> None:
    """An ONNX file of the small model; its outputs in ONNX Runtime beside PyTorch's on the digits themselves."""
    import onnxruntime

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own, about its own parts
        taken = niwaki.export.export_onnx(outcome.model, task.example(), file)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    inputs, _ = task.calibration(1, seed=2)[0]
    (found,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    with torch.no_grad():
        expected = outcome.model.eval()(inputs)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)
    apart = float((torch.from_numpy(found) - expected).abs().max())
    console.print(
        f"exported {file}: {taken['bytes'].value / 1024:.0f} KiB; ONNX Runtime's outputs equal PyTorch's to "
        f"{apart:.0e} on {len(inputs)} digits (largest output {float(expected.abs().max()):.0f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="where the runs go; earlier ones go away")
    parser.add_argument("--epochs", type=int, default=10, help="of the first training")
    asked = parser.parse_args()
    start = time.perf_counter()
    torch.set_num_threads(1)  # so small a network is fastest on one core
    task = niwaki.tasks.Classification(niwaki.data.open("digits"), batch=64)
    model = train(task, epochs=asked.epochs)

    table = Table(title=f"Accuracy in % of {len(task.splits.test)} test digits; keep: share of MACs that may stay")
    for head in HEADS:
        table.add_column(head, justify="left" if head == "method" else "right")
    half: tuple[Outcome, Path] | None = None
    with console.status("compressing") as status:
        for method in METHODS:
            name = type(method).__name__.lower()
            for keep in BUDGETS:
                runs = []
                for seed in range(SEEDS_OF_RANDOM if isinstance(method, Random) else 1):
                    status.update(f"{name}, keep {keep}, seed {seed}")
                    began = time.perf_counter()
                    outcome = compress(model, task, method, keep, seed)
                    folder = asked.out / f"{name}-keep{100 * keep:.0f}-seed{seed}"
                    outcome.save(folder, force=True)
                    runs.append((outcome, time.perf_counter() - began))
                    if half is None and keep == 0.5:
                        half = outcome, folder
                table.add_row(*row(name, keep, runs), end_section=keep == BUDGETS[-1])
    console.print(table)
    console.print(
        "cut - mask: largest difference of any output between the cut and the masked network, in float64. "
        "MACs: as the plan promised before anything was cut, and as PyTorch's own counter finds them afterwards."
    )
    assert half is not None
    check_reload(*half, task)
    export(half[0], asked.out / "model.onnx", task)
    page = niwaki.report.write(asked.out)
    console.print(f"report on all runs: {page} (one file, nothing loaded from anywhere)")
    console.print(f"done in {time.perf_counter() - start:.0f} s; look around with: .venv/bin/niwaki report {half[1]}")


if __name__ == "__main__":
    main()
