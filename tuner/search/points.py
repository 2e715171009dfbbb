"""Points: configurations seen as knob values alone, so that the search compares them cheaply. It measures nothing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from tuner.contract.base import Scalar
from tuner.contract.config import CompileMode, OptimizerConfig, OptimizerName, Precision, RunConfig
from tuner.contract.space import Knob, with_knobs
from tuner.contract.study import StudySpec

IDLE_PREFETCH = 2
"""The value prefetch takes where no worker exists and it has no effect."""


MOST_MODELS = 6
"""Models besides the baseline's that a study tries: each takes as many trainings as there are seeds."""


class Variant(NamedTuple):
    """The knobs that change how one micro-batch is computed."""

    precision: Precision
    compile: CompileMode
    gradient_checkpointing: bool
    channels_last: bool
    fused: bool


class Loader(NamedTuple):
    workers: int
    prefetch: int


class Point(NamedTuple):
    """Everything the system search may change about a configuration."""

    variant: Variant
    micro: int
    accumulation: int
    loader: Loader

    @property
    def samples(self) -> int:
        """Samples per optimizer step on one device."""
        return self.micro * self.accumulation


FLAG_KNOBS = (Knob.PRECISION, Knob.CHANNELS_LAST, Knob.FUSED)
"""Flags screened one at a time against the base."""


def point_of(config: RunConfig) -> Point:
    variant = Variant(
        config.precision,
        config.compile,
        config.gradient_checkpointing,
        config.channels_last,
        config.optimizer.fused,
    )
    return Point(variant, config.micro_batch_size, config.accumulation_steps, loader_of(config))


def loader_of(config: RunConfig) -> Loader:
    return as_loader(config.loader.num_workers, config.loader.prefetch_factor)


def as_loader(workers: int, prefetch: int) -> Loader:
    return Loader(workers, prefetch if workers else IDLE_PREFETCH)


def config_of(spec: StudySpec, point: Point) -> RunConfig:
    """The full configuration of `point`: the baseline with the point's knobs.

    Another effective batch size than the baseline's changes lr, betas and eps by rule (see `optimizer_rule`), and
    raises ValueError where the rule does not lead there.
    """
    baseline = spec.baseline
    effective = point.samples * baseline.world_size
    values: dict[Knob, Any] = {
        Knob.EFFECTIVE_BATCH_SIZE: effective,
        Knob.MICRO_BATCH_SIZE: point.micro,
        Knob.NUM_WORKERS: point.loader.workers,
        Knob.PREFETCH_FACTOR: point.loader.prefetch,
        Knob.PRECISION: point.variant.precision,
        Knob.COMPILE: point.variant.compile,
        Knob.GRADIENT_CHECKPOINTING: point.variant.gradient_checkpointing,
        Knob.CHANNELS_LAST: point.variant.channels_last,
        Knob.FUSED: point.variant.fused,
    }
    return rescaled(with_knobs(baseline, values), baseline)


def rescaled(config: RunConfig, baseline: RunConfig) -> RunConfig:
    """`config` with the baseline's optimizer settings carried over to its effective batch size by rule.

    Unchanged where the size is the baseline's. Raises ValueError where no rule leads there.
    """
    factor = config.effective_batch_size / baseline.effective_batch_size
    if factor == 1.0:
        return config
    optimizer = optimizer_rule(baseline.optimizer, factor).model_copy(update={"fused": config.optimizer.fused})
    return config.model_copy(update={"optimizer": optimizer}).canonical()


def lr_factor(config: RunConfig, baseline: RunConfig) -> float:
    """What the rule multiplies a rate by that is named for the baseline's effective batch size."""
    factor = config.effective_batch_size / baseline.effective_batch_size
    return lr_rule(baseline.optimizer, factor) / baseline.optimizer.lr


def with_rate(config: RunConfig, baseline: RunConfig, lr: float | None) -> RunConfig:
    """`config` with a rate that is named for the baseline's effective batch size; None leaves it as it is."""
    if lr is None:
        return config
    optimizer = config.optimizer.model_copy(update={"lr": lr * lr_factor(config, baseline)})
    return config.model_copy(update={"optimizer": optimizer})


def lr_rule(optimizer: OptimizerConfig, factor: float) -> float:
    """Learning rate when the effective batch grows by `factor`: linear for SGD (Goyal et al., arXiv 1706.02677),
    square root for Adam and AdamW (Malladi et al., arXiv 2205.10287). Raises ValueError for an optimizer without a
    rule, where the batch is not the same."""
    if optimizer.name is OptimizerName.OWN and factor != 1.0:
        raise ValueError(
            "no rule is known by which the lr of the workload's own optimizer follows the batch; say in optimizer.name "
            "after which it scales (sgd: linearly; adam, adamw: by the square root)"
        )
    power = factor if optimizer.name is OptimizerName.SGD else math.sqrt(factor)
    return optimizer.lr * power


