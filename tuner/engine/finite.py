"""Steps that were not finite: counted, said, and the end of the run when there are too many of them.

Such a step updates nothing (but see `update`). With a loss scaler the scale halves; that is its normal work, so only
many of them are said. Without one each is said, and a few in a row end the run: the checkpoint from before is kept.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

from tuner.contract.probe import NoticeEvent
from tuner.engine.failure import Diverged
from tuner.engine.hooks import Emit
from tuner.engine.record import StepRecord
from tuner.engine.step import TOTAL
from tuner.engine.trainer import Trainer

NOT_FINITE_STEPS = 3
"""So many steps in a row whose loss or gradient is not finite end a run without a loss scaler."""
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
        """Updates that were left out."""
        self.in_a_row = 0
        """Bad steps at the end of what was read; set before the start of a run that is resumed."""
        self._read = 0
        self._untold = self._made = 0
        """Bad steps that nobody was told of yet, and how many of them were updates all the same."""
        self._scale: float | None = None
        self._falling = 0
        self._told = False

    def start(self, trainer: Trainer) -> None:
        self._scale = trainer.loss_scale

    def check(self, trainer: Trainer, record: StepRecord, *, last: bool = False) -> None:
        """Judge the steps read since the last time; `record` must be drained. `last`: no more will come."""
        since, bad = self._read, record.bad_since(self._read)
        self._read += len(bad)
        losses = record.losses.get(TOTAL, array("d"))[since:]
        self.not_finite += sum(not math.isfinite(value) for value in losses)
        scale = trainer.loss_scale
        if scale is not None:
            self._scaled(scale, trainer)
            return
        self._judge(bad, losses, trainer)
        self._tell(sum(bad), sum(record.left_out[since:]), trainer, over=last or not self.in_a_row)

    def in_a_row_after(self, record: StepRecord) -> int:
        """The bad steps in a row at the end of `record`, those before this process included."""
        bad = record.bad_since(self._read)
        return record.bad_at_end() if not all(bad) else self.in_a_row + len(bad)

    def _judge(self, bad: Sequence[bool], losses: Sequence[float], trainer: Trainer) -> None:
        for is_bad, loss in zip(bad, losses, strict=True):
            self.in_a_row = self.in_a_row + 1 if is_bad else 0
            if self.in_a_row >= NOT_FINITE_STEPS:
                what = "gradient" if math.isfinite(loss) else "loss"
                raise Diverged(
                    f"the {what} was not finite in {self.in_a_row} steps in a row (at {trainer.samples} samples)"
                )

    def _tell(self, bad: int, left_out: int, trainer: Trainer, *, over: bool) -> None:
        """Once good steps have come again, or the run is over."""
        self.skipped += left_out
        self._untold += bad
        self._made += bad - left_out
        if not (self._untold and over):
            return
        steps = f"{self._untold} step{'s' if self._untold > 1 else ''}"
        update = "their updates were left out" if not self._made else "it has come back, but those updates were made"
        text = f"the loss or its gradient was not finite in {steps} before {trainer.samples:,} samples; {update}"
        self._untold = self._made = 0
        self._emit(NoticeEvent(level="warning", text=f"{text}: look at the data there"))

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
