"""Text as tokens: bytes, or those of a tokenizer of transformers; split by position."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from niwaki.errors import FileDamagedError, InputError, MissingExtraError

BYTES = 256
"""Tokens of a text that is read byte by byte."""
PARTS = ("train", "val", "test")


@final
@dataclass(frozen=True, eq=False)
class Tokens:
    """Blocks of neighbouring tokens of one split, handed out in batches.

    Examples:
        >>> blocks = Tokens(torch.arange(6, dtype=torch.uint8).view(3, 2))
        >>> [batch.tolist() for batch in blocks.batches(2)]
        [[[0, 1], [2, 3]], [[4, 5]]]
    """

    blocks: Shaped[Tensor, "n length"]
    """Of any whole-number type; batches are int64."""

    def __len__(self) -> int:
        return len(self.blocks)

    def batches(
        self, size: int, *, shuffle_seed: int | None = None, whole: bool = False
    ) -> Iterator[Int[Tensor, "batch length"]]:
        """All blocks once, `size` at a time: in order, or shuffled by `shuffle_seed`. `whole` leaves out a last batch
        that is not full, unless it is the only one.

        Raises:
            InputError: `size` below 1.
        """
        if size < 1:
            raise InputError(f"batches of {size} blocks", do="give a batch size of at least 1")
        count = len(self)
        generator = torch.Generator().manual_seed(shuffle_seed or 0)
        order = torch.arange(count) if shuffle_seed is None else torch.randperm(count, generator=generator)
        stop = count - count % size if whole and count >= size else count
        return (self.blocks[order[first : first + size]].long() for first in range(0, stop, size))


@final
@dataclass(frozen=True, eq=False)
class TextSplits:
    """The three splits of one text, and how they came about."""

    train: Tokens
    val: Tokens
    test: Tokens
    length: int
    """Tokens in a block."""
    vocabulary: int
    """All tokens are below."""
    mask: int | None = None
    """The token that stands for a hidden one, for masked language modelling."""
    record: dict[str, Any] = field(default_factory=dict)
    """JSON-able: source, counts, positions of the splits, SHA-256 of the file."""


@final
@dataclass(frozen=True)
class Text:
    """One file of text, in blocks of `length` tokens: the first part to train on, the next to validate, the last to
    test on. Text at the end that fills no block is left out.

    Raises:
        InputError: no such file or folder, too little text for three splits, or a setting out of range.
        FileDamagedError: a file that cannot be read, is no UTF-8 (with a tokenizer), or is no tokenizer.
        MissingExtraError: a tokenizer is named and transformers is not installed.
    """

    place: Path
    length: int = 128
    """Tokens in a block, from 2; no more than the model's context."""
    tokenizer: Path | None = None
    """A folder with a tokenizer of transformers; None takes bytes as tokens, 256 of them."""
    mask: int | bool | None = None
    """The token that hides others, for masked language modelling: a number, or True for the tokenizer's own."""
    val: float = 0.1
    """Share of the blocks to validate on, in (0, 1)."""
    test: float = 0.1
    """Share of the blocks to test on, in (0, 1)."""

    def __post_init__(self) -> None:
        if type(self.length) is not int or self.length < 2:
            raise InputError(f"blocks of {self.length!r} tokens", do="give a length of at least 2")
        if not (0 < self.val < 1 and 0 < self.test < 1 and self.val + self.test < 1):
            found, do = f"val={self.val}, test={self.test}", "give shares above 0 that leave something to train on"
            raise InputError("split a text", found=found, do=do)
        if self.mask is True and self.tokenizer is None:
            raise InputError("the mask token of bytes", found="they have none", do="give its number: mask=256")
        if type(self.mask) is int and self.mask < 0:
            raise InputError(f"mask token {self.mask}", do="give a token's number, from 0")

    def read(self) -> TextSplits:
        """The splits of the file."""
        if not self.place.is_file():
            raise InputError(f"text {self.place}", found="no such file", do="check the path")
        try:
            content = self.place.read_bytes()
        except OSError as cause:
            raise FileDamagedError(
                "read a text", found=str(cause), where=str(self.place), do="check the file"
            ) from cause
        tokens, vocabulary, mask = self._tokens(content)
        blocks = len(tokens) // self.length
        val, test = max(1, round(self.val * blocks)), max(1, round(self.test * blocks))
        train = blocks - val - test
        if train < 1:
            raise InputError(
                f"text {self.place} in blocks of {self.length} tokens",
                found=f"{len(tokens)} tokens, which is too little for three splits",
                do="give more text or a smaller length",
            )
        cut = tokens[: blocks * self.length].view(blocks, self.length)
        ends = (0, train, train + val, blocks)
        spans = {name: [ends[i], ends[i + 1]] for i, name in enumerate(PARTS)}
        record = {
            "source": f"text:{self.place.name}",
            "sha256": hashlib.sha256(content).hexdigest(),
            "tokens": len(tokens),
            "tokenizer": "bytes" if self.tokenizer is None else str(self.tokenizer),
            "vocabulary": vocabulary,
            "length": self.length,
            "split_by": "position",
            "blocks": spans,
            "counts": {name: stop - start for name, (start, stop) in spans.items()},
            "left_out": len(tokens) - blocks * self.length,
            "mask": mask,
        }
        parts = {name: Tokens(cut[start:stop]) for name, (start, stop) in spans.items()}
        return TextSplits(
            parts["train"], parts["val"], parts["test"], self.length, vocabulary=vocabulary, mask=mask, record=record
        )

    def _tokens(self, content: bytes) -> tuple[Shaped[Tensor, " tokens"], int, int | None]:
        """All tokens, how many kinds there are, and the one that hides others."""
        given = None if self.mask is None or isinstance(self.mask, bool) else self.mask
        if self.tokenizer is None:
            tokens = torch.from_numpy(np.frombuffer(content, np.uint8).copy())
            return tokens, max(BYTES, -1 if given is None else given + 1), given
        named = tokenizer_in(self.tokenizer)
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as cause:
            found, do = f"no UTF-8: {cause.reason} at byte {cause.start}", "convert the file to UTF-8"
            raise FileDamagedError("read a text", found=found, where=str(self.place), do=do) from cause
        listed = named(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not listed and content.strip():
            found, do = f"no token for any of the text ({len(named)} known)", "name a folder with the vocabulary, too"
            raise FileDamagedError("read a tokenizer", found=found, where=str(self.tokenizer), do=do)
        mask = named.mask_token_id if self.mask is True else given
        if self.mask is True and mask is None:
            raise InputError(f"the mask token of {self.tokenizer}", found="it has none", do="give its number: mask=103")
        return torch.tensor(listed, dtype=torch.int32), max(len(named), (mask or 0) + 1), mask


def tokenizer_in(folder: Path) -> Any:
    """The tokenizer of transformers in a folder.

    Raises:
        InputError: no such folder.
        FileDamagedError: it holds none.
        MissingExtraError: transformers is not installed.
    """
    if not folder.is_dir():
        raise InputError(f"tokenizer {folder}", found="no such folder", do="name a folder with tokenizer.json")
    try:
        from transformers import AutoTokenizer
    except ImportError as cause:
        do = 'pip install "niwaki[llm]", or leave the tokenizer out to read bytes'
        raise MissingExtraError("a tokenizer needs transformers", do=do) from cause
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as cause:  # whatever transformers make of a folder that holds none
        found = f"{type(cause).__name__}: {' '.join(str(cause).split())[:400]}"  # lists come line by line
        do = "name a folder that save_pretrained of a tokenizer wrote"
        raise FileDamagedError("read a tokenizer", found=found, where=str(folder), do=do) from cause


def open_text(
    place: str | Path,
    *,
    length: int = 128,
    tokenizer: str | Path | None = None,
    mask: int | bool | None = None,
    val: float = 0.1,
    test: float = 0.1,
) -> TextSplits:
    """The splits of a text file, in blocks of `length` tokens; see `Text`.

    Examples:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> file = Path(folder.name, "a.txt")
        >>> _ = file.write_text("to be or not to be " * 10)
        >>> splits = open_text(file, length=8)
        >>> splits.record["counts"], splits.vocabulary
        ({'train': 19, 'val': 2, 'test': 2}, 256)
        >>> folder.cleanup()
    """
    named = None if tokenizer is None else Path(tokenizer).expanduser()
    return Text(Path(place).expanduser(), length, named, mask, val, test).read()
