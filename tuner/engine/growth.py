"""What a whole evaluation holds at its peak, from two parts of it: arithmetic on bytes, nothing is measured here."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from tuner.contract.measurement import ByteRange

STRANDED = {"cpu": (0.0, 0.5, 1.0), "cuda": (0.0, 0.0, 0.5)}
"""Share of what training leaves free in the heap that what is kept does not fit into: least, usual, most. On a host one
job had 0.5 and 0.6 at two sizes; a CUDA allocator cuts its free blocks, and its figures are a guess."""
MADE_OF_KEPT = 8.0
"""Where the work after the last batch is too small to tell how it grows, it takes at most so many times what was kept:
eight bytes for each one kept, as when booleans become float64."""


@dataclass(frozen=True)
class Part:
    """One evaluation that was given the first `seen` batches only, begun with nothing free held."""

    in_use: tuple[int, ...]
    """Bytes in use after each batch, to the byte."""
    level: int
    """Bytes held after the last one, nothing free among them."""
    within: int
    """The most held above that level until then."""
    after: int
    """The most held above that level from then on: what was kept is joined, and figures are made of it."""

    @property
    def seen(self) -> int:
        return len(self.in_use)


@dataclass(frozen=True)
class Rate:
    """Bytes a batch."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Heap:
    """Where the evaluation takes its memory from."""

    free: int
    """Bytes held and free when it begins in production."""
    resolution: int
    """Bytes that two levels of the same may differ by."""
    stranded: tuple[float, float, float]
    """See `STRANDED`."""


def whole(part: Part, half: Part, batches: int, heap: Heap) -> ByteRange:
    """Bytes held at the peak of an evaluation of all `batches`, from a `part` of it and about `half` of that part.

    Affine in the number of batches: what is kept, and what is made of it at the end. The range spans all that was seen
    of either growth, and the heap's free part that is of use or not.
    """
    resolution = heap.resolution
    kept, left = kept_rate(part, half, resolution), batches - part.seen
    end = end_rate(part, half, kept, resolution)
    rising = [part.level + rate * left for rate in (kept.low, kept.value, kept.high)]
    ends = [max(part.within, part.after + rate * left) for rate in (end.low, end.value, end.high)]
    ends[2] = max(ends[2], _convex(part, half, batches, resolution))
    lost = [share * heap.free for share in heap.stranded]
    low, value, high = (round(sum(parts)) for parts in zip(rising, ends, lost, strict=True))
    return ByteRange(value=value, low=min(low, value), high=max(high, value))


def kept_rate(part: Part, half: Part, resolution: int) -> Rate:
    """What each batch leaves behind: as counted in the heap; where the levels held say otherwise, as they do (Python's
    own objects and other allocators are not in the heap)."""
    counted = slope(part.in_use)
    apart = part.seen - half.seen
    levels = (part.level - half.level) / apart
    blur = resolution / apart
    if abs(levels - counted.value) <= blur:
        return counted
    low, high = min(counted.low, levels - blur), max(counted.high, levels + blur)
    return Rate(max(0.0, levels), max(0.0, low), max(0.0, high))


def slope(in_use: Sequence[int]) -> Rate:
    """Median of the slopes between batches half the series apart, with the flattest and the steepest; the first quarter
    is left out, as a growth may begin late or end early. Never below 0."""
    steady = in_use[len(in_use) // 4 :]
    apart = max(1, len(steady) // 2)
    slopes = [(later - earlier) / apart for earlier, later in zip(steady, steady[apart:], strict=False)] or [0.0]
    value, low, high = statistics.median(slopes), min(slopes), max(slopes)
    return Rate(max(0.0, value), max(0.0, low), max(0.0, high))


def end_rate(part: Part, half: Part, kept: Rate, resolution: int) -> Rate:
    """How much more the work after the last batch takes for each batch before it."""
    apart = part.seen - half.seen
    value, blur = (part.after - half.after) / apart, resolution / apart
    low, high = max(0.0, value - blur), max(0.0, value + blur)
    if abs(part.after - half.after) <= resolution:
        value, high = min(value, MADE_OF_KEPT * kept.value), min(high, MADE_OF_KEPT * kept.high)
    return Rate(max(0.0, value), low, high)


def _convex(part: Part, half: Part, batches: int, resolution: int) -> float:
    """What the end would take if it grows as the square of the batches, as a table of all against all does; 0 where it
    grew no faster than the batches."""
    if part.after <= half.after * part.seen / half.seen + resolution:
        return 0.0
    return part.after * (batches / part.seen) ** 2
