"""What PAGCP's search costs: evaluations of candidates, and the scan by halving beside the one in turn."""

import argparse
import time

import torch
from rows import Rows
from torch import nn
from torch.nn import functional

import niwaki
from niwaki.graph.plans import plan_of
from niwaki.search import Candidate, Choice, Found, Geometric, Greedy, Masked
from niwaki.tasks import Custom

SCANS = ("grid", "bisect")


def run_speed(rows: Rows, options: argparse.Namespace) -> None:
    """Seconds of the processor for 19 shares of every group: each candidate cut and run whole, as it is and with its
    channels last, and as `Masked` does it. The middle share is timed, in turns: what a cut network costs falls with the
    share on a line. What the plain ways spend on cutting is left out; of the masked way the first candidate of a group
    counts with all that is worked out for the group."""
    import torchvision

    torch.manual_seed(0)
    model = getattr(torchvision.models, options.network)(weights=None).eval()
    size = min(options.images, options.together)
    batches = [
        (torch.randn(size, 3, options.pixels, options.pixels), torch.randint(1000, (size,)))
        for _ in range(options.images // size)
    ]
    task = Custom(
        loss=lambda net, batch: functional.cross_entropy(net(batch[0]), batch[1]), metric=lambda net, given: 0.0,
        splits={"train": batches},
    )  # fmt: skip
    graph = niwaki.trace(model, batches[0][0][:1])
    judge = Masked(model, graph, task, batches, memory=int(options.gib * 2**30 * options.images / 1000))

    def timed(net: nn.Module) -> tuple[float, float]:
        start = time.process_time()
        with torch.no_grad():
            total = sum(float(task.loss(net, batch)) * len(batch[1]) for batch in batches)
        return time.process_time() - start, total

    ways = ("plain", "plain, channels last", "masked")
    seconds, apart = dict.fromkeys(ways, 0.0), 0.0
    choices = judge.choices()
    judge(Candidate({}))
    for choice in choices:
        candidate = Candidate({}, choice.name, choice.size // 2)
        start = time.process_time()
        judge(Candidate({}, choice.name, 1))
        first = time.process_time() - start
        small = niwaki.cut(model, plan_of(graph, judge.kept(candidate.all))).eval()
        plain, loss = timed(small)
        start = time.process_time()
        found = judge(candidate)["loss"]
        masked = time.process_time() - start
        last, _ = timed(small.to(memory_format=torch.channels_last))
        apart = max(apart, abs(found / loss - 1))
        for way, spent in zip(ways, (19 * plain, 19 * last, first + 18 * masked), strict=True):
            seconds[way] += spent
        print(choice.name, [round(t, 3) for t in (plain, last, first, masked)], flush=True)
    key = f"{options.network}, {options.images} pictures of {options.pixels}, {size} in a batch"
    values = {
        "seconds": seconds,
        "times faster": {way: seconds[way] / seconds["masked"] for way in ways[:2]},
        "GiB for 1000": options.gib,
        "apart": apart,
        "groups": len(choices),
    }
    rows.add(key, {"arm": "speed", **values}, seed=0, threads=options.threads)


def run_scan(rows: Rows, key: str, model: nn.Module, task: niwaki.tasks.Task, options: argparse.Namespace) -> None:
    """Both scans of every group on the same networks: those that the one in turn cuts."""
    batches = task.calibration(options.batches, 0)
    graph = niwaki.trace(model, task.example())
    judge = Masked(model, graph, task, batches, nonnegative=True)
    choices = judge.choices()
    allowances = Geometric(initial_rate=options.scan_rate, initial_thres=options.scan_total)(len(choices))
    reference = judge(Candidate({}))
    gone: dict[str, int] = {}
    told: dict[str, dict[str, float]] = {
        scan: dict.fromkeys(("evaluations", "batches", "seconds"), 0.0) for scan in SCANS
    }
    apart = {}

    def ends(scan: str, choice: Choice) -> Found:
        before, seen, start = judge.asked, judge.seen, time.process_time()
        found = Greedy(scan=scan)(  # type: ignore[arg-type]
            [choice], lambda c: judge(Candidate(gone, c.group, c.count, c.bounds)), [allowances[len(gone)]],
            done=Found(reference, ()),
        )  # fmt: skip
        spent = (judge.asked - before, judge.seen - seen, time.process_time() - start)
        for name, number in zip(told[scan], spent, strict=True):
            told[scan][name] += number
        return found

    for number, choice in enumerate(choices):
        judge(Candidate(gone, choice.name, 1))  # what is worked out for the group is not a scan's
        found = {scan: ends(scan, choice) for scan in (SCANS if number % 2 else SCANS[::-1])}
        counts = [found[scan].gone.get(choice.name, 0) for scan in SCANS]
        if counts[0] != counts[1]:
            apart[choice.name] = [choice.size, *counts]
        print(key, number, choice.name, choice.size, counts, flush=True)
        reference = found["grid"].steps[-1].after
        gone |= found["grid"].gone
    macs = judge.macs(judge.kept(gone)) / judge.macs(judge.kept({}))
    values = {"groups": len(choices), "scans": told, "apart": apart, "macs": macs, "batches": len(batches)}
    rows.add(f"scan, {key}", {"arm": "scan", **values}, seed=0, threads=options.threads)
