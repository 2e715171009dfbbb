"""The memory model: peak memory of any variant and size, from traces and measured growth, with an error bar.

growth = scale * trace + fixed: a fake-tensor trace counts live tensors exactly but knows nothing of the allocator's
fragmentation, scratch memory of kernels, the dataset, loader buffers and Python. Scale and fixed part are Gaussian
unknowns, shared by all variants and with a deviation of each; measured rows narrow them down (a Gaussian process,
Rasmussen and Williams 2006, eq. 2.25-2.26). Where nothing was traced the peak is taken as convex and piecewise affine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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


HOST = Spread(
    scale=1.2, scale_sd=0.15, fixed=64 * MIB, fixed_sd=64 * MIB, kind_sd=0.25, own_sd=0.03, local=0.05, length=0.1,
    noise=0.025,
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

    def predict(self, variant: Variant, traced: float) -> Foretold:
        """Growth of one more process of `variant` whose trace holds `traced` bytes."""
        asked = (Grown(variant, traced, 0.0),)
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
        found: NDArray[np.float64] = spread.fixed_sd**2 + scales * np.outer(left, right)
        return found


def _agree(one: Sequence[Grown], other: Sequence[Grown], trait: Callable[[Variant], object]) -> NDArray[np.float64]:
    """1 where both rows have the same trait, else 0."""
    return np.array([[float(trait(a.variant) == trait(b.variant)) for b in other] for a in one]).reshape(
        len(one), len(other)
    )


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


class Foresight:
    """Traces, and growth measured beside them, in shares of the memory budget."""

    def __init__(
        self,
        traces: Traces,
        growths: Mapping[Variant, Mapping[int, Sequence[float]]],
        share: Callable[[float], float],
        spread: Spread,
    ) -> None:
        """`growths`: bytes by variant and micro-batch size; `share`: bytes of growth -> share of the budget."""
        self._traces = traces
        self._share = share
        rows = [
            Grown(variant, traced, growth)
            for variant, by_size in growths.items()
            for micro, found in by_size.items()
            if (traced := traces.of(variant, micro)) is not None
            for growth in found
        ]
        self.model = GrowthModel(rows, spread)

    def growth(self, variant: Variant, micro: int) -> Foretold | None:
        """Predicted bytes of growth; None where the size cannot be traced."""
        traced = self._traces.of(variant, micro)
        return None if traced is None else self.model.predict(variant, traced)

    def share(self, growth: float) -> float:
        return self._share(growth)


class MemoryModel:
    """Share of the memory budget at a micro-batch size: the value expected, and its upper error bar."""

    def __init__(
        self,
        shares: Mapping[Variant, Mapping[int, float]],
        overruns: Mapping[Variant, int],
        foresight: Foresight | None = None,
    ) -> None:
        """`shares`: measured, by variant and micro-batch size; `overruns`: smallest size seen not to fit."""
        self._shares = shares
        self._overruns = overruns
        self._foresight = foresight

    def fits(self, variant: Variant, micro: int) -> bool:
        """Whether it may be probed: False where it was seen not to fit, at this size or below.

        A size that was not measured must be expected inside the budget, and its upper error bar inside the hard limit,
        so that a probe does not run out of memory; what is shipped was measured, by the gate and the soak.
        """
        if micro >= self._overruns.get(variant, math.inf):
            return False
        expected = None if self._measured(variant, micro) is not None else self.expected(variant, micro)
        if expected is None:
            return self.upper(variant, micro) <= 1.0
        return expected <= 1.0 and self.upper(variant, micro) <= 1.0 / MEMORY_MARGIN

    def upper(self, variant: Variant, micro: int) -> float:
        """Upper error bar of the share; 1.0 = the whole budget, infinite where nothing is known at all."""
        if (seen := self._measured(variant, micro)) is not None:
            return seen
        if (foretold := self._foretold(variant, micro)) is not None and self._foresight is not None:
            return max(self._foresight.share(foretold.upper), self._below(variant, micro))
        return self._affine_upper(variant, micro)

    def expected(self, variant: Variant, micro: int) -> float | None:
        """The share expected without an error bar: measured, or foretold from a trace; None where there is neither."""
        if (seen := self._measured(variant, micro)) is not None:
            return seen
        foretold = self._foretold(variant, micro)
        if foretold is None or self._foresight is None:
            return None
        return self._foresight.share(foretold.value)

    def predicted(self, variant: Variant, micro: int) -> Foretold | None:
        """Bytes of growth foretold from a trace, whether or not the size was measured; None without a trace."""
        return self._foretold(variant, micro)

    def _measured(self, variant: Variant, micro: int) -> float | None:
        return self._shares.get(variant, {}).get(micro)

    def _foretold(self, variant: Variant, micro: int) -> Foretold | None:
        return None if self._foresight is None else self._foresight.growth(variant, micro)

    def _below(self, variant: Variant, micro: int) -> float:
        """The largest share measured at smaller sizes: a larger one never needs less."""
        return max((share for size, share in self._shares.get(variant, {}).items() if size < micro), default=0.0)

    def _affine_upper(self, variant: Variant, micro: int) -> float:
        if own := self._shares.get(variant):
            return affine_upper(own, micro)
        known = self._alike(variant)
        return BORROWED_MEMORY * max((affine_upper(shares, micro) for shares in known), default=math.inf)

    def _alike(self, variant: Variant) -> list[Mapping[int, float]]:
        """Measured variants to borrow from: those that recompute activations as this one does.

        Recomputing never needs more than not recomputing, so the latter may stand in for the former.
        """
        same = [s for v, s in self._shares.items() if v.gradient_checkpointing == variant.gradient_checkpointing]
        if same or not variant.gradient_checkpointing:
            return same
        return list(self._shares.values())


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
