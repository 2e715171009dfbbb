"""The gradient noise scale of a workload, from micro-gradients at frozen parameters after a short training.

phi = trace of the covariance of one sample's gradient / squared norm of the true gradient (McCandlish et al., arXiv
1812.06162): about so many samples make a gradient of which half is signal. It grows while a model learns, so it is
read from a warmed state. No gradient is kept: a first pass sums them, a second one forms the same again and projects
each onto the sum, from which every leave-one-out figure follows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tuner.contract.config import CompileMode, LoaderConfig, RunConfig
from tuner.contract.probe import ProgressEvent
from tuner.engine.bench import Answer, Bench
from tuner.engine.failure import Diverged
from tuner.engine.loader import Group, StreamSource, count_weights
from tuner.engine.probes import short_training
from tuner.engine.step import GradientMaker
from tuner.engine.trainer import Trainer
from tuner.randomness import sample_seeds

LEAST_GRADIENTS = 32
MOST_GRADIENTS = 256
PLENTY = 3.0
"""Micro-gradients are pooled until they hold this many times as many samples as the noise scale seen so far."""
POOL_TIMES = 4
"""They hold at most this many times the samples the model was warmed with, so that the probe's cost is bounded."""
ERRORS = 2.0
"""Half-width of the interval in standard errors: about 95 %."""
TELL_EVERY_S = 2.0

_Floats = NDArray[np.float64]


@dataclass(frozen=True)
class NoiseScale:
    """Figures of one pool of micro-gradients; squared norms in the loss's own unit, `trace` of one sample."""

    gradient_sq: float
    """Squared norm of the true gradient, unbiased; may come out negative where noise drowns it."""
    trace: float
    """Trace of the covariance of one sample's gradient, unbiased."""
    low: float
    high: float
    """About 95 %, in samples; `high` is infinite where the gradient does not stand out from its noise."""

    @property
    def phi(self) -> float:
        """In samples; NaN where the gradient's square came out as nothing."""
        return self.trace / self.gradient_sq if self.gradient_sq > 0 else math.nan


def moments(mean_square: float, square_of_mean: float, count: int, micro: int) -> tuple[float, float]:
    """(squared norm of the true gradient, trace of one sample's covariance), both unbiased.

    `mean_square`: mean of |g_i|^2 over `count` gradients of `micro` samples; `square_of_mean`: |mean of g_i|^2.
    Appendix A of McCandlish et al., with batches of `micro` and of `count * micro` samples.
    """
    gradient_sq = (count * square_of_mean - mean_square) / (count - 1)
    trace = (mean_square - square_of_mean) * count * micro / (count - 1)
    return gradient_sq, trace


def estimate(squares: _Floats, projections: _Floats, micro: int) -> NoiseScale:
    """The noise scale of one pool with its interval.

    `squares` [n]: |g_i|^2; `projections` [n]: g_i . S, where S is the sum of all n gradients; n >= 3. Numerator and
    denominator are each unbiased and divided last. The interval is Fieller's (1954), with the covariance of the two
    from the delete-one jackknife.
    """
    n = len(squares)
    total = float(projections.sum())
    gradient_sq, trace = moments(float(squares.mean()), total / n**2, n, micro)
    left_mean = (squares.sum() - squares) / (n - 1)
    left_square = (total - 2 * projections + squares) / (n - 1) ** 2
    left = np.array([moments(m, s, n - 1, micro) for m, s in zip(left_mean, left_square, strict=True)])
    covariance = (n - 1) * np.cov(left, rowvar=False, bias=True)
    low, high = fieller(trace, gradient_sq, covariance[1, 1], covariance[0, 0], covariance[0, 1])
    return NoiseScale(gradient_sq, trace, low, high)


def fieller(above: float, below: float, var_above: float, var_below: float, covariance: float) -> tuple[float, float]:
    """Interval of `above` / `below`, both positive in truth: all r with |above - r * below| within the error bars.

    The upper end is infinite where `below` does not differ from zero, the lower end never below 0.
    """
    a = below**2 - ERRORS**2 * var_below
    b = -2 * (above * below - ERRORS**2 * covariance)
    c = above**2 - ERRORS**2 * var_above
    root = math.sqrt(max(0.0, b * b - 4 * a * c))
    low = 2 * c / (root - b) if c > 0 and root > b else 0.0
    high = (root - b) / (2 * a) if a > 0 and below > 0 else math.inf
    return low, high


def noise(bench: Bench) -> None:
    """The noise scale of each point's model and optimizer, after training on the request's samples."""
    bench.each_point(lambda config: _noise(bench, config))


