"""The Workload protocol: what a user writes. No loop, no optimizer, no device, no AMP, no DDP.

Torch is named for type checkers alone; importing this module never loads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from pydantic import Field

from tuner.contract.base import Frozen, Scalar
from tuner.contract.config import OptimizerConfig, RunConfig

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.utils.data import Dataset

SAMPLE_SEED = "sample_seed"
"""Key the loader adds to every batch: int64 [B], derived from (run seed, epoch, index)."""

ERROR = "_se"
"""Behind the name of a figure: its standard error, where the workload tells one."""
SURE = 2.0
"""Standard errors by which a figure must be better than without learning to be called so."""

Split = Literal["train", "valid"]
Batch = Mapping[str, "Tensor"]


class WorkloadInfo(Frozen):
    """What the tuner must know before it runs anything; cheap to make, no data is read for it."""

    name: str
    summary: str
    """One sentence: the job."""
    unit: str = "sample"
    """What one sample is: image, text, window."""
    preset: str = ""
    """Which preset the options select."""
    preset_note: str = ""
    """What that preset means for the user, e.g. that tiny is a rehearsal."""
    train_samples: int = Field(ge=1)
    baseline: RunConfig
    """What people run today: always probed, always the thing compared with."""
    batch_coupled: bool = False
    """True when samples of a micro-batch influence each other (BatchNorm, in-batch negatives)."""


@dataclass(frozen=True)
class Term:
    """One loss term of one micro-batch. The engine forms `coefficient * sum of sums / sum of weights` over the group
    of accumulated micro-batches, so the result does not depend on how the effective batch was cut."""

    sum: Tensor
    """Scalar: the sum (not the mean) over the micro-batch."""
    weight: float | Tensor
    """What to divide by: samples, or tokens; must equal what `weights(batch)` counted."""
    coefficient: float = 1.0


Terms = Mapping[str, Term]


class Trivial(Frozen):
    """What a metric would be without learning anything: chance, the mean as prediction, zero fill."""

    value: float
    text: str
    """How it comes about: `chance`, `predicting the training mean`."""
    higher_is_better: bool = True

    def beaten_by(self, name: str, metrics: Mapping[str, float]) -> bool:
        """Is the figure `name` better than without learning, by more than the noise its standard error tells of? Never
        where one of them is no number."""
        ahead = metrics[name] - self.value if self.higher_is_better else self.value - metrics[name]
        return ahead > SURE * metrics.get(name + ERROR, 0.0)


class Progress(Protocol):
    """`(0, 0, text)` is a remark: what the user should know of the data, shown once as a line of its own."""

    def __call__(self, done: int, total: int, text: str) -> None: ...


@runtime_checkable
class Workload(Protocol):
    """The required part. Raise WorkloadError for data the user can mend."""

    def __init__(self, options: Mapping[str, Scalar]) -> None: ...

    def info(self) -> WorkloadInfo: ...

    def model(self) -> nn.Module: ...

    def dataset(self, split: Split) -> Dataset[Mapping[str, Tensor]]:
        """Map-style; an item is a dict of tensors, or a tuple, whose parts the batch names "0", "1". Numbers and numpy
        arrays become tensors. The same index always gives the same item."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Terms | Tensor | Mapping[str, Tensor]:
        """Named terms. A scalar tensor, alone or by name, is taken as the mean over the micro-batch's samples.

        Randomness (timesteps, noise, dropped condition) derives from `batch["sample_seed"]` (`tuner.randomness`)."""
        ...

    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> Mapping[str, float]: ...


class HasPrepare(Protocol):
    """Optional: called in every process before data is asked for, under a lock. The first call makes what is needed and
    caches it below `cache_dir` under a key of its content; later calls must find it there quickly."""

    def prepare(self, cache_dir: Path, progress: Progress) -> None: ...


class HasWeights(Protocol):
    """Optional: weights of the loss terms, counted before the forward pass; default = samples for every term."""

    def weights(self, batch: Batch) -> Mapping[str, float]: ...


class HasParamGroups(Protocol):
    """Optional: parameter groups, `params` and `lr_scale` each; the lr knob multiplies all of them."""

    def param_groups(self, model: nn.Module) -> Sequence[Mapping[str, Any]]: ...


class HasOptimizer(Protocol):
    """Optional: an optimizer of your own, made from the configuration's settings. Each group's lr relative to
    `config.lr` is kept: the lr knob and the schedule multiply all of them. Its `step()` takes no closure, and its state
    consists of tensors and plain values. Where it ignores `config.fused`, that knob is refused."""

    def optimizer(self, model: nn.Module, config: OptimizerConfig) -> Optimizer: ...


class HasSchedule(Protocol):
    """Optional: a learning rate schedule of your own: the factor on the base lr, 0 or more, after `samples` samples of
    `horizon_samples`. Counted in samples, so that it means the same at every batch size; a pure function of them."""

    def schedule(self, samples: float, horizon_samples: int) -> float: ...


class HasCollate(Protocol):
    """Optional: list of dataset items, as the dataset gives them -> batch (without `sample_seed`, which the loader
    adds): a dict of tensors, or a tuple, whose parts are named "0", "1"."""

    def collate(self, items: Sequence[Any]) -> Mapping[str, Tensor] | Sequence[Tensor]: ...


class HasLengths(Protocol):
    """Optional: how long each sample of the split is (tokens, frames), for batches of samples of about equal length:
    the loader then puts such samples into one optimizer step. None = order them without regard to length."""

    def lengths(self, split: Split) -> Sequence[int] | None: ...


class HasCheckpointBlocks(Protocol):
    """Optional: the submodules whose activations are recomputed under gradient checkpointing."""

    def checkpoint_blocks(self, model: nn.Module) -> Sequence[nn.Module]: ...


class HasSample(Protocol):
    """Optional: write sample pictures or texts of the (EMA) model below `out_dir`; returns the files."""

    def sample(self, model: nn.Module, out_dir: Path, seed: int) -> Sequence[Path]: ...


class HasAssess(Protocol):
    """Optional: figures that need generating (class match of samples, nearest training picture). Called where samples
    are made, and at the end of a run; may write pictures and CSV below `out_dir`. Draws derive from `seed` alone."""

    def assess(self, model: nn.Module, out_dir: Path, seed: int) -> Mapping[str, float]: ...


class HasTrivial(Protocol):
    """Optional: for metrics of `evaluate` and `assess`, by name, what they would be without learning. Called once,
    after `prepare`; computed from the data, not written down."""

    def trivial(self) -> Mapping[str, Trivial]: ...


class HasPredict(Protocol):
    """Optional: inference on one batch, what `tuner bench` times; without it, the forward pass of `loss` is timed."""

    def predict(self, model: nn.Module, batch: Batch) -> Tensor: ...


class HasPreload(Protocol):
    """Optional class attribute: modules worth importing once for all probes (they must start no thread)."""

    preload: Sequence[str]
