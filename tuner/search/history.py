"""History: the stored rows, indexed by what was asked, and which of them settle a question for good."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

import numpy as np

from tuner.contract.measurement import Measurement, MemoryPeak, Outcome
from tuner.contract.probe import ProbeKind, ProbeRow, Stage
from tuner.contract.study import StudySpec
from tuner.search.host import slowdowns
from tuner.search.memory import Size, Traces
from tuner.search.points import Point, Variant, point_of

SEARCH_STAGES = frozenset(
    {
        Stage.BASELINE,
        Stage.EQUIVALENCE,
        Stage.TRACE,
        Stage.NOISE,
        Stage.LOADER,
        Stage.FLAGS,
        Stage.BATCH,
        Stage.VERIFY,
        Stage.POLISH,
        Stage.CONFIRM,
        Stage.QUALITY,
        Stage.LR,
        Stage.SAMPLER,
    }
)
"""Stages whose seconds and probes count against the budget; the gate and the soak have their own."""

FLUKES = frozenset({Outcome.CRASHED, Outcome.NO_RESULT, Outcome.TIMEOUT})
"""Outcomes that may be an accident of the process and not a property of the configuration."""

MAX_CONTENDED = 3
"""Attempts at a measurement another process keeps disturbing; then it is unmeasurable here."""

TRACED = "predicted_peak_bytes"
HEAPED = "predicted_heap_bytes"
"""What a trace probe answers: live tensors; and the host's heap for them, which counts without a GPU."""

_MODEL_KINDS = frozenset({ProbeKind.COMPUTE, ProbeKind.END_TO_END})


def mean_rate(measurement: Measurement) -> float:
    """Samples per second at steady state: the `value` of `statistics.throughput`, without its interval."""
    steady = measurement.steady_step_s
    return measurement.samples_per_step * len(steady) / math.fsum(steady)


def mean_step_s(measurement: Measurement) -> float:
    """Loader workers deliver in bursts, so only the mean says how long a step takes."""
    steady = measurement.steady_step_s
    return math.fsum(steady) / len(steady)


def is_ok(row: ProbeRow) -> bool:
    """Measured, with at least one steady step."""
    return row.outcome is Outcome.OK and row.measurement is not None and bool(row.measurement.steady_step_s)


def tells_memory(row: ProbeRow) -> bool:
    """Its peak is its own. A host's heap keeps what earlier points of the same process made it grow to (seen: a tenth
    more than alone); a CUDA allocator gives its cache back between points."""
    if not is_ok(row) or row.measurement is None:
        return False
    return row.index == 0 or row.measurement.memory.reserved_bytes is not None


def rate_of(row: ProbeRow) -> float:
    assert row.measurement is not None
    return mean_rate(row.measurement)


def power_of(rows: Sequence[ProbeRow]) -> float | None:
    """Mean power in watts over the measured steps of `rows`; None where no row tells."""
    told = [row.measurement.telemetry for row in rows if row.measurement is not None]
    watts = [telemetry.power_w for telemetry in told if telemetry is not None and telemetry.power_w]
    return float(np.mean(watts)) if watts else None


def growth_of(row: ProbeRow) -> float:
    """Bytes: reserved + context on a GPU, without one what the process grew by after its imports."""
    assert row.measurement is not None
    peak = row.measurement.memory
    return float(peak.gate_bytes if peak.reserved_bytes is not None else peak.process_bytes - peak.base_bytes)


def is_settled(rows: Sequence[ProbeRow], *, retry_fluke: bool) -> bool:
    """True when nothing more is to be asked: measured, ruled out for good, or the attempts are used up."""
    if not rows:
        return False
    outcomes = Counter(row.outcome for row in rows)
    flukes = sum(outcomes[outcome] for outcome in FLUKES)
    final = len(rows) - outcomes[Outcome.CONTENDED] - flukes
    if final:
        return True
    return outcomes[Outcome.CONTENDED] >= MAX_CONTENDED or flukes >= (2 if retry_fluke else 1)


