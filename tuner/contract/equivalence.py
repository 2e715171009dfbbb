"""What the equivalence probe measured, and what follows from it: is the cut of a batch free, and if not, why.

Rows keep figures alone; causes are worked out when they are read, so a row of an older tuner, which has fewer figures,
loads and names fewer causes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import StrEnum

from tuner.contract.base import Frozen
from tuner.contract.probe import ProbeReply

EQUIVALENT = 1e-5
"""Relative L2 distance of fp32 gradients below which two cuts of one effective batch count as the same training."""
SAME_PARTS = 1e-4
"""The same for a micro-batch's gradient against those of its parts, whose rounding weighs more where they cancel."""
NEAR = 0.05
"""Relative error of a combination's coefficients."""


class Figure(StrEnum):
    """Names among the values of an equivalence probe. Those of a loss term or a class are followed by `.` and its name.

    A term's figures compare the gradient of one micro-batch with those of its `parts`, run alone.
    """

    RELATIVE_L2 = "relative_l2"
    """|g1 - g2| / |g1| of two cuts of the same samples, dropout off, other random states for either."""
    DROPOUT = "dropout_off"
    """The largest dropout rate that was turned off."""
    REFETCHED = "refetched"
    """Share of the samples looked at that the data set gives otherwise when asked again."""
    RECOLLATED = "recollated"
    """The same for `collate`, called again on the same items."""
    UNHELD = "batches_unheld"
    """1: a random `collate` whose batches cannot be split by samples, so the two cuts hold other numbers."""
    RERUN = "rerun_l2"
    """Distance of the gradients of the same cut, run again from other random states."""
    STATISTICS = "statistics"
    """Modules of a class whose buffers move in a forward pass."""
    FROZEN = "frozen_l2"
    """RELATIVE_L2 with those modules in evaluation mode and batch norms on their running statistics."""
    LIVE_SPAN = "live_span_l2"
    """The largest SPAN of a term with the statistics not frozen."""
    PARTS = "parts"
    """How many parts the micro-batch was split into."""
    SUM = "sum_l2"
    """Distance of a term's gradient from the sum of its parts'."""
    SPAN = "span_l2"
    """Distance from the nearest linear combination of them."""
    TOTAL = "span_total"
    """Sum of that combination's coefficients: of a sum, the number of parts; of a mean, 1."""
    COUNTED = "counted_apart"
    """Relative difference of what `weights(batch)` counts over the two cuts."""

    def of(self, name: str) -> str:
        return f"{self.value}.{name}"

    def named(self, values: Mapping[str, float]) -> dict[str, float]:
        """Name -> figure."""
        start = f"{self.value}."
        return {key.removeprefix(start): value for key, value in values.items() if key.startswith(start)}


class Cause(StrEnum):
    """What makes the gradient depend on the cut; `random_data` and `dropout` are told though they do not."""

    BATCH_STATISTICS = "batch_statistics"
    MEAN_FOR_SUM = "mean_for_sum"
    FREE_DRAWS = "free_draws"
    RANDOM_DATA = "random_data"
    COUPLED_SAMPLES = "coupled_samples"
    UNEVEN_WEIGHTS = "uneven_weights"
    DROPOUT = "dropout"
    UNKNOWN = "unknown"

    @property
    def cure(self) -> str:
        return _CURES[self]


_CURES = {
    Cause.BATCH_STATISTICS: "use GroupNorm or LayerNorm, or say so with WorkloadInfo(batch_coupled=True)",
    Cause.MEAN_FOR_SUM: "divide by nothing and return the sum",
    Cause.FREE_DRAWS: 'draw from batch["sample_seed"] with tuner.randomness, so that a sample keeps its numbers in '
    "every micro-batch",
    Cause.RANDOM_DATA: "draw in `loss` from sample_seed, or from a generator seeded by the index; or accept such "
    "augmentation knowingly: losses compare with more noise, and a resumed run may draw other numbers",
    Cause.COUPLED_SAMPLES: "say so with WorkloadInfo(batch_coupled=True), and the micro-batch size is left alone",
    Cause.UNEVEN_WEIGHTS: "return the sum over the tokens (or cells) with their number as the weight, and count the "
    "same in weights(batch)",
    Cause.DROPOUT: "",
    Cause.UNKNOWN: "see whether the loss is a sum over its samples that draws from sample_seed alone; otherwise say "
    "batch_coupled",
}


class Finding(Frozen):
    """One cause as seen in one workload."""

    cause: Cause
    text: str
    """Where it lies and what was measured."""
    cure: str
    """What to do; empty where there is nothing to do."""

    @classmethod
    def of(cls, cause: Cause, text: str) -> Finding:
        return cls(cause=cause, text=text, cure=cause.cure)

    @property
    def line(self) -> str:
        return f"{self.text}; {self.cure}" if self.cure else self.text


class EquivalenceReply(ProbeReply):
    """`tuner probe --kind equivalence --json`: the reply and what follows from it."""

    equivalent: bool | None
    """null = it was not measured."""
    causes: tuple[Finding, ...]
    notes: tuple[Finding, ...]

    @classmethod
    def of(cls, reply: ProbeReply) -> EquivalenceReply:
        values = reply.points[0].values
        return cls(**dict(reply), equivalent=equivalent(values), causes=causes(values), notes=remarks(values))


