"""Trains a small Llama with long context that can retrieve: what the benchmarks of caches are run on.

    python benchmarks/kv_model.py --out runs/kv_model/gqa --context 2048 --batch 2 --steps 800    # half an hour, a core
    python benchmarks/kv_model.py --out runs/kv_model/mha --pairs 4             # as many key/value heads as query heads
    python benchmarks/kv_model.py --out runs/kv_model/large --width 384 --layers 8 --heads 12 --pairs 4 \
        --context 2048 --batch 8 --steps 6000 --device cuda                      # a GPU

Tokens are bytes, and one token for each of 64 keys (from 256) and 64 values (from 320). A page is text with lines
`#KEY VALUE` in it and questions `?KEY VALUE` behind it; the loss is that of the answers and, with a weight of
`--share`, that of the text. What makes looking back form within minutes: rows of numbers without text first, said
again from a place drawn by chance, so that no fixed distance helps; then lines without text, more and more of them;
then text, longer and longer. A stage ends when the validation split is answered to `--target`, or after its rounds;
the last one has `--steps` steps, whose rate falls to zero. Killed, the same command goes on from its last round.
Writes OUT/model.safetensors, config.json and training.json.
"""

import argparse
import json
import lzma
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rows import ROOT
from torch import Tensor, nn
from torch.nn import functional

from niwaki.data import TextSplits, open_text
from niwaki.files import write_json
from niwaki.measure import Measurement
from niwaki.tasks import Facts, LongText, Needle, Retrieval

BOOKS = ROOT.parent / "shared" / "data" / "text" / "books" / "train_small.txt.xz"
BYTES, NUMBERS, WORDS = 256, 64, 384
"""Tokens of text, keys or values behind them, and all tokens."""
ECHO = 16
"""Numbers in a row of the first stage."""
SHARPNESS = 0.06
"""Standard deviation of the first weights: with transformers' 0.02 attention starts too flat for a width of 128."""


def facts() -> Facts:
    """Lines `#KEY VALUE`, questions `?KEY VALUE`, a line's end after each."""
    keys = torch.arange(BYTES, BYTES + NUMBERS)[:, None]
    return Facts(keys, keys + NUMBERS, before=tuple(b"#"), after=tuple(b"\n"), ask=tuple(b"?"))


class Stage(NamedTuple):
    """A part of the curriculum."""

    lines: int
    """0: numbers that are said again."""
    length: int | None
    """Tokens of a page before its questions; None: the lines alone."""
    questions: int
    batch: int
    steps: int
    """Of a round."""
    rounds: int
    """At most."""