class History:
    """The rows of one study. Rows put in by hand, by production or by set-up are no part of a search."""

    def __init__(self, spec: StudySpec, rows: Iterable[ProbeRow]) -> None:
        self.spec = spec
        self.rows = tuple(sorted(rows, key=lambda row: row.number))
        self.search = tuple(row for row in self.rows if row.stage in SEARCH_STAGES)
        self.gate = tuple(row for row in self.rows if row.stage is Stage.GATE)
        self.soak = tuple(row for row in self.rows if row.stage is Stage.SOAK)
        self.quality = tuple(row for row in self.rows if row.stage is Stage.QUALITY)
        """Apart from the others: they are of other models, or of no use for speed."""
        self._asked: defaultdict[tuple[ProbeKind, Point], list[ProbeRow]] = defaultdict(list)
        for row in self.search:
            if row.stage not in (Stage.LR, Stage.QUALITY):
                self._asked[row.kind, point_of(row.config)].append(row)

    @cached_property
    def request_sizes(self) -> Counter[str]:
        """Points per request id."""
        return Counter(row.request_id for row in self.rows)

    @cached_property
    def probes(self) -> int:
        """Processes the search has used."""
        return len({row.request_id for row in self.search})

    @cached_property
    def spent_s(self) -> float:
        return sum(row.seconds for row in self.search)

    @cached_property
    def _slow(self) -> dict[int, float]:
        return slowdowns(self.search)

    def rate(self, row: ProbeRow) -> float:
        """Samples per second of a search's row, as at the host's usual speed."""
        return rate_of(row) / self.host_factor(row)

    def host_factor(self, row: ProbeRow) -> float:
        """What seconds of a search's row must be multiplied with to be as at the host's usual speed."""
        return math.exp(-self._slow.get(row.number, 0.0))

    def step_s(self, row: ProbeRow) -> float:
        """Mean seconds of a step of a search's row, as at the host's usual speed."""
        assert row.measurement is not None
        return mean_step_s(row.measurement) * self.host_factor(row)

    @property
    def host_moved(self) -> bool:
        """Did the host's own speed differ so much between probes that it is taken out of what is compared?"""
        return bool(self._slow)

    def compile_seconds(self, variant: Variant) -> float:
        """Longest compile phase the search saw of a variant: production may start with a cold cache. 0 = none seen."""
        return self._compile_s.get(variant, 0.0)

    @cached_property
    def _compile_s(self) -> dict[Variant, float]:
        found: dict[Variant, float] = {}
        for (_, point), rows in self._asked.items():
            for row in rows:
                seconds = row.measurement.phases_s.get("compile", 0.0) if row.measurement is not None else 0.0
                found[point.variant] = max(seconds, found.get(point.variant, 0.0))
        return found

    def of(self, kind: ProbeKind, point: Point) -> tuple[ProbeRow, ...]:
        return tuple(self._asked.get((kind, point), ()))

    def of_kind(self, kind: ProbeKind) -> dict[Point, list[ProbeRow]]:
        """Rows by point, in the order first asked."""
        return {point: rows for (asked, point), rows in self._asked.items() if asked is kind}

    def ok(self, kind: ProbeKind, point: Point) -> tuple[ProbeRow, ...]:
        return tuple(row for row in self.of(kind, point) if is_ok(row))

    @cached_property
    def _unreached(self) -> frozenset[int]:
        """Numbers of the rows whose point never ran: the process had ended at a point before it.

        They are no attempt at their point. Every request has at least one row that is, so asking again ends.
        """
        failed = {(row.request_id, row.index) for row in self.rows if row.outcome is not Outcome.OK}
        return frozenset(
            row.number
            for row in self.rows
            if row.outcome is Outcome.NO_RESULT and (row.request_id, row.index - 1) in failed
        )

    def attempts(self, kind: ProbeKind, point: Point) -> tuple[ProbeRow, ...]:
        return tuple(row for row in self.of(kind, point) if row.number not in self._unreached)

    def settled(self, kind: ProbeKind, point: Point, *, must: bool = False) -> bool:
        """See `is_settled`. A crash among other points is tried again alone: one of those may have caused it.

        `must`: also a timeout, and also a crash in a process of its own.
        """
        rows = self.attempts(kind, point)
        shared = any(self.request_sizes[row.request_id] > 1 for row in rows if row.outcome in FLUKES)
        timed_out = any(row.outcome is Outcome.TIMEOUT for row in rows)
        return is_settled(rows, retry_fluke=must or (shared and not timed_out))

    def is_retry(self, kind: ProbeKind, point: Point) -> bool:
        """True when the point ended its process before: it is then asked alone."""
        return any(row.outcome in FLUKES for row in self.attempts(kind, point))

    def fits(self, row: ProbeRow) -> bool:
        """The measured peak lies within the memory budget."""
        return row.measurement is not None and self.spec.memory_used(row.measurement.memory) <= 1.0

    def typical_share(self, rows: Sequence[ProbeRow]) -> float:
        """Middle share of the memory budget of processes that ran. The margin between the budget and the hard limit is
        there for what single processes differ by, so one above the budget does not rule a configuration out."""
        return float(np.median([self.spec.memory_used(row.measurement.memory) for row in rows if row.measurement]))

    def size_of(self, kind: ProbeKind, point: Point) -> Size:
        """What its peak depends on: on a host also the loader's workers, which compute probes do without."""
        counts = self.spec.device.kind == "cpu" and kind is ProbeKind.END_TO_END
        return Size(point.variant, point.micro, point.loader.workers if counts else 0)

    def needed(self, point: Point) -> Size:
        """The size an end-to-end probe of `point` has."""
        return self.size_of(ProbeKind.END_TO_END, point)

    @cached_property
    def overrun_sizes(self) -> frozenset[Size]:
        """Seen not to fit: neither they nor anything above is tried again."""
        return frozenset(
            self.size_of(kind, point)
            for (kind, point), rows in self._asked.items()
            if kind in _MODEL_KINDS and (any(row.outcome.is_oom for row in rows) or self._passes(rows))
        )

    def _passes(self, rows: Sequence[ProbeRow]) -> bool:
        told = [row for row in rows if tells_memory(row)]
        return bool(told) and self.typical_share(told) > 1.0

    @cached_property
    def overruns(self) -> dict[Variant, int]:
        """Smallest micro-batch size seen not to fit, by variant, whatever the loader."""
        found: dict[Variant, int] = {}
        for size in self.overrun_sizes:
            found[size.variant] = min(size.micro, found.get(size.variant, size.micro))
        return found

    def limit(self, point: Point) -> float:
        """Smallest micro-batch size of its variant seen not to fit with as many workers or fewer; infinite = none."""
        found = self.limiting(point)
        return found.micro if found is not None else math.inf

    def limiting(self, point: Point) -> Size | None:
        """The size that `limit` is of."""
        own = self.needed(point)
        sizes = (s for s in self.overrun_sizes if s.variant == own.variant and s.workers <= own.workers)
        return min(sizes, key=lambda size: size.micro, default=None)

    @cached_property
    def shares(self) -> dict[Size, float]:
        """Measured share of the memory budget (the middle of what was seen)."""
        rows: dict[Size, list[ProbeRow]] = {}
        for size, row in self._told():
            rows.setdefault(size, []).append(row)
        return {size: self.typical_share(found) for size, found in rows.items()}

    @cached_property
    def growths(self) -> dict[Size, list[float]]:
        """Bytes each measured process grew by (see `growth_of`)."""
        found: dict[Size, list[float]] = {}
        for size, row in self._told():
            found.setdefault(size, []).append(growth_of(row))
        return found

    def _told(self) -> Iterator[tuple[Size, ProbeRow]]:
        for (kind, point), rows in self._asked.items():
            if kind in _MODEL_KINDS:
                size = self.size_of(kind, point)
                yield from ((size, row) for row in rows if tells_memory(row))

    @cached_property
    def traces(self) -> Traces:
        """Bytes the traces hold; of a size traced with several accumulations the most."""
        name = TRACED if self.spec.device.kind == "cuda" else HEAPED
        peaks: dict[bool, dict[int, float]] = {}
        for point, rows in self.of_kind(ProbeKind.TRACE).items():
            by_size = peaks.setdefault(point.variant.gradient_checkpointing, {})
            for row in rows:
                traced = row.values.get(name, row.values.get(TRACED))
                if traced is not None:
                    by_size[point.micro] = max(traced, by_size.get(point.micro, 0.0))
        return Traces({key: by_size for key, by_size in peaks.items() if by_size})

    def share_of_growth(self, growth: float) -> float:
        """Share of the memory budget that a growth of so many bytes would take, on top of what the imports hold."""
        whole = max(0, round(growth))
        if self.spec.device.kind == "cuda":
            return self.spec.memory_used(MemoryPeak(process_bytes=0, reserved_bytes=whole))
        return self.spec.memory_used(MemoryPeak(process_bytes=self._base_bytes + whole, base_bytes=self._base_bytes))

    @cached_property
    def _base_bytes(self) -> int:
        """What the imported process holds: the most that was seen."""
        peaks = [row.measurement.memory for row in self.search if row.measurement is not None]
        return max((peak.base_bytes for peak in peaks), default=0)
