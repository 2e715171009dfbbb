"""RunConfig: everything that decides how a training job runs. The type that enters a probe is the type
that leaves in best.<gpu>.yaml and the type that production runs.

Durations are counted in samples, so nothing changes its meaning when the batch does.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum
from typing import Self

from pydantic import Field, field_validator, model_validator

from tuner.contract.base import Scalar
from tuner.contract.given import Given


class Precision(StrEnum):
    """Arithmetic of the forward and backward pass; parameters stay fp32."""

    FP32 = "fp32"
    TF32 = "tf32"
    FP16 = "fp16"
    BF16 = "bf16"


class CompileMode(StrEnum):
    """How the model is run: op by op, through torch.compile in one of its modes, or as a plain CUDA graph."""

    EAGER = "eager"
    DEFAULT = "default"
    REDUCE_OVERHEAD = "reduce-overhead"
    MAX_AUTOTUNE = "max-autotune"
    CUDAGRAPHS = "cudagraphs"


class OptimizerName(StrEnum):
    ADAM = "adam"
    ADAMW = "adamw"
    SGD = "sgd"
    OWN = "own"
    """Made by the workload's `optimizer`: no rule is known by which its lr follows the effective batch size."""


class ScheduleKind(StrEnum):
    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"


class LoaderConfig(Given):
    num_workers: int = Field(default=0, ge=0, le=256)
    prefetch_factor: int = Field(default=2, ge=1, le=64)
    """Batches each worker keeps ready; without workers it has no effect."""
    pin_memory: bool = False
    persistent_workers: bool = True


