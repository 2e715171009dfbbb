"""The memory model: peak memory of any variant and size, from traces and measured growth, with an error bar.

growth = scale * trace + fixed: a fake-tensor trace counts live tensors exactly but knows nothing of the allocator's
fragmentation, scratch memory of kernels, the dataset, loader buffers and Python. Scale and fixed part are Gaussian
unknowns, shared by all variants and with a deviation of each; measured rows narrow them down (a Gaussian process,
Rasmussen and Williams 2006, eq. 2.25-2.26). Where nothing was traced the peak is taken as convex and piecewise affine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tuner.contract.study import MEMORY_MARGIN
from tuner.search.points import Variant

EXTRAPOLATED_MEMORY = 1.15
"""Upper error bar of memory above the largest measured size: convex growth makes the affine guess too small."""
INTERPOLATED_MEMORY = 1.03
BORROWED_MEMORY = 1.10
DEVIATIONS = 3.0
"""Standard deviations of a prediction that its error bar spans."""
MAY_FIT = 2.0
"""Standard deviations below the expected peak that must lie inside the budget for a probe to be worth it."""
LIKELY = 0.5
"""Standard deviations above it that must lie inside an enforced limit: a probe that fails there harms nobody.
Chosen on recorded grids (see benchmarks/README.md)."""
MIB = float(1 << 20)


@dataclass(frozen=True)
class Spread:
    """What is believed of growth against trace before anything was measured: means and standard deviations."""

    scale: float
    scale_sd: float
    fixed: float
    fixed_sd: float
    kind_sd: float
    """Deviation of the scale between recomputing and not."""
    own_sd: float
    """Further deviation of the scale of each variant."""
    local: float
    """Part of the trace by which growth wanders with the size: heap fragmentation, kernels chosen by shape."""
    length: float
    """Distance in log size over which that wandering is remembered."""
    noise: float
    """Spread of repeats, relative to the growth expected."""
    loading: float = 0.0
    """What loader workers add, in bytes: shared memory of their batches counts for the process on a host."""
    loading_share: float = 0.0
    """The same as a part of the trace."""


HOST = Spread(
    scale=1.2, scale_sd=0.15, fixed=64 * MIB, fixed_sd=64 * MIB, kind_sd=0.25, own_sd=0.03, local=0.05, length=0.1,
    noise=0.025, loading=4 * MIB, loading_share=0.03,
)  # fmt: skip
"""Against the heap that a trace simulates. Scale, wandering and noise by the likelihood of the ladders in
`benchmarks/grids` (`benchmarks.memory` reports each workload with the values chosen on the others); the fixed part and
what recomputing changes are left wide, as four jobs tell little of a fifth."""
DEVICE = Spread(
    scale=1.1, scale_sd=0.15, fixed=512 * MIB, fixed_sd=384 * MIB, kind_sd=0.1, own_sd=0.05, local=0.05, length=0.3,
    noise=0.01,
)  # fmt: skip
"""Against live tensors, for reserved + context of a GPU: guesses, wide on purpose: no GPU's ladder is recorded."""


class Grown(NamedTuple):
    """One measured growth beside its trace, in bytes."""

    variant: Variant
    traced: float
    growth: float
    workers: int = 0


class Foretold(NamedTuple):
    """A predicted growth in bytes and its standard deviation, repeats included."""

    value: float
    sd: float

    @property
    def upper(self) -> float:
        return self.value + DEVIATIONS * self.sd


