"""Passes the tuner's own stop signals on to a production run, so that it can save and end by itself."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@contextlib.contextmanager
def forwarded(stop: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """Within: the first SIGINT, SIGTERM or SIGUSR1 calls `stop` once; a second Ctrl-C raises KeyboardInterrupt.

    Yields a function telling whether `stop` was called. Outside the main thread nothing can be caught.
    """
    asked = False

    def forward(number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not asked:
            asked = True
            stop()

    if threading.current_thread() is not threading.main_thread():
        yield lambda: asked
        return
    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
