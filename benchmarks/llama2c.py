"""The vocabulary of a llama2.c model as a tokenizer."""

import itertools
import re
import struct
from functools import cache
from pathlib import Path

BOS, FIRST_BYTE = 1, 3


class Vocabulary:
    """Pieces of a llama2.c tokenizer: neighbours are joined, the likeliest piece first."""

    def __init__(self, file: Path) -> None:
        content, at = file.read_bytes(), 4
        self.numbers: dict[bytes, int] = {}
        while at < len(content):
            _, length = struct.unpack_from("fi", content, at)
            self.numbers.setdefault(content[at + 8 : at + 8 + length], len(self.numbers))
            at += 8 + length

    def tokens(self, text: str) -> list[int]:
        """Tokens of one story, with the one that begins it; no piece reaches over a space or a line's end."""
        return [BOS, *(token for word in re.findall(r" ?[^ \n]+|\n| ", f" {text}") for token in self._word(word))]

    @cache  # noqa: B019 (one vocabulary a run)
    def _word(self, word: str) -> tuple[int, ...]:
        pieces = [letter.encode() for letter in word]
        while len(pieces) > 1:  # earlier pieces have the higher score
            joined = [self.numbers.get(a + b, len(self.numbers)) for a, b in itertools.pairwise(pieces)]
            best = min(range(len(joined)), key=joined.__getitem__)
            if joined[best] == len(self.numbers):
                break
            pieces[best : best + 2] = [pieces[best] + pieces[best + 1]]
        return tuple(
            token
            for piece in pieces
            for token in ([self.numbers[piece]] if piece in self.numbers else [FIRST_BYTE + byte for byte in piece])
        )
