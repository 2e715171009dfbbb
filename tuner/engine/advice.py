"""What the guides advise when they see a run's symptoms: a pure function of its course, and who tells it once.

Levels are medians over several log lines and noise is measured against the line's own trend, so that an ordinary noisy
curve is left in peace.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from tuner.contract.config import LossBands
from tuner.contract.probe import NoticeEvent
from tuner.engine.hooks import Emit

LEVEL_LINES = 5
"""The level of the loss is the median of so many log lines."""
SWING_LINES = 24
"""Oscillation is judged on so many log lines."""
SWING = 0.6
"""From line to line the loss moves by more than this share of its level (median): more than noise."""
TURNING = 0.5
"""Share of lines at which an oscillating loss turns; pure noise turns at 2/3, a period of two at all of them."""
FALLING = 0.9
"""A loss whose later half lies below this share of its earlier half gets on, however it swings."""
PATIENCE_SHARE = 1 / 3
"""After this share of the horizon the loss should be within its band."""
WORSE = 3
"""So many evaluations in a row, each worse than the one before, count as a turn for the worse."""
WORSE_SHARE, TRAINED_SHARE = 0.02, 0.97
"""Over them the figure has lost at least this share, and the training loss has fallen below this share."""
QUIET_LINES = 5
"""A symptom is over when it was not seen for so many judgements in a row; then it may be told again."""


class Symptom(StrEnum):
    TROUBLE = "trouble"
    HIGH = "high"
    OSCILLATION = "oscillation"
    BELOW = "below"
    OVERFITTING = "overfitting"


@dataclass(frozen=True)
class Course:
    """A run as far as its loss tells it: the total loss of each log line over samples."""

    samples: Sequence[int]
    total: Sequence[float]
    horizon: int
    lr: float
    bands: LossBands | None = None
    earlier: str = ""
    """An earlier checkpoint that can be taken instead, in words; empty = none is kept."""

    @property
    def level(self) -> float:
        return _level(self.total)


def loss_advice(course: Course) -> dict[Symptom, str]:
    """Symptom -> what is seen and what the guide does then. At most one word on the learning rate at a time."""
    found: dict[Symptom, str] = {}
    trouble, swings = _trouble(course), _oscillation(course)
    if trouble:
        found[Symptom.TROUBLE] = trouble
    elif swings:
        found[Symptom.OSCILLATION] = swings
    elif high := _high(course):
        found[Symptom.HIGH] = high
    if below := _below(course):
        found[Symptom.BELOW] = below
    return found


def _trouble(course: Course) -> str:
    bands, level = course.bands, course.level
    if bands is None or not level > bands.warn_high:
        return ""
    return (
        f"the loss is {level:.3g}, above {bands.warn_high:g} ({_normal(bands)}): training is in trouble; "
        f"lower the learning rate ({course.lr:g} -> {0.8 * course.lr:.3g}), or look at the data"
    )


def _high(course: Course) -> str:
    bands, level = course.bands, course.level
    if bands is None or not level > bands.normal_high or course.samples[-1] < PATIENCE_SHARE * course.horizon:
        return ""
    return (
        f"the loss is still {level:.3g} after {course.samples[-1]:,} of {course.horizon:,} samples ({_normal(bands)}): "
        f"raise the learning rate by half ({course.lr:g} -> {1.5 * course.lr:.3g})"
    )


def _below(course: Course) -> str:
    bands, level = course.bands, course.level
    if bands is None or not level < bands.warn_low:
        return ""
    return (
        f"the loss is {level:.3g}, below {bands.warn_low:g} ({_normal(bands)}): the model probably memorises the data "
        f"(overfitting); {_instead(course.earlier)}"
    )


def _oscillation(course: Course) -> str:
    swing = swing_share(course.total)
    if swing <= SWING:
        return ""
    return (
        f"the loss swings by {100 * swing:.0f} % from line to line around {course.level:.3g} and does not fall: "
        f"lower the learning rate by a fifth ({course.lr:g} -> {0.8 * course.lr:.3g}), or raise the effective batch"
    )


def swing_share(total: Sequence[float]) -> float:
    """Median move of the loss from one log line to the next as a share of its level, over the last lines and around
    their straight trend; 0 when it gets on, seldom turns, or there are too few lines to tell."""
    last = np.asarray(total[-SWING_LINES:], dtype=np.float64)
    if len(last) < SWING_LINES or not np.isfinite(last).all():
        return 0.0
    level = float(np.median(np.abs(last)))
    half = SWING_LINES // 2
    if level == 0 or float(last[half:].mean()) < FALLING * float(last[:half].mean()):
        return 0.0
    place = np.arange(len(last), dtype=np.float64)
    moves = np.diff(last - np.polyval(np.polyfit(place, last, 1), place))
    turns = float(np.mean(moves[1:] * moves[:-1] < 0))
    return float(np.median(np.abs(moves))) / level if turns >= TURNING else 0.0


def overfitting(course: Course, name: str, values: Sequence[tuple[int, float]], *, higher: bool) -> str:
    """Advice when a validation figure (samples, value) has turned for the worse while the training loss went on
    falling; empty otherwise."""
    last = values[-WORSE - 1 :]
    if len(last) <= WORSE or not all(math.isfinite(value) for _, value in last):
        return ""
    sign = 1.0 if higher else -1.0
    losses = [sign * (before - after) for (_, before), (_, after) in itertools.pairwise(last)]
    if min(losses) <= 0 or sum(losses) < WORSE_SHARE * abs(last[0][1]):
        return ""
    then = _level([loss for samples, loss in zip(course.samples, course.total, strict=True) if samples <= last[0][0]])
    if not course.level < TRAINED_SHARE * then:
        return ""
    return (
        f"{name} has got worse in {WORSE} evaluations in a row ({last[0][1]:.4g} at {last[0][0]:,} samples, "
        f"{last[-1][1]:.4g} now) while the training loss fell from {then:.3g} to {course.level:.3g}: overfitting; "
        f"{_instead(course.earlier)}"
    )


def _level(total: Sequence[float]) -> float:
    """Median of the last finite lines; NaN before there are enough of them."""
    finite = [value for value in total[-4 * LEVEL_LINES :] if math.isfinite(value)][-LEVEL_LINES:]
    return statistics.median(finite) if len(finite) == LEVEL_LINES else math.nan


def _normal(bands: LossBands) -> str:
    return f"normal is {bands.normal_low:g} to {bands.normal_high:g}"


def _instead(earlier: str) -> str:
    where = f"take the earlier checkpoint {earlier}" if earlier else "end the run earlier (quality.patience)"
    return f"{where}, or a smaller model"


class Adviser:
    """Holds the course of one run, and tells each symptom once until it is over."""

    def __init__(self, horizon: int, lr: float, bands: LossBands | None, emit: Emit) -> None:
        self.earlier: Callable[[], str] = str
        """Gives the checkpoint that advice may name."""
        self._horizon = horizon
        self._lr = lr
        self._bands = bands
        self._emit = emit
        self._samples: list[int] = []
        self._total: list[float] = []
        self._quiet: dict[Symptom, int] = {}
        """Told symptoms -> for how many judgements they were not seen."""

    def restore(self, samples: Sequence[int], total: Sequence[float]) -> None:
        """The lines of the run's earlier part."""
        self._samples, self._total = list(samples), list(total)

    def line(self, samples: int, total: float) -> None:
        """A new log line."""
        self._samples.append(samples)
        self._total.append(total)
        self._tell(loss_advice(self._course()), [symptom for symptom in Symptom if symptom is not Symptom.OVERFITTING])

    def figures(self, history: Mapping[str, Sequence[tuple[int, float]]], directions: Mapping[str, bool]) -> None:
        """New validation figures; `directions`: which of them to judge, and whether more is better."""
        if not self._samples:
            return
        course = self._course()
        texts = [
            text
            for name, higher in directions.items()
            if (text := overfitting(course, name, history.get(name, ()), higher=higher))
        ]
        self._tell({Symptom.OVERFITTING: texts[0]} if texts else {}, [Symptom.OVERFITTING])

    def _course(self) -> Course:
        return Course(self._samples, self._total, self._horizon, self._lr, self._bands, self.earlier())

    def _tell(self, seen: Mapping[Symptom, str], judged: Sequence[Symptom]) -> None:
        for symptom in judged:
            if symptom in seen:
                if symptom not in self._quiet:
                    self._emit(NoticeEvent(level="warning", text=f"at {self._samples[-1]:,} samples {seen[symptom]}"))
                self._quiet[symptom] = 0
            elif symptom in self._quiet:
                self._quiet[symptom] += 1
                if self._quiet[symptom] >= QUIET_LINES:
                    del self._quiet[symptom]
