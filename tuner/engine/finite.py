"""Steps that were not finite: counted, said, and the end of the run when there are too many of them.

With a loss scaler such a step updates nothing and the scale halves; that is its normal work, so only many of them are
said. Without one nothing is left out behind anybody's back: the run stops, and the checkpoint from before is kept.
"""

from __future__ import annotations

import math

from tuner.contract.probe import NoticeEvent
from tuner.engine.failure import Diverged
from tuner.engine.hooks import Emit
from tuner.engine.record import StepRecord
from tuner.engine.step import TOTAL
from tuner.engine.trainer import Trainer

NOT_FINITE_STEPS = 3
"""So many losses in a row that are not finite end a run without a loss scaler."""
SMALLEST_SCALE = 2.0**-14
"""Below this fp16 loss scale every step has been skipped for long, whatever the loss says."""
MANY_SKIPPED = 10
"""So many updates left out with hardly one in between are said; a few are how a scaler finds its scale."""


class FiniteWatch:
    """Fed whenever the losses have been read. Raises Diverged from `check`."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self.not_finite = 0
        """Steps whose loss was not finite."""
        self.skipped = 0
        """Updates that the loss scaler left out."""
        self._read = 0
        self._passed = 0
        self._scale: float | None = None
        self._falling = 0
        self._told = False

    def start(self, trainer: Trainer) -> None:
        self._scale = trainer.loss_scale

    def check(self, trainer: Trainer, record: StepRecord) -> None:
        """Judge the steps read since the last time; `record` must be drained."""
        totals = record.losses.get(TOTAL, ())
        fresh = totals[self._read :]
        self._read = len(totals)
        self.not_finite += sum(not math.isfinite(value) for value in fresh)
        lost, scale = record.not_finite_at_end(), trainer.loss_scale
        if scale is None:
            self._unscaled(lost, trainer)
        else:
            self._scaled(scale, trainer)

    def _unscaled(self, lost: int, trainer: Trainer) -> None:
        """Every step was an update, a bad one too: say so where the loss has come back."""
        if lost >= NOT_FINITE_STEPS:
            raise Diverged(f"the loss was not finite in {lost} steps in a row (at {trainer.samples} samples)")
        passed = self.not_finite - lost - self._passed
        if passed > 0:
            self._passed += passed
            steps = f"{passed} step{'s' if passed > 1 else ''}"
            text = (
                f"the loss was not finite in {steps} before {trainer.samples:,} samples; it has come back, but those "
                "updates were made: look at the data there"
            )
            self._emit(NoticeEvent(level="warning", text=text))

    def _scaled(self, scale: float, trainer: Trainer) -> None:
        before, self._scale = self._scale or scale, scale
        skipped = round(math.log2(before / scale)) if 0 < scale < before else 0
        self.skipped += skipped
        self._falling = self._falling + skipped if skipped else 0
        if scale < SMALLEST_SCALE:
            raise Diverged(
                f"the gradient was not finite in {self._falling} of the last steps, whose updates were left out; the "
                f"fp16 loss scale fell to {scale:g} (at {trainer.samples} samples)"
            )
        if not skipped:
            self._told = False
        elif self._falling >= MANY_SKIPPED and not self._told:
            self._told = True
            self._emit(NoticeEvent(level="warning", text=_many(self._falling, scale, trainer.samples)))


def _many(skipped: int, scale: float, samples: int) -> str:
    return (
        f"at {samples:,} samples {skipped} updates have been left out of late, as their gradient was not finite; the "
        f"fp16 loss scale fell to {scale:g}, and the run ends below {SMALLEST_SCALE:.1g}: a lower learning rate, or "
        "bf16 or fp32, is the usual cure"
    )