class OptimizerConfig(Given):
    name: OptimizerName = OptimizerName.ADAM
    """Where the workload has an `optimizer` of its own: `own`, unless it says after which of them its lr scales."""
    lr: float = Field(gt=0, le=100)
    """Base rate; a workload's parameter groups are multiples of it."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """SGD only."""
    fused: bool = False

    @field_validator("betas")
    @classmethod
    def _betas(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("both betas must lie in [0, 1)")
        return value


class ScheduleConfig(Given):
    kind: ScheduleKind = ScheduleKind.CONSTANT
    warmup_samples: int = Field(default=0, ge=0)
    final_factor: float = Field(default=0.0, ge=0, le=1)
    """lr at the horizon as a share of the base lr (linear and cosine)."""


class EmaConfig(Given):
    half_life_samples: int = Field(gt=0)
    """After this many samples the weight of an old parameter value has halved."""
    warmup_ratio: float = Field(default=0.05, ge=0, le=1)
    """Early on the half-life is at most this share of the samples seen, so that the initial weights are forgotten."""
    evaluate_raw: bool = False
    """Evaluate the weights as trained too: its metrics stand beside the averaged ones as `raw_NAME`."""


class Cadence(Given):
    """How often production does what, in samples; 0 = never. Some of it may be said in epochs instead."""

    log_samples: int = Field(default=0, ge=0)
    evaluate_samples: int = Field(default=0, ge=0)
    sample_samples: int = Field(default=0, ge=0)
    checkpoint_samples: int = Field(default=0, ge=0)
    evaluate_epochs: float = Field(default=0.0, ge=0, le=1e9)
    """0.5 = twice in every pass over the training split; with this, evaluate_samples stays 0."""
    sample_epochs: float = Field(default=0.0, ge=0, le=1e9)
    checkpoint_epochs: float = Field(default=0.0, ge=0, le=1e9)

    @model_validator(mode="after")
    def _one_unit(self) -> Self:
        for duty in ("evaluate", "sample", "checkpoint"):
            samples, epochs = getattr(self, f"{duty}_samples"), getattr(self, f"{duty}_epochs")
            if samples and epochs:
                raise ValueError(
                    f"{duty}_samples ({samples}) and {duty}_epochs ({epochs:g}) are both given; "
                    "set one of them, and the other to 0"
                )
        return self

    @property
    def in_epochs(self) -> bool:
        """Must the size of the training split be known to act on this?"""
        return bool(self.evaluate_epochs or self.sample_epochs or self.checkpoint_epochs)

    def in_samples(self, epoch_samples: int) -> Cadence:
        """The same with every duty counted in samples, for a training split of `epoch_samples`."""
        return Cadence(
            log_samples=self.log_samples,
            evaluate_samples=self.evaluate_samples or _samples(self.evaluate_epochs, epoch_samples),
            sample_samples=self.sample_samples or _samples(self.sample_epochs, epoch_samples),
            checkpoint_samples=self.checkpoint_samples or _samples(self.checkpoint_epochs, epoch_samples),
        )


def _samples(epochs: float, epoch_samples: int) -> int:
    return max(1, round(epochs * epoch_samples)) if epochs else 0


class LossBands(Given):
    """Where the guide says the total loss should lie; outside `warn_*` production says so."""

    normal_low: float
    normal_high: float
    warn_low: float
    warn_high: float


class QualityWeights(StrEnum):
    """Which weights are judged where a run averages them."""

    EMA = "ema"
    RAW = "raw"


class QualityConfig(Given):
    """Which validation metric says how good the model is: its best checkpoint is kept, and the run may end early."""

    metric: str
    """A name from `evaluate` or `assess`."""
    higher_is_better: bool = True
    patience: int = Field(default=0, ge=0)
    """End the run after this many evaluations in a row without a better one; 0 = never."""
    min_delta: float = Field(default=0.0, ge=0)
    """By how much a value must be better to count."""
    weights: QualityWeights = QualityWeights.EMA
    """`raw`: the weights as trained decide, not their average (which is evaluated too). Without `ema` both are one."""


SAME_RUN = ("workload", "options", "ema", "seed", "optimizer.name")
"""What a resumed run may not change: its checkpoints would belong to another run."""


def _plain(value: object) -> str:
    return repr(value.model_dump(mode="json") if isinstance(value, Given) else value)


class RunConfig(Given):
    workload: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,128}(:[A-Za-z_][A-Za-z0-9_.]{0,127})?$")
    """A registered name, or `module:Class`."""
    options: dict[str, Scalar] = Field(default_factory=dict)
    """What the workload itself understands: preset, data, model size."""
    micro_batch_size: int = Field(ge=1, le=1 << 20)
    accumulation_steps: int = Field(default=1, ge=1, le=1 << 16)
    world_size: int = Field(default=1, ge=1, le=1 << 16)
    precision: Precision = Precision.FP32
    compile: CompileMode = CompileMode.EAGER
    gradient_checkpointing: bool = False
    channels_last: bool = False
    loader: LoaderConfig = LoaderConfig()
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    ema: EmaConfig | None = None
    max_grad_norm: float | None = Field(default=None, gt=0)
    horizon_samples: int = Field(ge=1)
    """Length of the production run in samples."""
    cadence: Cadence = Cadence()
    loss_bands: LossBands | None = None
    quality: QualityConfig | None = None
    threads: int = Field(default=0, ge=0, le=1024)
    """Intra-op CPU threads; 0 = all cores."""
    seed: int = Field(default=0, ge=0, lt=1 << 31)

    @property
    def effective_batch_size(self) -> int:
        return self.micro_batch_size * self.accumulation_steps * self.world_size

    def another_run(self, saved: RunConfig, placed: Collection[str] = ()) -> str:
        """What makes the run of `saved` another one than this, in words; empty where this goes on with it. `placed`:
        options that name data, which were compared by content: where they lie is no part of what they are."""
        before, now = ({**dict(config), "optimizer.name": config.optimizer.name.value} for config in (saved, self))
        before["options"] = {
            **saved.options,
            **{name: self.options.get(name) for name in placed if name in saved.options},
        }
        key = next((key for key in SAME_RUN if before[key] != now[key]), None)
        return f"{key} was {_plain(before[key])}, is now {_plain(now[key])}" if key else ""

    @property
    def judges_raw(self) -> bool:
        """Do the weights as trained decide, where there is an average of them too?"""
        return self.ema is not None and self.quality is not None and self.quality.weights is QualityWeights.RAW

    @property
    def batch_label(self) -> str:
        """`8x2`: micro-batch x accumulation, as the guides write it."""
        return f"{self.micro_batch_size}x{self.accumulation_steps}"

    @property
    def label(self) -> str:
        """One line for tables: `16x1 fp32 eager w2/4 fused channels_last`; lr is left out, as it changes no speed."""
        workers = f"w{self.loader.num_workers}"
        if self.loader.num_workers:
            workers += f"/{self.loader.prefetch_factor}"
        flags = {
            "fused": self.optimizer.fused,
            "channels_last": self.channels_last,
            "checkpointing": self.gradient_checkpointing,
        }
        extras = [name for name, on in flags.items() if on]
        extras += [f"{self.world_size} ranks"] if self.world_size > 1 else []
        return " ".join([self.batch_label, self.precision.value, self.compile.value, workers, *extras])

    def canonical(self) -> Self:
        """Equal for configurations that run identically: settings without effect take their default."""
        if self.loader.num_workers:
            return self
        idle = self.loader.model_copy(update={"prefetch_factor": 2, "persistent_workers": True})
        return self.model_copy(update={"loader": idle})
