"""SearchSpace: the values each knob may take, and what the target GPU and this machine rule out, with the reason."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from tuner.contract.base import Frozen, Scalar
from tuner.contract.config import CompileMode, Precision, RunConfig
from tuner.contract.given import Given
from tuner.contract.gpu import DeviceInfo, GpuProfile


class Knob(StrEnum):
    """What is searched. Accumulation follows from the micro-batch size and the effective batch size."""

    MICRO_BATCH_SIZE = "micro_batch_size"
    EFFECTIVE_BATCH_SIZE = "effective_batch_size"
    PRECISION = "precision"
    COMPILE = "compile"
    GRADIENT_CHECKPOINTING = "gradient_checkpointing"
    CHANNELS_LAST = "channels_last"
    FUSED = "fused"
    NUM_WORKERS = "num_workers"
    PREFETCH_FACTOR = "prefetch_factor"
    LR = "lr"


MOST_COMBINATIONS = 1_000_000
"""Of the values of all knobs; the models of a search look at every one of them."""


class Dropped(Frozen):
    """A value that will not be tried, why, and because of what."""

    knob: Knob
    value: str
    reason: str
    because: Literal["target", "device", "rule"]


class SearchSpace(Given):
    """Values per knob, within what `RunConfig` allows; an empty tuple = the baseline's value alone."""

    micro_batch_size: tuple[Annotated[int, Field(ge=1, le=1 << 20)], ...] = ()
    effective_batch_size: tuple[Annotated[int, Field(ge=1, le=1 << 30)], ...] = ()
    """Searched only with `--effective-batch free`; the baseline's otherwise."""
    precision: tuple[Precision, ...] = ()
    compile: tuple[CompileMode, ...] = ()
    gradient_checkpointing: tuple[bool, ...] = ()
    channels_last: tuple[bool, ...] = ()
    fused: tuple[bool, ...] = ()
    num_workers: tuple[Annotated[int, Field(ge=0, le=256)], ...] = ()
    prefetch_factor: tuple[Annotated[int, Field(ge=1, le=64)], ...] = ()
    lr: tuple[Annotated[float, Field(gt=0, le=100)], ...] = Field(default=())
    options: dict[str, tuple[Scalar, ...]] = Field(default_factory=dict)
    """Options that change the model itself (width, layers): searched only under a quality constraint."""

    @model_validator(mode="after")
    def _can_be_looked_through(self) -> Self:
        counts = [len(getattr(self, knob.value)) for knob in Knob] + [len(values) for values in self.options.values()]
        total = math.prod(max(1, count) for count in counts)
        if total > MOST_COMBINATIONS:
            raise ValueError(
                f"at most {MOST_COMBINATIONS:,} combinations can be searched, and these lists make {total:,}"
            )
        return self

    def values(self, knob: Knob, baseline: RunConfig) -> tuple[Any, ...]:
        """The knob's values, the baseline's always among them."""
        own = knob_value(baseline, knob)
        listed: tuple[Any, ...] = getattr(self, knob.value)
        return listed if own in listed else (own, *listed)

    def restrict(
        self, gpu: GpuProfile, device: DeviceInfo, baseline: RunConfig, effective_batch: int | None
    ) -> tuple[SearchSpace, tuple[Dropped, ...]]:
        """Drop what the target GPU or this machine cannot do. `effective_batch` None = free.

        Returns the remaining space and one `Dropped` per value, in the order of the knobs.
        """
        dropped = [
            *_illegal_precisions(self.precision, gpu, device),
            *_illegal_compiles(self.compile, gpu, device),
            *_illegal_batches(self.micro_batch_size, baseline, effective_batch),
            *_illegal_workers(self.num_workers, device, baseline.world_size),
        ]
        gone = {(item.knob, item.value) for item in dropped}
        update = {
            knob.value: tuple(v for v in getattr(self, knob.value) if (knob, str(v)) not in gone) for knob in Knob
        }
        if effective_batch is not None:
            update[Knob.EFFECTIVE_BATCH_SIZE.value] = ()
        return self.model_copy(update=update), tuple(dropped)


def knob_value(config: RunConfig, knob: Knob) -> Any:
    """The value `config` gives to `knob`."""
    if knob in (Knob.NUM_WORKERS, Knob.PREFETCH_FACTOR):
        return getattr(config.loader, knob.value)
    if knob in (Knob.LR, Knob.FUSED):
        return getattr(config.optimizer, knob.value)
    return getattr(config, knob.value)


