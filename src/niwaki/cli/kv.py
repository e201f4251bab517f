"""`niwaki kv`: a key/value cache with fewer bytes, before and after; `niwaki kv plan`: what it will take."""

import warnings
from pathlib import Path
from typing import Annotated

import typer

from niwaki.cli.options import AsJson, Checkpoint, Device, Seed, Threads
from niwaki.cli.talk import show
from niwaki.errors import InputError, NothingChangedWarning, UnknownNameError

METHODS = ("think", "cskv")
INITIALISATIONS = ("whitened", "asvd", "svd")
POLICIES = ("snapkv", "h2o", "streaming_llm")
BITS = (2, 4, 8)
"""What the command line knows before torch is imported."""


def kv(
    words: Annotated[
        list[str],
        typer.Argument(metavar="[plan] MODEL", help="`plan` and a model's source, or the source alone to measure it."),
    ],
    method: Annotated[str, typer.Option(help=f"One of: {', '.join(METHODS)}.")] = "think",
    keep: Annotated[
        float | None, typer.Option(help="Share of key channels that stay, in (0, 1]; 0.6 (cskv: 0.2) unless said.")
    ] = None,
    values: Annotated[
        float | None, typer.Option(help="Share of value channels that stay; 1 (cskv: as of keys) unless said.")
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            help=f"Tokens that stay, POLICY:KEEP ({', '.join(POLICIES)}; a count, or a share with a point).",
            metavar="POLICY:KEEP",
        ),
    ] = None,
    bits: Annotated[int | None, typer.Option(help="2, 4 or 8: what stays is packed.")] = None,
    recent: Annotated[int, typer.Option(min=0, help="Newest tokens that are stored whole.")] = 32,
    init: Annotated[
        str | None, typer.Option(help=f"For cskv: {', '.join(INITIALISATIONS)}; whitened unless said.")
    ] = None,
    projections: Annotated[
        Path | None, typer.Option(help="For cskv: a file of projections; made from the text unless said.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="A text to judge by, and to time on.", metavar="FILE")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of its tokenizer; bytes unless said.", metavar="FOLDER")
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=2, help="Tokens in a window; the model's context, up to 2048, unless said.")
    ] = None,
    score: Annotated[
        int | None, typer.Option(min=1, help="Tokens of it told against the cache; a quarter unless said.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Windows to judge by.")] = 32,
    lines: Annotated[int, typer.Option(min=0, help="Lines of a retrieval test; 0 leaves it out.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Decoded tokens that are timed.")] = 16,
    batch: Annotated[int, typer.Option(min=1, help="Sequences in a batch, in the timing and in the test.")] = 1,
    checkpoint: Checkpoint = None,
    threads: Threads = None,
    device: Device = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Compress a model's key/value cache and measure it. Bytes, perplexity, retrieval and time, before and after."""
    planning = words[0] == "plan"
    if len(words) != 1 + planning:
        raise InputError(
            f"niwaki kv {' '.join(words)}",
            found="no model" if len(words) <= planning else "more than one model",
            do="niwaki kv [plan] MODEL",
        )
    if method not in METHODS:
        raise UnknownNameError.of("method for caches", method, METHODS)
    if not planning and text is None:
        raise InputError(f"niwaki kv {words[0]}", found="no text to judge by", do="give --text FILE, or niwaki kv plan")

    for option, share in (("--keep", keep), ("--values", values)):
        if share is not None and not 0 < share <= 1:
            do = "give a share above 0 and at most 1 of what stays"
            raise InputError(f"{option} {share:g}", found="not in (0, 1]", do=do)
    if bits is not None and bits not in BITS:
        raise InputError(f"--bits {bits}", found="not 2, 4 or 8", do="use 4, or 2 where memory is short")
    if init is not None and init not in INITIALISATIONS:
        raise UnknownNameError.of("initialisation", init, INITIALISATIONS)
    if method == "cskv" and tokens is not None:
        do = "leave --tokens out, or use --method think"
        raise InputError("--method cskv", found=f"--tokens {tokens}, which it does not know", do=do)

    if method != "cskv":
        asked = {"--projections": projections, "--init": init}
        if named := [f"{option} {value}" for option, value in asked.items() if value is not None]:
            found = f"{', '.join(named)}, which only cskv knows"
            raise InputError(f"--method {method}", found=found, do="add --method cskv, or leave these out")

    if projections is not None:
        said = {"--keep": keep, "--values": values, "--init": init}
        if named := [f"{option} {value}" for option, value in said.items() if value is not None]:
            found = f"{', '.join(named)}, which the projections in it have of their own"
            raise InputError(f"--projections {projections}", found=found, do="leave these out, or --projections")

    from niwaki.cli.kv_run import LowRankWay, Way, judged, planned, think_way

    how: Way
    if method == "cskv":
        how = LowRankWay(
            0.2 if keep is None else keep, values, init=init or "whitened", file=projections, window=recent, bits=bits
        )
    else:
        how = think_way(0.6 if keep is None else keep, values, tokens=tokens, bits=bits, recent=recent, known=POLICIES)
    with warnings.catch_warnings():
        warnings.simplefilter("once", NothingChangedWarning)  # not for every layer of every window
        if planning:
            table, record = planned(words[1], how, batch=batch)
        else:
            assert text is not None
            table, record = judged(
                words[0],
                how,
                text=text,
                tokenizer=tokenizer,
                length=length,
                score=score,
                limit=limit,
                lines=lines,
                steps=steps,
                batch=batch,
                checkpoint=checkpoint,
                threads=threads,
                device=device,
                seed=seed,
            )
    show(table, data=record, as_json=as_json)
