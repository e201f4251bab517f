"""A split of data to evaluate on, and how much of it."""

from typing import Any

from torch import Tensor

from niwaki.errors import InputError, NotFiniteError, UnknownNameError

SPLITS = ("train", "val", "test")


def part_of(splits: Any, split: str, limit: int | None, *, of: str) -> tuple[Any, int]:
    """The split of this name, and how many of its samples are looked at.

    Args:
        of: what the samples are called: "pictures", "sequences".

    Raises:
        UnknownNameError: an unknown split.
        InputError: an empty one, or a limit of none.
    """
    part = getattr(splits, known(split))
    return part, counted(split, limit, len(part), of=of)


def known(split: str) -> str:
    """`split`, where it is the name of one.

    Raises:
        UnknownNameError: it is none.
    """
    if split not in SPLITS:
        raise UnknownNameError.of("split", split, SPLITS)
    return split


def counted(split: str, limit: int | None, most: int, *, of: str) -> int:
    """How many of the `most` samples of a split are looked at; `of` is what they are called.

    Raises:
        InputError: none.
    """
    count = most if limit is None else min(limit, most)
    if count < 1:
        found = f"{most} {of}, limit {limit}"
        raise InputError(f"evaluate on the {split} split", found=found, do="use a split and a limit above 0")
    return count


def finite(scores: Tensor, split: str) -> Tensor:
    """`scores`, where they are numbers.

    Raises:
        NotFiniteError: NaN or infinite values.
    """
    if not scores.isfinite().all():
        do = "look for NaN in the weights, or for a precision that is too small"
        raise NotFiniteError(f"evaluate on the {split} split", found="NaN or infinite outputs", do=do)
    return scores
