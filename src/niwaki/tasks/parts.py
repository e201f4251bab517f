"""A split of data to evaluate on, and how much of it."""

from typing import Any

from niwaki.errors import InputError, UnknownNameError

SPLITS = ("train", "val", "test")


def part_of(splits: Any, split: str, limit: int | None, *, of: str) -> tuple[Any, int]:
    """The split of this name, and how many of its samples are looked at.

    Args:
        of: what the samples are called: "pictures", "sequences".

    Raises:
        UnknownNameError: an unknown split.
        InputError: an empty one, or a limit of none.
    """
    if split not in SPLITS:
        raise UnknownNameError.of("split", split, SPLITS)
    part = getattr(splits, split)
    count = len(part) if limit is None else min(limit, len(part))
    if count < 1:
        found = f"{len(part)} {of}, limit {limit}"
        raise InputError(f"evaluate on the {split} split", found=found, do="use a split and a limit above 0")
    return part, count