class GrowthModel:
    """Growth of a process from its trace, given the rows measured so far (none: from belief alone)."""

    def __init__(self, rows: Sequence[Grown], spread: Spread) -> None:
        self._rows = tuple(rows)
        self._spread = spread
        grown = np.array([row.growth for row in rows])
        self._noise = np.square(spread.noise * grown)
        covariance = self._covariance(self._rows, self._rows) + np.diag(self._noise)
        self._factor = np.linalg.cholesky(covariance) if rows else np.zeros((0, 0))
        self._weights = self._solve(grown - self._expected(self._rows)) if rows else np.zeros(0)

    def predict(self, variant: Variant, traced: float, workers: int = 0) -> Foretold:
        """Growth of one more process of `variant` whose trace holds `traced` bytes, beside so many loader workers."""
        asked = (Grown(variant, traced, 0.0, workers),)
        prior, variance = float(self._expected(asked)[0]), float(self._covariance(asked, asked)[0, 0])
        if not self._rows:
            return Foretold(prior, math.hypot(math.sqrt(variance), self._spread.noise * prior))
        cross = self._covariance(asked, self._rows)[0]
        value = prior + float(cross @ self._weights)
        explained = float(cross @ self._solve(cross))
        sd = math.sqrt(max(0.0, variance - explained))
        return Foretold(value, math.hypot(sd, self._spread.noise * value))

    def log_likelihood(self) -> float:
        """Of the rows under the belief: what the constants are chosen by (Rasmussen and Williams 2006, eq. 2.30)."""
        grown = np.array([row.growth for row in self._rows]) - self._expected(self._rows)
        halves = float(np.log(np.diag(self._factor)).sum())
        return -0.5 * float(grown @ self._weights) - halves - 0.5 * len(grown) * math.log(2 * math.pi)

    def _solve(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        half = np.linalg.solve(self._factor, values)
        return np.asarray(np.linalg.solve(self._factor.T, half), dtype=np.float64)

    def _expected(self, rows: Sequence[Grown]) -> NDArray[np.float64]:
        return self._spread.fixed + self._spread.scale * np.array([row.traced for row in rows])

    def _covariance(self, one: Sequence[Grown], other: Sequence[Grown]) -> NDArray[np.float64]:
        spread = self._spread
        left, right = (np.array([row.traced for row in rows], dtype=np.float64) for rows in (one, other))
        kind = _agree(one, other, lambda variant: variant.gradient_checkpointing)
        own = _agree(one, other, lambda variant: variant)
        apart = np.abs(np.log(left)[:, None] - np.log(right)[None, :])
        near = own * np.exp(-apart / spread.length)
        scales = spread.scale_sd**2 + kind * spread.kind_sd**2 + own * spread.own_sd**2 + near * spread.local**2
        loads = spread.loading**2 + spread.loading_share**2 * np.outer(left, right)
        found: NDArray[np.float64] = spread.fixed_sd**2 + scales * np.outer(left, right) + _loaded(one, other) * loads
        return found


def _agree(one: Sequence[Grown], other: Sequence[Grown], trait: Callable[[Variant], object]) -> NDArray[np.float64]:
    """1 where both rows have the same trait, else 0."""
    return np.array([[float(trait(a.variant) == trait(b.variant)) for b in other] for a in one]).reshape(
        len(one), len(other)
    )


def _loaded(one: Sequence[Grown], other: Sequence[Grown]) -> NDArray[np.float64]:
    """1 where both have equally many workers, a half where both have some, else 0."""
    agree = [[(a.workers > 0 < b.workers) * (1.0 + (a.workers == b.workers)) / 2 for b in other] for a in one]
    return np.array(agree).reshape(len(one), len(other))


@dataclass(frozen=True)
class Traces:
    """Bytes that traces hold, by recomputing or not and micro-batch size."""

    peaks: Mapping[bool, Mapping[int, float]] = field(default_factory=dict)

    def of(self, variant: Variant, micro: int) -> float | None:
        """The trace at a size, between two traced ones the straight line (the trace is convex, so never too low);
        beyond them the line through the two nearest. None where fewer than two sizes, or none there, were traced."""
        known = self.peaks.get(variant.gradient_checkpointing, {})
        if micro in known:
            return known[micro]
        if len(known) < 2:
            return None
        sizes = sorted(known)
        at = min(max(1, sum(size < micro for size in sizes)), len(sizes) - 1)
        low, high = sizes[at - 1], sizes[at]
        slope = (known[high] - known[low]) / (high - low)
        return max(1.0, known[low] + slope * (micro - low))


class Size(NamedTuple):
    """What peak memory depends on. `workers`: of the loader, where they count (on a host); else 0."""

    variant: Variant
    micro: int
    workers: int = 0


class Foresight:
    """Traces, and growth measured beside them, in shares of the memory budget."""

    def __init__(
        self,
        traces: Traces,
        growths: Mapping[Size, Sequence[float]],
        share: Callable[[float], float],
        spread: Spread,
    ) -> None:
        """`growths`: bytes; `share`: bytes of growth -> share of the budget."""
        self._traces = traces
        self._share = share
        rows = [
            Grown(size.variant, traced, growth, size.workers)
            for size, found in growths.items()
            if (traced := traces.of(size.variant, size.micro)) is not None
            for growth in found
        ]
        self.model = GrowthModel(rows, spread)
        self._known: dict[Size, Foretold | None] = {}

    def growth(self, size: Size) -> Foretold | None:
        """Predicted bytes of growth; None where the size cannot be traced."""
        if size not in self._known:
            traced = self._traces.of(size.variant, size.micro)
            self._known[size] = None if traced is None else self.model.predict(size.variant, traced, size.workers)
        return self._known[size]

    def share(self, growth: float) -> float:
        return self._share(growth)


class MemoryModel:
    """Share of the memory budget at a micro-batch size: the value expected, and its upper error bar."""

    def __init__(
        self,
        shares: Mapping[Size, float],
        overruns: Collection[Size],
        foresight: Foresight | None = None,
        *,
        enforced: bool = False,
    ) -> None:
        """`shares`: measured; `overruns`: seen not to fit; `enforced`: passing the hard limit ends the probe alone."""
        self._enforced = enforced
        self._measured = shares
        self._overruns = overruns
        self._foresight = foresight
        self._shares: dict[Variant, dict[int, float]] = {}
        for size, share in shares.items():
            by_micro = self._shares.setdefault(size.variant, {})
            by_micro[size.micro] = max(share, by_micro.get(size.micro, 0.0))

    def fits(self, variant: Variant, micro: int, workers: int = 0) -> bool:
        """Whether it may be probed: False where it was seen not to fit, at this size or below, with as many workers
        or fewer.

        A size that was not measured must be expected inside the budget, and its upper error bar inside the hard limit.
        Where that limit is enforced, it is enough that it may well fit and that running out of memory is unlikely.
        What is shipped was measured, by the gate and the soak.
        """
        size = Size(variant, micro, workers)
        if any(_implies(overrun, size) for overrun in self._overruns):
            return False
        foretold = None if size in self._measured else self.predicted(variant, micro, workers)
        if foretold is None or self._foresight is None:
            return self.upper(variant, micro, workers) <= 1.0
        below, above = (MAY_FIT, LIKELY) if self._enforced else (0.0, DEVIATIONS)
        low, high = (self._foresight.share(foretold.value + n * foretold.sd) for n in (-below, above))
        return max(low, self._below(size)) <= 1.0 and high <= 1.0 / MEMORY_MARGIN

    def upper(self, variant: Variant, micro: int, workers: int = 0) -> float:
        """Upper error bar of the share; 1.0 = the whole budget, infinite where nothing is known at all."""
        size = Size(variant, micro, workers)
        if (seen := self._measured.get(size)) is not None:
            return seen
        if (foretold := self.predicted(variant, micro, workers)) is not None and self._foresight is not None:
            return max(self._foresight.share(foretold.upper), self._below(size))
        return self._affine_upper(variant, micro)

    def expected(self, variant: Variant, micro: int, workers: int = 0) -> float | None:
        """The share expected without an error bar: measured, or foretold from a trace; None where there is neither."""
        if (seen := self._measured.get(Size(variant, micro, workers))) is not None:
            return seen
        foretold = self.predicted(variant, micro, workers)
        if foretold is None or self._foresight is None:
            return None
        return self._foresight.share(foretold.value)

    def predicted(self, variant: Variant, micro: int, workers: int = 0) -> Foretold | None:
        """Bytes of growth foretold from a trace, whether or not the size was measured; None without a trace."""
        return None if self._foresight is None else self._foresight.growth(Size(variant, micro, workers))

    def _below(self, size: Size) -> float:
        """The largest share measured at smaller sizes: a larger one never needs less."""
        known = (share for other, share in self._measured.items() if other.micro < size.micro and _implies(other, size))
        return max(known, default=0.0)

    def _affine_upper(self, variant: Variant, micro: int) -> float:
        if own := self._shares.get(variant):
            return affine_upper(own, micro)
        known = self._alike(variant)
        return BORROWED_MEMORY * max((affine_upper(shares, micro) for shares in known), default=math.inf)

    def _alike(self, variant: Variant) -> Sequence[Mapping[int, float]]:
        """Measured variants to borrow from: those that recompute activations as this one does.

        Recomputing never needs more than not recomputing, so the latter may stand in for the former.
        """
        same = [s for v, s in self._shares.items() if v.gradient_checkpointing == variant.gradient_checkpointing]
        if same or not variant.gradient_checkpointing:
            return same
        return list(self._shares.values())


def _implies(known: Size, size: Size) -> bool:
    """`size` needs at least as much as `known`."""
    return known.variant == size.variant and known.micro <= size.micro and known.workers <= size.workers


def affine(shares: Mapping[int, float], micro: int) -> float:
    """What the measured sizes say by straight lines: between two, through the upper two, or in proportion to one."""
    sizes = sorted(shares)
    if micro <= sizes[0]:
        return shares[sizes[0]]
    if micro <= sizes[-1]:
        return float(np.interp(micro, sizes, [shares[size] for size in sizes]))
    top = sizes[-1]
    if len(sizes) == 1:
        return shares[top] * micro / top
    slope = max(0.0, (shares[top] - shares[sizes[-2]]) / (top - sizes[-2]))
    return shares[top] + slope * (micro - top)


def affine_upper(shares: Mapping[int, float], micro: int) -> float:
    """Upper error bar of `affine`: interpolation is safe, extrapolation of a convex peak is too low."""
    guess, sizes = affine(shares, micro), sorted(shares)
    if micro in shares or micro < sizes[0]:
        return guess
    if micro < sizes[-1] or len(sizes) == 1:
        return guess * INTERPOLATED_MEMORY
    proportional = shares[sizes[-1]] * micro / sizes[-1]
    return min(guess * EXTRAPOLATED_MEMORY, max(guess, proportional * INTERPOLATED_MEMORY))
