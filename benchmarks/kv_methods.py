"""What compressed key/value caches cost and lose: bytes held, perplexity, and retrieval by depth, of every method.

    python benchmarks/kv_methods.py                              # stories260k: perplexity only
    python benchmarks/kv_methods.py --model runs/kv_model/gqa    # a model of benchmarks/kv_model.py: retrieval too

Each text window and each page is read into a cache, and what follows is decoded token by token against it. All methods
see the same tokens, in numbers of 16 bits (float16; bfloat16 for the models that retrieve). Projections are made and
trained on the training split, those of models that retrieve on pages with lines; nothing is chosen on the test split.
StreamingLLM and H2O keep as many tokens as fit into the bytes of unpacked CSKV.
"""

import argparse
import copy
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from kv_model import facts
from llama2c import Vocabulary
from rows import ROOT, Rows, arguments, prose, table
from transformers import AutoModelForCausalLM, DynamicCache

import niwaki
from niwaki import kv
from niwaki.data import TextSplits, Tokens, open_text
from niwaki.tasks import Cached, Facts, LanguageModelling, LongText, Retrieval, Task, Whole
from niwaki.tasks.reading import Reader
from niwaki.train import Recovery

DATA = ROOT.parent / "shared" / "data"
KEEPS = (0.5, 0.2)
"""Of CSKV."""
LEAST = 0.14
"""Of CSKV in 4 bits, so that 95 % of an old token's bytes are saved with the scales counted."""
WINDOW = 32
TRAINING = Recovery(
    epochs=1, limit=150, lr=3e-3, optimizer="adamw", schedule="linear", warmup=0.0, weight_decay=0.0, clip=1.0
)
"""The published rate, 5e-5, was chosen for a model of 7 billion parameters and more steps; 3e-3 suits small ones."""


LIMITS = """
Methods without a row were not run. stories260k has heads of 8 channels, so that CSKV 0.2 keeps floor(1.6) = 1 of each
(12.5 %), and 512 tokens of context; it was not taught to retrieve, and nothing there is about retrieval. Perplexities
are of the same tokens; the standard error over windows (0.27 of stories260k, 0.56 of gqa, 0.55 of mha) is that of
each figure alone. Eviction has the bytes of CSKV at the end of the window; at the prompt it has more.

gqa is benchmarks/kv_model.py with 541 312 parameters, 2 layers, 2 key/value heads of 64 channels and 2048 tokens,
taught for 33 minutes on one busy core: 9.9 million tokens, `--context 2048 --batch 2`, first with `--steps 3000`,
after two rounds of the last stage on with `--steps 800`. Read whole it answers 99.8 % of 48 lines in 1848 tokens; of
single needles 96.6 %, of those right before their question 72 % at 2040 tokens. As a model of text it is weak
(perplexity 15 a byte), and one seed was trained. CSKV keeps floor(0.2 * 64) = 12 channels.

mha has as many key/value heads as query heads, 4: 606 848 parameters, taught for 34 minutes on a shared core, 9.4
million tokens, `--context 2048 --batch 2 --pairs 4 --steps 800`, one seed. Read whole it answers 99.9 % of the lines;
of single needles all but those right before their question, which it never finds (it was not taught such). Its
perplexity is 15 a byte, too.

What holds of the papers' orders on gqa, and what does not: key channels go almost for nothing, half of the value
channels cost a tenth of the perplexity. SnapKV behind ThinK loses lines, the early ones most: it keeps what the end of
the prompt looks at, and the questions come later. At equal bytes CSKV 0.2 finds far lines where H2O and StreamingLLM,
which evicted them, do not; perplexity, which here needs near text only, would not tell. At keep 0.2 whitened factors
are better than ASVD, and ASVD than SVD, by perplexity; by retrieval they cannot be told apart, all at the whole
cache's level. ASVD trained comes to where the whitened factors begin. Training for 4 bits did not beat rounding
afterwards: least value and scale leave little to learn, where the papers' quantiser breaks groups without a 0. "80 %"
is 81.2 % of an old token's bytes, since ranks are floored; "95 %" is 93.2 %: 5.83 bits a number with its scales. With
32 whole tokens, and more of them where keys are packed by blocks, 79.6 % and 89.6 % of the cache of 1983 tokens are
saved. To save 94.9 % with the scales counted, keep 0.14 (8 channels) is needed, where scales come to 2.5 bits a number;
there lines are lost at every depth, one of fifteen.

On mha the same holds but for this. Key channels cost more: perplexity rises by a twentieth at keep 0.6 and by a fifth
at 0.5, where gqa has lost a fiftieth, while half of the value channels are free; lines are found all the same.
CSKV 0.2 can't be told from the whole cache, however its factors are made, in 16 bits or 4, and at 0.14 in 4 bits, where
94.9 % are saved with the scales counted, 99.7 % of the lines are found. SnapKV and eviction lose more lines than on
gqa. Eviction lowers perplexity below that of the whole cache: this model reads far text worse than
none, one more reason to judge caches by what is found in them.
"""


