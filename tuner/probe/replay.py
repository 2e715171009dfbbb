"""Answers probe requests from a recorded grid: no process runs; noise, seconds and failures are the recorded ones.

A search of a thousand seeds then takes minutes. Every answer is a pure function of the seed and the request, except
that a configuration's first compile is charged once.
"""

from __future__ import annotations

import math
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from tuner.contract.config import CompileMode, RunConfig
from tuner.contract.measurement import Measurement, MemoryPeak, Outcome
from tuner.contract.probe import Listener, PointReply, ProbeKind, ProbeReply, ProbeRequest, ProbeRow
from tuner.contract.space import Knob, knob_value
from tuner.contract.study import StudySpec
from tuner.probe.recording import ANCHOR, UNCAPPED, GridHeader, Recorded, read

Key = tuple[object, ...]
_LOADER = (Knob.NUM_WORKERS, Knob.PREFETCH_FACTOR)
_COMPUTE = (
    Knob.MICRO_BATCH_SIZE,
    Knob.PRECISION,
    Knob.COMPILE,
    Knob.GRADIENT_CHECKPOINTING,
    Knob.CHANNELS_LAST,
    Knob.FUSED,
)
_KNOBS = {
    ProbeKind.END_TO_END: (*_COMPUTE, *_LOADER),
    ProbeKind.COMPUTE: _COMPUTE,
    ProbeKind.LOADER: _LOADER,
    ProbeKind.TRACE: (Knob.MICRO_BATCH_SIZE, Knob.GRADIENT_CHECKPOINTING),
    ProbeKind.EQUIVALENCE: (),
}
"""What an answer of each kind depends on; of the rest any recorded answer serves."""
NEAR = 4
"""Anchors on either side whose median tells the host's speed at a probe."""
NO_SECONDS = 0.05
"""Charged for a probe that cannot be answered."""


def key_of(kind: ProbeKind, config: RunConfig) -> Key:
    return kind, *(knob_value(config.canonical(), knob) for knob in _KNOBS[kind])


