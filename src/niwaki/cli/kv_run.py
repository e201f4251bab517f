"""What `niwaki kv` does once torch is there: plan, or run before and after."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch import nn
from transformers.cache_utils import DynamicCache

from niwaki import kv
from niwaki.cli.sources import ask
from niwaki.cli.talk import say, warn
from niwaki.data import TextSplits, open_text, tokenizer_in
from niwaki.errors import InputError, UnknownNameError
from niwaki.kv.plan import CachePlan
from niwaki.measure import Measurement
from niwaki.models import outline
from niwaki.tasks import Cached, Facts, LongText, Retrieval

CALIBRATION = 64
"""Windows of the training part that projections are made from, if it has so many."""
LONGEST = 2048
"""Tokens in a window unless said, if the model's context is as long."""
KINDS = {"snapkv": kv.SnapKV, "h2o": kv.H2O, "streaming_llm": kv.StreamingLLM}


def policy_of(text: str, known: Sequence[str]) -> kv.Eviction:
    """`snapkv:512` keeps 512 tokens, `h2o:0.2` a share.

    Raises:
        UnknownNameError, InputError: another policy, or no number.
    """
    name, colon, number = text.partition(":")
    if name not in known:
        raise UnknownNameError.of("policy for tokens", name, list(known))
    try:
        keep = float(number) if "." in number else int(number)
    except ValueError as cause:
        found = f"{number!r} is no number" if colon else "no number"
        raise InputError(f"--tokens {text}", found=found, do=f"write {name}:512 or {name}:0.2") from cause
    return KINDS[name](keep=keep)


class Way(Protocol):
    """How a cache is to be compressed, once the model is there."""

    def planned(self, model: nn.Module) -> kv.How: ...

    def fitted(self, model: nn.Module, splits: TextSplits) -> kv.How: ...


@dataclass(frozen=True)
class Given:
    """One that asks nothing of model and text."""

    how: kv.How

    def planned(self, model: nn.Module) -> kv.How:
        return self.how

    def fitted(self, model: nn.Module, splits: TextSplits) -> kv.How:
        return self.how


def think_way(
    keep: float, values: float | None, *, tokens: str | None, bits: int | None, recent: int, known: Sequence[str]
) -> Given:
    """ThinK, eviction and packing."""
    values = 1.0 if values is None else values
    return Given(
        kv.Compression(
            channels=None if keep == values == 1 else kv.ThinK(keep=keep, values=values),
            tokens=None if tokens is None else policy_of(tokens, known),
            bits=None if bits is None else kv.KIVI(bits=bits),
            recent=recent,
        )
    )


@dataclass(frozen=True)
class LowRankWay:
    """CSKV: projections from a file, or made from the text's training part."""

    keep: float
    values: float | None
    init: Any
    file: Path | None
    window: int
    bits: int | None

    def planned(self, model: nn.Module) -> kv.How:
        made = self._read() or kv.outlined(model, keep=self.keep, values=self.values)
        return kv.CSKV(model, replace(made, fingerprint=""), self.window, bits=self.bits)

    def fitted(self, model: nn.Module, splits: TextSplits) -> kv.How:
        made = self._read()
        if made is None:
            say(f"projections ({self.init}) from {CALIBRATION} windows of the text's training part")
            batches = list(splits.train.batches(1, shuffle_seed=0))[:CALIBRATION]
            made = kv.project(model, batches, keep=self.keep, values=self.values, init=self.init)
        return kv.CSKV(model, made, self.window, bits=self.bits)

    def _read(self) -> kv.Projections | None:
        return None if self.file is None else kv.Projections.load(self.file)


def planned(source: str, way: Way, *, batch: int) -> tuple[Any, dict[str, Any]]:
    """The table and the record of `niwaki kv plan`; weights are not read."""
    model = outline(source).model
    how = way.planned(model)
    promised = kv.plan(model, how)
    record = {"model": source, "how": _told(how), **promised.facts()}
    return _plan_table(promised, batch), record


