"""The trace stage: peak memory on fake tensors of the sizes the search may use, where memory could bind at all.

A trace takes a second or some, allocates nothing and so cannot run out of memory; it comes before anything is measured
at another size than the baseline's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tuner.contract.measurement import Outcome
from tuner.contract.probe import PREDICTED_USED, PointReply, ProbeKind, ProbeReply, ProbeRequest, ProbeRow, Stage
from tuner.contract.space import Knob
from tuner.contract.study import StudySpec
from tuner.search.history import TRACED
from tuner.search.points import Point, Variant, flag_values, point_of, with_batch, with_flag
from tuner.search.situation import Situation
from tuner.search.view import View

COULD_BIND = 0.6
"""Share of the memory budget, of the largest size in proportion to the reference's, from which tracing is worth it."""
UNCHECKPOINTED = 3.0
"""How many times the memory of a recomputing reference the same size may take without recomputing."""
TRACED_SIZES = 4
"""Sizes traced per variant: the peak is convex in the size and nearly straight between them."""


def tracing(s: Situation) -> ProbeRequest | None:
    """One process per variant, the reference's first; a variant that cannot be traced is not asked again."""
    if not s.view.spec.probes_alone or not could_bind(s):
        return None
    for variant in _variants(s):
        if not _untraceable(s, variant):
            points = [_at(s, variant, micro) for micro in traced_sizes(s)]
            if request := s.measure(ProbeKind.TRACE, Stage.TRACE, points, s.budget.trace_s):
                return request
    return None


def could_bind(s: Situation) -> bool:
    """Something was seen not to fit, or the largest size of the space might not."""
    reference = s.forecast.reference
    sizes = [micro for samples in s.view.sample_values for micro in s.view.micro_values(samples)]
    if not sizes or max(sizes) == min(sizes) == reference.micro:
        return False
    rows = s.forecast.rows[reference]
    share = max(s.view.spec.memory_used(row.measurement.memory) for row in rows if row.measurement is not None)
    recomputes = reference.variant.gradient_checkpointing
    worse = UNCHECKPOINTED if recomputes and False in flag_values(s.view.spec, Knob.GRADIENT_CHECKPOINTING) else 1.0
    return bool(s.history.overruns) or worse * share * max(sizes) / reference.micro >= COULD_BIND


def _variants(s: Situation) -> Iterator[Variant]:
    """The reference's, then the same with recomputing the other way where the space has that."""
    base = s.view.base
    yield base
    other = not base.gradient_checkpointing
    if other in flag_values(s.view.spec, Knob.GRADIENT_CHECKPOINTING):
        yield with_flag(base, Knob.GRADIENT_CHECKPOINTING, other)


def _untraceable(s: Situation, variant: Variant) -> bool:
    """A point of it was answered `unsupported`; where it was one of the reference's, so will be every other variant."""
    for point, rows in s.history.of_kind(ProbeKind.TRACE).items():
        if point.variant in (variant, s.view.base) and any(row.outcome is Outcome.UNSUPPORTED for row in rows):
            return not any(TRACED in row.values for row in rows)
    return False


def traced_sizes(s: Situation) -> tuple[int, ...]:
    """The smallest and the largest size, the reference's, and those next below the largest."""
    sizes = sorted({micro for samples in s.view.sample_values for micro in s.view.micro_values(samples)})
    own = s.forecast.reference.micro
    wanted = dict.fromkeys((own, sizes[-1], sizes[0], *reversed(sizes)))
    return tuple(sorted(list(wanted)[:TRACED_SIZES]))


def _at(s: Situation, variant: Variant, micro: int) -> Point:
    """At the most samples a step that `micro` divides: gradients then wait while the next micro-batch is computed."""
    reference = s.forecast.reference._replace(variant=variant)
    samples = [value for value in s.view.sample_values if value % micro == 0]
    return with_batch(reference, micro, max(samples)) if samples else reference


def with_foresight(spec: StudySpec, rows: Sequence[ProbeRow], request: ProbeRequest, reply: ProbeReply) -> ProbeReply:
    """`reply` with the share of the budget foretold for each point that ran out of memory and so has no peak of its
    own: what a sampler is told as its overrun. Where nothing was traced, `reply` as it is."""
    if not any(point.outcome.is_oom for point in reply.points):
        return reply
    view = View(spec, rows)

    def told(point: PointReply) -> PointReply:
        asked = point_of(request.points[point.index])
        share = view.memory.expected(*view.history.needed(asked)) if point.outcome.is_oom else None
        if share is None:
            return point
        return point.model_copy(update={"values": {**point.values, PREDICTED_USED: share}})

    return reply.model_copy(update={"points": tuple(told(point) for point in reply.points)})
