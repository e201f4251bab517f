"""Trace, score, choose and cut a checkpoint larger than the memory that is used: how much that is, and the seconds."""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rows import Rows, arguments, prose, table
from safetensors import safe_open

import niwaki
from niwaki.plan import apply_cuts
from niwaki.stored import INDEX, Stored, write_index, write_safetensors

GIB = 1 << 30
LIMIT = 6 * GIB
SHARDS = 3
CHECKED = 24
"""Tensors of the result that are compared with `index_select` by the plan's `cuts`."""
CASES: dict[str, dict[str, Any]] = {
    "llama-1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
                 "num_key_value_heads": 4},
    "llama-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
                 "num_key_value_heads": 32},
}  # fmt: skip
"""Sizes of TinyLlama 1.1B and of Llama 2 7B; the numbers are random."""
COMMON = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
}


def generate(folder: Path, case: str, *, seed: int) -> None:
    """A checkpoint as transformers writes it, in bfloat16, normally distributed; one tensor in memory at a time."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**COMMON, **CASES[case]}), encoding="utf-8")
    model = niwaki.models.outline(f"hf:{folder}").model
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str) -> torch.Tensor:
        numbers = torch.randn(shapes[name], generator=generator)
        return numbers.mul_(0.02).add_(1.0 if "norm" in name else 0.0).to(torch.bfloat16)

    names, count = list(shapes), -(-len(shapes) // SHARDS)
    files = {f"model-{i + 1:05}-of-{SHARDS:05}.safetensors": names[i * count : (i + 1) * count] for i in range(SHARDS)}
    for file, held in files.items():
        write_safetensors(
            folder / file, {name: (torch.bfloat16, shapes[name]) for name in held}, draw, {"format": "pt"}
        )
    total = 2 * sum(torch.Size(shape).numel() for shape in shapes.values())
    write_index(folder / INDEX, files, {"total_size": total})


def measure(folder: Path, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The four steps in this process, which has done nothing else."""
    idle = peak()
    outline = niwaki.models.outline(f"hf:{folder}")
    start = time.perf_counter()
    done = niwaki.compress_stored(
        outline.model,
        outline.example,
        folder,
        out,
        method=niwaki.methods.Magnitude(),
        budget=niwaki.Budget(keep=options.keep, of="params"),
        progress=lambda stage, seconds: print(f"  {stage}: {seconds:.1f} s", file=sys.stderr, flush=True),
    )
    seconds = time.perf_counter() - start
    told = done.to_json()
    return {
        "keep": options.keep,
        "params_before": told["before"]["params"],
        "params_after": told["after"]["params"],
        "bytes_before": told["before"]["bytes"],
        "bytes_after": told["after"]["bytes"],
        "largest_shard_bytes": max(path.stat().st_size for path in folder.glob("*.safetensors")),
        "shards": len(done.files),
        "peak_bytes": peak(),
        "idle_bytes": idle,
        "seconds": seconds,
        "steps": done.seconds,
    }


def check(folder: Path, out: Path) -> int:
    """Compare tensors, spread over all shards, with what anyone makes of `cuts` in plan.json; how many were equal."""
    plan = niwaki.Plan.from_json((out / "plan.json").read_text(encoding="utf-8"))
    assert not json.loads((out / "surgery.json").read_text(encoding="utf-8"))["scaled"]
    stored, cuts = Stored(folder), plan.by_tensor()
    names = sorted(stored)[:: max(1, len(stored) // CHECKED)]
    for name in names:
        with safe_open(str(out / stored.places[name].file.name), framework="pt") as file:  # type: ignore[no-untyped-call]
            found = file.get_tensor(name)
        assert torch.equal(found, apply_cuts(stored[name], cuts.get(name, []), name)), name
    return len(names)


def peak() -> int:
    """Largest resident memory of this program so far (Linux); pages of files that are mapped count, too."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def page(rows: Rows) -> None:
    lines = []
    for case in CASES:
        row = rows.get(case)
        if row is not None:
            steps = row["steps"]
            lines.append(
                (
                    case,
                    f"{row['params_before'] / 1e9:.2f} to {row['params_after'] / 1e9:.2f}",
                    f"{row['bytes_before'] / GIB:.2f} to {row['bytes_after'] / GIB:.2f}",
                    f"{row['largest_shard_bytes'] / GIB:.2f}",
                    f"{row['peak_bytes'] / GIB:.2f}",
                    *(f"{steps[name]:.0f}" for name in ("trace", "score", "choose", "cut")),
                    f"{row['checked']}",
                )
            )
    heads = ("sizes of", "parameters, 10^9", "GiB on disk", "largest shard, GiB", "peak memory, GiB")
    text = prose(
        f"""
        # Models larger than memory

        Written by `python benchmarks/large.py --table`; do not edit.

        Trace, score (magnitude), choose (half of the parameters) and cut of generated checkpoints in bfloat16, {SHARDS}
        shards each, from disk to disk in one process ([how](../large-models.md)). Peak memory is the largest resident
        set of that process, Python, torch and transformers included, and pages of mapped files counted; the bar is
        {LIMIT / GIB:.0f} GiB. Seconds depend on the disk. The last column counts tensors, spread over all shards, that
        were compared bit by bit with `index_select` by the `cuts` of plan.json; all were equal.
        """
    )
    rows.write(text + table(
        (*heads, "trace, s", "score, s", "choose, s", "cut, s", "checked"), lines
    ))  # fmt: skip


def more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, help="where checkpoints go meanwhile (default: a temporary folder)")
    parser.add_argument("--keep", type=float, default=0.5, help="share of the parameters (default: %(default)s)")
    parser.add_argument("--inside", nargs=2, type=Path, metavar=("FROM", "TO"), help=argparse.SUPPRESS)


def main() -> None:
    options = arguments((__doc__ or "").splitlines()[0], cases=list(CASES), threads=1, more=more)
    torch.set_num_threads(options.threads)
    if options.inside:
        print(json.dumps(measure(*options.inside, options)))
        return
    rows = Rows("large", fresh=options.fresh, packages=("transformers", "safetensors"))
    for case in [] if options.table else options.only or list(CASES):
        if not rows.wanted(case):
            continue
        home = Path(tempfile.mkdtemp(prefix="large.", dir=options.folder))
        try:
            generate(home / "whole", case, seed=options.seed)
            words = ["--inside", home / "whole", home / "cut", "--keep", options.keep, "--threads", options.threads]
            child = [sys.executable, __file__, *map(str, words)]
            said = subprocess.run(child, stdout=subprocess.PIPE, text=True, check=True).stdout
            values = json.loads(said.splitlines()[-1])
            values["checked"] = check(home / "whole", home / "cut")
            rows.add(case, values, seed=options.seed, threads=options.threads)
            assert values["peak_bytes"] < LIMIT, f"{values['peak_bytes']:,} bytes"
        finally:
            shutil.rmtree(home)
    page(rows)


if __name__ == "__main__":
    main()
