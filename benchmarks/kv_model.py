"""Trains a small Llama with long context that can retrieve: what the benchmarks of caches are run on.

    python benchmarks/kv_model.py --out runs/kv_model/gqa                       # a CPU core, about an hour
    python benchmarks/kv_model.py --out runs/kv_model/mha --pairs 4             # as many key/value heads as query heads
    python benchmarks/kv_model.py --out runs/kv_model/large --width 384 --layers 8 --heads 12 --pairs 4 --head-size 64 \
        --context 2048 --batch 8 --device cuda                                    # a GPU

Tokens are bytes, and one token for each of 256 numbers (256 to 511). Half of each step is text, half are contexts of
lines `#KEY VALUE` in text with questions `?KEY VALUE` after them. The curriculum goes from few lines without text to
many lines in long text; a stage ends when the validation split is answered to `--target`, or after its rounds. Killed,
the same command goes on from its last checkpoint. Writes OUT/model.safetensors, config.json and training.json.
"""

import argparse
import json
import lzma
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rows import ROOT
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from niwaki.data import TextSplits, open_text
from niwaki.files import write_json
from niwaki.measure import Measurement
from niwaki.tasks import Facts, LanguageModelling, Retrieval, Task
from niwaki.train import Checkpoints, Recovery

BOOKS = ROOT.parent / "shared" / "data" / "text" / "books" / "train_small.txt.xz"
NUMBERS, WORDS = 256, 512
"""How many numbers have a token of their own, from 256 up; and all tokens."""


def facts() -> Facts:
    """Lines `#KEY VALUE`, questions `?KEY VALUE`, a line's end after each."""
    numbers = torch.arange(NUMBERS, WORDS)[:, None]
    return Facts(numbers, numbers, before=tuple(b"#"), after=tuple(b"\n"), ask=tuple(b"?"))


class Stage(NamedTuple):
    """A part of the curriculum."""

    lines: int
    length: int | None
    """Tokens of a context; None: the lines alone."""
    questions: int
    batch: int
    steps: int
    """Of a round."""
    rounds: int
    """At most."""


def stages(context: int, batch: int) -> list[Stage]:
    """From few lines to many, from lines alone to `context` tokens; fewer contexts in a step as they get longer."""
    found = [Stage(8, None, 8, 64, 400, 8), Stage(16, 96, 12, 32, 150, 6), Stage(32, 224, 16, 16, 150, 6)]
    length = 448
    while length <= context // 2:
        found.append(Stage(32, length, 24, max(batch, 8), 150, 6))
        length *= 2
    return [*found, Stage(48, context - 200, 32, batch, 250, 12)]


@dataclass(frozen=True, eq=False)
class Both(Task):
    """A batch of lines and one of text in each step."""

    lines: Retrieval
    text: LanguageModelling
    share: float
    """What the text's loss counts, next to that of the answers."""

    @property
    def steps(self) -> int:
        return self.lines.steps

    def train_batches(self, seed: int) -> Iterator[Any]:
        return zip(self.lines.train_batches(seed), self.text.train_batches(seed), strict=False)

    def calibration(self, n_batches: int, seed: int) -> list[Any]:
        return [pair for pair, _ in zip(self.train_batches(seed), range(n_batches), strict=False)]

    def inputs(self, batch: Any) -> Tensor:
        return self.lines.inputs(batch[0])

    def example(self) -> Tensor:
        return self.lines.example()

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return self.lines.loss(model, batch[0]) + self.share * self.text.loss(model, batch[1])

    def evaluate(self, model: nn.Module, *, split: str = "test", limit: int | None = None) -> Measurement:
        return self.lines.evaluate(model, split=split, limit=limit)


def text(asked: argparse.Namespace, length: int) -> TextSplits:
    """The first bytes of the books, in blocks."""
    file = asked.out / "books.txt"
    if not file.exists():
        with lzma.open(asked.books) as books:
            content = books.read(asked.megabytes << 20)
        aside = file.with_suffix(".part")
        aside.write_bytes(content)
        aside.replace(file)
    return open_text(file, length=length, val=0.02, test=0.02)


