"""Requests to stop: SIGINT, SIGTERM, SIGHUP and SIGUSR1, whichever of our processes gets them.

A handler only notes the first signal and wakes whoever waits; nothing is ever raised in one, since that could be in the
middle of an import or of a transaction. Each process has its part:

    the command      listens from its first moment on, and acts where it may: `check` raises Interrupted
    the worker host  tells the command (see `tuner.zygote`)
    a training run   notes it and ends at the next step border, with a checkpoint
    other probes     end at once, by the signal itself; the command takes that for its own
    loader workers, ranks other than the first   pass it on and go on working, or no checkpoint could be made

A signal that was ignored when the process began (SIGHUP under nohup) stays ignored.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from tuner.contract.errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
CTRL_C = 130
"""Exit code."""


@dataclass
class _Noted:
    """What this process knows; there is one of it, as a process has one set of handlers."""

    first: signal.Signals | None = None
    insisted: bool = False
    """A second Ctrl-C has come."""
    attended: bool = False
    """Somebody waits for the signals, and acts upon a second Ctrl-C by itself."""
    lost: str = ""
    """What a hard end would lose; empty = there is no hard end."""
    kept: Callable[[], str] = lambda: "What was finished is kept; the same command goes on from here."
    listens: bool = False
    read_fd: int = -1
    write_fd: int = -1

    def note(self, number: int) -> None:
        again = self.first is not None
        self.first = self.first or signal.Signals(number)
        if again and number == signal.SIGINT:
            if self.lost and (self.insisted or not self.attended):
                _end_now()
            self.insisted = True
        if self.write_fd >= 0:
            with contextlib.suppress(OSError):
                os.write(self.write_fd, b"s")


_noted = _Noted()


class Interrupted(Stopped):
    """A signal asked the command to stop, and it stops here. Exit code 75, of Ctrl-C 130."""

    def __init__(self, text: str = "") -> None:
        by = _noted.first or signal.SIGINT
        super().__init__(text or f"stopped by {name_of(by)}. {_noted.kept()}")
        self.exit_code = CTRL_C if by == signal.SIGINT else Stopped.exit_code


def listen() -> dict[int, Any]:
    """From now on the signals are noted; the handlers that were there before. Only in the main thread."""
    if _noted.listens or threading.current_thread() is not threading.main_thread():
        return {}
    _noted.listens = True
    if _noted.read_fd < 0:
        _noted.read_fd, _noted.write_fd = os.pipe()
        os.set_blocking(_noted.write_fd, False)
    before: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}
    heard = [number for number in SIGNALS if before[number] is not signal.SIG_IGN]
    for number in heard:
        signal.signal(number, _handle)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, heard)
    return before


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """`listen` for a while, where this process does not listen already; nothing stays noted afterwards."""
    if _noted.listens:
        yield
        return
    before = listen()
    try:
        yield
    finally:
        _noted.listens = False
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        forget()


def forget() -> None:
    """Nothing has been asked."""
    _noted.first, _noted.insisted = None, False
    while _noted.read_fd >= 0 and select.select([_noted.read_fd], [], [], 0)[0]:
        os.read(_noted.read_fd, 64)


def note(number: int) -> None:
    """A process of ours got a signal: as if it had come to this one."""
    _noted.note(number)


def asked() -> signal.Signals | None:
    """The signal that asked this process to stop."""
    return _noted.first


def check() -> None:
    """Raises Interrupted when this process was asked to stop."""
    if _noted.first is not None:
        raise Interrupted


def deaf() -> None:
    """This process is about to end by itself; while it does, Python itself would end it by the signal."""
    if _noted.listens:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def insisted() -> bool:
    """Was Ctrl-C pressed again?"""
    return _noted.insisted


@contextlib.contextmanager
def attended() -> Iterator[None]:
    """Within: whoever waits here acts upon a second Ctrl-C by itself."""
    _noted.attended = True
    try:
        yield
    finally:
        _noted.attended = False


def ends_hard(lost: str, kept: Callable[[], str]) -> None:
    """From now on a second Ctrl-C ends this process at once, and says what is `lost` and what `kept`."""
    _noted.lost, _noted.kept = lost, kept


def farewell() -> str:
    """Said at the hard end."""
    lost = f"; lost: {_noted.lost}" if _noted.lost else ""
    return f"ended at once by a second Ctrl-C{lost}. {_noted.kept()}"


def descriptors() -> list[int]:
    """To be waited for beside others: readable once a signal has come. Empty where nobody listens."""
    return [_noted.read_fd] if _noted.read_fd >= 0 else []


def take_wake_up() -> None:
    """Empty the descriptor: what it told is noted."""
    if _noted.read_fd >= 0:
        os.read(_noted.read_fd, 64)


def sleep(seconds: float) -> None:
    """Raises Interrupted as soon as a signal comes."""
    check()
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if not descriptors():
            time.sleep(left)
        elif select.select(descriptors(), [], [], left)[0]:
            take_wake_up()
        check()


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Within: signals wait, for this thread and for what it starts. A child begins deaf, until it is ready."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def by_default() -> None:
    """In a forked child: the signals do what they do in a process that does not know them, ignored ones excepted."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    for descriptor in (_noted.read_fd, _noted.write_fd):  # the parent's
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _noted.read_fd, _noted.write_fd, _noted.lost, _noted.listens = -1, -1, "", False
    forget()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def pass_on(to: int) -> None:
    """In a process that must go on when the others are to stop: its signals go to process `to`. Those of its own parent
    do not: a parent that ends a child, as torch does with a loader worker that is late, wants just that."""
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=_pass_on, args=(to, parent), name="stop-signals", daemon=True).start()


def _pass_on(to: int, parent: int) -> None:
    while True:
        came = signal.sigwaitinfo(SIGNALS)
        if came.si_pid != parent:
            with contextlib.suppress(OSError):
                os.kill(to, came.si_signo)
        elif to == parent:
            os._exit(0)


def ended_by(status: int) -> signal.Signals | None:
    """The stop signal that ended a process, by its status as from waitpid."""
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    return signal.Signals(number) if number in SIGNALS else None


def name_of(number: signal.Signals) -> str:
    return "Ctrl-C" if number == signal.SIGINT else number.name


def has_pending(pid: int) -> Sequence[signal.Signals]:
    """Stop signals that wait for a process which has blocked them (Linux; empty elsewhere)."""
    with contextlib.suppress(OSError, ValueError):
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as lines:
            waiting = next(int(line.split()[1], 16) for line in lines if line.startswith("ShdPnd:"))
        return [number for number in SIGNALS if waiting >> (number - 1) & 1]
    return []


def _handle(number: int, _frame: FrameType | None) -> None:
    _noted.note(number)


def _end_now() -> None:
    """The hard end: the worker host notices that we are gone, and ends what runs under it."""
    with contextlib.suppress(Exception):
        cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
        os.write(2, f"{cursor}\ntuner: {farewell()}\n".encode(errors="replace"))
    os._exit(CTRL_C)
