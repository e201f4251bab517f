"""Time and memory of a decoded token: compressed caches beside transformers' own, step by step in turns.

    python benchmarks/kv_speed.py                                                     # a CPU core, minutes
    python benchmarks/kv_speed.py --device cuda --type bfloat16 --layers 32 --width 4096 --heads 32 --pairs 8 \
        --head-size 128 --lengths 2048 8192 16384 32768 65536 --batches 1 16          # a GPU; not run so far

A Llama of random weights reads a random prompt into each cache; then each decodes the same tokens, in turns within
every step, so that a busy machine is busy for all. On the CPU time is that of the process, on one thread: what others
do meanwhile does not count, what they take from caches of the processor does. A ratio is the median over steps of a
cache's time to that of transformers' `DynamicCache` in the same step, with the quartiles: above 1 is slower. Bytes are
those of the distinct storages that a cache keeps alive behind the prompt; the peak is of everything that a decoding
step has alive at once besides the weights, the cache included. "in two parts" holds the same numbers as ours does and
leaves nothing out: transformers' own cache copies all its keys and values for each token, and what a gain owes to that
is told by it.
"""

import argparse
import gc
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rows import Rows, arguments, prose, table
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from kv import Whole
from niwaki import kv

WARM = 2
"""Steps before the timed ones; the second is the one whose memory is looked at."""
VOCABULARY = 256
CSKV_KEEP = 0.2
WHOLE = "transformers"


def ways(model: Any) -> dict[str, Callable[[], kv.How | None]]:
    """Names and ways; projections are made of the weights alone, since their time does not depend on text."""
    made: list[kv.Projections] = []

    def low_rank(bits: int | None) -> kv.How:
        if not made:
            made.append(kv.project(model, None, keep=CSKV_KEEP, init="svd"))
        return kv.CSKV(model, made[0], bits=bits)

    thin = kv.ThinK(keep=0.6)
    found: dict[str, Callable[[], kv.How | None]] = {
        WHOLE: lambda: None,
        "in two parts": Whole,
        "ThinK 0.6": lambda: kv.Compression(channels=thin),
        "ThinK 0.5, values 0.5": lambda: kv.Compression(channels=kv.ThinK(keep=0.5, values=0.5)),
        "ThinK 0.6, SnapKV 0.25": lambda: kv.Compression(channels=thin, tokens=kv.SnapKV(keep=0.25)),
        "ThinK 0.6, KIVI 4 bit": lambda: kv.Compression(channels=thin, bits=kv.KIVI(bits=4)),
        f"CSKV {CSKV_KEEP}": lambda: low_rank(None),
        f"CSKV {CSKV_KEEP}, 4 bit": lambda: low_rank(4),
    }
    if next(model.parameters()).is_cuda:
        found["ThinK 0.6, fused"] = lambda: kv.Compression(channels=thin, fused=True)
    return found


def peak_of(call: Callable[[], Any], *, cuda: bool) -> int:
    """The most bytes that were allocated during a call on top of what was there before, by the allocator's account."""
    gc.collect()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events: Any = profiler.profiler
    moves = sorted((e.start_ns(), e.nbytes()) for e in events.kineto_results.events() if e.name() == "[memory]")
    return max(itertools.accumulate((size for _, size in moves), initial=0))


class Runner:
    """One cache with its prompt read."""

    def __init__(self, model: Any, how: kv.How | None, prompt: Tensor) -> None:
        self.model = model
        self.cache = DynamicCache(config=model.config) if how is None else kv.KVCache(model, how)
        model(prompt, past_key_values=self.cache, logits_to_keep=1)
        self.bytes = kv.cache_bytes(self.cache)
        self.peak, self.times = 0, list[float]()

    def step(self, token: Tensor, number: int) -> None:
        if number < WARM:
            held = kv.cache_bytes(self.cache)
            self.peak = held + peak_of(lambda: self.model(token, past_key_values=self.cache), cuda=token.is_cuda)
            return
        clock = time.perf_counter if token.is_cuda else time.process_time
        _wait(token)
        start = clock()
        self.model(token, past_key_values=self.cache)
        _wait(token)
        self.times.append(1000 * (clock() - start))


