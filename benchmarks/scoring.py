"""How a search on a recorded grid is scored: by the repeats it did not see. It knows nothing of how searchers work.

Regret of a configuration = 1 - worth / best worth among all recorded cells; score = 0 for the median cell, 1 for the
best (after Tuning the Tuner, arXiv 2509.26300).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tuner.contract.config import RunConfig
from tuner.contract.study import StudySpec
from tuner.search.objective import Figures, merit

RESAMPLES = 2000
LEAST_BASELINE_REGRET = 0.10
"""Where the baseline is this close to the best, doing nothing would meet the goal: such a grid does not count."""
UNFIT_SHARE = (0.15, 0.40)
"""Share of cells that must not fit, for memory to matter and not to be everything."""
LEAST_TARGET = 0.02
ABOVE_FLOOR = 0.01
P90_TARGET = 0.05


class RecordedGrid(Protocol):
    """What is asked of a recorded grid (`tuner.probe.replay.Grid`)."""

    @property
    def name(self) -> str: ...
    @property
    def spec(self) -> StudySpec: ...
    @property
    def cells(self) -> tuple[RunConfig, ...]: ...
    @property
    def repeats(self) -> tuple[int, ...]: ...
    def rate(self, config: RunConfig, repeats: Sequence[int]) -> float | None: ...
    def compile_s(self, config: RunConfig) -> float: ...
    def fits(self, config: RunConfig) -> bool: ...


@dataclass(frozen=True)
class Split:
    """Which repeats a search sees, and which judge what it named."""

    search: tuple[int, ...]
    held_back: tuple[int, ...]

    def turned(self) -> Split:
        return Split(self.held_back, self.search)


def split(grid: RecordedGrid, seed: int) -> Split:
    """Half of the repeats for the search, the others held back, drawn by `seed`.

    Raises ValueError with fewer than two repeats.
    """
    if len(grid.repeats) < 2:
        raise ValueError(f"{grid.name}: at least two repeats of every cell are needed (got {len(grid.repeats)})")
    mixed = [int(r) for r in np.random.default_rng([seed, 1]).permutation(grid.repeats)]
    half = len(mixed) // 2
    return Split(tuple(sorted(mixed[:half])), tuple(sorted(mixed[half:])))


def worth(spec: StudySpec, rate: float, compile_s: float) -> float:
    """What the study maximises, by the search's own rule: samples/s, or the horizon over the whole production time."""
    return merit(spec, Figures(rate, compile_s))


class Scale:
    """Worth of every cell by some of the repeats: what regret and score are read from."""

    def __init__(self, grid: RecordedGrid, spec: StudySpec, repeats: Sequence[int]) -> None:
        self._by_digest = {cell.canonical().digest(): cell for cell in grid.cells}
        self._unfit = {digest for digest, cell in self._by_digest.items() if not grid.fits(cell)}
        self._worths: dict[str, float] = {}
        for digest, cell in self._by_digest.items():
            rate = None if digest in self._unfit else grid.rate(cell, repeats)
            if rate is not None:
                self._worths[digest] = worth(spec, rate, grid.compile_s(cell))
        if not self._worths:
            raise ValueError(f"{grid.name}: no cell fits")
        self.best = max(self._worths.values())
        self.middle = float(np.median(list(self._worths.values())))

    def regret(self, config: RunConfig) -> float:
        """0 = the best cell, 1 = what does not fit, failed, or was never recorded."""
        return 1 - self._worths.get(config.canonical().digest(), 0.0) / self.best

    def score(self, regret: float) -> float:
        """1 = the best cell, 0 = the median cell; below 0 is worse than drawing one at random."""
        middle = 1 - self.middle / self.best
        return 1 - regret / middle if middle > 0 else 0.0

    def overflows(self, config: RunConfig) -> bool:
        return config.canonical().digest() in self._unfit

    def best_cell(self) -> RunConfig:
        return self._by_digest[max(self._worths, key=lambda digest: self._worths[digest])]


@dataclass(frozen=True)
class Scene:
    """A grid at one split: what does not depend on the searcher."""

    floor: float
    """Regret of the cell that is best by the search's repeats: no search that sees only those can do better."""
    baseline: float
    unfit: float
    """Share of the cells that do not fit."""


def scene(grid: RecordedGrid, spec: StudySpec, halves: Split) -> Scene:
    scale = Scale(grid, spec, halves.held_back)
    oracle = Scale(grid, spec, halves.search).best_cell()
    unfit = sum(not grid.fits(cell) for cell in grid.cells) / len(grid.cells)
    return Scene(scale.regret(oracle), scale.regret(spec.baseline), unfit)


def counts(scenes: Sequence[Scene]) -> tuple[bool, str]:
    """Does the grid count, and why not."""
    baseline, unfit = float(np.median([s.baseline for s in scenes])), scenes[0].unfit
    if baseline < LEAST_BASELINE_REGRET:
        return False, f"the baseline's own regret is below {LEAST_BASELINE_REGRET:.0%}"
    if baseline <= target_regret(scenes):
        return False, "its repeats differ so much that the baseline itself lies within the target"
    if not UNFIT_SHARE[0] <= unfit <= UNFIT_SHARE[1]:
        return False, f"the share of cells that do not fit is not within {UNFIT_SHARE[0]:.0%}-{UNFIT_SHARE[1]:.0%}"
    return True, ""


def target_regret(scenes: Sequence[Scene]) -> float:
    """max(2 %, noise floor + 1 %), by the median floor over the splits."""
    return max(LEAST_TARGET, float(np.median([s.floor for s in scenes])) + ABOVE_FLOOR)


@dataclass(frozen=True)
class Range:
    """A statistic with its 95 % bootstrap interval over the seeds."""

    value: float
    low: float
    high: float

    def percent(self) -> str:
        return f"{100 * self.value:.1f} % ({100 * self.low:.1f}-{100 * self.high:.1f})"


_Floats = NDArray[np.float64]


def ranged(values: Sequence[float], statistic: Callable[[_Floats], _Floats]) -> Range:
    """`statistic` reduces the last axis; resampling is seeded, so that equal values give equal intervals."""
    data = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(0).integers(0, len(data), size=(RESAMPLES, len(data)))
    low, high = np.quantile(statistic(data[picks]), [0.025, 0.975], method="nearest")
    return Range(float(statistic(data)), float(low), float(high))


def median(data: _Floats) -> _Floats:
    """Of values that may be infinite (never reached): the upper middle one, never a mean of two."""
    return np.asarray(np.quantile(data, 0.5, axis=-1, method="higher"))


def ninth_tenth(data: _Floats) -> _Floats:
    return np.asarray(np.quantile(data, 0.9, axis=-1, method="higher"))


def ratio_of_medians(own: Sequence[float], other: Sequence[float]) -> Range:
    """median(own) / median(other) over common seeds, pairs resampled together. `other` must be finite."""
    pairs = np.asarray([own, other], dtype=np.float64)
    picks = np.random.default_rng(0).integers(0, pairs.shape[1], size=(RESAMPLES, pairs.shape[1]))
    low, high = np.quantile(median(pairs[0][picks]) / median(pairs[1][picks]), [0.025, 0.975], method="nearest")
    return Range(float(median(pairs[0]) / median(pairs[1])), float(low), float(high))
