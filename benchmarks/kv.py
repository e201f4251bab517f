"""Compressed key/value caches: beside a peer's, the same channels chosen and the bytes really held; and decoding time.

    python benchmarks/kv.py --only peer --model FOLDER --text FILE --peer peer/bin/python
    python benchmarks/kv.py --only speed

peer: the model is a folder of transformers; the text is read as bytes, or by the tokenizer in the folder `--tokenizer`.
The peer runs in an environment of its own: see benchmarks/kv_peer.py.

speed: two layers of a Llama with random weights (8 query heads, 2 key/value heads of 64 channels, float32), one
sequence; a forward pass of one token, caches in turns. transformers' own cache copies all its keys and values for each
token; "in two parts" holds the same numbers as ours does, the prompt untouched and new tokens behind it, with nothing
left out, and so tells how much of a gain is that. The machine did other work meanwhile: compare within a column, and
mind the spread (half the distance of the quartiles).
"""

import argparse
import json
import shlex
import subprocess
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rows import Rows, arguments, prose, table
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from niwaki import kv
from niwaki.data import open_text
from niwaki.kv.compressed_layer import CompressedLayer

KEEPS = (0.7, 0.5, 0.3)
LENGTHS = (2048, 8192, 16384)
STEPS = 16
THIN = kv.ThinK(keep=0.6)
HOWS: dict[str, kv.Compression] = {
    "ThinK 0.6": kv.Compression(channels=THIN),
    "ThinK 0.5, values 0.5": kv.Compression(channels=kv.ThinK(keep=0.5, values=0.5)),
    "SnapKV 0.25": kv.Compression(tokens=kv.SnapKV(keep=0.25)),
    "SnapKV 0.25, ThinK 0.6": kv.Compression(tokens=kv.SnapKV(keep=0.25), channels=THIN),
    "KIVI 4 bits": kv.Compression(bits=kv.KIVI(bits=4)),
    "ThinK 0.6, KIVI 4 bits": kv.Compression(channels=THIN, bits=kv.KIVI(bits=4)),
}


class InTwo(kv.KVLayer):
    """Everything, the prompt apart from what follows."""

    def take(self, call: kv.Call) -> Tensor:
        if not self.parts:
            width = call.keys.shape[2]
            self.parts = (
                kv.Segment.whole(call.keys, call.values, start=0),
                kv.Segment.whole(call.keys[:, :, :0], call.values[:, :, :0], start=width),
            )
            return call.own(call.keys, call.values)
        first, last = self.parts
        assert isinstance(last, kv.Segment)
        self.parts = (first, last.append(call.keys, call.values))
        return kv.attend(call, self.parts)[0]


class Whole(kv.How):
    def layer(self, site: kv.Site) -> kv.KVLayer:
        return InTwo()


def chosen(model: Any, prompt: Tensor, keep: float) -> tuple[list[list[list[int]]], list[int]]:
    """Channels that we leave out, per layer and head, and bytes of the whole cache and of ours."""
    # nothing recent stays whole, as in the peer
    cache = kv.KVCache(model, kv.Compression(channels=kv.ThinK(keep=keep), recent=0))
    whole = DynamicCache()
    with torch.no_grad():
        for one in (whole, cache):
            model(prompt, past_key_values=one)
    left_out = []
    for layer in cache.layers:
        assert isinstance(layer, CompressedLayer) and layer.old is not None and layer.old.key_channels is not None
        kept, width = layer.old.key_channels[0].tolist(), layer.site.head_dim
        left_out.append([sorted(set(range(width)) - set(head)) for head in kept])
    return left_out, [kv.cache_bytes(whole), cache.nbytes()]


