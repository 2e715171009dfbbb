"""The live watch of a production run: throughput and memory off the promise, and a loader that holds the run up.

Judged on windows of some seconds, several in a row, so that one stall or a noisy neighbour's short job says nothing.
Each warning is said once, with the likely cause, and a line says when it is over.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tuner.contract.allowance import allowance
from tuner.contract.probe import Expected, NoticeEvent, TrainPlan
from tuner.contract.statistics import drift
from tuner.engine.hooks import Emit, Hook, Phases
from tuner.engine.memory import PeakMemory
from tuner.engine.meter import FIRST_STEPS, buffered_steps
from tuner.engine.record import StepRecord
from tuner.engine.stall import loader_words
from tuner.engine.step import StepResult
from tuner.engine.telemetry import Nvml, load_per_core
from tuner.engine.trainer import Trainer

STREAK = 3
"""A warning needs so many windows in a row that are off, and its end so many in a row that are not."""
WINDOW_STEPS = 8
"""A window has at least so many steps."""
SLOW, VERY_SLOW = 0.9, 0.8
"""Throughput below this share of the promise is off; below the second also where the host explains it."""
WIDE = 0.7
"""A promise's own interval widens `SLOW` down to this share at most."""
WAITING = 0.5
"""Without a promise, a loader that takes more than this share of the time holds the run up."""
LARGER = 1.1
"""Batches so many times as large as at first explain a slower step, or more memory."""
OVER = 1.05
"""Memory above this share of the promised peak, and above its interval, is off."""
AGAIN = 1.1
"""Memory is told again once it is so many times what was told."""
RISING = 4
"""A peak that rose in so many windows in a row looks like something kept from step to step."""
BUSY_LOAD = 1.25
"""Load average per core of a host that other jobs keep busy."""
MAINTENANCE = ("evaluate", "sample", "assess", "checkpoint")


@dataclass(frozen=True)
class Window:
    """Some seconds of a run."""

    samples: int
    seconds: float
    """In steps; breaks are not in it."""
    wait_s: float
    step_elements: int
    """Numbers in the largest step's batches, padding included."""
    reference_s: tuple[float, ...] = ()
    peak_bytes: int = 0
    maintenance: tuple[str, ...] = ()
    """Evaluation, sampling and the like that happened within it."""

    @property
    def rate(self) -> float:
        return self.samples / self.seconds

    @property
    def waiting(self) -> float:
        return self.wait_s / self.seconds


class Alarm:
    """On after `STREAK` windows in a row that are off, and off again after as many that are not."""

    def __init__(self) -> None:
        self.on = False
        self._streak = 0

    def changed(self, off: bool) -> bool:
        """Take in one more window; True when the alarm has just gone on, or out."""
        self._streak = self._streak + 1 if off != self.on else 0
        if self._streak < STREAK:
            return False
        self.on, self._streak = off, 0
        return True


def host_speed(expected: Expected, reference_s: Sequence[float]) -> float | None:
    """The host now against the host of the promise, by its reference work; 0.5 = half as fast. None = unknown."""
    return drift(reference_s, expected.reference_s)


def least_rate(expected: Expected) -> float:
    """Samples/s below which the promise is not kept: a tenth less, or the lower end of a wider promise."""
    promised = expected.samples_per_s
    return min(SLOW * promised.value, max(promised.low, WIDE * promised.value))


def is_slow(window: Window, expected: Expected, host: float | None) -> bool:
    """Below the promise. Where the host itself is slower and explains it, only if much below."""
    explained = host is not None and window.rate / host >= least_rate(expected)
    return window.rate < (VERY_SLOW * expected.samples_per_s.value if explained else least_rate(expected))


def slow_cause(windows: Sequence[Window], expected: Expected, host: float | None, first_elements: int) -> str:
    """The likely cause as the windows tell it; empty when they do not. `loader` = look at the loader."""
    samples, seconds = sum(w.samples for w in windows), sum(w.seconds for w in windows)
    if host is not None and samples / seconds / host >= least_rate(expected):
        return (
            f"the host itself runs at {100 * host:.0f} % of its speed at the time of the promise (its reference work "
            "slowed as much): another job keeps it busy, or it throttles; see `top`"
        )
    waited = sum(w.wait_s for w in windows)
    lost = seconds - samples / expected.samples_per_s.value
    if waited > lost / 2 and waited > 0.1 * seconds:
        return "loader"
    if min(w.step_elements for w in windows) > LARGER * first_elements:
        return "the batches are larger than at first: their shapes changed"
    return ""


