"""The Pareto view of a study's rows: one point per configuration, for `tuner.store.pareto` to keep."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from tuner.contract.config import RunConfig
from tuner.contract.probe import ProbeKind, ProbeRow, Stage
from tuner.contract.study import StudySpec
from tuner.search.history import SEARCH_STAGES, is_ok, power_of, rate_of
from tuner.search.losses import losses_at_equal_samples
from tuner.store import pareto
from tuner.store.pareto import ParetoPoint

_STAGES = (SEARCH_STAGES - {Stage.QUALITY}) | {Stage.GATE, Stage.SOAK}


def write_pareto(url: str, spec: StudySpec, rows: Sequence[ProbeRow]) -> bool:
    """Write it beside the study. False when nothing ran, or another's study has the name. Raises StoreError."""
    points = pareto_points(spec, rows)
    return bool(points) and pareto.write_pareto(url, spec, points)


def pareto_points(spec: StudySpec, rows: Sequence[ProbeRow]) -> list[ParetoPoint]:
    """Configurations of the baseline's model that ran end to end, in the order first measured."""
    groups = list(_by_config(spec, rows))
    losses = _losses(rows, [group[0].config for group in groups])
    return [_point(spec, group, loss) for group, loss in zip(groups, losses, strict=True)]


def _by_config(spec: StudySpec, rows: Sequence[ProbeRow]) -> Iterable[list[ProbeRow]]:
    groups: dict[str, list[ProbeRow]] = {}
    for row in rows:
        whole = row.kind is ProbeKind.END_TO_END and row.stage in _STAGES
        if whole and is_ok(row) and row.config.options == spec.baseline.options:
            groups.setdefault(row.config.digest(), []).append(row)
    return groups.values()


def _point(spec: StudySpec, rows: Sequence[ProbeRow], loss: float | None) -> ParetoPoint:
    """Means over processes, since the best of several would be luck; the memory is the most that was seen."""
    memory = [row.measurement.memory for row in rows if row.measurement is not None]
    rate, power = float(np.mean([rate_of(row) for row in rows])), power_of(rows)
    return ParetoPoint(
        config=rows[0].config,
        samples_per_s=rate,
        peak_bytes=max(peak.gate_bytes for peak in memory),
        overrun=max(spec.memory_used(peak) for peak in memory) - 1,
        processes=len(rows),
        loss=loss,
        joules_per_sample=power / rate if power is not None else None,
    )


def _losses(rows: Sequence[ProbeRow], configs: Sequence[RunConfig]) -> Sequence[float | None]:
    """At equal samples. What agrees with the first configuration's but for rounding is given the same value: a front
    of rounding errors would be none."""
    found = losses_at_equal_samples(rows, configs)
    if found is None:
        return [None] * len(configs)
    first = configs[0].effective_batch_size
    return [
        loss if differs or config.effective_batch_size != first else found.losses[0]
        for loss, differs, config in zip(found.losses, found.differs, configs, strict=True)
    ]
