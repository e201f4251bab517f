"""The page of the benchmark of detectors, made from its rows."""

import statistics
from typing import Any

from rows import Rows, prose, table

RUNTIMES = ("pytorch", "onnxruntime", "openvino")
SHOWN = ("AP50", "AP", "AP_small", "AP_medium", "AP_large")
LIMITS = """
YOLOv8 and YOLOv4-tiny are trained from nothing; rows of YOLO-Fastest begin with its weights of COCO, on blood cells and
cars with new heads. Sizes, lengths and the rate of the pressure were chosen by losses and validation pictures, or are
the papers'; but the longer case of aerial pictures and the arms of other pressures were added after test figures of the
first were seen, and stand beside them. These are trainings of some hundred to some thousand steps on a core that others
used, too, where the papers have hundreds of epochs on GPUs; where an arm has one seed, differences smaller than the
range of others' seeds say little. Blood cells are three classes, most of them large; the aerial pictures are 82 for
training and 24 for the test, of objects of some pixels; of COCO there are 115 pictures for training and 128 for the
test. Uniform L2 keeps any widths, unless its row says multiples, the YOLOv8 framework multiples of 8; heads of YOLOv8
are cut inside as all else is."""


CLAIMS = """
What the papers claim, on these rows.

**YOLOv8n by the framework with channel-wise distillation** (three seeds). The paper takes 73.5 % of the parameters for
2.7 points of AP50 and 1.73 times the speed. Here 73 % of the parameters and 72 % of the multiply-adds go, and AP50 ends
0.2 points below the whole network that was trained for as long (and 2.5 above where it began, as all networks go on
learning); it is about twice as fast. That is no merit of the framework's own parts on these pictures: uniform L2 at the
same multiply-adds ends as high, though slower in runtimes (1.5 to 1.7 times as fast, its widths being odd), without the
teacher AP50 is as high and AP a point higher, and without pressure, with pressure that rises, or with 300 times the
pressure, which makes up for the few steps, it is as high, too (one seed). Right after the cut next to nothing is left
in any arm: training makes up for it.

**YOLOv8m and YOLOv8s** (one seed; of the last stage three for YOLOv8s). As large a share goes, and they are 2.2 to 2.4
times as fast in PyTorch and 2.5 to 3.1 times in the runtimes. What they need is epochs after the cut. With 80 of them
YOLOv8m, the paper's network, ends 0.1 points of AP50 above the whole network that was trained for as long, with 0.8 of
AP less, and above uniform L2 in both; it is 9 points above where it began. YOLOv8s ends 4 points above where it began
and 3.0 below the whole network, where uniform L2, which trains in all epochs after its cut, is 1.4 below; in each of
three seeds of the last stage it ends higher without the teacher than with it (85.2 and 84.5 in the mean). With 25 and
30 epochs after the cut they were 3.5 and 4.3 below. The short trainings were made first: more epochs after the cut, at
the same cost for all arms, were given once their test figures had been seen. 300 times the pressure does not help (80.5
against 80.9, YOLOv8m, short).

**YOLOv8n on aerial pictures** (one seed): the framework loses. From an AP50 of 40 after 250 epochs, a quarter of the
network with 300 steps after the cut comes to 20, uniform L2 at the same multiply-adds with 500 steps to 36, and the
whole network to 43. With 100 epochs first all are learning still: 18, 10 and 30. A cut that leaves nothing needs more
steps than so few pictures give in as many epochs.

**YOLOv4-tiny by group channel pruning** (three seeds). The paper takes 64.7 % of the parameters and 34.9 % of the
compute. Here as many parameters and 46 to 54 % of the multiply-adds go, and AP50 ends where it began and 2.4 points
(1.5 to 3.1) below the whole network that was trained for as long: within the three points that were the aim. AP over
all overlaps falls by more, from 32.6 to 24.8. Pressure does what it is for: the cut leaves 47 to 51 of 54 to 58 points,
where without pressure it leaves 37 (one seed), and uniform L2 18 to 22. After fine-tuning it is the other way round:
uniform L2 at the same multiply-adds, with 45 to 54 % of the parameters, has an AP50 of 58.2 and an AP of 30.8; a third
of the pressure 58.0 and 29.4, and no pressure 58.1 and 31.0, with more multiply-adds (one seed): what presses less
keeps more of AP. Pressure that lets go of large scales ends 2 points above constant pressure, with fewer multiply-adds
(one seed). Attention maps cost 1.7 points with every seed of the last stage: at the published weights the teacher has
four fifths of the loss; the teacher's outputs neither help nor hurt.

**YOLO-Fastest by group channel pruning**, in shorter trainings: the method loses. On blood cells, without pressure, and
with as many epochs after the cut instead, the network ends higher at the same parameters, and so does uniform L2 at the
same multiply-adds; attention maps help by less than seeds differ. The share of parameters that the paper removes cost
far more than three points of AP50, and the network, small and of depthwise layers, is not faster when cut to odd
widths. On COCO's classes, with 115 pictures and 175 steps after the cut, three tenths of the multiply-adds of the XL
network are too many: nothing of an AP50 of 43 comes back, and of uniform L2 7.

Not trained: YOLOv4, anything on a GPU; the last two cases for as long as they would need."""


