"""Notices when this process did not run for a while: stopped (SIGSTOP), its container paused, its machine asleep.

No step that fell into such a time is a measurement. A thread lets the kernel count a timer's ticks while it waits for
them; in one wait there is one tick, unless the thread could not be woken. A thread that waits for Python's lock, which
a long call in C may hold, was woken in time and so counts one tick too: that is the job's own time, and no sleep.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from typing import Self

TICK_S = 0.25
LEAST_S = 1.0
"""Less is what a busy machine does to any thread."""
HOW_IT_SLEPT = "stopped by SIGSTOP, its container paused, or the machine asleep"
PATIENCE_S = 1.0
"""How long `take` waits at most for a thread that has been woken and not yet said so."""
_LOOK_S = 0.005
_BOOTTIME, _CLOEXEC = 7, 0o2000000
"""The clock that goes on while the machine is asleep; man 2 timerfd_create."""


class _Timer(ctypes.Structure):
    """`struct itimerspec`: seconds and nanoseconds, of the interval and of the first tick."""

    _fields_ = tuple((name, ctypes.c_long) for name in ("every_s", "every_ns", "first_s", "first_ns"))


_TICKS = _Timer(0, int(TICK_S * 1e9), 0, int(TICK_S * 1e9))
_NOW = _Timer(0, 0, 0, 1)


class Pulse:
    """Watches from its making on, until `close`. Without timers of Linux it never notices anything."""

    def __init__(self) -> None:
        self._slept_s = self._taken_s = 0.0
        self._enough = False
        self._beat = _now()
        """When the present wait began."""
        self._thread: threading.Thread | None = None
        self._library = ctypes.PyDLL(None)  # keeps Python's lock: no other thread comes between setting and waiting
        if sys.platform == "linux" and (timer := self._library.timerfd_create(_BOOTTIME, _CLOEXEC)) >= 0:
            self._timer = timer
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def take(self) -> float:
        """Seconds slept through since this was last asked; 0.0 for less than `LEAST_S` in a row."""
        if self._thread is None:
            return 0.0
        until = time.monotonic() + PATIENCE_S
        while _now() - self._beat > LEAST_S and time.monotonic() < until:
            time.sleep(_LOOK_S)  # we woke up before the watching thread did
        slept, self._taken_s = self._slept_s - self._taken_s, self._slept_s
        return slept

    def close(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            self._enough = True
            self._set(_NOW)
            thread.join()
            os.close(self._timer)

    def _set(self, timer: _Timer) -> None:
        self._library.timerfd_settime(self._timer, 0, ctypes.byref(timer), None)

    def _watch(self) -> None:
        while not self._enough:
            self._beat = _now()
            self._set(_TICKS)
            ticks = int.from_bytes(os.read(self._timer, 8), sys.byteorder)
            asleep = (ticks - 1) * TICK_S
            if asleep >= LEAST_S and _now() - self._beat >= asleep:
                self._slept_s += asleep


def _now() -> float:
    return time.clock_gettime(_BOOTTIME) if sys.platform == "linux" else time.monotonic()
