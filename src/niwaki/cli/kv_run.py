"""What `niwaki kv` does once torch is there: plan, or run before and after."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.cache_utils import DynamicCache

from niwaki import kv
from niwaki.cli.sources import ask
from niwaki.cli.talk import say
from niwaki.data import open_text
from niwaki.errors import InputError, UnknownNameError
from niwaki.kv.plan import CachePlan
from niwaki.measure import Measurement
from niwaki.models import outline
from niwaki.tasks import Cached, Facts, LongText, Retrieval

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


def planned(source: str, how: kv.How, *, batch: int) -> tuple[Any, dict[str, Any]]:
    """The table and the record of `niwaki kv plan`; weights are not read."""
    promised = kv.plan(outline(source).model, how)
    record = {"model": source, "how": repr(how), **promised.facts()}
    return _plan_table(promised, batch), record


def judged(
    source: str,
    how: kv.Compression,
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
    promised = kv.plan(model, how)
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

    step = None if how.steady else 1
    makers: list[Any] = [lambda: DynamicCache(config=model.config), lambda: kv.KVCache(model, how)]
    sides: list[dict[str, Measurement]] = [{}, {}]
    for side, new in enumerate(makers):
        say(f"{('the whole', 'the compressed')[side]} cache: {limit} windows of {length} tokens, {stride} told")
        reader = Cached(new, step=step)
        task = LongText(splits, length, stride, batch, reader)
        sides[side] |= task.metrics(model, split="test", limit=limit)
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
        "how": repr(how),
        "before": before,
        "after": after,
        "plan": promised.facts((row.shape[1],)),
    }
    return _comparison(before, after), record


def _encoder(tokenizer: Path | None) -> Any:
    if tokenizer is None:
        return lambda text: list(text.encode())
    from transformers import AutoTokenizer

    named = AutoTokenizer.from_pretrained(str(tokenizer), local_files_only=True, trust_remote_code=False)
    return lambda text: named(text, add_special_tokens=False)["input_ids"]


def _plan_table(promised: CachePlan, batch: int) -> Any:
    from rich.table import Table

    full, ours = promised.per_token()
    table = Table("", "whole", "compressed", "of it")
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("bytes per token", f"{full:,.0f}", f"{ours:,.1f}", f"{ours / full:.1%}")
    for tokens in (1024, 4096, 16384, 65536):
        load = kv.Load(tokens, batch=batch)
        of_full, of_ours = promised.full_bytes(load), promised.bytes(load)
        name = f"bytes at {batch} x {tokens:,} tokens"
        table.add_row(name, f"{of_full:,}", f"{of_ours:,}", f"{of_ours / of_full:.1%}")
    table.add_row("weights", f"{promised.weights:,}", f"{promised.weights + promised.extra:,}", "")
    for name, tokens_or_none in (
        ("fewer bytes from (tokens)", promised.break_even()),
        ("5 % of weights and cache from (tokens)", promised.noticed()),
    ):
        table.add_row(name, "", "never" if tokens_or_none is None else f"{tokens_or_none:,}", "")
    return table


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