def optimizer_rule(optimizer: OptimizerConfig, factor: float) -> OptimizerConfig:
    """All settings when the effective batch grows by `factor`.

    Adam and AdamW: besides lr, beta -> 1 - factor * (1 - beta) and eps -> eps / sqrt(factor), so that the averages
    span as many samples as before (the square root scaling rule of arXiv 2205.10287). Momentum and weight decay are
    left alone.
    Raises ValueError, with the arithmetic, where a beta would leave [0, 1).
    """
    changed: dict[str, Any] = {"lr": lr_rule(optimizer, factor)}
    if optimizer.name is not OptimizerName.SGD:
        first, second = (scaled_beta(beta, factor) for beta in optimizer.betas)
        changed |= {"betas": (first, second), "eps": optimizer.eps / math.sqrt(factor)}
    return optimizer.model_copy(update=changed)


def scaled_beta(beta: float, factor: float) -> float:
    """1 - factor * (1 - beta), without the last digits' rounding. Raises ValueError where it is negative."""
    scaled = round(1 - factor * (1 - beta), 12)
    if scaled < 0:
        raise ValueError(f"beta {beta:g} would become 1 - {factor:g} x (1 - {beta:g}) = {scaled:g}, below 0")
    return scaled


def with_batch(point: Point, micro: int, samples: int) -> Point:
    """`point` cut into micro-batches of `micro` at `samples` per step (must divide)."""
    assert samples % micro == 0
    return point._replace(micro=micro, accumulation=samples // micro)


def with_flag(variant: Variant, knob: Knob, value: Any) -> Variant:
    return variant._replace(**{knob.value: value})


def sample_values(spec: StudySpec) -> tuple[int, ...]:
    """Samples per step and device the search may use; the first is where the stages work."""
    world = spec.baseline.world_size
    if spec.effective_batch is not None:
        return (max(1, spec.effective_batch // world),)
    own = spec.baseline.effective_batch_size
    others = sorted(set(spec.space.effective_batch_size) - {own})
    return tuple(value // world for value in (own, *others) if value % world == 0)


def micro_values(spec: StudySpec, samples: int) -> tuple[int, ...]:
    """Micro-batch sizes of the space that divide `samples`, ascending."""
    values = spec.space.values(Knob.MICRO_BATCH_SIZE, spec.baseline)
    return tuple(sorted({value for value in values if samples % value == 0}))


def flag_values(spec: StudySpec, knob: Knob) -> tuple[Any, ...]:
    return spec.space.values(knob, spec.baseline)


def worker_values(spec: StudySpec) -> tuple[int, ...]:
    return tuple(sorted(set(spec.space.values(Knob.NUM_WORKERS, spec.baseline))))


def prefetch_values(spec: StudySpec) -> tuple[int, ...]:
    return tuple(sorted(set(spec.space.values(Knob.PREFETCH_FACTOR, spec.baseline))))


def all_models(spec: StudySpec) -> list[dict[str, Scalar]]:
    """The options of every model besides the baseline's, in the order of the study file."""
    own = spec.baseline.options
    names = list(spec.space.options)
    values = [
        listed if own.get(name) in listed else (own.get(name), *listed) for name, listed in spec.space.options.items()
    ]
    models = [{**own, **dict(zip(names, choice, strict=True))} for choice in itertools.product(*values)]
    return [model for model in models if model != own]


def other_models(spec: StudySpec) -> list[dict[str, Scalar]]:
    """Those of `all_models` that are tried."""
    return all_models(spec)[:MOST_MODELS]


def smaller_cuts(point: Point) -> Iterator[Point]:
    """The same samples per step in ever smaller micro-batches (halved), down to one sample."""
    micro = point.micro
    while micro % 2 == 0:
        micro //= 2
        yield with_batch(point, micro, point.samples)
    if micro > 1:
        yield with_batch(point, 1, point.samples)


def differences(one: Point, other: Point) -> int:
    """How many settings differ: flags, the cut of the batch, workers, prefetch."""
    pairs = [*zip(one.variant, other.variant, strict=True), *zip(one.loader, other.loader, strict=True)]
    return sum(a != b for a, b in pairs) + (one[1:3] != other[1:3])


def neighbours(values: tuple[int, ...], value: int) -> tuple[int, ...]:
    """The next listed value above and below `value`."""
    below = [v for v in values if v < value]
    above = [v for v in values if v > value]
    return (*above[:1], *below[-1:])