def judged(
    source: str,
    way: Way,
    *,
    text: Path,
    tokenizer: Path | None,
    length: int | None,
    score: int | None,
    limit: int,
    lines: int,
    steps: int,
    batch: int,
    checkpoint: str | None,
    threads: int | None,
    device: str | None,
    seed: int,
) -> tuple[Any, dict[str, Any]]:
    """The table and the record of `niwaki kv MODEL`.

    Raises:
        InputError: a context that is longer than the model's, or too little text for one window.
    """
    asked = ask(source, checkpoint=checkpoint, seed=seed, threads=threads, device=device)
    model: Any = asked.loaded.model
    context = int(getattr(model.config, "max_position_embeddings", LONGEST))
    length = min(LONGEST, context) if length is None else length
    if length > context:
        do = "give --length up to that"
        raise InputError(f"windows of {length} tokens", found=f"a model for {context}", do=do)
    splits = open_text(text, length=length, tokenizer=tokenizer)
    vocabulary = int(model.get_input_embeddings().num_embeddings)
    if splits.vocabulary > vocabulary:
        found, do = f"{splits.vocabulary} tokens, the model has {vocabulary}", "give the model's own --tokenizer"
        raise InputError(f"read {text.name}", found=found, do=do)
    stride = length // 4 if score is None else score
    if not 0 < stride < length:
        raise InputError(f"--score {stride}", found=f"windows of {length} tokens", do="give 1 to length - 1")

    how = way.fitted(model, splits)
    promised = kv.plan(model, how)
    step = None if getattr(how, "steady", False) else 1
    makers: list[Any] = [lambda: DynamicCache(config=model.config), lambda: kv.KVCache(model, how)]
    sides: list[dict[str, Measurement]] = [{}, {}]
    for side, new in enumerate(makers):
        say(f"{('the whole', 'the compressed')[side]} cache: {limit} windows of {length} tokens, {stride} told")
        reader = Cached(new, step=step)
        task = LongText(splits, length, stride, batch, reader)
        sides[side] |= task.metrics(model, split="test", limit=limit)
        if side == 0 and sides[0]["perplexity"].value > vocabulary:
            warn(
                f"a perplexity above the {vocabulary} tokens of the vocabulary: is the text in the model's own tokens?"
            )
        if lines:
            facts = Facts.of_text(_encoder(tokenizer))
            asking = Retrieval(facts, lines, questions=min(8, lines), sequences=limit, batch=batch, reader=reader)
            sides[side]["retrieval"] = asking.evaluate(model, split="test")
    row = splits.test.blocks[:1].long().expand(batch, -1)[:, : max(1, length - steps - 2)]
    for known, timed in zip(sides, kv.decoding(model, row, makers, steps=steps), strict=True):
        known.update(timed)
    before, after = ({name: one.to_json() for name, one in side.items()} for side in sides)
    record = {
        "model": source,
        "how": _told(how),
        "before": before,
        "after": after,
        "plan": promised.facts((row.shape[1],)),
    }
    return _comparison(before, after), record


def _told(how: kv.How) -> str:
    """A way and its settings, without the model."""
    if not isinstance(how, kv.CSKV):
        return repr(how)
    named = ", ".join(f"{name}={getattr(how, name)!r}" for name in ("window", "tumbling", "bits"))
    return f"CSKV({how.projections.shape!r}, {named})"


def _encoder(tokenizer: Path | None) -> Any:
    if tokenizer is None:
        return lambda text: list(text.encode())
    named = tokenizer_in(tokenizer)
    return lambda text: named(text, add_special_tokens=False)["input_ids"]


def _plan_table(promised: CachePlan, batch: int) -> Any:
    from rich.table import Table

    full, ours = promised.per_token()
    table = Table("", "whole", "compressed", "of it")
    for column in table.columns[1:]:
        column.justify = "right"
    if promised.context is not None:
        table.add_row("the model's context, tokens", f"{promised.context:,}", "", "")
    table.add_row("bytes per token", f"{full:,.0f}", f"{ours:,.1f}", f"{ours / full:.1%}")
    for tokens in (1024, 4096, 16384, 65536):
        load = promised.at(tokens, batch)
        of_full, of_ours = promised.full_bytes(load), promised.bytes(load)
        name = f"bytes at {batch} x {tokens:,} tokens{_beyond(promised, tokens)}"
        table.add_row(name, f"{of_full:,}", f"{of_ours:,}", f"{of_ours / of_full:.1%}")
    table.add_row("weights", f"{promised.weights:,}", f"{promised.weights + promised.extra:,}", "")
    for name, tokens_or_none in (
        ("fewer bytes from (tokens)", promised.break_even()),
        ("5 % of weights and cache from (tokens)", promised.noticed()),
    ):
        told = "never" if tokens_or_none is None else f"{tokens_or_none:,}{_beyond(promised, tokens_or_none)}"
        table.add_row(name, "", told, "")
    return table


def _beyond(promised: CachePlan, tokens: int) -> str:
    """A mark where a length is more than the model was made for."""
    return " (beyond its context)" if promised.context is not None and tokens > promised.context else ""


def _comparison(before: dict[str, Any], after: dict[str, Any]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    from niwaki.report.numbers import title, with_spread

    table = Table("", "whole", "compressed", "ratio", "definition")
    for column in table.columns[1:4]:
        column.justify = "right"
    for name, record in before.items():
        other = after[name]
        ratio = f"{other['value'] / record['value']:.3f}" if record["value"] else "-"
        table.add_row(title(name), *map(escape, (with_spread(record), with_spread(other), ratio, other["definition"])))
    return table
