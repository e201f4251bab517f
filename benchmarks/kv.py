"""Compressed key/value caches beside a peer's: the same channels chosen, and the bytes that are really held.

    python benchmarks/kv.py --model FOLDER --text FILE --peer peer/bin/python

The model is a folder of transformers; the text is read as bytes, or by the tokenizer in the folder `--tokenizer`. The
peer runs in an environment of its own: see benchmarks/kv_peer.py.
"""

import argparse
import json
import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from rows import Rows, arguments, prose, table
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from niwaki import kv
from niwaki.data import open_text
from niwaki.kv.compressed_layer import CompressedLayer

KEEPS = (0.7, 0.5, 0.3)


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


def page(rows: Rows) -> str:
    lines = [
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
    return "# Key/value caches beside a peer\n\n" + prose(__doc__ or "") + table(heads, lines)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="runs/kv_model/gqa", help="folder of transformers")
    parser.add_argument("--text", default="", help="a text to take the prompt from")
    parser.add_argument("--tokenizer", help="folder of its tokenizer; bytes unless said")
    parser.add_argument("--length", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--peer", default="", help="command of the peer's python")


def main() -> None:
    asked = arguments((__doc__ or "").splitlines()[0], cases=("peer",), threads=1, more=options)
    torch.set_num_threads(asked.threads)
    rows = Rows("kv", fresh=asked.fresh, packages=("transformers",))
    if not asked.table:
        beside(rows, asked)
    rows.write(page(rows))


if __name__ == "__main__":
    main()