def page(rows: Rows, about: str) -> None:
    """Write the page; `about` says what was compared."""
    whole = whole_of(rows)
    lines, times = [], []
    for row in whole:
        before, stages = row["dense"], row["stages"]
        for stage, after in {"dense": before, **stages}.items():
            shares = [f"{100 * after[name] / before[name]:.1f} %" for name in ("params", "macs")]
            lines.append((row["key"], stage, *(f"{after[n]:.1f}" if n in after else "-" for n in SHOWN), *shares))
        sizes = [f"{row['file_bytes'][name] / 1e6:.2f}" for name in ("dense", "cut")]
        found = [told(row["times"].get(name, {})) for name in (*RUNTIMES, "cuda")]
        times.append((row["key"], *sizes, *found, row["times"].get("load", "-")))
    heads = ("case", "stage", "AP50", "AP", "small", "medium", "large", "params", "MACs")
    parts = [
        "# Detectors",
        "Written by `python benchmarks/detectors.py --table`; do not edit.",
        prose(about).strip(),
        prose(LIMITS).strip(),
        *found_of(rows),
        prose(CLAIMS).strip(),
        "## Over seeds",
        "At the end of each arm, on test pictures; mean (lowest to highest). *Whole* is the network trained on for as "
        "many epochs and not cut: against it and against where every arm began, seed by seed.",
        over_seeds(whole),
        "## The last stage",
        last_table(rows),
        "## Every stage",
        "Shares are of the dense network's; figures in percent, on test pictures.",
        table(heads, lines),
        "## Size and speed",
        "Files in MB; how many times as fast the cut network is as the dense one, in turns, and pictures a second of "
        "both; *load* is the number of "
        "processes that wanted the machine's cores meanwhile: where it is above their number, times tell little.",
        table(("case", "dense", "cut", "PyTorch", "ONNX Runtime", "OpenVINO", "GPU", "load"), times),
    ]
    rows.write("\n\n".join(parts))


def whole_of(rows: Rows) -> list[dict[str, Any]]:
    """Rows of whole arms; in the keys of older ones of L2 it does not stand what they were cut to."""
    found = []
    for row in (row for row in rows.rows if "last" not in row):
        arm = f"L2 at {row['equal']}" if row["arm"] == "L2" else row["arm"]
        found.append({**row, "key": row["key"].removesuffix(row["arm"]) + arm, "arm": arm})
    return found


def told(times: dict[str, Any]) -> str:
    """How many times as fast, and pictures a second of both."""
    if "times_as_fast" not in times:
        return "-"
    return f"{times['times_as_fast']:.2f} ({times['dense']:.0f} to {times['cut']:.0f})"


def over_seeds(whole: list[dict[str, Any]]) -> str:
    """Where every arm ends, over its seeds."""
    cases: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for row in whole:
        case = row["key"].removesuffix(f", {row['arm']}").replace(f", seed {row['seed']}", "")
        cases.setdefault((case, row["arm"]), {})[row["seed"]] = row
    lines = []
    for (case, arm), seeds in cases.items():
        longer = cases.get((case, "whole"), {})
        ends = {seed: list(row["stages"].values())[-1] for seed, row in seeds.items()}
        shares = [f"{spread([100 * end[name] / seeds[seed]['dense'][name] for seed, end in ends.items()])} %"
                  for name in ("params", "macs")]  # fmt: skip
        apart = [end["AP50"] - seeds[seed]["dense"]["AP50"] for seed, end in ends.items()]
        on = [
            end["AP50"] - longer[seed]["stages"]["trained on"]["AP50"] for seed, end in ends.items() if seed in longer
        ]
        times = [spread([row["times"].get(name, {}).get("times_as_fast") for row in seeds.values()], 2)
                 for name in RUNTIMES]  # fmt: skip
        marks = [spread([end[name] for end in ends.values()]) for name in ("AP50", "AP")]
        lines.append((case, arm, len(ends), *shares, *marks, spread(apart, sign="+"),
                      "-" if arm == "whole" else spread(on, sign="+"), *times))  # fmt: skip
    heads = ("case", "arm", "seeds", "params", "MACs", "AP50", "AP", "AP50 against the start", "against whole",
             "times as fast: PyTorch", "ONNX Runtime", "OpenVINO")  # fmt: skip
    return table(heads, lines)