class Grid:
    """A recording, indexed.

    Speeds are corrected for the host's own: by the reference work done between the steps of each probe, as far as steps
    follow it; where there is none, by the drift that the baseline's probes in between tell. Loader workers slow the
    reference work too, so it is compared among probes with as many of them.
    """

    def __init__(self, header: GridHeader, recorded: Iterable[Recorded]) -> None:
        self.header = header
        self.spec: StudySpec = header.spec
        self.repeats = tuple(range(header.repeats))
        self._rows: defaultdict[Key, defaultdict[int, list[ProbeRow]]] = defaultdict(lambda: defaultdict(list))
        self._slow: dict[int, tuple[float, float]] = {}
        """id of a row -> log of how much slower the host was around it, for the steps and for the reference work."""
        self._host: dict[int, float] = {}
        """The same during it, by its own reference work."""
        self.anchors: list[ProbeRow] = []
        self._index(list(recorded))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises ConfigError for a file that is no recording."""
        return cls(*read(path))

    @property
    def name(self) -> str:
        return self.spec.name.removeprefix("grid-")

    def _index(self, recorded: Sequence[Recorded]) -> None:
        anchors = [(place, item.row) for place, item in enumerate(recorded) if item.repeat == ANCHOR]
        good = [(place, row) for place, row in anchors if _ran(row)]
        self.anchors = [row for _, row in good]
        places = np.array([place for place, _ in good])
        steps = _centred([math.log(_mean_step(row)) for _, row in good])
        works = _centred([_reference(row) if _has_reference(row) else 0.0 for _, row in good])
        for place, item in enumerate(recorded):
            if item.repeat in (ANCHOR, UNCAPPED):
                continue
            self._rows[key_of(item.row.kind, item.row.config)][item.repeat].append(item.row)
            if len(steps):
                near = np.argsort(np.abs(places - place))[: 2 * NEAR]
                self._slow[id(item.row)] = float(np.median(steps[near])), float(np.median(works[near]))
        self._usual = _usual_references(self._rows)
        self._host = _host_speeds(self._rows, self._usual)

    @cached_property
    def cells(self) -> tuple[RunConfig, ...]:
        """Every configuration, in the order first recorded."""
        return tuple(
            next(iter(by_repeat.values()))[0].config
            for key, by_repeat in self._rows.items()
            if key[0] is ProbeKind.END_TO_END
        )

    def rows(self, kind: ProbeKind, config: RunConfig, repeats: Sequence[int]) -> list[ProbeRow]:
        by_repeat: Mapping[int, list[ProbeRow]] = self._rows.get(key_of(kind, config), {})
        return [row for repeat in repeats for row in by_repeat.get(repeat, ())]

    def log_step(self, row: ProbeRow) -> float:
        """Log of the mean step seconds, corrected for the host's speed."""
        return math.log(_mean_step(row)) - self._host.get(id(row), self._slow.get(id(row), (0.0, 0.0))[0])

    def rate(self, config: RunConfig, repeats: Sequence[int]) -> float | None:
        """Mean samples/s over `repeats` (geometric); None where any failed, or where `config` does not fit."""
        rows = self.rows(ProbeKind.END_TO_END, config, repeats)
        if not rows or not all(_ran(row) for row in rows) or not self.fits(config):
            return None
        return config.effective_batch_size / math.exp(float(np.mean([self.log_step(row) for row in rows])))

    def own_peaks(self, kind: ProbeKind, config: RunConfig, rows: Sequence[ProbeRow]) -> list[MemoryPeak]:
        """Peaks to answer a compute probe with on a host; empty = the row's own.

        A host's heap keeps what earlier points of the same process made it grow to, and who replays a point asks for it
        first. So: those recorded as the first of their process, else those end to end without workers.
        """
        if kind is not ProbeKind.COMPUTE or self.spec.device.kind != "cpu":
            return []
        alone = config.model_copy(update={"loader": config.loader.model_copy(update={"num_workers": 0})})
        first = [row for row in rows if row.index == 0 and _ran(row)]
        found = first or [row for row in self.rows(ProbeKind.END_TO_END, alone, self.repeats) if _ran(row)]
        return [row.measurement.memory for row in found if row.measurement is not None]

    def fits(self, config: RunConfig) -> bool:
        """No recorded process of it failed, and they typically stay inside the memory budget: its margin below the cap
        is there for what single processes differ by."""
        rows = self.rows(ProbeKind.END_TO_END, config, self.repeats)
        return bool(rows) and all(_ran(row) for row in rows) and self._typical_share(rows) <= 1.0

    def _typical_share(self, rows: Sequence[ProbeRow]) -> float:
        return float(np.median([self.spec.memory_used(row.measurement.memory) for row in rows if row.measurement]))

    def compile_s(self, config: RunConfig, *, cached: bool = False) -> float:
        """Seconds of the first compile, with a cold cache, or of one served from the cache; 0 for eager."""
        seconds = self._compiles.get(_compiled_key(config), [0.0])
        return min(seconds) if cached else max(seconds)

    @cached_property
    def _compiles(self) -> dict[Key, list[float]]:
        found: defaultdict[Key, list[float]] = defaultdict(list)
        for by_repeat in self._rows.values():
            for row in (row for rows in by_repeat.values() for row in rows if _ran(row)):
                found[_compiled_key(row.config)].append(_compile_phase(row.measurement))
        return dict(found)

    @cached_property
    def residuals(self) -> dict[ProbeKind, NDArray[np.float64]]:
        """Log step time and log reference work of each process less the means of its configuration, spread as between
        fresh processes, a row each; the second is not a number where there was no reference work.

        Only slow drift is taken out: what the host does from one second to the next is noise to a search.
        """
        found: defaultdict[ProbeKind, list[NDArray[np.float64]]] = defaultdict(list)
        for key, by_repeat in self._rows.items():
            kind = key[0]
            rows = [row for rows in by_repeat.values() for row in rows if _ran(row)]
            if kind in (ProbeKind.END_TO_END, ProbeKind.COMPUTE, ProbeKind.LOADER) and len(rows) > 2:
                assert isinstance(kind, ProbeKind)
                logs = np.array([self._logs(row) for row in rows])
                found[kind].append((logs - logs.mean(axis=0)) * math.sqrt(len(logs) / (len(logs) - 1)))
        return {kind: np.concatenate(values) for kind, values in found.items()}

    def _logs(self, row: ProbeRow) -> tuple[float, float]:
        slow, slow_work = self._slow.get(id(row), (0.0, 0.0))
        work = _reference(row) - slow_work if _has_reference(row) else math.nan
        return math.log(_mean_step(row)) - slow, work

    def usual_reference_s(self, row: ProbeRow) -> float | None:
        """Seconds of the reference work beside such rows, as a rule; None where there was none."""
        log = self._usual.get(_group(row))
        return math.exp(log) if log is not None else None


