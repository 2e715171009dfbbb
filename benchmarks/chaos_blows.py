"""Blows against a running worker: which signal, in which phase, how long after it began; and who deals them."""

from __future__ import annotations

import contextlib
import random
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

from tuner.contract.probe import Event, PhaseEvent

IN_EVALUATION = "-9 in evaluation"
BLOWS: Mapping[str, float] = {
    "-9 in training": 0.35,
    "-9 in a save": 0.35,
    IN_EVALUATION: 0.1,
    "-9 at the start": 0.05,
    "SIGTERM": 0.15,
}
"""Name -> share of all blows."""
SHORTEST_S = 0.02


class Moments:
    """A listener that learns how long the phases of an undisturbed run take."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self._phase, self._since = "", time.monotonic()

    def __call__(self, event: Event) -> None:
        if isinstance(event, PhaseEvent):
            now = time.monotonic()
            self.seconds.setdefault(self._phase, []).append(now - self._since)
            self._phase, self._since = event.phase, now

    def typical(self, phase: str) -> float:
        """The longest stretch of it; a moment where it never came."""
        return max(self.seconds.get(phase, [SHORTEST_S]))

    def total(self, phase: str) -> float:
        return sum(self.seconds.get(phase, [SHORTEST_S]))


@dataclass(frozen=True)
class Blow:
    name: str
    number: int
    phase: str
    nth: int
    """Which beginning of the phase starts the clock."""
    delay_s: float

    @classmethod
    def drawn(cls, chance: random.Random, moments: Moments) -> Blow:
        """One that a run with these moments can be dealt."""
        names = [name for name in BLOWS if name != IN_EVALUATION or "evaluate" in moments.seconds]
        (name,) = chance.choices(names, weights=[BLOWS[name] for name in names])
        training = moments.total("measure")
        if name == "-9 in a save":  # a little longer than it takes: also just after it
            save = chance.uniform(0, 1.2 * moments.typical("checkpoint"))
            return cls(name, signal.SIGKILL, "checkpoint", chance.randint(1, 3), save)
        if name == IN_EVALUATION:
            return cls(name, signal.SIGKILL, "evaluate", 1, chance.uniform(0, moments.typical("evaluate")))
        if name == "-9 at the start":
            return cls(name, signal.SIGKILL, "build", 1, chance.uniform(0, moments.total("build")))
        number = signal.SIGTERM if name == "SIGTERM" else signal.SIGKILL
        return cls(name, number, "measure", 1, chance.uniform(0, 0.7 * training))


class Striker:
    """A listener that deals one blow to the worker it listens to."""

    def __init__(self, blow: Blow | None) -> None:
        self._blow = blow
        self._left = blow.nth if blow is not None else 0
        self._worker: psutil.Process | None = None
        self._timer: threading.Timer | None = None
        self.struck = False
        """Was the signal sent to a living worker?"""
        self.blind = False
        """Is there nobody to send it to?"""

    def __call__(self, event: Event) -> None:
        if self._blow is None or not isinstance(event, PhaseEvent):
            return
        self._worker = self._worker or find_worker()  # at the first event: looking takes longer than a small save
        self.blind = self._worker is None
        if event.phase != self._blow.phase:
            return
        self._left -= 1
        if self._left == 0:
            self._timer = threading.Timer(self._blow.delay_s, self._strike)
            self._timer.start()

    def close(self) -> None:
        """After the run: a blow that comes too late is called off."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()

    def _strike(self) -> None:
        assert self._blow is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            if self._worker is not None:
                self._worker.send_signal(self._blow.number)
                self.struck = True


def find_worker() -> psutil.Process | None:
    """The probe that runs now: the youngest child of our children that fork them."""
    workers = []
    for host in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "--serve" in host.cmdline():
                workers += [(worker.create_time(), worker) for worker in host.children()]
    return max(workers, key=lambda found: found[0])[1] if workers else None
