def compress() -> None:
    """Not yet."""