def spread(numbers: list[Any], digits: int = 1, *, sign: str = "") -> str:
    """Mean, and the range where there are several; a dash where there are none."""
    if not numbers or None in numbers:
        return "-"
    low, mean, high = (f"{x:{sign}.{digits}f}" for x in (min(numbers), statistics.mean(numbers), max(numbers)))
    return mean if low == high else f"{mean} ({low} .. {high})"


def of_teachers(rows: Rows) -> dict[str, dict[str, list[float]]]:
    """Case -> teacher -> AP50 at the end, a number a seed; `fine-tuning` is where all of a case begin."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in sorted((row for row in rows.rows if "last" in row), key=lambda row: row["seed"]):
        case, _, name = row["key"].partition(", seed ")[2].rpartition(", seed ")[0].rpartition(", ")
        case = f"{row['key'].partition(', seed ')[0]}, seed {case}"
        here = found.setdefault(case, {"fine-tuning": [row["stages"]["fine-tuning"]["AP50"]]})
        here.setdefault(name, []).append(row["stages"][row["last"]]["AP50"])
    return found


def share_taught(rows: Rows, case: str, name: str) -> str:
    """How much of the loss was the teacher's before the first step."""
    begins = f"{case}, {name}, seed "
    parts = next((row["losses_at_first"] for row in rows.rows if "last" in row and row["key"].startswith(begins)), {})
    return f"{100 * (1 - parts['task'] / sum(parts.values())):.1f} %" if parts else "-"


def last_table(rows: Rows) -> str:
    lines = []
    for case, teachers in of_teachers(rows).items():
        start = teachers["fine-tuning"][0]
        plain = next((marks for name, marks in teachers.items() if name.startswith("none")), None)
        for name, marks in teachers.items():
            if name == "fine-tuning":
                continue
            against = "-"
            if plain is not None and plain is not marks and len(plain) == len(marks):
                apart = [mine - theirs for mine, theirs in zip(marks, plain, strict=True)]
                against = f"{statistics.mean(apart):+.1f} ({min(apart):+.1f} .. {max(apart):+.1f})"
            spread = f"{statistics.mean(marks):.1f} ({min(marks):.1f} .. {max(marks):.1f})"
            lines.append((case, name, len(marks), share_taught(rows, case, name), f"{start:.1f}", spread, against))
    heads = ("case", "teacher, epochs", "seeds", "of the loss at first", "AP50 before", "after: mean (range)",
             "against none, seed by seed")  # fmt: skip
    return table(heads, lines)


def found_of(rows: Rows) -> list[str]:
    """What the rows say of the papers' claims, in words."""
    said = []
    for case, teachers in of_teachers(rows).items():
        plain = next((marks for name, marks in teachers.items() if name.startswith("none")), [])
        for name, marks in teachers.items():
            if name.startswith(("none", "fine-tuning")) or len(marks) != len(plain):
                continue
            apart = statistics.mean(marks) - statistics.mean(plain)
            wide = max(max(one) - min(one) for one in (marks, plain))
            held = "beyond" if abs(apart) > wide else "within"
            higher = sum(mine > theirs for mine, theirs in zip(marks, plain, strict=True))
            said.append(
                f"- {case}: {name} epochs of it against none: {apart:+.1f} AP50 in the mean of {len(marks)} seeds "
                f"({higher} of them higher), {held} the widest range of a teacher's seeds ({wide:.1f}); of the loss at "
                f"first {share_taught(rows, case, name)} was the teacher's."
            )
    pairs: dict[str, dict[str, Any]] = {}
    for row in (row for row in whole_of(rows) if row["arm"].startswith(("GCP", "L2"))):
        pairs.setdefault(row["key"].removesuffix(row["arm"]), {})[row["arm"]] = row["stages"]
    for case, arms in pairs.items():
        for other in ("GCP, constant pressure", "GCP, no pressure", "L2 at macs of GCP"):
            if "GCP" not in arms or other not in arms:
                continue
            words = [f"{stage} {arms['GCP'][stage]['AP50']:.1f} and {arms[other][stage]['AP50']:.1f}"
                     for stage in arms["GCP"] if stage in arms[other]]  # fmt: skip
            said.append(f"- {case}AP50 of GCP and of {other.removeprefix('GCP, ')}: {'; '.join(words)}.")
    return ["## Found", "\n".join(said)] if said else []