def _noise(bench: Bench, config: RunConfig) -> Answer:
    with short_training(bench, _plain(config)) as run:
        with bench.phases.during("noise"):
            pool = Pool(bench, run.trainer)
            found = pool.estimate()
        values = {
            "gradient_sq": found.gradient_sq,
            "trace": found.trace,
            "warm_samples": float(run.trainer.samples),
            "micro_gradients": float(pool.count),
            "noise_low": found.low,
        }
        if math.isfinite(found.phi):
            values["noise_scale"] = found.phi
        if math.isfinite(found.high):
            values["noise_high"] = found.high
        return run.measurement(bench), values


def _plain(config: RunConfig) -> RunConfig:
    """The same training without what it does not need here: compiling, and an average of the weights."""
    return config.model_copy(update={"compile": CompileMode.EAGER, "ema": None})


class Pool:
    """Micro-gradients of `trainer`'s model as it stands, over the samples that would come next."""

    def __init__(self, bench: Bench, trainer: Trainer) -> None:
        self._bench = bench
        self._trainer = trainer
        self._maker = GradientMaker(
            trainer.workload, trainer.model, trainer.arithmetic, channels_last=trainer.config.channels_last
        )
        self._micro = trainer.config.micro_batch_size
        self._most = min(MOST_GRADIENTS, max(LEAST_GRADIENTS, POOL_TIMES * trainer.samples // self._micro))
        self._told = time.monotonic()
        self.count = 0
        """Micro-gradients pooled."""

    def estimate(self) -> NoiseScale:
        """Raises Diverged where gradients are not finite."""
        summed, squares = self._sum()
        self.count = len(squares)
        projections = [_dot(gradient, summed) for gradient in self._gradients(self.count)]
        return estimate(np.array(squares), np.array(projections), self._micro)

    def _sum(self) -> tuple[list[Tensor], list[float]]:
        """Sum of the gradients, and the square of each."""
        summed = [torch.zeros_like(parameter) for parameter in self._trainer.parameters]
        squares: list[float] = []
        for gradient in self._gradients(self._most):
            squares.append(_dot(gradient, gradient))
            torch._foreach_add_(summed, gradient)
            if not math.isfinite(squares[-1]):
                raise Diverged("the gradients are not finite")
            if len(squares) >= LEAST_GRADIENTS and self._enough(squares, _dot(summed, summed)):
                break
        return summed, squares

    def _enough(self, squares: list[float], square_of_sum: float) -> bool:
        """The mean gradient of so many samples is signal for the most part."""
        n = len(squares)
        gradient_sq, trace = moments(sum(squares) / n, square_of_sum / n**2, n, self._micro)
        return PLENTY * trace <= n * self._micro * gradient_sq

    def _gradients(self, count: int) -> Iterator[list[Tensor]]:
        """`count` micro-gradients, one after another in the same memory; the same ones every time it is called.

        Parameters stay as they are; what a model draws at random is drawn again from a seed per micro-batch.
        """
        trainer = self._trainer
        config = trainer.config.model_copy(update={"loader": LoaderConfig(num_workers=0)})
        source = StreamSource(trainer.workload, config, trainer.device, start=trainer.samples)
        try:
            for number, group in zip(range(count), _single(source, trainer.workload), strict=False):
                torch.manual_seed(int(sample_seeds(config.seed, number, torch.tensor([-3]))))
                trainer.optimizer.zero_grad(set_to_none=True)
                self._maker(group)
                yield self._unscaled()
                self._tell(number, count)
        finally:
            trainer.optimizer.zero_grad(set_to_none=True)
            source.close()

    def _unscaled(self) -> list[Tensor]:
        scale = self._trainer.loss_scale or 1.0
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._trainer.parameters]
        return found if scale == 1.0 else [gradient / scale for gradient in found]

    def _tell(self, done: int, total: int) -> None:
        if time.monotonic() - self._told > TELL_EVERY_S:
            self._told = time.monotonic()
            self._bench.emit(ProgressEvent(done=done + 1, total=total, text="gradients"))


def _single(source: StreamSource, workload: object) -> Iterator[Group]:
    """Every micro-batch as a group of its own, weighed by itself."""
    while True:
        for batch in source.next_group().batches:
            yield Group([batch], count_weights(workload, [batch]))


def _dot(one: list[Tensor], other: list[Tensor]) -> float:
    """Inner product over all parameters."""
    parts = [torch.dot(a.flatten().float(), b.flatten().float()) for a, b in zip(one, other, strict=True)]
    return float(torch.stack(parts).double().sum())
