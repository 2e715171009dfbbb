"""The soak: once through what makes production's peak beside the steps. The evaluation is made whole where its time
allows that; elsewhere a part of it is, and its growth over the batches tells the peak of all of it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tuner.contract.measurement import EvaluationPart
from tuner.contract.probe import NoticeEvent, ProgressEvent
from tuner.engine import growth, judging
from tuner.engine.bench import Bench
from tuner.engine.checkpoint import Checkpointer
from tuner.engine.curves import draw_curves
from tuner.engine.failure import classify, one_line, release
from tuner.engine.hooks import Emit
from tuner.engine.loader import TensorBatch, valid_count
from tuner.engine.memory import PeakMemory
from tuner.engine.table import SAMPLES, Row
from tuner.engine.trainer import Trainer

LEAST_BATCHES = 8
"""Evaluated at any price."""
EARLY = 0.25
"""Share of the time after which an evaluation that will not come to its end is ended: the rest is for its parts."""
PARTS_SHARE = 0.5
"""Share of the time for the larger part; the smaller one takes half as long."""
RESOLUTION = {"cpu": 1 << 20, "cuda": 20 << 20}
"""Bytes that two levels of the same may differ by: pages here and there; a block of the CUDA allocator."""
BEAT_S = 2.0


def run(bench: Bench, trainer: Trainer, memory: PeakMemory) -> None:
    """Evaluation, samples and their assessment, curves and a checkpoint; `memory` is told what the evaluation says."""
    with tempfile.TemporaryDirectory(prefix="tuner-soak-") as folder:
        with bench.phases.during("evaluate"):
            found, memory.evaluation = Soaked(bench, trainer, memory).evaluate()
        with bench.phases.during("sample"):
            judging.write_samples(trainer, Path(folder) / "samples")
        with bench.phases.during("assess"), judging.tolerated("the assessment", bench.emit):
            found |= judging.assess(trainer, Path(folder) / "samples")
        with bench.phases.during("sample"):  # a panel for each figure, as production will have: many take memory
            draw_curves([], [[_as_row(found)]], Path(folder) / "curves.png")
        with bench.phases.during("checkpoint"):
            Checkpointer(Path(folder) / "checkpoints").save(trainer.state_dict())


def _as_row(figures: Mapping[str, float]) -> Row:
    return {SAMPLES: "1", **{name: f"{value:.9g}" for name, value in figures.items()}}


class Soaked:
    """One soak's evaluation."""

    def __init__(self, bench: Bench, trainer: Trainer, memory: PeakMemory) -> None:
        self._bench = bench
        self._trainer = trainer
        self._memory = memory
        self._seconds = bench.request.limits.evaluate_s
        self._total = valid_count(trainer.workload, trainer.config)

    def evaluate(self) -> tuple[dict[str, float], EvaluationPart]:
        """Figures, of the part alone where a part was seen, and what the peak stands on. Raises what the workload
        raises on the whole split, and lack of memory."""
        going = Going(self._total, self._bench.emit, self._hopeless)
        found = self._figures(going)
        if going.ended_early:
            return found, self._extrapolated(going)
        if judging.evaluates_raw(self._trainer):
            again = Going(self._total, self._bench.emit, self._hopeless)
            self._figures(again, raw=True)
            return found, _whole(going, going.whole_s + again.whole_s)
        return found, _whole(going, going.whole_s)

    def _hopeless(self, going: Going) -> bool:
        """Will the evaluation not come to its end in its time?"""
        if going.seen < LEAST_BATCHES:
            return False
        spent = going.spent_s
        return spent > self._seconds or (spent > EARLY * self._seconds and going.whole_s > self._seconds)

    def _figures(self, going: Going, *, raw: bool = False) -> dict[str, float]:
        """Of a part no figures are owed: a workload may fail on it, e.g. where a class is missing."""
        try:
            return judging.evaluate(self._trainer, raw=raw, through=going)
        except Exception as error:
            if not going.ended_early or classify(error)[0].is_oom:
                raise
            text = f"the evaluation of {going.seen} of {going.total} batches gave no figures: {one_line(error)}"
            release(error)
            self._bench.emit(NoticeEvent(text=text))
            return {}
        finally:
            going.close()

    def _extrapolated(self, going: Going) -> EvaluationPart:
        affordable = int(PARTS_SHARE * self._seconds / max(going.batch_s, 1e-9))
        count = min(going.total, max(LEAST_BATCHES, affordable))
        kind, held = self._trainer.device.type, self._memory.held
        self._memory.start_anew()
        heap = growth.Heap(max(0, held - self._memory.held), RESOLUTION[kind], growth.STRANDED[kind])
        whole = growth.whole(self._part(count), self._part(max(1, count // 2)), going.total, heap)
        times = 2 if judging.evaluates_raw(self._trainer) else 1
        return EvaluationPart(batches=going.total, seen=count, seconds=times * going.whole_s, held=whole)

    def _part(self, count: int) -> growth.Part:
        """The first `count` batches, with nothing free held when they begin and again when they end."""
        memory = self._memory
        in_use: list[int] = []
        ends: list[int] = []

        def end() -> None:
            ends.append(memory.most_lately)
            memory.start_anew()
            ends.append(memory.held)

        going = Going(
            self._total, self._bench.emit, lambda going: going.seen >= count, lambda: in_use.append(memory.in_use), end
        )
        memory.start_anew()
        self._figures(going)
        if not ends:  # the workload did not ask for all of them
            end()
        within, level = ends
        after = memory.most_lately
        return growth.Part(tuple(in_use), level, max(0, within - level), max(0, after - level))


def _whole(going: Going, seconds: float) -> EvaluationPart:
    return EvaluationPart(batches=going.seen, seen=going.seen, seconds=seconds)


def _nothing() -> None:
    pass


class Going:
    """The batches on their way to the workload: counted, timed, and ended early where `enough` says so."""

    def __init__(
        self,
        total: int,
        emit: Emit,
        enough: Callable[[Going], bool],
        after_batch: Callable[[], None] = _nothing,
        at_end: Callable[[], None] = _nothing,
    ) -> None:
        self.total = total
        self.seen = 0
        self.ended_early = False
        self._emit = emit
        self._enough = enough
        self._after_batch = after_batch
        self._at_end = at_end
        self._began = self._first = self._last = self._told = time.monotonic()
        self._ended: float | None = None

    def __call__(self, batches: Iterator[TensorBatch]) -> Iterator[TensorBatch]:
        while not self._is_early():
            batch = next(batches, None)
            if batch is None:
                break
            yield batch
            del batch
            self._count()
        self._at_end()

    def _is_early(self) -> bool:
        self.ended_early = self.seen < self.total and self._enough(self)
        return self.ended_early

    def _count(self) -> None:
        self.seen += 1
        self._last = time.monotonic()
        if self.seen == 1:
            self._first = self._last
        self._after_batch()
        if self._last - self._told >= BEAT_S:
            self._told = self._last
            self._emit(ProgressEvent(done=self.seen, total=self.total, text="evaluating"))

    def close(self) -> None:
        """The workload's evaluation is over."""
        self._ended = time.monotonic()

    @property
    def spent_s(self) -> float:
        return self._last - self._began

    @property
    def batch_s(self) -> float:
        """Of a usual batch; the first one may compile."""
        return (self._last - self._first) / (self.seen - 1) if self.seen > 1 else self.spent_s

    @property
    def whole_s(self) -> float:
        """Of all batches; in proportion where they were ended early, or are not over."""
        if self._ended is not None and not self.ended_early:
            return self._ended - self._began
        return self._first - self._began + self.batch_s * (self.total - 1)
