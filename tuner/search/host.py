"""The host's own speed during each probe, told by the reference work before and after its steps (without a GPU only).

A shared machine runs a tenth faster or slower from one probe to the next. A fixed piece of work feels the same, so that
most of the difference can be taken out of what a search compares. It is done where the configuration does not run
(`tuner.engine.reference`), so it tells of the host alone. The ship gate does not rest on it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from tuner.contract.measurement import Outcome
from tuner.contract.probe import ProbeKind, ProbeRow
from tuner.search.points import Point, point_of

QUIET = 0.02
"""Standard deviation of the log seconds of the reference work up to which the host counts as steady."""
SLOPE = 1.0
"""How far steps follow the reference work, until processes of one configuration tell."""
WEIGHT = 0.01
"""Sum of squares that guess is worth: two pairs of processes, the host 7 % faster for one than for the other."""
STEEPEST = 2.0


def slowdowns(rows: Iterable[ProbeRow]) -> dict[int, float]:
    """Row number -> log of how much longer its steps took by the host's doing; only of rows with reference work."""
    by_kind: defaultdict[ProbeKind, list[ProbeRow]] = defaultdict(list)
    for row in rows:
        if has_reference(row):
            by_kind[row.kind].append(row)
    apart: dict[int, float] = {}
    for of_kind in by_kind.values():
        logs = np.array([reference_log(row) for row in of_kind])
        apart.update({row.number: float(log) for row, log in zip(of_kind, logs - np.median(logs), strict=True)})
    if len(apart) < 2 or float(np.std(list(apart.values()))) < QUIET:
        return {}
    slope = _slope([row for of_kind in by_kind.values() for row in of_kind], apart)
    return {number: slope * log for number, log in apart.items()}


def has_reference(row: ProbeRow) -> bool:
    measurement = row.measurement
    if row.outcome is not Outcome.OK or measurement is None:
        return False
    return bool(measurement.reference_s and measurement.steady_step_s)


def reference_log(row: ProbeRow) -> float:
    """Log of the mean seconds of the reference work."""
    assert row.measurement is not None
    return math.log(float(np.mean(row.measurement.reference_s)))


def _slope(rows: Sequence[ProbeRow], apart: dict[int, float]) -> float:
    """Least squares within configurations measured more than once, drawn towards `SLOPE`."""
    cells: defaultdict[tuple[ProbeKind, Point], list[ProbeRow]] = defaultdict(list)
    for row in rows:
        cells[row.kind, point_of(row.config)].append(row)
    across, along = WEIGHT * SLOPE, WEIGHT
    for cell in cells.values():
        x = np.array([apart[row.number] for row in cell])
        y = np.array([_step_log(row) for row in cell])
        across += float((x - x.mean()) @ (y - y.mean()))
        along += float((x - x.mean()) @ (x - x.mean()))
    return min(STEEPEST, max(0.0, across / along))


def _step_log(row: ProbeRow) -> float:
    assert row.measurement is not None
    return math.log(float(np.mean(row.measurement.steady_step_s)))
