"""View: what the rows of a study show, worked out once per call: reference, legality of accumulation, models, budget.

It is rebuilt from (spec, rows) every time and changes nothing, which is what makes the planner a pure function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

from tuner.contract.config import CompileMode, Precision
from tuner.contract.equivalence import equivalent
from tuner.contract.measurement import Interval, Outcome
from tuner.contract.probe import ProbeKind, ProbeRow
from tuner.contract.space import Knob
from tuner.contract.study import StudySpec
from tuner.search import goodput
from tuner.search.history import History, growth_of, is_ok, is_settled
from tuner.search.memory import DEVICE, HOST, Foresight, MemoryModel, Size
from tuner.search.model import LoaderModel, StepModel
from tuner.search.points import (
    Loader,
    Point,
    Variant,
    as_loader,
    loader_of,
    micro_values,
    point_of,
    sample_values,
    smaller_cuts,
    with_batch,
)

SURELY = 0.9
"""Share of the memory budget below which a proportional extrapolation is trusted without a measurement."""


class View:
    def __init__(self, spec: StudySpec, rows: Sequence[ProbeRow]) -> None:
        self.spec = spec
        self.history = History(spec, rows)

    @cached_property
    def baseline(self) -> Point:
        return point_of(self.spec.baseline)

    @cached_property
    def ladder(self) -> tuple[Point, ...]:
        """The baseline, then what may stand in for it: where this machine cannot run its loader workers, itself without
        them; where it does not fit, ever smaller cuts of its effective batch."""
        if self.baseline.loader.workers and self._is_unsupported(self.baseline):
            return (self.baseline, self.baseline._replace(loader=as_loader(0, 0)))
        return (self.baseline, *smaller_cuts(self.baseline))

    @cached_property
    def reference(self) -> Point | None:
        """What candidates are compared with: the baseline or the largest cut of its batch that fits; None = not yet."""
        for point in self.ladder:
            rows = self.history.ok(ProbeKind.END_TO_END, point)
            if rows and all(self.history.fits(row) for row in rows):
                return point
            if not self.fails_for_good(point):
                return None
        return None

    def fails_for_good(self, point: Point) -> bool:
        """Can this machine not run it end to end, however often it is tried?"""
        return self.overflows(point) or (bool(point.loader.workers) and self._is_unsupported(point))

    def _is_unsupported(self, point: Point) -> bool:
        rows = self.history.of(ProbeKind.END_TO_END, point)
        return any(row.outcome is Outcome.UNSUPPORTED for row in rows)

    def overflows(self, point: Point) -> bool:
        """Seen end to end to run out of memory or to pass the budget."""
        rows = self.history.of(ProbeKind.END_TO_END, point)
        return any(row.outcome.is_oom or (is_ok(row) and not self.history.fits(row)) for row in rows)

    @property
    def base(self) -> Variant:
        assert self.reference is not None
        return self.reference.variant

    @cached_property
    def samples(self) -> int:
        """Samples per step and device at which the stages measure."""
        first = sample_values(self.spec)[0]
        usable = self.micro_values(first)
        return first if usable or self.reference is None else self.reference.samples

    @cached_property
    def noise_scale(self) -> Interval | None:
        """Gradient noise scale in samples; None = unknown."""
        return goodput.noise_scale(self.history.rows, self.spec)

    @cached_property
    def best_samples(self) -> float | None:
        """Samples per step and device with the best goodput by the closed form; None while something is unknown."""
        if self.noise_scale is None or not self._fitting or not self.steps.fits:
            return None
        anchor = self.anchor
        fit = min(self.steps.fits.values(), key=lambda fit: fit.step_s(anchor.micro, anchor.accumulation))
        return goodput.best_samples(self.noise_scale.value / self.spec.baseline.world_size, fit, max(self._fitting))

    @cached_property
    def _fitting(self) -> tuple[int, ...]:
        """Micro-batch sizes of the space that memory allows the base variant; of a coupled batch the reference's."""
        if self.coupled and self.reference is not None:
            return (self.reference.micro,)
        values = self.spec.space.values(Knob.MICRO_BATCH_SIZE, self.spec.baseline)
        return tuple(micro for micro in values if self.memory.fits(self.base, micro))

    @cached_property
    def sample_values(self) -> tuple[int, ...]:
        """Samples per step and device the search may use, the baseline's first: see `goodput.usable_samples`."""
        phi = self.noise_scale.value if self.noise_scale is not None else None
        return goodput.usable_samples(self.spec, phi, self.best_samples, self._fitting if phi is not None else ())

    @cached_property
    def equivalence_pairs(self) -> tuple[tuple[Point, Point], ...]:
        """Pairs of cuts to compare, in fp32: the reference against one micro-batch, or else against smaller ones."""
        if self.reference is None or self.spec.batch_coupled:
            return ()
        if len(micro_values(self.spec, self.reference.samples)) < 2 or self.reference.samples < 2:
            return ()
        own = self.reference._replace(variant=self.base._replace(precision=Precision.FP32, compile=CompileMode.EAGER))
        whole = with_batch(own, own.samples, own.samples)
        smaller = next(smaller_cuts(own), None)
        return tuple((own, other) for other in (whole, smaller) if other is not None and other != own)

    @cached_property
    def equivalence(self) -> Mapping[str, float]:
        """What the equivalence probe measured; empty where it has not."""
        for rows in self.history.of_kind(ProbeKind.EQUIVALENCE).values():
            for row in rows:
                if equivalent(row.values) is not None:
                    return row.values
        return {}

    def equivalence_settled(self, pair: tuple[Point, Point]) -> bool:
        """Nothing more can be learned from this pair. A request is judged by the first of its rows that failed."""
        by_request: dict[str, list[ProbeRow]] = {}
        for point in pair:
            for row in self.history.of(ProbeKind.EQUIVALENCE, point):
                by_request.setdefault(row.request_id, []).append(row)
        whole = [group for group in by_request.values() if len(group) == len(pair)]
        judged = [min(group, key=lambda row: (row.outcome is Outcome.OK, row.index)) for group in whole]
        return is_settled(judged, retry_fluke=True)

    @cached_property
    def coupled(self) -> bool:
        """Samples of a micro-batch influence each other: how the batch is cut changes the training."""
        return self.spec.batch_coupled or equivalent(self.equivalence) is False

    def micro_values(self, samples: int) -> tuple[int, ...]:
        """Micro-batch sizes the search may use at `samples` per step, ascending; of a coupled batch the reference's."""
        if not self.coupled or self.reference is None:
            return micro_values(self.spec, samples)
        return (self.reference.micro,) if samples % self.reference.micro == 0 else ()

    @cached_property
    def anchor(self) -> Point:
        """The reference at the largest micro-batch size that surely fits: where flags are compared.

        Judged from end-to-end rows of the reference and from traces alone, so that it stays where it is while models
        grow: a size is sure in proportion to the reference, or by the upper error bar of its trace.
        """
        assert self.reference is not None
        reference = self.reference
        rows = self.history.ok(ProbeKind.END_TO_END, reference)
        share = max(self.spec.memory_used(row.measurement.memory) for row in rows if row.measurement is not None)
        sizes = self.micro_values(self.samples)
        limit = self.history.limit(reference)
        needed = self.history.needed(reference)
        traced = MemoryModel({}, (), self._foresight({needed: [growth_of(row) for row in rows]}))
        sure = [
            m
            for m in sizes
            if m < limit
            and (
                m <= reference.micro or share * m / reference.micro <= SURELY or traced.fits(*needed._replace(micro=m))
            )
        ]
        return with_batch(reference, max(sure, default=sizes[0]), self.samples)

    @cached_property
    def memory(self) -> MemoryModel:
        history = self.history
        enforced = self.spec.device.kind == "cuda" or self.spec.memory_cap_bytes is not None
        foresight = self._foresight(history.growths)
        return MemoryModel(history.shares, history.overrun_sizes, foresight, enforced=enforced)

    def _foresight(self, growths: Mapping[Size, Sequence[float]]) -> Foresight | None:
        """What traces say beside the growth measured; None where nothing was traced."""
        traces, spread = self.history.traces, DEVICE if self.spec.device.kind == "cuda" else HOST
        return Foresight(traces, growths, self.history.share_of_growth, spread) if traces.peaks else None

    @cached_property
    def steps(self) -> StepModel:
        return StepModel(self.history, self.base)

    @cached_property
    def loading(self) -> LoaderModel:
        return LoaderModel(self.history)

    @cached_property
    def loaders(self) -> tuple[Loader, ...]:
        """Loader settings that may be used: the reference's and those measured."""
        return tuple(sorted({loader_of(self.spec.baseline), *self.loading.per_sample}))
