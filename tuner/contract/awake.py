"""A clock that stands still while this process does: stopped (SIGSTOP, Ctrl-Z), its container paused, its machine
asleep. Patience that is measured by it does not end in the moment of waking up."""

from __future__ import annotations

import time
from collections.abc import Callable

TURN_S = 1.0
"""Longest turn of who waits by this clock."""
LONGEST_TURN_S = 3.0
"""A turn may take longer on a busy machine; what takes longer than this was slept through."""


class AwakeClock:
    """Monotonic seconds without those slept through, for a loop that calls `turn` at least every `TURN_S`."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._slept_s = 0.0
        self.begin()

    def begin(self) -> None:
        """The loop begins here: what came before was no turn."""
        self._turned = self._now()

    def __call__(self) -> float:
        return self._now() - self._slept_s

    def turn(self) -> float:
        """The time; a turn that took far too long counts as none."""
        now = self._now()
        if now - self._turned > LONGEST_TURN_S:
            self._slept_s += now - self._turned
        self._turned = now
        return now - self._slept_s