@dataclass(frozen=True, eq=False)
class Case:
    """A model and what it is judged on."""

    name: str
    model: Any
    exact: Any
    """The same weights in float32, to calibrate and train with."""
    splits: TextSplits
    length: int
    facts: Facts | None = None
    lines: int = 0
    made: dict[str, kv.Projections] = field(default_factory=dict)

    def pages(self, count: int, *, batch: int, reader: Reader | None = None) -> Retrieval:
        """Pages of facts, as long as the model was taught."""
        assert self.facts is not None
        return Retrieval(
            self.facts, self.lines, length=self.length - 200, questions=16, filler=self.splits, batch=batch,
            sequences=count, seed=1, reader=reader or Whole(),
        )  # fmt: skip

    def words(self, steps: int) -> tuple[Task, list[Any]]:
        """What projections are trained on, 2048 tokens or a page in a step, and inputs of 64 sequences to begin with.

        A model that retrieves is called with pages: what they hold besides text has keys of its own.
        """
        if self.facts is None:
            found = list(self.splits.train.batches(4, shuffle_seed=0))[:16]
            return LanguageModelling(self.splits, batch=max(1, 2048 // self.length)), found
        pages = self.pages(steps, batch=1)
        return pages, [pages.inputs(page) for page in self.pages(64, batch=4).train_batches(1)]

    def projections(self, keep: float, kind: str) -> kv.Projections:
        """`svd`, `asvd`, `whitened`, or trained from there: `asvd, trained`, `whitened, trained for 4 bits`."""
        key = f"{keep} {kind}"
        if key not in self.made:
            init, _, training = kind.partition(", ")
            if not training:
                self.made[key] = kv.project(self.exact, self.words(1)[1], keep=keep, init=init)  # type: ignore[arg-type]
            else:
                rounding = kv.Rounding(4, WINDOW) if "bits" in training else None
                words, _ = self.words(TRAINING.limit or 1)
                start = self.projections(keep, init)
                self.made[key], _ = kv.reconstruct(self.exact, start, words, how=TRAINING, rounding=rounding)
        return self.made[key]


def stories(options: argparse.Namespace) -> Case:
    """The small published model, on the sample of its own kind of text, cut by position."""
    text = (DATA / "text/tinystories-sample/ts_sample.txt").read_text(encoding="utf-8")[: options.characters]
    vocabulary = Vocabulary(DATA / "lm/stories260k/tok512.bin")
    listed = [story.strip() for story in text.split("<|endoftext|>") if story.strip()]
    ends, parts = [0, int(0.8 * len(listed)), int(0.9 * len(listed)), len(listed)], []
    for start, stop in itertools.pairwise(ends):
        tokens = torch.tensor([token for story in listed[start:stop] for token in vocabulary.tokens(story)])
        parts.append(Tokens(tokens[: len(tokens) // 512 * 512].view(-1, 512)))
    model = niwaki.models.load(f"llama2c:{DATA / 'lm/stories260k/stories260K.bin'}").model
    return Case("stories260k", *both(model, torch.float16), TextSplits(*parts, 512, len(vocabulary.numbers)), 512)


def both(model: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """In 16 bits, and these very numbers in float32."""
    model = model.to(dtype)
    return model, copy.deepcopy(model).float()


def trained(options: argparse.Namespace) -> Case:
    """A model of benchmarks/kv_model.py with its own text."""
    folder = Path(options.model)
    model = AutoModelForCausalLM.from_pretrained(str(folder), local_files_only=True).eval()
    length = int(model.config.max_position_embeddings)
    splits = open_text(folder / "books.txt", length=length, val=0.02, test=0.02)
    # bfloat16: as good here, and CPUs without float16 read prompts 3 times as fast
    return Case(folder.name, *both(model, torch.bfloat16), splits, length, facts(), options.lines)


def arms(case: Case) -> Iterator[tuple[str, Callable[[], kv.How | None]]]:
    """Names and ways."""
    yield "whole", lambda: None
    for keep in (0.7, 0.6, 0.5):
        yield f"ThinK {keep}", lambda keep=keep: kv.Compression(channels=kv.ThinK(keep=keep))
    yield "ThinK 0.5, values 0.5", lambda: kv.Compression(channels=kv.ThinK(keep=0.5, values=0.5))
    yield "ThinK 0.6, SnapKV 0.5", lambda: kv.Compression(channels=kv.ThinK(keep=0.6), tokens=kv.SnapKV(keep=0.5))
    yield "ThinK 0.6, KIVI 4 bit", lambda: kv.Compression(channels=kv.ThinK(keep=0.6), bits=kv.KIVI(bits=4))
    for keep in KEEPS:
        for kind in ("svd", "asvd", "whitened", "asvd, trained"):
            yield (
                f"CSKV {keep}, {kind}",
                lambda keep=keep, kind=kind: kv.CSKV(case.model, case.projections(keep, kind), WINDOW),
            )
        for kind in ("whitened", "whitened, trained for 4 bits"):
            yield (
                f"CSKV {keep}, {kind}, 4 bit",
                lambda keep=keep, kind=kind: kv.CSKV(case.model, case.projections(keep, kind), WINDOW, bits=4),
            )
        share = kv.plan(case.model, kv.CSKV(case.model, case.projections(keep, "svd"), WINDOW)).bytes(
            kv.Load(case.length - 1)
        )
        for policy in (kv.StreamingLLM, kv.H2O):
            yield (
                f"{policy.__name__}, bytes of CSKV {keep}",
                lambda policy=policy, share=share: evicting(case, policy, share),
            )

    yield (
        f"CSKV {LEAST}, whitened, 4 bit",
        lambda: kv.CSKV(case.model, case.projections(LEAST, "whitened"), WINDOW, bits=4),
    )


def evicting(case: Case, policy: Callable[..., kv.Eviction], share: int) -> kv.How:
    """As many tokens as fit into so many bytes, with the places and scores that are kept of each."""
    load = kv.Load(case.length - 1)
    ways = [
        kv.Compression(tokens=policy(keep=tokens), recent=min(WINDOW, tokens // 2)) for tokens in range(8, case.length)
    ]
    return [way for way in ways if kv.plan(case.model, way).bytes(load) <= share][-1]


def judge(case: Case, rows: Rows, options: argparse.Namespace) -> None:
    for name, way in arms(case):
        key = f"{case.name}, {name}"
        if not rows.wanted(key) or not any(part in name for part in options.arms):
            continue
        started = time.perf_counter()
        how = way()
        held: list[float] = []

        def counted(cache: Any, held: list[float] = held) -> None:
            tokens, batch = cache.get_seq_length(), options.windows
            held.append(kv.cache_bytes(cache) / tokens / batch)

        def new(how: kv.How | None = how) -> Any:
            return DynamicCache(config=case.model.config) if how is None else kv.KVCache(case.model, how)

        reader = Cached(new, step=1, seen=counted)
        task = LongText(case.splits, case.length, options.stride, batch=options.windows, reader=reader)
        found = task.metrics(case.model, split="test", limit=options.windows)
        values = {
            "model": case.name,
            "method": name,
            "bytes_per_token": held[0],
            "tokens": case.length - options.stride - 1,
            "perplexity": found["perplexity"].value,
            "perplexity_spread": found["perplexity"].spread,
            "definition": found["perplexity"].definition,
        }
        if how is not None:
            values["bytes_per_old_token"] = kv.plan(case.model, how).per_token()[1]
        if isinstance(how, kv.CSKV):
            numbers = sum(one.rank for pair in how.projections.layers.values() for one in pair)
            values["bits_of_a_number"] = 8 * values["bytes_per_old_token"] / numbers
        if case.facts is not None:
            asking = case.pages(options.pages, batch=16, reader=Cached(new, step=1))
            values["retrieval"] = {k: m.value for k, m in asking.metrics(case.model, split="test").items()}
        values["seconds"] = time.perf_counter() - started
        rows.add(key, values, seed=options.seed, threads=options.threads)


def page(rows: Rows) -> str:
    out = (
        "# Compressed key/value caches\n\n"
        + prose(LIMITS)
        + prose((__doc__ or "").split("\n\n", 1)[1].split("\n\n", 1)[1])
    )
    for model in dict.fromkeys(row["model"] for row in rows.rows):
        listed = [row for row in rows.rows if row["model"] == model]
        full = next((row for row in listed if row["method"] == "whole"), listed[0])
        depths = list(listed[0].get("retrieval", ()))
        heads = ("method", "bytes per token", "of the whole", "old token", "saved", "bits", "perplexity")
        heads = (*heads, "of the whole's", *(depth.replace("accuracy at", "lines at") for depth in depths))
        lines = [
            (
                row["method"],
                f"{row['bytes_per_token']:.1f}",
                f"{row['bytes_per_token'] / full['bytes_per_token']:.1%}",
                f"{row['bytes_per_old_token']:.1f}" if row.get("bytes_per_old_token") else "-",
                f"{1 - row['bytes_per_old_token'] / full['bytes_per_token']:.1%}"
                if row.get("bytes_per_old_token")
                else "-",
                f"{row['bits_of_a_number']:.2f}" if "bits_of_a_number" in row else "-",
                f"{row['perplexity']:.3f}",
                f"{row['perplexity'] / full['perplexity']:.3f}",
                *(f"{row['retrieval'][depth]:.1f}" for depth in depths),
            )
            for row in listed
        ]
        said = f"Bytes after a prompt of {full['tokens']} tokens. Perplexity: {full['definition']}."
        out += f"## {model}\n\n{said}\n\n{table(heads, lines)}\n\n"
    return out


def more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="", help="folder of benchmarks/kv_model.py; stories260k unless said")
    parser.add_argument("--arms", nargs="+", default=[""], help="methods whose name has one of these parts")
    parser.add_argument("--characters", type=int, default=1_500_000, help="of the sample of stories")
    parser.add_argument("--windows", type=int, default=32, help="of text")
    parser.add_argument("--stride", type=int, default=64, help="tokens told in each")
    parser.add_argument("--lines", type=int, default=48, help="of a page of facts")
    parser.add_argument("--pages", type=int, default=64, help="of facts")


def main() -> None:
    options = arguments((__doc__ or "").splitlines()[0], cases=("all",), threads=1, more=more)
    torch.set_num_threads(options.threads)
    rows = Rows("kv_methods", fresh=options.fresh, packages=("transformers",))
    if not options.table:
        judge(trained(options) if options.model else stories(options), rows, options)
    rows.write(page(rows))


if __name__ == "__main__":
    main()
