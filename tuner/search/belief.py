"""What is believed of a measured configuration's speed: the measurements and the model's word, each by its error.

One probe on a shared host is off by several percent, and the best of many such figures is best by luck. The model has
learnt from all probes together, so its prediction is a prior for each of them (normal, in log space).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

PROCESS_NOISE = 0.03
"""Standard deviation between fresh processes of one configuration, until repeats were seen."""
WEIGHT = 2.0
"""How many repeats that guess is worth."""
LEAST_SPREAD = 0.02
"""The model's own standard deviation is never believed smaller than this."""


class Belief(NamedTuple):
    """Log of a rate and its standard deviation."""

    log: float
    sd: float

    @property
    def rate(self) -> float:
        return math.exp(self.log)


def process_noise(repeats: Iterable[Sequence[float]]) -> float:
    """Standard deviation of log rates between processes of one configuration, pooled over `repeats` (rates of each)."""
    squares, freedom = WEIGHT * PROCESS_NOISE**2, WEIGHT
    for rates in repeats:
        if len(rates) > 1:
            squares += float(np.var(np.log(rates))) * len(rates)
            freedom += len(rates) - 1
    return math.sqrt(squares / freedom)


def believe(rates: Sequence[float], noise: float, prior: Belief | None) -> Belief:
    """Precision-weighted mean of the measured rates (each with standard deviation `noise`) and the prior."""
    mean, variance = float(np.mean(np.log(rates))), noise**2 / len(rates)
    if prior is None:
        return Belief(mean, math.sqrt(variance))
    own, other = 1 / variance, 1 / max(prior.sd, LEAST_SPREAD) ** 2
    return Belief((own * mean + other * prior.log) / (own + other), math.sqrt(1 / (own + other)))