def _centred(values: Sequence[float]) -> NDArray[np.float64]:
    logs = np.array(values)
    return logs - np.median(logs) if len(logs) else logs


def _usual_references(rows: Mapping[Key, Mapping[int, Sequence[ProbeRow]]]) -> dict[Key, float]:
    """Median log of the reference work by kind and number of workers."""
    groups: defaultdict[Key, list[float]] = defaultdict(list)
    for row in (row for by_repeat in rows.values() for found in by_repeat.values() for row in found):
        if _has_reference(row):
            groups[_group(row)].append(_reference(row))
    return {group: float(np.median(values)) for group, values in groups.items()}


def _host_speeds(rows: Mapping[Key, Mapping[int, Sequence[ProbeRow]]], usual: Mapping[Key, float]) -> dict[int, float]:
    """By id of a row: log of how much slower its steps were by the host's doing.

    The log of its reference work, less the median among rows of the kind with as many workers, times the slope with
    which steps follow it: least squares within configurations.
    """
    cells = [
        [row for found in by_repeat.values() for row in found if _has_reference(row)] for by_repeat in rows.values()
    ]
    apart = {id(row): _reference(row) - usual[_group(row)] for cell in cells for row in cell}
    across = along = 0.0
    for cell in (cell for cell in cells if len(cell) > 1):
        x = np.array([apart[id(row)] for row in cell])
        y = np.array([math.log(_mean_step(row)) for row in cell])
        across += float((x - x.mean()) @ (y - y.mean()))
        along += float((x - x.mean()) @ (x - x.mean()))
    slope = across / along if along else 0.0
    return {key: slope * value for key, value in apart.items()}


def _group(row: ProbeRow) -> Key:
    return row.kind, row.config.loader.num_workers


def _has_reference(row: ProbeRow) -> bool:
    return _ran(row) and row.measurement is not None and bool(row.measurement.reference_s)


def _reference(row: ProbeRow) -> float:
    assert row.measurement is not None
    return math.log(float(np.mean(row.measurement.reference_s)))


def _ran(row: ProbeRow) -> bool:
    return row.outcome is Outcome.OK and row.measurement is not None and bool(row.measurement.steady_step_s)


def _mean_step(row: ProbeRow) -> float:
    assert row.measurement is not None
    return float(np.mean(row.measurement.steady_step_s))


def _compile_phase(measurement: Measurement | None) -> float:
    return measurement.phases_s.get("compile", 0.0) if measurement is not None else 0.0


def _compiled_key(config: RunConfig) -> Key:
    """What a compiled step depends on: not the optimizer, not the loader."""
    if config.compile is CompileMode.EAGER:
        return ()
    return (
        config.compile,
        config.micro_batch_size,
        config.precision,
        config.gradient_checkpointing,
        config.channels_last,
    )


