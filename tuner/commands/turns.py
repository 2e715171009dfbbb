"""One command at a time measures on a device, and one works on a study: who comes second waits, and says for whom.

A production run is no measurement: such runs share a device, with a notice, but whoever measures waits for them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from tuner import stopping
from tuner.commands.console import clock
from tuner.contract.errors import Busy
from tuner.contract.study import StudySpec
from tuner.holders import FilePlace, Hold, Holder, Place, Taken
from tuner.probe.device_memory import visible_gpus

if TYPE_CHECKING:
    from rich.console import Console

LOOK_S = 0.2
CPU = "cpu"


def holder(command: str, workload: str, *, study: str = "", alone: bool = True) -> Holder:
    """This process, running `tuner COMMAND`."""
    return Holder.here(f"tuner {command} -w {workload}", study=study, alone=alone)


def optimizing(spec: StudySpec) -> Holder:
    return holder("optimize", spec.workload, study=spec.name)


@contextmanager
def device(who: Holder, ranks: int, console: Console, *, wait: bool) -> Iterator[bool]:
    """The devices that `ranks` ranks run on: a GPU each, or this host's CPU. Yields whether it had to wait, so that
    what was seen of them before is no longer true. Raises Busy."""
    with ExitStack() as held:
        waited = False
        for name in devices(ranks):
            label = "the CPU of this host" if name == CPU else f"GPU {name}"
            place = FilePlace(lock_folder(), name.replace("/", "_"), private=True)
            waited |= held.enter_context(turn(label, place, who, console, wait=wait))
        yield waited


@contextmanager
def study(url: str, spec: StudySpec, console: Console, *, wait: bool) -> Iterator[None]:
    """The study in the store at `url`; to be asked for after the device, so that no two wait for each other. Raises
    Busy and StoreError."""
    from tuner.store.study_lock import study_place

    with turn(f"study {spec.name}", study_place(url, spec.name), optimizing(spec), console, wait=wait):
        yield


def devices(ranks: int) -> list[str]:
    """In one order for everybody, so that no two commands wait for each other."""
    return sorted(visible_gpus()[:ranks]) or [CPU]


@contextmanager
def turn(label: str, place: Place, who: Holder, console: Console, *, wait: bool) -> Iterator[bool]:
    """What `place` keeps, while the block runs; yields whether somebody else had it first. Where nothing can be locked
    it goes on without, and says so."""
    waiting = _Waiting(label, console)
    with waiting:
        hold = _taken(label, place, who, waiting, wait=wait)
    if hold is not None and hold.beside:
        others = "; ".join(map(str, hold.beside))
        console.print(f"  note: {label} is shared with {others}: each is slower than it would be alone", style="yellow")
    try:
        yield waiting.begun
    finally:
        if hold is not None:
            hold.release()


def _taken(label: str, place: Place, who: Holder, waiting: _Waiting, *, wait: bool) -> Hold | None:
    while True:
        try:
            return place.take(who)
        except Taken as error:
            if not wait:
                raise Busy(f"{label} is used by {error}; try again later, or let it wait (--wait)") from None
            waiting.for_(error)
            stopping.sleep(LOOK_S)
        except OSError as error:
            waiting.is_vain(error)
            return None


class _Waiting:
    """What is said while waiting: one line for each who is waited for, and on a terminal for how long."""

    def __init__(self, label: str, console: Console) -> None:
        self._label = label
        self._console = console
        self._status = console.status("waiting", spinner="dots") if console.is_terminal else None
        self._told = ""
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def for_(self, taken: Taken) -> None:
        text = f"waiting: {self._label} is used by {taken}; Ctrl-C ends the wait, --no-wait would refuse"
        if text != self._told:
            self._console.print(text)
            self._told = text
        if self._status is not None:
            self._status.start()
            self._status.update(f"waiting for {self._label} - {clock(time.monotonic() - self._began)}")

    @property
    def begun(self) -> bool:
        return bool(self._told)

    def is_vain(self, error: OSError) -> None:
        why = error.strerror or error
        text = f"  warning: {self._label} cannot be locked: {why}; others may use it at the same time"
        self._console.print(text, style="yellow")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._status is not None:
            self._status.stop()
        if self._told and error is None:
            self._console.print(f"waited {clock(time.monotonic() - self._began)} for {self._label}")


def lock_folder() -> Path:
    """$TUNER_LOCKS, or a folder of this user's in /tmp: one for all of the user's sessions on this host, whatever their
    environment, and no other host's."""
    return Path(os.environ.get("TUNER_LOCKS") or f"/tmp/tuner-{os.getuid()}")