def options_text(options: Mapping[str, Scalar], names: Iterable[str]) -> str:
    """`width=16 depth=2`: the options called `names`, for tables."""
    return " ".join(f"{name}={options.get(name)}" for name in names)


def with_knobs(config: RunConfig, values: dict[Knob, Any]) -> RunConfig:
    """`config` with some knobs changed. The effective batch size is kept unless given: accumulation follows.

    Raises ValueError when the micro-batch size does not divide the effective batch size.
    """
    loader = {k.value: values[k] for k in (Knob.NUM_WORKERS, Knob.PREFETCH_FACTOR) if k in values}
    optimizer = {k.value: values[k] for k in (Knob.LR, Knob.FUSED) if k in values}
    micro = values.get(Knob.MICRO_BATCH_SIZE, config.micro_batch_size)
    effective = values.get(Knob.EFFECTIVE_BATCH_SIZE, config.effective_batch_size)
    if effective % (micro * config.world_size):
        raise ValueError(f"micro_batch_size {micro} does not divide the effective batch size {effective}")
    plain = (Knob.PRECISION, Knob.COMPILE, Knob.GRADIENT_CHECKPOINTING, Knob.CHANNELS_LAST)
    update: dict[str, Any] = {k.value: values[k] for k in plain if k in values}
    update |= {
        "micro_batch_size": micro,
        "accumulation_steps": effective // (micro * config.world_size),
        "loader": config.loader.model_copy(update=loader),
        "optimizer": config.optimizer.model_copy(update=optimizer),
    }
    return config.model_copy(update=update).canonical()


def grid(space: SearchSpace, baseline: RunConfig, knobs: Sequence[Knob]) -> Iterator[RunConfig]:
    """Every configuration over `knobs`, the rest as in the baseline; equal ones once."""
    seen: set[str] = set()
    for choice in itertools.product(*(space.values(knob, baseline) for knob in knobs)):
        try:
            config = with_knobs(baseline, dict(zip(knobs, choice, strict=True)))
        except ValueError:
            continue
        if (digest := config.digest()) not in seen:
            seen.add(digest)
            yield config


def _illegal_precisions(values: Sequence[Precision], gpu: GpuProfile, device: DeviceInfo) -> Iterator[Dropped]:
    for value in values:
        if value not in gpu.dtypes:
            why = f"{gpu.label} has no {value.value}{_capability(gpu)}"
            yield Dropped(knob=Knob.PRECISION, value=value.value, reason=why, because="target")
        elif value not in device.dtypes:
            why = f"cannot be measured here: {device.name} has no useful {value.value}"
            yield Dropped(knob=Knob.PRECISION, value=value.value, reason=why, because="device")


def _illegal_compiles(values: Sequence[CompileMode], gpu: GpuProfile, device: DeviceInfo) -> Iterator[Dropped]:
    for value in values:
        if value not in gpu.compile_modes:
            why = gpu.compile_note or f"{gpu.label} cannot run it"
            yield Dropped(knob=Knob.COMPILE, value=value.value, reason=why, because="target")
        elif value.value in device.compile_problems:
            why = f"cannot be measured here: {device.compile_problems[value.value]}"
            yield Dropped(knob=Knob.COMPILE, value=value.value, reason=why, because="device")


def _illegal_batches(values: Sequence[int], baseline: RunConfig, effective_batch: int | None) -> Iterator[Dropped]:
    if effective_batch is None:
        return
    for value in values:
        if effective_batch % (value * baseline.world_size):
            why = f"does not divide the effective batch size {effective_batch}, which is kept"
            yield Dropped(knob=Knob.MICRO_BATCH_SIZE, value=str(value), reason=why, because="rule")


def _illegal_workers(values: Sequence[int], device: DeviceInfo, ranks: int) -> Iterator[Dropped]:
    for value in values:
        if value * ranks > 2 * device.cpu_count:
            each = f" ({ranks} ranks with {value} each)" if ranks > 1 else ""
            why = f"more than twice this host's {device.cores}{each}"
            yield Dropped(knob=Knob.NUM_WORKERS, value=str(value), reason=why, because="device")


def _capability(gpu: GpuProfile) -> str:
    return f" (compute capability {gpu.capability[0]}.{gpu.capability[1]})" if gpu.capability else ""