def _wait(token: Tensor) -> None:
    if token.is_cuda:
        torch.cuda.synchronize()


def judge(rows: Rows, options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=options.width, intermediate_size=options.width,
        num_hidden_layers=options.layers, num_attention_heads=options.heads, num_key_value_heads=options.pairs,
        head_dim=options.head_size, max_position_embeddings=2 * max(options.lengths),
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().to(options.device, getattr(torch, options.type)).requires_grad_(False)
    named = ways(model)
    for tokens in options.lengths:
        for batch in options.batches:
            keys = {name: f"{options.device}, {options.type}, {batch} x {tokens}, {name}" for name in named}
            if not any(map(rows.wanted, keys.values())):
                continue
            prompt = torch.randint(VOCABULARY, (batch, tokens), device=options.device)
            try:
                runners = {name: Runner(model, way(), prompt) for name, way in named.items()}
                for number in range(WARM + options.steps):
                    token = torch.randint(VOCABULARY, (batch, 1), device=options.device)
                    for runner in runners.values():
                        runner.step(token, number)
            except torch.OutOfMemoryError:
                print(f"{batch} x {tokens}: does not fit", flush=True)
                continue
            for name, runner in runners.items():
                ratios = [a / b for a, b in zip(runner.times, runners[WHOLE].times, strict=True)]
                low, middle, high = statistics.quantiles(ratios, n=4)
                values = {
                    "shape": f"{options.layers} layers of {options.width}, {options.heads} query and {options.pairs} "
                    f"key/value heads of {options.head_size}, {options.type}, {options.device}",
                    "batch": batch,
                    "tokens": tokens,
                    "name": name,
                    "ms": statistics.median(runner.times),
                    "ratio": middle,
                    "quartiles": [low, high],
                    "bytes": runner.bytes,
                    "peak_bytes": runner.peak,
                    "steps": options.steps,
                }
                rows.add(keys[name], values, seed=options.seed, threads=options.threads)
            del runners


def page(rows: Rows) -> str:
    text = "# Decoding with compressed caches\n\n" + prose((__doc__ or "").split("\n\n", 2)[2])
    for shape in dict.fromkeys(row["shape"] for row in rows.rows):
        here = [row for row in rows.rows if row["shape"] == shape]
        text += f"## {shape}\n\n"
        for batch, tokens in dict.fromkeys((row["batch"], row["tokens"]) for row in here):
            listed = [row for row in here if (row["batch"], row["tokens"]) == (batch, tokens)]
            lines = [
                (
                    row["name"],
                    f"{row['ms']:.1f}",
                    f"{row['ratio']:.2f} ({row['quartiles'][0]:.2f} to {row['quartiles'][1]:.2f})",
                    f"{row['bytes'] / 1e6:.1f}",
                    f"{row['peak_bytes'] / 1e6:.1f}",
                )
                for row in listed
            ]
            heads = ("cache", "ms a token", "of transformers' time", "cache, MB", "peak of a step, MB")
            text += f"{batch} x {tokens:,} tokens, {listed[0]['steps']} steps:\n\n{table(heads, lines)}\n\n"
    return text


def more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--type", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8, help="of queries")
    parser.add_argument("--pairs", type=int, default=2, help="heads of keys and values")
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 16384], help="tokens of prompts")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--steps", type=int, default=24, help="that are timed")


def main() -> None:
    options = arguments((__doc__ or "").splitlines()[0], cases=("all",), threads=1, more=more)
    torch.set_num_threads(options.threads)
    rows = Rows("kv_speed", fresh=options.fresh, packages=("transformers",))
    if not options.table:
        with torch.no_grad():
            judge(rows, options)
    rows.write(page(rows))


if __name__ == "__main__":
    main()