class ReplayRunner:
    """A `ProbeRunner` over a `Grid`.

    repeats: which recorded processes may be seen (default all). A configuration answers with the mean of those,
    moved by a residual drawn from the whole grid's: the recorded noise between processes, with the steps' own within.
    only_baseline: whatever is asked, the baseline answers, as in a study that tunes it against itself.
    """

    def __init__(
        self, grid: Grid, *, seed: int, repeats: Sequence[int] | None = None, only_baseline: bool = False
    ) -> None:
        self.grid = grid
        self.seconds = 0.0
        """Recorded seconds of everything asked so far."""
        self._seed = seed
        self._repeats = tuple(grid.repeats if repeats is None else repeats)
        self._only_baseline = only_baseline
        self._compiled: set[Key] = set()

    def remember(self, rows: Iterable[ProbeRow]) -> None:
        """Count the compiles of earlier rows as done, when a study goes on with a new runner."""
        self._compiled |= {_compiled_key(row.config) for row in rows if row.outcome is Outcome.OK}

    def run(self, request: ProbeRequest, listener: Listener | None = None) -> ProbeReply:
        """The recorded answer to `request`; a configuration that was not recorded is `unsupported`."""
        del listener
        points = tuple(self._point(request, index) for index in range(len(request.points)))
        seconds = sum(point.seconds for point in points)
        self.seconds += seconds
        fixed = sum(self._fixed_s(request.kind, config) for config in request.points)
        return ProbeReply(request_id=request.id, points=points, seconds=seconds, fixed_s=min(fixed, seconds))

    def close(self) -> None:
        """Nothing is open."""

    def _asked(self, config: RunConfig) -> RunConfig:
        return self.grid.spec.baseline if self._only_baseline else config

    def _fixed_s(self, kind: ProbeKind, config: RunConfig) -> float:
        rows = self.grid.rows(kind, self._asked(config), self._repeats) if kind in _KNOBS else []
        return float(np.mean([row.fixed_s for row in rows])) if rows else 0.0

    def _point(self, request: ProbeRequest, index: int) -> PointReply:
        kind, config = request.kind, self._asked(request.points[index])
        rng = np.random.default_rng([self._seed, zlib.crc32(request.id.encode()), index])
        rows = self._rows_for(kind, config)
        if not rows:
            message = f"not recorded in grid {self.grid.name}"
            return PointReply(index=index, outcome=Outcome.UNSUPPORTED, message=message, seconds=NO_SECONDS)
        row = rows[int(rng.integers(len(rows)))]
        if not _ran(row) or row.measurement is None:
            return PointReply(
                index=index, outcome=row.outcome, message=row.message, values=row.values, seconds=row.seconds
            )
        peaks = self.grid.own_peaks(kind, config, rows)
        moved = self._moved(kind, row, rows, rng)
        if peaks:
            moved = moved.model_copy(update={"memory": peaks[int(rng.integers(len(peaks)))]})
        measurement, compiled_s = self._compiling(config, moved)
        return PointReply(
            index=index,
            outcome=row.outcome,
            message=row.message,
            measurement=measurement,
            values=row.values,
            seconds=row.seconds - _compile_phase(row.measurement) + compiled_s,
        )

    def _rows_for(self, kind: ProbeKind, config: RunConfig) -> list[ProbeRow]:
        if kind not in _KNOBS:
            return []
        if self._only_baseline and kind is ProbeKind.END_TO_END:
            return self.grid.anchors
        repeats = self._repeats if kind in (ProbeKind.END_TO_END, ProbeKind.COMPUTE) else self.grid.repeats
        return self.grid.rows(kind, config, repeats)

    def _moved(self, kind: ProbeKind, row: ProbeRow, rows: Sequence[ProbeRow], rng: np.random.Generator) -> Measurement:
        """The row's steps, scaled to the mean of `rows` and a residual of the whole grid; an anchor as it is."""
        assert row.measurement is not None
        residuals = self.grid.residuals.get(kind)
        if (self._only_baseline and kind is ProbeKind.END_TO_END) or residuals is None or not len(residuals):
            return row.measurement
        mean = float(np.mean([self.grid.log_step(other) for other in rows if _ran(other)]))
        step, work = (float(value) for value in residuals[int(rng.integers(len(residuals)))])
        factor = math.exp(mean + step - math.log(_mean_step(row)))
        usual_s = self.grid.usual_reference_s(row)
        told = usual_s is not None and math.isfinite(work)
        return row.measurement.model_copy(
            update={
                "reference_s": (usual_s * math.exp(work),) if usual_s is not None and told else (),
                "step_s": tuple(factor * value for value in row.measurement.step_s),
                "data_wait_s": tuple(factor * value for value in row.measurement.data_wait_s),
            }
        )

    def _compiling(self, config: RunConfig, measurement: Measurement) -> tuple[Measurement, float]:
        """The compile phase as this study meets it: cold the first time, from the cache afterwards."""
        key = _compiled_key(config)
        if not key:
            return measurement, 0.0
        seconds = self.grid.compile_s(config, cached=key in self._compiled)
        self._compiled.add(key)
        return measurement.model_copy(update={"phases_s": {**measurement.phases_s, "compile": seconds}}), seconds