class LiveWatch(Hook):
    """Cuts the run into windows and tells what is off. Goes after the journal, whose record it reads."""

    def __init__(
        self,
        plan: TrainPlan,
        record: Callable[[], StepRecord],
        reference_s: Sequence[float],
        memory: PeakMemory,
        phases: Phases,
        emit: Emit,
    ) -> None:
        self._expected = plan.expected
        self._every_s = plan.watch_every_s
        self._record = record
        self._reference_s = reference_s
        self._memory = memory
        self._phases = phases
        self._emit = emit
        self._windows: deque[Window] = deque(maxlen=max(STREAK, RISING + 1))
        self._slow, self._waiting = Alarm(), Alarm()
        self._first_elements = 0
        self._told_peak = 0
        self._begin(0)

    def _begin(self, since: int) -> None:
        """A new window, from step number `since` of the record on."""
        self._since = since
        self._began = time.monotonic()
        self._elements = 0
        self._references = len(self._reference_s)
        self._maintained = self._maintenance_s()

    def _maintenance_s(self) -> dict[str, float]:
        seconds = self._phases.seconds()
        return {name: seconds.get(name, 0.0) for name in MAINTENANCE}

    def on_start(self, trainer: Trainer) -> None:
        self._begin(FIRST_STEPS + buffered_steps(trainer.config))

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        self._elements = max(self._elements, result.elements)
        known = len(self._record().step_s)
        if known <= self._since:  # warm-up
            self._began = time.monotonic()
        elif time.monotonic() - self._began >= self._every_s and known - self._since >= WINDOW_STEPS:
            window = self._close(trainer, known)
            if window.seconds:  # not slept through
                self._judge(trainer, window)

    def _close(self, trainer: Trainer, known: int) -> Window:
        found = self._record().stretch(self._since, known)
        seconds = self._maintenance_s()
        window = Window(
            samples=found.steps * trainer.config.effective_batch_size,
            seconds=found.seconds,
            wait_s=found.wait_s,
            step_elements=self._elements,
            reference_s=tuple(self._reference_s[self._references :]),
            peak_bytes=self._memory.read().gate_bytes if self._expected is not None else 0,
            maintenance=tuple(name for name in MAINTENANCE if seconds[name] > self._maintained[name]),
        )
        self._begin(known)
        return window

    def _judge(self, trainer: Trainer, window: Window) -> None:
        self._windows.append(window)
        self._first_elements = self._first_elements or window.step_elements
        if self._expected is None:
            self._judge_waiting(trainer, window)
        else:
            self._judge_rate(trainer, window, self._expected)
            self._judge_memory(trainer, window, self._expected)

    def _last(self) -> list[Window]:
        return list(self._windows)[-STREAK:]

    def _judge_waiting(self, trainer: Trainer, window: Window) -> None:
        if not self._waiting.changed(window.waiting > WAITING):
            return
        windows = self._last()
        share = 100 * sum(w.wait_s for w in windows) / sum(w.seconds for w in windows)
        if self._waiting.on:
            text = f"{share:.0f} % of the time went into waiting for batches: {loader_words(trainer)}"
            self._tell(trainer, text)
        else:
            self._tell(trainer, f"the loader keeps up again ({share:.0f} % of the time waiting)", over=True)

    def _judge_rate(self, trainer: Trainer, window: Window, expected: Expected) -> None:
        windows = self._last()
        host = host_speed(expected, [s for w in windows for s in w.reference_s] or self._reference_s[-1:])
        if not self._slow.changed(is_slow(window, expected, host)):
            return
        seconds = sum(w.seconds for w in windows)
        rate, promised = sum(w.samples for w in windows) / seconds, expected.samples_per_s.value
        if not self._slow.on:
            self._tell(trainer, f"{rate:,.4g} samples/s, about the promised {promised:,.4g} again", over=True)
            return
        found = slow_cause(windows, expected, host, self._first_elements)
        if found == "loader":
            share = 100 * sum(w.wait_s for w in windows) / seconds
            found = f"{share:.0f} % of the time went into waiting for batches: {loader_words(trainer)}"
        text = f"{rate:,.4g} samples/s for {seconds:.0f} s, {100 * (1 - rate / promised):.0f} % below the promised"
        self._tell(trainer, f"{text} {promised:,.4g}: {found or device_cause(trainer.device)}")

    def _judge_memory(self, trainer: Trainer, window: Window, expected: Expected) -> None:
        peak = window.peak_bytes
        if peak <= max(expected.peak_high_bytes, OVER * expected.peak_bytes, AGAIN * self._told_peak):
            return
        self._told_peak = peak
        text = (
            f"peak memory {peak >> 20:,} MiB, {100 * (peak / expected.peak_bytes - 1):.0f} % above the promised "
            f"{expected.peak_bytes >> 20:,} MiB ({free_bytes(trainer.device) >> 20:,} MiB are still free): "
        )
        self._tell(trainer, text + memory_cause(list(self._windows), self._first_elements))

    def _tell(self, trainer: Trainer, text: str, *, over: bool = False) -> None:
        self._emit(NoticeEvent(level="info" if over else "warning", text=f"at {trainer.samples:,} samples {text}"))


def memory_cause(windows: Sequence[Window], first_elements: int) -> str:
    """Why the last window's peak is above the promise, as far as the windows tell."""
    last = windows[-1]
    peaks = [w.peak_bytes for w in windows]
    if len(peaks) > RISING and all(a < b for a, b in itertools.pairwise(peaks[-RISING - 1 :])):
        return "it rises from window to window: something is kept from step to step, such as losses with their graph"
    if last.step_elements > LARGER * first_elements:
        return "the batches are larger than at first: their shapes changed"
    if last.maintenance:
        return f"it rose with {' and '.join(last.maintenance)}, which need more here than was measured"
    return "no cause seen in the batches; a library's cache or allocator may differ from the time of the promise"


def device_cause(device: torch.device) -> str:
    """What slows steps down without leaving a trace in them."""
    if device.type == "cuda":
        try:
            nvml = Nvml(device)
        except OSError:
            return _load() or "no cause seen, and NVML cannot be asked; see `nvidia-smi`"
        if nvml.throttled():
            return "the GPU throttles (heat or power): see `nvidia-smi -q -d PERFORMANCE`"
        if others := nvml.other_processes():
            return f"{others} other process{'es' if others > 1 else ''} on the GPU: see `nvidia-smi`"
    return _load() or "no cause seen: the loader keeps up, and the batches are as large as before"


def _load() -> str:
    load = load_per_core() or 0.0
    return f"the host is busy (load {load:.1f} per core): see `top`" if load > BUSY_LOAD else ""


def free_bytes(device: torch.device) -> int:
    """What the device (without one, the host) still has."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return allowance().free_bytes
