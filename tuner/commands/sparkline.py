"""A curve as one line of text, for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

BLOCKS = "▁▂▃▄▅▆▇█"
WIDE = 20.0
"""Positive values whose largest is this many times the smallest are drawn by their logarithms."""


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """Each character is the mean of as many neighbouring values; a blank where none is finite. Low is low."""
    means = [_mean(values[start:end]) for start, end in _groups(len(values), width)]
    known = [value for value in means if math.isfinite(value)]
    if not known:
        return ""
    logarithmic = min(known) > 0 and max(known) > WIDE * min(known)
    heights = [math.log(value) if logarithmic and math.isfinite(value) else value for value in means]
    finite = [value for value in heights if math.isfinite(value)]
    low, high = min(finite), max(finite)
    return "".join(_block(value, low, high) for value in heights)


def _groups(count: int, width: int) -> list[tuple[int, int]]:
    """Borders of at most `width` groups of nearly equal size."""
    groups = min(count, width)
    return [(count * place // groups, count * (place + 1) // groups) for place in range(groups)]


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _block(value: float, low: float, high: float) -> str:
    if not math.isfinite(value):
        return " "
    share = (value - low) / (high - low) if high > low else 0.5
    return BLOCKS[min(len(BLOCKS) - 1, int(share * len(BLOCKS)))]