def beside(rows: Rows, options: argparse.Namespace) -> None:
    """One row for each share that stays."""
    splits = open_text(options.text, length=options.length, tokenizer=options.tokenizer)
    prompt = splits.test.blocks[:1].long()
    model = AutoModelForCausalLM.from_pretrained(options.model, local_files_only=True, dtype=torch.float32).eval()
    for keep in KEEPS:
        key = f"peer {Path(options.model).name} {keep}"
        if not rows.wanted(key):
            continue
        with tempfile.TemporaryDirectory() as folder:
            given, taken = Path(folder) / "prompt.json", Path(folder) / "peer.json"
            given.write_text(json.dumps(prompt[0].tolist()))
            words = [*shlex.split(options.peer), str(Path(__file__).parent / "kv_peer.py"), "--model", options.model]
            words += ["--prompt", str(given), "--keep", str(keep), "--out", str(taken)]
            subprocess.run(words, check=True, timeout=600, stderr=subprocess.DEVNULL)
            peer = json.loads(taken.read_text())
        ours, held = chosen(model, prompt, keep)
        pairs = [
            (a, b) for mine, other in zip(ours, peer["zeroed"], strict=True) for a, b in zip(mine, other, strict=True)
        ]
        values = {
            "what": "peer",
            "model": Path(options.model).name,
            "keep": keep,
            "tokens": prompt.shape[1],
            "heads": len(pairs),
            "same": sum(a == b for a, b in pairs),
            "bytes": held[0],
            "ours_bytes": held[1],
            "peer_bytes": peer["bytes"][1],
            "peer": peer["versions"],
        }
        rows.add(key, values, seed=0, threads=1)


def speed(rows: Rows, options: argparse.Namespace) -> None:
    """Rows of every way at each length."""
    torch.manual_seed(options.seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2 * max(LENGTHS),
    )
    model = LlamaForCausalLM(config).eval()
    for tokens in LENGTHS:
        names = ["transformers", "in two parts", *HOWS]
        if not any(rows.wanted(f"speed {tokens} {name}") for name in names):
            continue
        hows = [Whole(), *HOWS.values()]
        makers = [DynamicCache, *(partial(kv.KVCache, model, how) for how in hows)]
        prompt = torch.randint(1, 256, (1, tokens))
        for name, taken in zip(names, kv.decoding(model, prompt, makers, steps=STEPS), strict=True):
            values = {
                "what": "speed",
                "tokens": tokens,
                "name": name,
                "bytes": taken["cache_bytes"].value,
                "ms": taken["decode_ms"].value,
                "spread": taken["decode_ms"].spread,
            }
            rows.add(f"speed {tokens} {name}", values, seed=options.seed, threads=options.threads)


def page(rows: Rows) -> str:
    peers = [
        (
            row["model"],
            row["keep"],
            f"{row['same']} of {row['heads']}",
            f"{row['bytes']:,}",
            f"{row['ours_bytes']:,}",
            f"{row['peer_bytes']:,}",
        )
        for row in rows.rows
        if row["what"] == "peer"
    ]
    heads = ("model", "key channels kept", "heads with the same channels", "whole cache, bytes", "ours", "kvpress")
    text = "# Key/value caches\n\n" + prose(__doc__ or "")
    text += "## Beside a peer\n\n" + table(heads, peers)
    taken = [row for row in rows.rows if row["what"] == "speed"]
    if taken:
        told = []
        for name in dict.fromkeys(row["name"] for row in taken):
            here = {row["tokens"]: row for row in taken if row["name"] == name}
            cells = [f"{row['ms']:.1f} ± {row['spread']:.1f}" if (row := here.get(n)) else "-" for n in LENGTHS]
            last = here.get(LENGTHS[-1])
            told.append((name, *cells, f"{last['bytes']:,.0f}" if last else "-"))
        columns = ("cache", *(f"ms at {n} tokens" for n in LENGTHS), f"bytes at {LENGTHS[-1]}")
        text += "\n\n## Time of a decoded token\n\n" + table(columns, told)
    return text


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="runs/kv_model/gqa", help="folder of transformers")
    parser.add_argument("--text", default="", help="a text to take the prompt from")
    parser.add_argument("--tokenizer", help="folder of its tokenizer; bytes unless said")
    parser.add_argument("--length", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--peer", default="", help="command of the peer's python")


def main() -> None:
    asked = arguments((__doc__ or "").splitlines()[0], cases=("peer", "speed"), threads=1, more=options)
    torch.set_num_threads(asked.threads)
    rows = Rows("kv", fresh=asked.fresh, packages=("transformers",))
    if not asked.table:
        for name, run in (("peer", beside), ("speed", speed)):
            if asked.only is None or name in asked.only:
                run(rows, asked)
    rows.write(page(rows))


if __name__ == "__main__":
    main()