def network(asked: argparse.Namespace) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(asked.seed)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=asked.width, intermediate_size=3 * asked.width, num_hidden_layers=asked.layers,
        num_attention_heads=asked.heads, num_key_value_heads=asked.pairs, head_dim=asked.head_size,
        max_position_embeddings=asked.context, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def train(asked: argparse.Namespace) -> None:
    asked.out.mkdir(parents=True, exist_ok=True)
    model, record_file = network(asked).to(asked.device), asked.out / "training.json"
    record: dict[str, Any] = json.loads(record_file.read_text()) if record_file.exists() else {"rounds": []}
    record["settings"] = {name: str(value) if isinstance(value, Path) else value for name, value in vars(asked).items()}
    record["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    weights = asked.out / "state.safetensors"
    if weights.exists():
        load_model(model, weights)
    print(f"{record['parameters']} parameters", flush=True)
    for number, stage in enumerate(stages(asked.context, asked.batch)):
        task = both(asked, stage)
        for turn in range(stage.rounds):
            done = [r for r in record["rounds"] if r["stage"] == number]
            if len(done) > turn:
                if done[turn]["accuracy"] >= asked.target:
                    break
                continue
            entry = one_round(asked, model, task, number=number, turn=turn)
            record["rounds"].append(entry)
            aside = weights.with_suffix(".part")
            save_model(model, str(aside))
            aside.replace(weights)
            write_json(record_file, record)
            print(entry, flush=True)
            if entry["accuracy"] >= asked.target:
                break
    model.cpu().save_pretrained(asked.out)
    record["test"] = tested(asked, model)
    write_json(record_file, record)
    print(json.dumps(record["test"], indent=1), flush=True)


def both(asked: argparse.Namespace, stage: Stage) -> Both:
    length = min(asked.context, max(128, stage.length or 0))
    splits = text(asked, length)
    lines = Retrieval(
        facts(), stage.lines, length=stage.length, questions=stage.questions, filler=text(asked, 64),
        batch=stage.batch, sequences=stage.batch * stage.steps, seed=asked.seed,
    )  # fmt: skip
    return Both(lines, LanguageModelling(splits, batch=max(1, asked.tokens // length)), asked.share)


def one_round(asked: argparse.Namespace, model: nn.Module, task: Both, *, number: int, turn: int) -> dict[str, Any]:
    started = time.perf_counter()
    schedule = "linear" if task.lines.length == stages(asked.context, asked.batch)[-1].length else "constant"
    how = Recovery(
        epochs=1, lr=asked.lr, optimizer="adamw", weight_decay=0.01, schedule=schedule, warmup=0.1, clip=1.0,
        seed=asked.seed * 1000 + number * 50 + turn, folder=str(asked.out / "rounds" / f"{number}-{turn}"),
        checkpoints=Checkpoints(every_steps=100),
    )  # fmt: skip
    history = how(model, task, resume=True)
    accuracy = task.evaluate(model, split="val", limit=64).value
    perplexity = task.text.metrics(model, split="val", limit=64)["perplexity"].value
    return {
        "stage": number, "round": turn, "lines": task.lines.lines, "length": task.lines.length,
        "loss": history.epochs[-1]["loss"], "accuracy": accuracy, "perplexity": perplexity,
        "seconds": time.perf_counter() - started,
    }  # fmt: skip


def tested(asked: argparse.Namespace, model: nn.Module) -> dict[str, Any]:
    """Of the test split, at the last stage's length."""
    task = both(asked, stages(asked.context, asked.batch)[-1])
    found = task.lines.metrics(model, split="test", limit=128)
    found |= {"perplexity": task.text.metrics(model, split="test", limit=128)["perplexity"]}
    return {name: {"value": m.value, "spread": m.spread, "definition": m.definition} for name, m in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4, help="of queries")
    parser.add_argument("--pairs", type=int, default=2, help="heads of keys and values")
    parser.add_argument("--head-size", type=int, default=32)
    parser.add_argument("--context", type=int, default=1024, help="tokens of the longest sequences")
    parser.add_argument("--batch", type=int, default=4, help="contexts in a step of the last stage")
    parser.add_argument("--tokens", type=int, default=1024, help="of text in a step")
    parser.add_argument("--share", type=float, default=0.3, help="weight of the text's loss")
    parser.add_argument("--target", type=float, default=97.0, help="per cent of answers that end a stage")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--books", type=Path, default=BOOKS)
    parser.add_argument("--megabytes", type=int, default=8, help="of the books")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    train(asked)


if __name__ == "__main__":
    main()
