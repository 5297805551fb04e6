"""Numbers in messages: with a noun in the right number, and never rounded to 0."""


def count(number: int, noun: str) -> str:
    """Return `1 step` or `2 steps`, with commas in large numbers."""
    plural = f"{noun}es" if noun.endswith(("ss", "sh", "ch", "x")) else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def format_bytes(size: int) -> str:
    """Return `1.50 GiB`, or `3.20 MiB` below 0.1 GiB."""
    gib = size / 2**30
    return f"{short(gib)} GiB" if gib >= 0.1 else f"{short(size / 2**20)} MiB"


def short(number: float) -> str:
    """Return `number` with two decimals, or with two significant digits below 0.1."""
    return f"{number:.2f}" if abs(number) >= 0.1 else f"{number:.2g}"
