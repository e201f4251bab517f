"""Every architecture of torchvision, timm, transformers, ultralytics: traced, halved, judged, trained, saved, exported.

One process and one row a model, so that one that fails, hangs or eats the memory costs nothing but its row. Run again
to go on; `--shard 1/4` takes every fourth model, `--only WORD` those whose name holds a word, `--quick` stops before
saving and exporting, `--nightly` adds every architecture of timm below 30 million parameters.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from coverage_judge import BAR, KEEP, judge, trouble
from coverage_lists import LISTS, timm_nightly
from coverage_peer import OWN_SECONDS, OWN_STEPS, PEER_STEPS, peer
from rows import ROOT, Rows, prose, table

PEER_SECONDS = 90
"""Most for the peer to prune a model once."""
TURNS_SECONDS = 420
"""Most for the turns in which both are timed then: a slow one that is left out would change the mean."""
LISTED = {"torchvision": 121, "timm": 98, "hf": 104, "ultralytics": 64, "darknet": 4}
"""How long the lists are with the versions that the rows were made with."""
PEER = "peer "
"""Begins the keys of the peer's rows."""
GIB, PEER_GIB = 18, 12
"""Most memory of its own for the process of one model; the peer's graphs of some would take any amount."""
FREE = 0.9
WHOLE = 0.999
"""Of the parameters: a peer that keeps so many cut nothing."""
PACKAGES = ("torchvision", "timm", "transformers", "ultralytics", "torch-pruning")
KEPT = 0.45


def child(source: str, what: str, *, quick: bool) -> None:
    """Print the row, as far as it comes, a line a stage."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    most = (GIB if what == "ours" else PEER_GIB) * 2**30
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    os.chdir(ROOT)
    try:
        if what == "ours":
            judge(source, quick=quick)
        else:
            peer(source)
    except Exception as error:
        print(json.dumps({"error" if what == "ours" else "peer_error": trouble(error)}), flush=True)


def measured(source: str, what: str, *, seconds: int, quick: bool) -> dict[str, Any]:
    """The row of one model from a process of its own."""
    words = [sys.executable, __file__, "--child", source, "--what", what, *(["--quick"] if quick else [])]
    found: dict[str, Any] = {}
    code: int | None = None
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        text = ""
        for most in (seconds, TURNS_SECONDS):
            try:
                text, _ = process.communicate(timeout=most)
                code = process.returncode
            except subprocess.TimeoutExpired as late:
                text = late.output.decode() if isinstance(late.output, bytes) else late.output or ""
            if code is not None or '"peer": "runs"' not in text:
                break
        process.kill()
    for line in text.splitlines():
        try:
            found |= json.loads(line)
        except (ValueError, TypeError):
            continue
    key = "error" if what == "ours" else "peer_error"
    if code is None and "peer" not in found:
        found[key] = f"more than {seconds} s"
    elif code and key not in found:
        found[key] = f"the process ended with {code}"
    return found


def faults(row: Mapping[str, Any]) -> list[str]:
    """What the row lacks, in words; the unforgivable first."""
    found = []
    if row.get("passed") is False:
        found.append("**differs from the mask**" if row.get("moved", 1.0) > 0 else "**outputs do not move**")
    if row.get("uneven", True) not in (True, None):
        found.append(f"**uneven plan: {row['uneven']}**")
    if "error" in row:
        found.append(f"{row.get('stage', 'start')}: {row['error']}")
    found += [f"unknown {name}" for name in row.get("unknown", ())]
    if row.get("free", 1.0) < FREE:
        fixed = ", ".join(f"{share:.0%} {why}" for why, share in list(row.get("fixed", {}).items())[:2])
        found.append(f"{row['free']:.0%} in free groups ({fixed})")
    if row.get("free_both", 0.0) >= FREE and row.get("kept", 0.0) > KEPT:
        found.append(f"keeps {row['kept']:.0%} of the parameters")
    if "passed" in row and not judged(row):
        found.append("every group is inexact: only that it runs and is finite was judged")
    for key in ("gradients", "train", "saved", "export", "onnx"):
        value = row.get(key, True)
        if value is not True and not str(value).startswith("the original"):
            found.append(f"{key}: {value}")
    return found


def judged(row: Mapping[str, Any]) -> bool:
    """Whether cut and masked outputs could be compared: not where every group is inexact."""
    return bool(row.get("exact")) or isinstance(row.get("exact_difference"), float)


def good(row: Mapping[str, Any]) -> bool:
    """Cut, equal to the mask under both plans, trainable; in a full row also saved and exported."""
    asked = ("passed", "gradients", *(("saved",) if row.get("stage") == "done" else ()))
    rest = all(row.get(k, True) is True or str(row[k]).startswith("the original") for k in ("train", "export", "onnx"))
    return (
        row.get("stage") in ("done", "quick")
        and all(row.get(key) is True for key in asked)
        and row.get("uneven") in (True, None)
        and rest
        and "error" not in row
    )


def prunes(row: Mapping[str, Any]) -> bool:
    """Whether the peer cut anything, and what is left runs."""
    return row.get("peer") == "runs" and row["peer_kept"] < WHOLE


def reaches(row: Mapping[str, Any], left: str = "peer_left") -> bool:
    """Whether both got to the share of the multiply-accumulates that was asked; each by its own count."""
    return max(row.get(left, 1.0), row.get("ours_left", 1.0)) <= KEEP


def own(row: Mapping[str, Any]) -> bool:
    """Whether the peer's own script's loop got to that share, or was stopped on the way, which counts as if it had."""
    return reaches(row, "peer_own_left") or (row.get("peer_own_s", 0.0) > OWN_SECONDS and row["ours_left"] <= KEEP)


COUNTED: dict[str, Callable[[Mapping[str, Any]], bool]] = {"warm": lambda row: True, "budget": reaches, "own": own}
"""Which rows count in each comparison: one step, a few to the budget, as many as the peer's own script takes."""


