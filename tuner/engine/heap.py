"""How far glibc's heap grows for a sequence of tensors: a simulation of its best fit, for the host's peak.

Tensors are aligned to 64 bytes, so glibc takes a chunk somewhat larger and cuts scraps off both ends. Small objects
soon live in these scraps; while they do, neighbouring free chunks do not join, and a freed tensor leaves a hole just
too small for the next one of its size. On a host with little else on the heap that costs up to twice the live bytes.
Layout after glibc 2.36, malloc.c (`_int_malloc`, `_int_memalign`, `_int_free`); arenas, bins of small chunks and the
thread cache are left out.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Sequence

HEADER = 8
UNIT = 16
"""Chunks are multiples of it, header included."""
SMALLEST = 32
ALIGNMENT = 64
"""What torch asks for."""
LEAST_TENSOR = 1024
"""Smaller ones are served from bins of their own and move no border."""
LINGERS = (20, 25, 30, 35, 40)
"""Tensors that are made while a scrap stays taken: it is not known better, and the layout is chaotic, so the heap is
simulated with each and the mean is taken. Chosen on the ladders of gpt2 and graph, each of which alone points to about
30 of 5 to 100; the two U-Nets had no part in it."""

Event = tuple[int, int]
"""(number, bytes) of a tensor that is made; (-number, 0) of one that is gone."""


def heap_peak(held: Sequence[int], events: Sequence[Event], passes: int = 2) -> int:
    """Bytes up to the highest address ever in use: first what is held throughout, then `events`, `passes` times."""
    peaks = []
    for linger in LINGERS:
        heap = Heap(linger)
        for size in held:
            heap.take(size)
        for _ in range(passes):
            _play(heap, events)
        peaks.append(heap.peak)
    return sum(peaks) // len(peaks)


def _play(heap: Heap, events: Sequence[Event]) -> None:
    taken: dict[int, tuple[int, int]] = {}
    for number, size in events:
        if number > 0 and size >= LEAST_TENSOR:
            taken[number] = heap.take(size)
        elif -number in taken:
            heap.give_back(*taken.pop(-number))
    for chunk in taken.values():  # results that outlive the step are dropped before the next one
        heap.give_back(*chunk)


class Heap:
    """Free chunks below a top that only ever moves up; neighbours that are both free are one."""

    def __init__(self, linger: int) -> None:
        self.peak = 0
        self._linger = linger
        self._top = 0
        self._by_size: list[tuple[int, int]] = []
        """(size, start) of the free chunks, sorted."""
        self._size_at: dict[int, int] = {}
        self._start_of: dict[int, int] = {}
        """End -> start of the free chunks."""
        self._scraps: deque[tuple[int, int, int]] = deque()
        """(tensor at which it is free again, start, size)"""
        self._made = 0

    def take(self, size: int) -> tuple[int, int]:
        """An aligned chunk for `size` bytes: its start and size."""
        self._made += 1
        self._collect_scraps()
        needed = max(SMALLEST, _rounded(size + HEADER))
        start, got = self._best_fit(_rounded(size + ALIGNMENT + SMALLEST + HEADER))
        lead = -(start + UNIT) % ALIGNMENT
        if 0 < lead < SMALLEST:
            lead += ALIGNMENT
        if lead:
            self._scrap(start, lead)
        rest = got - lead - needed
        if rest < SMALLEST:
            return start + lead, got - lead
        self._scrap(start + lead + needed, rest)
        return start + lead, needed

    def give_back(self, start: int, size: int) -> None:
        if start + size in self._size_at:
            size += self._remove(start + size)
        if start in self._start_of:
            before = self._start_of[start]
            size += self._remove(before)
            start = before
        if start + size == self._top:
            self._top = start
        else:
            self._insert(start, size)

    def _best_fit(self, wanted: int) -> tuple[int, int]:
        """The smallest free chunk that is large enough, cut to size; else new bytes at the top."""
        at = bisect.bisect_left(self._by_size, (wanted, -1))
        if at == len(self._by_size):
            start, self._top = self._top, self._top + wanted
            self.peak = max(self.peak, self._top)
            return start, wanted
        size, start = self._by_size[at]
        self._remove(start)
        if size - wanted < SMALLEST:
            return start, size
        self.give_back(start + wanted, size - wanted)
        return start, wanted

    def _scrap(self, start: int, size: int) -> None:
        if size >= LEAST_TENSOR:
            self.give_back(start, size)
        else:
            self._scraps.append((self._made + self._linger, start, size))

    def _collect_scraps(self) -> None:
        while self._scraps and self._scraps[0][0] <= self._made:
            _, start, size = self._scraps.popleft()
            self.give_back(start, size)

    def _insert(self, start: int, size: int) -> None:
        bisect.insort(self._by_size, (size, start))
        self._size_at[start] = size
        self._start_of[start + size] = start

    def _remove(self, start: int) -> int:
        size = self._size_at.pop(start)
        del self._start_of[start + size]
        del self._by_size[bisect.bisect_left(self._by_size, (size, start))]
        return size


def _rounded(size: int) -> int:
    return -(-size // UNIT) * UNIT
