"""The peer's ThinK on a model and a prompt: run by benchmarks/kv.py in the peer's own environment.

    python -m venv peer && peer/bin/pip install kvpress
    peer/bin/python benchmarks/kv_peer.py --model FOLDER --prompt FILE --keep 0.5 --out FILE

The model is a folder that save_pretrained of transformers wrote; the prompt a JSON list of tokens. Writes JSON: which
channels of each layer's keys were zeroed, and bytes of the distinct storages of the cache.
"""

import argparse
import json
from importlib.metadata import version

import torch
from kvpress import ThinKPress
from transformers import AutoModelForCausalLM, DynamicCache


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "prompt", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--keep", type=float, required=True)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32).eval()
    with open(asked.prompt) as file:
        tokens = torch.tensor([json.load(file)])
    caches = [DynamicCache(), DynamicCache()]
    with torch.no_grad():
        model(tokens, past_key_values=caches[0])
        with ThinKPress(key_channel_compression_ratio=1 - asked.keep)(model):
            model(tokens, past_key_values=caches[1])
    zeroed = [[(head == 0).all(0).nonzero().flatten().tolist() for head in layer.keys[0]] for layer in caches[1].layers]
    found = {
        "versions": {name: version(name) for name in ("kvpress", "transformers", "torch")},
        "zeroed": zeroed,
        "bytes": [held(cache) for cache in caches],
    }
    with open(asked.out, "w") as file:
        json.dump(found, file)


def held(cache: DynamicCache) -> int:
    """Bytes of the distinct storages behind keys and values."""
    storages = {}
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


if __name__ == "__main__":
    main()