def speedup(rows: list[dict[str, Any]], what: str, *, missed: bool = False) -> tuple[int, float]:
    """Of trace + choose + cut against the peer's, over the models that both can do: how many, geometric mean.

    `missed`: also over those at which one of them did not get to the share that was asked.
    """
    ratios = [
        row[f"peer_{what}_s"] / row[f"ours_{what}_s"]
        for row in rows
        if prunes(row) and row.get("passed") and f"peer_{what}_s" in row and (missed or COUNTED[what](row))
    ]
    return len(ratios), geometric(ratios)


def geometric(values: Iterable[float]) -> float:
    """Geometric mean, not a number of nothing."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def page(rows: Rows) -> None:
    rows.page = ROOT / "docs" / "coverage.md"
    peers = {row["key"].removeprefix(PEER): row for row in rows.rows if row["key"].startswith(PEER)}
    whole = [{**peers.get(row["key"], {}), **row} for row in rows.rows if not row["key"].startswith(PEER)]
    text = prose(f"""
        # Coverage

        Written by `python benchmarks/coverage.py --table`; do not edit.

        Every architecture, untrained, with random numbers in every tensor; {KEEP:.0%} of the units of every free group
        kept at once (random scores, uniform), then a second, uneven plan. *Difference* is that of cut and masked
        outputs in float64, relative to the largest output (bar {BAR:.0e}), the larger of both plans; where groups are
        inexact it is taken over the exact ones alone. *Gradients*: every parameter that had one has one, in evaluation
        and in training mode. *Saved* runs are loaded in a fresh process and compared bit by bit. *Export* is
        `torch.export`, then ONNX Runtime for classifiers of torchvision; a dash where the original can't be exported
        or was not asked. *Peer* is Torch-Pruning's `BasePruner` on the same model, thread count and machine with at
        most {PEER_SECONDS} s and {PEER_GIB} GiB to prune once, and its seconds; where both can do it, they are timed
        turn by turn in at most {TURNS_SECONDS} s more, and *ours, times* says how often as fast ours is (one step / to
        half of the multiply-accumulates in at most {PEER_STEPS} steps / in steps of the peer's own script).
    """)
    (count, step), (reached, budget) = speedup(whole, "warm"), speedup(whole, "budget")
    tried, with_missed = speedup(whole, "budget", missed=True)
    short = {
        side: sum(prunes(row) and bool(row.get("passed")) and row.get(side, 0.0) > KEEP for row in whole)
        for side in ("peer_left", "ours_left")
    }
    if count:
        text += prose(f"""
            Trace, score, choose and cut are **{step:.2f}** times as fast as the peer's graph and one step of pruning
            (geometric mean over the {count} models that both can do and that were timed; medians of alternating turns
            in one process, one thread), and **{budget:.2f}** times as fast (over {reached} of them) where both are to
            reach half of the multiply-accumulates: ours by its budget, the peer by its loop of steps with its own count
            after each. At {tried - reached} more one of them ends above half (the peer at {short["peer_left"]}, after
            all its {PEER_STEPS} steps; ours at {short["ours_left"]}, where what is fixed allows no less); counted as
            if both had got there, it is {with_missed:.2f} times. Our time goes with the number of calls, the peer's
            with the number of channels, too: of the transformers, which have a layer or two of width 64 here, it takes
            tens of milliseconds, and ours no fewer.
            They were timed on one core, beside other work on the other one. Our own columns of seconds are from
            earlier versions, which were slower; the rows say which.
        """)
    bare = [row for row in whole if prunes(row) and row.get("passed") and "bare_s" in row]
    count, times = speedup(whole, "own")
    if count:
        ended = [row for row in whole if row.get("passed") and row.get("peer_own_s", 0.0) > OWN_SECONDS]
        text += prose(f"""
            That is a loop of at most {PEER_STEPS} steps. Its own script for ImageNet goes to a share of the operations
            in steps of a hundredth of the channels (`reproduce/main_imagenet.py` of its repository: {OWN_STEPS} steps
            to none, until the count is low enough). To half of the multiply-accumulates by that loop ours is
            **{times:.1f}** times as fast (over {count} models, one turn each; {len(ended)} of the peer's were stopped
            after {OWN_SECONDS} s and count as if they had ended then).
        """)
    if bare:
        share = {
            what: geometric(row[f"peer_{what}_s"] / row["bare_s"] for row in bare if f"peer_{what}_s" in row)
            for what in ("warm", "budget")
        }
        text += prose(f"""
            One forward of these models whose calls are only looked at takes a {share["warm"]:.1f}th of the peer's step
            and a {share["budget"]:.1f}th of its way to half of the multiply-accumulates: so many times as fast a tool
            could be that does nothing else. Ours looks twice, at the model and, to check it, at what was cut.
        """)
    for family in LISTS:
        mine = [row for row in whole if row["key"].startswith(family + ":")]
        if not mine:
            continue
        passed = sum(map(good, mine))
        asked = [row for row in mine if "peer" in row or "peer_error" in row]
        runs = sum(map(prunes, asked))
        against = f" The peer prunes {runs} of {len(asked)}." if asked else ""
        both, times = speedup(mine, "budget")
        if both:
            against += f" To half of the multiply-accumulates ours is {times:.1f} times as fast (over {both})."
        both, times = speedup(mine, "own")
        if both:
            against += f" By the loop of its own script, {times:.1f} times (over {both})."
        left = LISTED[family] - len(mine)
        missing = f" {left} of the list have not been run yet." if left > 0 else ""
        text += f"## {family}\n\n{passed} of {len(mine)} cut, judged, trained, saved and loaded.{missing}{against}\n\n"
        text += table(HEADS, [_line(row) for row in sorted(mine, key=lambda row: row["key"])]) + "\n\n"
    rows.write(text)


HEADS = (
    "model",
    "M parameters",
    "in free groups",
    "kept",
    "door",
    "difference",
    "gradients",
    "saved",
    "export",
    "trace / choose / cut (s)",
    "peak (GiB)",
    "peer",
    "ours, times",
    "trouble",
)


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    values = [row.get("difference") if row.get("exact") else row.get("exact_difference"), row.get("uneven_difference")]
    numbers = [value for value in values if isinstance(value, float)] if judged(row) else []
    doors = sorted({row[k] for k in ("door", "uneven_door") if k in row})
    return (
        row["key"].split(":", 1)[1],
        f"{row.get('params', 0) / 1e6:.1f}",
        f"{row['free']:.2f}" if "free" in row else "-",
        f"{row['kept']:.2f}" if "kept" in row else "-",
        " / ".join(doors) or "-",
        f"{max(numbers):.0e}" if numbers else "-",
        " / ".join(_word(row.get(k)) for k in ("gradients", "train")),
        _word(row.get("saved")),
        " / ".join(_word(row.get(k)) for k in ("export", "onnx")),
        " / ".join(f"{row[k]:.2f}" if k in row else "-" for k in ("trace_s", "choose_s", "cut_s")),
        f"{row['cut_gib']:.1f}" if "cut_gib" in row else "-",
        _peer(row),
        " / ".join(
            f"{row[f'peer_{what}_s'] / row[f'ours_{what}_s']:.1f}" if f"peer_{what}_s" in row else "-"
            for what in COUNTED
        ),
        _cell("; ".join(faults(row))[:240]),
    )


def _peer(row: Mapping[str, Any]) -> str:
    if "peer" not in row:
        return _cell(row.get("peer_error", "-"))[:60]
    return f"{row['peer'] if row['peer_kept'] < WHOLE else 'cuts nothing'}, {row['peer_s']:.1f} s"


def _word(value: Any) -> str:
    if value is None or str(value).startswith("the original"):
        return "-"
    return "yes" if value is True else "**no**"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lists", nargs="+", choices=tuple(LISTS), default=list(LISTS), help="which collections")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="only models whose name holds one of these words")
    parser.add_argument("--skip", nargs="+", metavar="WORD", default=[], help="no models whose name holds one of these")
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="every N-th model, from the I-th")
    parser.add_argument("--seconds", type=int, default=300, help="most for one model (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="stop before saving and exporting")
    parser.add_argument("--nightly", action="store_true", help="every architecture of timm below 30 M parameters")
    parser.add_argument(
        "--peer", nargs="?", const="also", choices=("also", "only"), help="the peer as well, or only the peer"
    )
    parser.add_argument("--fresh", action="store_true", help="make rows again that are there")
    parser.add_argument(
        "--rows",
        default="coverage",
        metavar="NAME",
        help="file of the rows (default: %(default)s); another lies in runs/",
    )
    parser.add_argument("--table", action="store_true", help="only write the page")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--what", choices=("ours", "peer"), default="ours", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.what, quick=options.quick)
        return
    part, parts = map(int, options.shard.split("/"))
    rows = Rows(options.rows, fresh=options.fresh, packages=PACKAGES, draft=options.rows != "coverage")
    if not options.table:
        sources: dict[str, str] = {}
        for kind in options.lists:
            sources |= LISTS[kind]()
        if options.nightly:
            sources |= timm_nightly()
        for key, source in list(sources.items())[part - 1 :: parts]:
            if options.only and not any(word in key for word in options.only):
                continue
            if any(word in key for word in options.skip):
                continue
            if options.peer != "only" and rows.wanted(key):
                found = measured(source, "ours", seconds=options.seconds, quick=options.quick)
                rows.add(key, found, seed=0, threads=1)
                print(f"   {'ok' if good(found) else 'NOT OK'} {'; '.join(faults(found))}", flush=True)
            if options.peer and rows.wanted(PEER + key):
                found = measured(source, "peer", seconds=PEER_SECONDS, quick=False)
                rows.add(PEER + key, found, seed=0, threads=1)
    if options.rows == "coverage":
        page(rows)


if __name__ == "__main__":
    main()
