"""Charts of block characters."""

from collections.abc import Sequence

_LEVELS = " ▁▂▃▄▅▆▇█"


def block(share: float) -> str:
    """The character that fills a share of its height, in steps of one eighth.

    Args:
        share: from 0 to 1; anything beyond is drawn as 0 or 1.
    """
    return _LEVELS[round(8 * min(1, max(0, share)))]


def sparkline(values: Sequence[float], width: int) -> str:
    """The last `width` values as one character each.

    The smallest of them is the lowest block and the largest the full one; equal values are of half
    height.
    """
    shown = values[max(0, len(values) - width) :]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    if low == high:
        return block(0.5) * len(shown)
    return "".join(block((1 + 7 * (value - low) / (high - low)) / 8) for value in shown)