def equivalent(values: Mapping[str, float]) -> bool | None:
    """Do two cuts of one batch give the same gradient? None = not measured."""
    apart = values.get(Figure.RELATIVE_L2)
    return None if apart is None else apart < EQUIVALENT


def causes(values: Mapping[str, float]) -> tuple[Finding, ...]:
    """Why two cuts differ, the likeliest first; empty where they do not. `unknown` where no test told."""
    if equivalent(values) is not False:
        return ()
    return tuple(_causes(values)) or (Finding.of(Cause.UNKNOWN, _unknown(values)),)


def remarks(values: Mapping[str, float]) -> tuple[Finding, ...]:
    """What a reader should know whether or not the cut is free."""
    if equivalent(values) is None:
        return ()
    return (*_random_data(values), *_dropout(values))


def _causes(values: Mapping[str, float]) -> Iterator[Finding]:
    """Draws hide the rest: with them no two runs can be compared."""
    again = values.get(Figure.RERUN, 0.0)
    if again >= EQUIVALENT:
        what = f"the same micro-batches, run twice, differ by {again:.1e}"
        yield Finding.of(Cause.FREE_DRAWS, f"loss or model: draws that do not follow `sample_seed`: {what}")
        return
    if values.get(Figure.UNHELD):
        yield from _random_data(values)
        return
    if _frozen_helps(values):
        yield Finding.of(Cause.BATCH_STATISTICS, _statistics(values))
    if values.get(Figure.FROZEN, 1.0) >= EQUIVALENT:
        yield from _of_terms(values)


def _frozen_helps(values: Mapping[str, float]) -> bool:
    spans = Figure.SPAN.named(values).values()
    alone = values.get(Figure.FROZEN, 1.0) < EQUIVALENT
    return alone or (values.get(Figure.LIVE_SPAN, 0.0) >= SAME_PARTS > max(spans, default=1.0))


def _statistics(values: Mapping[str, float]) -> str:
    found = [f"{count:.0f} x {name}" for name, count in Figure.STATISTICS.named(values).items()]
    alone = values.get(Figure.FROZEN, 1.0)
    rest = f" (with them frozen the gradients differ by {alone:.1e})" if alone < EQUIVALENT else ""
    which = ", ".join(found) or "batch_norm without running statistics"
    return f"model: statistics of the micro-batch ({which}) make its samples influence each other{rest}"


def _of_terms(values: Mapping[str, float]) -> Iterator[Finding]:
    spans, totals = Figure.SPAN.named(values), Figure.TOTAL.named(values)
    for name, apart in Figure.COUNTED.named(values).items():
        if apart >= EQUIVALENT:
            text = (
                f"weights(batch): what it counts for term {name} does not add up over micro-batches ({apart:.1e} apart)"
            )
            yield Finding.of(Cause.UNEVEN_WEIGHTS, text)
    for name, apart in Figure.SUM.named(values).items():
        if apart < SAME_PARTS:
            continue
        if spans.get(name, 1.0) >= SAME_PARTS:
            yield Finding.of(Cause.COUPLED_SAMPLES, _coupled(name, spans.get(name, 1.0)))
        elif abs(totals.get(name, 0.0) - 1.0) < NEAR:
            text = f"loss: term {name} is a mean over the micro-batch where a sum is asked for"
            yield Finding.of(Cause.MEAN_FOR_SUM, f"{text} (it does not grow with the samples)")
        else:
            yield Finding.of(Cause.UNEVEN_WEIGHTS, _uneven(name, apart))


def _coupled(name: str, apart: float) -> str:
    return (
        f"loss: term {name}: a sample's gradient depends on the other samples of its micro-batch (in-batch negatives, "
        f"a statistic over the batch): {apart:.1e} of it is no combination of the samples' own"
    )


def _uneven(name: str, apart: float) -> str:
    return (
        f"loss: term {name} weighs a sample by what else its micro-batch holds (a mean over ragged tokens times the "
        f"samples?): the gradient is a combination of the samples' own, but {apart:.1e} from their sum"
    )


def _random_data(values: Mapping[str, float]) -> Iterator[Finding]:
    for figure, where in (
        (Figure.REFETCHED, "the same sample fetched twice"),
        (Figure.RECOLLATED, "collate, called twice,"),
    ):
        share = values.get(figure, 0.0)
        if share:
            text = f"data set: {where} differs ({100 * share:.0f} % of the samples looked at)"
            yield Finding.of(Cause.RANDOM_DATA, text)


def _dropout(values: Mapping[str, float]) -> Iterator[Finding]:
    rate = values.get(Figure.DROPOUT, 0.0)
    if rate:
        text = f"dropout (rate {rate:g}) was turned off to compare: every sample draws its own, however a batch is cut"
        yield Finding.of(Cause.DROPOUT, text)


def _unknown(values: Mapping[str, float]) -> str:
    if Figure.RERUN not in values:
        return "the cause was not measured: a tuner before this one made the row"
    if not Figure.SUM.named(values):
        return "the cause could not be measured: parts of a micro-batch do not run alone"
    return "no test told why: every term is the sum of its samples, nothing draws, and no statistics were found"
