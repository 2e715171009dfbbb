"""How the search words a probe request: limits by kind, and an id that is a pure function of what is asked."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from tuner.contract.config import RunConfig
from tuner.contract.probe import ProbeKind, ProbeLimits, ProbeRequest, Stage
from tuner.contract.study import StudySpec
from tuner.search.history import History

REFERRED = frozenset({ProbeKind.END_TO_END, ProbeKind.COMPUTE})
"""Kinds whose speed is compared: without a GPU the host's reference work is done before and after their steps."""

SOAK_PATIENCE = 3
"""A soak's phases (evaluation, sampling, checkpoint write) may be silent this much longer."""

EVALUATE_SHARE = 0.25
EVALUATE_S = (30.0, 300.0)
"""A soak's evaluation may take this share of the search's budget, within these seconds."""

NEVER_NARROW = 1e-9
"""Half-width at which the gate may stop early: its figures become the promise of a long run, and a lucky second has a
narrow interval too."""


def limits_for(spec: StudySpec, kind: ProbeKind, stage: Stage) -> ProbeLimits:
    measure, half_width = spec.measure, spec.measure.half_width
    seconds = measure.compute_s if kind in (ProbeKind.COMPUTE, ProbeKind.LOADER) else measure.measure_s
    if stage in (Stage.GATE, Stage.SOAK):
        seconds, half_width = spec.gate.measure_s, NEVER_NARROW
    return ProbeLimits(
        measure_s=seconds,
        min_steps=measure.min_steps,
        half_width=half_width,
        deadline_s=measure.deadline_s * (SOAK_PATIENCE if stage is Stage.SOAK else 1),
        evaluate_s=min(max(EVALUATE_S[0], EVALUATE_SHARE * spec.budget_s), EVALUATE_S[1]),
        memory_bytes=spec.memory_cap_bytes,
    )


def make_request(
    history: History,
    kind: ProbeKind,
    stage: Stage,
    configs: Sequence[RunConfig],
    *,
    pair: int | None = None,
    samples: int | None = None,
) -> ProbeRequest:
    """The request for `configs`; asked again after a failure it has the same id but for its repeat number."""
    spec = history.spec
    base = f"{stage.value}-{kind.value}-{_digest(configs)}"
    if pair is not None:
        base += f"-pair{pair}"
    return ProbeRequest(
        id=f"{base}-{_repeat(history, base)}",
        kind=kind,
        stage=stage,
        workload=spec.workload,
        options=configs[0].options or spec.options,
        points=tuple(configs),
        limits=limits_for(spec, kind, stage),
        device=spec.device.kind,
        pair=pair,
        soak=stage is Stage.SOAK,
        samples=samples,
        reference=kind in REFERRED,
    )


def _digest(configs: Sequence[RunConfig]) -> str:
    return hashlib.sha256(" ".join(config.digest() for config in configs).encode()).hexdigest()[:12]


def _repeat(history: History, base: str) -> int:
    return sum(1 for request_id in history.request_sizes if request_id.rpartition("-")[0] == base)