def stages(asked: argparse.Namespace) -> list[Stage]:
    """From few lines to many, from lines alone to the whole context; fewer pages in a step as they get longer."""
    found = [Stage(0, None, ECHO, 96, 100, 20), Stage(8, None, 8, 64, 100, 20)]
    found += [Stage(16, None, 16, 32, 100, 10), Stage(48, None, 48, 12, 100, 10)]
    length = 256
    while length < asked.context:
        found.append(Stage(min(48, length // 16), length - 64, 16, max(asked.batch, 4096 // length), 100, 10))
        length *= 2
    rounds = max(1, round(asked.steps / 200))
    return [*found, Stage(48, asked.context - 200, 32, asked.batch, 200, rounds)]


def echo(stage: Stage, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Different numbers in a row, and again from a place drawn by chance; what can be told is to be told."""
    first = BYTES + torch.rand(stage.batch, 2 * NUMBERS, generator=generator).argsort(1)[:, :ECHO]
    places = torch.arange(ECHO) + torch.randint(ECHO, (stage.batch, 1), generator=generator)
    rows = torch.cat([first, first.gather(1, places % ECHO)], 1)
    told = torch.zeros_like(rows[:, 1:], dtype=torch.bool)
    told[:, ECHO:] = True
    return rows, told


def retrieval(asked: argparse.Namespace, stage: Stage, pages: int) -> Retrieval:
    return Retrieval(
        facts(), stage.lines, length=stage.length, questions=stage.questions, filler=text(asked, 64),
        batch=stage.batch, sequences=pages, seed=asked.seed,
    )  # fmt: skip


def batches(asked: argparse.Namespace, stage: Stage, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens, and which of all but the first are answers."""
    if not stage.lines:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(stage.steps):
            yield echo(stage, generator)
        return
    for page in retrieval(asked, stage, stage.batch * stage.steps).train_batches(seed):
        rows = torch.cat([page.context, page.rest], 1)
        told = torch.cat([torch.zeros(page.context.shape[1], dtype=torch.bool), page.telling])[:-1]
        yield rows, told.expand(len(rows), -1)


def of_text(rows: Tensor, told: Tensor) -> Tensor:
    """Which of all but the first are bytes of the text: behind a byte, and no beginning of a line or question."""
    before, here = rows[:, :-1], rows[:, 1:]
    return (before < BYTES) & (here < BYTES) & (here != ord("#")) & (here != ord("?")) & ~told


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
        initializer_range=SHARPNESS, rope_parameters={"rope_type": "default", "rope_theta": asked.base},
    )  # fmt: skip
    return LlamaForCausalLM(config)


def train(asked: argparse.Namespace) -> None:
    asked.out.mkdir(parents=True, exist_ok=True)
    model, record_file, state = network(asked).to(asked.device), asked.out / "training.json", asked.out / "state.pt"
    optimizer = torch.optim.AdamW(model.parameters(), lr=asked.lr, betas=(0.9, 0.98), weight_decay=0.05)
    record: dict[str, Any] = {"rounds": []}
    if state.exists():
        saved = torch.load(state, map_location=asked.device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        record = json.loads(saved["record"])
    record["settings"] = {name: str(value) if isinstance(value, Path) else value for name, value in vars(asked).items()}
    record["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    print(f"{record['parameters']} parameters", flush=True)
    plan = stages(asked)
    for number, stage in enumerate(plan):
        last = number == len(plan) - 1
        for turn in range(stage.rounds):
            done = [r for r in record["rounds"] if r["stage"] == number]
            if len(done) > turn:
                if done[turn]["accuracy"] >= asked.target and not last:
                    break
                continue
            entry = one_round(asked, model, optimizer, number=number, turn=turn)
            record["rounds"].append(entry)
            kept = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "record": json.dumps(record)}
            save(state, kept)
            write_json(record_file, record)
            print(entry, flush=True)
            if entry["accuracy"] >= asked.target and not last:
                break
    model.cpu().save_pretrained(asked.out)
    record["test"] = tested(asked, model)
    write_json(record_file, record)
    print(json.dumps(record["test"], indent=1), flush=True)


def save(file: Path, state: dict[str, Any]) -> None:
    aside = file.with_suffix(".part")
    torch.save(state, aside)
    aside.replace(file)


def one_round(
    asked: argparse.Namespace, model: nn.Module, optimizer: torch.optim.Optimizer, *, number: int, turn: int
) -> dict[str, Any]:
    started, plan = time.perf_counter(), stages(asked)
    stage, last = plan[number], number == len(plan) - 1
    tokens, losses, right, nats = 0, 0.0, 0.0, 0.0
    model.train()
    for step, (rows, told) in enumerate(batches(asked, stage, asked.seed * 100_000 + number * 1000 + turn)):
        done = (turn + step / stage.steps) / stage.rounds if last else 0.0
        rising = min(1.0, (step + 1) / 50) if number == turn == 0 else 1.0
        for group in optimizer.param_groups:
            group["lr"] = asked.lr * rising * (1 - done)
        rows, told = rows.to(asked.device), told.to(asked.device)
        answers, others = answers_and_text(model, rows, told)
        loss = functional.cross_entropy(*answers)
        if len(others[1]):
            of_others = functional.cross_entropy(*others)
            nats += of_others.item()
            loss = loss + asked.share * of_others
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += rows.numel()
        losses += loss.item()
        right += (answers[0].argmax(1) == answers[1]).double().mean().item()
    seconds = time.perf_counter() - started
    count = stage.steps
    found = {"stage": number, "round": turn, "lines": stage.lines, "length": stage.length, "loss": losses / count}
    found |= {"training accuracy": 100 * right / count, "accuracy": validated(asked, stage, model)}
    return {**found, "nats of text": nats / count, "tokens": tokens, "seconds": seconds}


def answers_and_text(model: Any, rows: Tensor, told: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Scores and tokens, of both kinds; only where they count, which saves most of the output layer."""
    hidden = model.model(rows, use_cache=False).last_hidden_state[:, :-1]
    here = rows[:, 1:]
    which = (told, of_text(rows, told))
    first, second = ((model.lm_head(hidden[places]), here[places]) for places in which)
    return first, second


@torch.no_grad()
def validated(asked: argparse.Namespace, stage: Stage, model: nn.Module) -> float:
    """Per cent of answers, of the validation split; of the first stage, of new rows."""
    if stage.lines:
        return retrieval(asked, stage, 64).evaluate(model, split="val").value
    rows, told = echo(stage, torch.Generator().manual_seed(-1))
    answers, _ = answers_and_text(model.eval(), rows.to(asked.device), told.to(asked.device))
    return 100 * (answers[0].argmax(1) == answers[1]).double().mean().item()


def tested(asked: argparse.Namespace, model: nn.Module) -> dict[str, Any]:
    """Of the test split: lines and a needle at the whole context, and the perplexity of the text."""
    splits = text(asked, asked.context)
    found: dict[str, Measurement] = {}
    found |= retrieval(asked, stages(asked)[-1], 128).metrics(model, split="test")
    needle = Needle(facts(), text(asked, 64), lengths=(asked.context // 2, asked.context - 8), trials=32)
    found |= {f"needle, {name}": one for name, one in needle.metrics(model, split="test").items()}
    half = asked.context // 2
    found |= {"perplexity": LongText(splits, asked.context, half).metrics(model, split="test", limit=128)["perplexity"]}
    return {name: {"value": m.value, "spread": m.spread, "definition": m.definition} for name, m in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4, help="of queries")
    parser.add_argument("--pairs", type=int, default=2, help="heads of keys and values")
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--base", type=float, default=5e5, help="of rotary positions")
    parser.add_argument("--context", type=int, default=1024, help="tokens of the longest pages")
    parser.add_argument("--batch", type=int, default=4, help="pages in a step of the last stage")
    parser.add_argument("--steps", type=int, default=2000, help="of the last stage")
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
