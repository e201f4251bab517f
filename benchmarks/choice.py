"""How GlobalRank should bring layers to one scale, on validation pictures: prints the table of its card.

The test pictures are not looked at. The networks' publisher trained on the validation pictures, so that accuracies are
too high; scores and statistics never saw them.
"""

import argparse
import os
import warnings

import torch
from cifar import CALIBRATION, NETWORKS, STREAMS, network, repair_, task_of
from rows import ROOT, table

import niwaki

RULES: dict[str, niwaki.budgets.Rule] = {
    "uniform": niwaki.budgets.Uniform(),
    **{how: niwaki.budgets.GlobalRank(normalise=how) for how in ("none", "mean", "max", "sum")},  # type: ignore[arg-type]
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=tuple(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5], help="shares of the MACs")
    parser.add_argument("--rules", nargs="+", choices=tuple(RULES), default=list(RULES))
    parser.add_argument("--batch", type=int, default=128)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    os.chdir(ROOT)
    torch.set_num_threads(1)
    task = task_of(options)
    lines = []
    for name in options.only:
        model, example = network(name), task.example()
        for which, protect in (("inner widths", STREAMS), ("all widths", ())):
            graph = niwaki.trace(model, example, protect=protect)
            how = niwaki.scores.Magnitude()
            scores = niwaki.score(graph, niwaki.collect(model, graph, how.needs), how=how)
            for keep in options.keep:
                line = [name, which, f"{keep:g}"]
                for rule in options.rules:
                    budget = niwaki.Budget(keep=keep, of="macs")
                    small = niwaki.cut(model, niwaki.choose(graph, scores, budget, how=RULES[rule]))
                    repair_(small, task, seed=0)
                    line.append(f"{task.evaluate(small, split='val').value:.1f}")
                lines.append(tuple(line))
                print(*line, flush=True)
    print(f"\nbatch norm from {CALIBRATION} batches of {options.batch}; {len(task.splits.val)} validation pictures\n")
    print(table(("network", "cut", "keep", *options.rules), lines))


if __name__ == "__main__":
    main()
