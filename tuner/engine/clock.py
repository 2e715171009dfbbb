"""Step times without waiting for the device: CUDA events read later, or the host's monotonic clock.

A step lasts from the end of the step before to its own end, whatever was done in between, so that the seconds of steps
in a row add up to wall time. Only after a break (evaluation, a checkpoint) does a step begin where it is asked for.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Protocol

import torch


class StepClock(Protocol):
    """`begin` and `end` stand around a step; `take` gives the seconds of finished steps, each once, in order."""

    def begin(self) -> None:
        """A step begins here, unless it already began where the one before ended."""
        ...

    def end(self) -> None:
        """A step ends here, and the next one begins."""
        ...

    def rest(self) -> None:
        """What came since the last step is part of none: the next one begins with its `begin`."""
        ...

    def take(self, *, wait: bool) -> list[float]:
        """With `wait` every step so far; without it those whose time is known by now."""
        ...


class HostClock:
    def __init__(self) -> None:
        self._began: float | None = None
        self._done: list[float] = []

    def begin(self) -> None:
        if self._began is None:
            self._began = time.perf_counter()

    def end(self) -> None:
        assert self._began is not None, "a step ended that had not begun"
        now = time.perf_counter()
        self._done.append(now - self._began)
        self._began = now

    def rest(self) -> None:
        self._began = None

    def take(self, *, wait: bool) -> list[float]:  # noqa: ARG002
        done, self._done = self._done, []
        return done


class CudaClock:
    """Pairs of events in the stream: a step lasts from when the device reaches its beginning to its end."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._open: torch.cuda.Event | None = None
        self._pairs: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def begin(self) -> None:
        if self._open is None:
            self._open = self._mark()

    def end(self) -> None:
        assert self._open is not None, "a step ended that had not begun"
        now = self._mark()
        self._pairs.append((self._open, now))
        self._open = now

    def rest(self) -> None:
        self._open = None

    def take(self, *, wait: bool) -> list[float]:
        if wait and self._pairs:
            self._pairs[-1][1].synchronize()
        done = []
        while self._pairs and self._pairs[0][1].query():
            begin, end = self._pairs.popleft()
            done.append(begin.elapsed_time(end) / 1000.0)
        return done

    def _mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def step_clock(device: torch.device) -> StepClock:
    return CudaClock(device) if device.type == "cuda" else HostClock()
