"""A loader that stands still: noticed from a thread of its own, since the loop itself waits then, and told with the
likely cause. The same questions say why a loader is slow."""

from __future__ import annotations

import contextlib
import sys
import sysconfig
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import psutil

from tuner.contract.allowance import usable_cores
from tuner.contract.awake import AwakeClock
from tuner.contract.probe import NoticeEvent
from tuner.engine.hooks import Emit, Hook
from tuner.engine.loader import Keyed, StreamSource
from tuner.engine.step import StepResult
from tuner.engine.trainer import Trainer

LOOKS, LOOK_S = 20, 0.01
"""What the workers do is looked at so many times, so far apart."""
USUAL = 5.0
"""A wait so many times as long as the longest usual one is a stall, if it is over `stall_s` too."""
_ASKED_FOR_ITEMS = {Keyed.__getitems__.__code__, Keyed.__getitem__.__code__}
_ASKED_FOR_BATCH = StreamSource.next_batch.__code__


class StallWatch(Hook):
    """Warns once when no batch has come for `stall_s`, and says when they come again. `close` ends its thread."""

    def __init__(self, stall_s: float, emit: Emit) -> None:
        self._stall_s = stall_s
        self._emit = emit
        self._enough = threading.Event()
        self._thread: threading.Thread | None = None
        self._usual_s = 0.0
        self._begun = False
        """The first batch waits for the workers to start: it says nothing about what is usual."""
        self._told = False

    def on_start(self, trainer: Trainer) -> None:
        self._thread = threading.Thread(target=self._look, args=(trainer, threading.get_ident()), daemon=True)
        self._thread.start()

    def after_step(self, trainer: Trainer, result: StepResult) -> None:  # noqa: ARG002
        if self._told:
            self._told = False
            self._emit(NoticeEvent(text=f"batches come again, after {result.wait_s:.0f} s"))
        elif self._begun:
            self._usual_s = max(self._usual_s, result.wait_s)
        self._begun = True

    def on_end(self, trainer: Trainer) -> None:  # noqa: ARG002
        self.close()

    def close(self) -> None:
        self._enough.set()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()

    def _look(self, trainer: Trainer, training: int) -> None:
        """Every second or so: is the loop inside the loader, in the same step as before, and since when?"""
        step, clock = -1, AwakeClock()
        since = clock()
        while not self._enough.wait(min(1.0, self._stall_s / 4)):
            now, before = clock.turn(), step
            step = trainer.steps if _in_loader(training) else -1
            if step < 0 or step != before:
                since = now
            elif not self._told and now - since > max(self._stall_s, USUAL * self._usual_s):
                cause = _own_place(training) or loader_words(trainer)
                self._told = True
                self._emit(NoticeEvent(level="warning", text=f"no batch for {now - since:.0f} s: {cause}"))


def loader_words(trainer: Trainer) -> str:
    """Why the batches come slowly or not at all, as far as the worker processes show it."""
    workers = getattr(trainer.source, "worker_pids", [])
    if not workers:
        return "the training process makes the batches itself (loader.num_workers 0); try a worker or two"
    seen = _states(workers)
    name = f"the {len(workers)} loader workers" if len(workers) > 1 else "the loader worker"
    if (state := next((word for word in ("gone", "stopped") if seen[word]), "")) or not seen:
        return f"of {name} one is {state or 'gone'}"
    total = sum(seen.values())
    if seen[psutil.STATUS_DISK_SLEEP] >= total / 3:
        return f"{name} wait{_s(workers)} for the disk: slow storage"
    if seen[psutil.STATUS_RUNNING] >= total / 2:
        more = "more workers" if len(workers) < usable_cores() else "fewer other jobs on this host"
        return f"{name} compute{_s(workers)} without a pause: {more}, or less work per sample"
    return f"{name} mostly sleep{_s(workers)}: waiting for something, such as network storage or a lock"


def _s(workers: Sequence[int]) -> str:
    return "s" if len(workers) == 1 else ""


def _states(pids: Sequence[int]) -> Counter[str]:
    """How often each state was seen over a moment; `gone` for a process that is no more."""
    seen: Counter[str] = Counter()
    for _ in range(LOOKS):
        for pid in pids:
            seen[_state(pid)] += 1
        time.sleep(LOOK_S)
    return seen


def _state(pid: int) -> str:
    with contextlib.suppress(psutil.Error):
        status = psutil.Process(pid).status()
        return "gone" if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) else str(status)
    return "gone"


def _stack(thread: int) -> list[FrameType]:
    """Innermost first. Not to be kept: frames hold the tensors of the step."""
    frames, frame = [], sys._current_frames().get(thread)
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def _in_loader(thread: int) -> bool:
    return any(frame.f_code is _ASKED_FOR_BATCH for frame in _stack(thread))


def _own_place(thread: int) -> str:
    """Where in the workload's own code an item is being made, in this process; empty when workers make them."""
    frames = _stack(thread)
    asked = next((place for place, frame in enumerate(frames) if frame.f_code in _ASKED_FOR_ITEMS), 0)
    inner = frames[:asked]
    if not inner:
        return ""
    own = next((frame for frame in inner if not _is_library(frame.f_code.co_filename)), inner[-1])
    place = f"{Path(own.f_code.co_filename).name}:{own.f_lineno}"
    return f"the dataset is still busy with one item, in {own.f_code.co_name} ({place})"


def _is_library(path: str) -> bool:
    roots = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
    return path.startswith((*roots, "<"))
