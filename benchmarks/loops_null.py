"""A null model under every loop: one linear layer, 64 to 64, eight rows a batch, so a step is mostly the loop's own.

Every contender does the same training: the same weights to begin with, the same batches, the same optimizer, the loss
handled as each does it by default, logging and saving off. The bare loop is what one writes by hand: gradients set to
nothing, forward, backward, update, and the loss kept without reading it.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from benchmarks.loops_ours import CPU, PacedSource, train, unheard
from benchmarks.loops_pace import Contender, Job, Pace, Paced
from tuner.contract.config import (
    Cadence,
    EmaConfig,
    OptimizerConfig,
    OptimizerName,
    RunConfig,
    ScheduleConfig,
    ScheduleKind,
)
from tuner.contract.workload import SAMPLE_SEED, Batch, Split, Term, WorkloadInfo
from tuner.engine.advice import Adviser
from tuner.engine.hooks import Hook
from tuner.engine.journal import Journal
from tuner.engine.loader import Group
from tuner.engine.memory import PeakMemory
from tuner.engine.trainer import Trainer

WIDTH, BATCH, RESIDENT = 64, 8, 16
LR = {"sgd": 1e-2, "adam": 1e-4}
Pair = tuple[Tensor, Tensor]
CASES = ("resident sgd", "resident adam", "loader sgd")
GOAL_CASE = CASES[0]


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, WIDTH)


def make_optimizer(model: nn.Module, case: str) -> torch.optim.Optimizer:
    kind = case.split()[1]
    made: type[Any] = torch.optim.SGD if kind == "sgd" else torch.optim.Adam
    return made(model.parameters(), lr=LR[kind])  # type: ignore[no-any-return]


def resident_pairs() -> list[Pair]:
    made = torch.Generator().manual_seed(1)
    x, y = (torch.randn(RESIDENT, BATCH, WIDTH, generator=made) for _ in range(2))
    return list(zip(x, y, strict=True))


class Rows(Dataset[Any]):
    """Items that lie in memory, in the form the loop wants; asked for a batch, it lets the pace tick."""

    def __init__(self, pace: Pace, form: Callable[[Tensor, Tensor], Any]) -> None:
        self._pace = pace
        pairs = [pair for x, y in resident_pairs() for pair in zip(x, y, strict=True)]
        self._items = [form(x, y) for x, y in pairs]

    def __len__(self) -> int:
        return self._pace.batches * BATCH

    def __getitem__(self, index: int) -> Any:
        return self._items[index % len(self._items)]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        self._pace.tick()
        items, count = self._items, len(self._items)
        return [items[index % count] for index in indices]


def as_pair(x: Tensor, y: Tensor) -> Pair:
    return x, y


def as_mapping(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    return {"x": x, "y": y}


def feed(pace: Pace, form: Callable[[Tensor, Tensor], Any]) -> Any:
    """What a loop iterates over: batches that lie there, or torch's own loader of shuffled rows."""
    if pace.job.case.startswith("resident"):
        return Paced(pace, [form(x, y) for x, y in resident_pairs()])
    return DataLoader(Rows(pace, form), batch_size=BATCH, shuffle=True)


# --- the contenders ---------------------------------------------------------------------------------------------------


def bare(pace: Pace) -> nn.Module:
    model = make_model()
    optimizer = make_optimizer(model, pace.job.case)
    losses = []
    for x, y in feed(pace, as_pair):
        optimizer.zero_grad()
        loss = functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return model


def with_accelerate(pace: Pace) -> nn.Module:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    made = make_model()
    model, optimizer, batches = accelerator.prepare(made, make_optimizer(made, pace.job.case), feed(pace, as_pair))
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        loss = functional.mse_loss(model(x), y)
        accelerator.backward(loss)
        optimizer.step()
        losses.append(loss.detach())
    return made


def with_ignite(pace: Pace) -> nn.Module:
    from ignite.engine import create_supervised_trainer

    model = make_model()
    engine = create_supervised_trainer(model, make_optimizer(model, pace.job.case), nn.MSELoss(), device="cpu")
    engine.run(feed(pace, as_pair), max_epochs=1, epoch_length=pace.batches)
    return model


def with_lightning(pace: Pace) -> nn.Module:
    import lightning

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.inner = make_model()

        def training_step(self, batch: Pair) -> Tensor:
            return functional.mse_loss(self.inner(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return make_optimizer(self.inner, pace.job.case)

    quiet("lightning.pytorch", "lightning.fabric")
    module = Module()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, feed(pace, as_pair))
    return module.inner


def with_transformers(pace: Pace) -> nn.Module:
    from transformers import Trainer as HfTrainer
    from transformers import TrainingArguments

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make_model()

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"loss": functional.mse_loss(self.inner(x), y)}

    class Fed(HfTrainer):  # type: ignore[misc]
        def get_train_dataloader(self) -> Any:
            return feed(pace, as_mapping)

    model = Model()
    optimizer = make_optimizer(model, pace.job.case)
    with tempfile.TemporaryDirectory(prefix="tuner-loops-") as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            max_steps=pace.batches,
            max_grad_norm=0.0,
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
        )
        constant = torch.optim.lr_scheduler.LambdaLR(optimizer, always_one)
        Fed(model=model, args=arguments, train_dataset=Rows(pace, as_mapping), optimizers=(optimizer, constant)).train()
    return model.inner


def always_one(step: int) -> float:  # noqa: ARG001
    """A schedule that changes nothing."""
    return 1.0


def quiet(*names: str) -> None:
    """Their advice about workers and unused GPUs."""
    warnings.filterwarnings("ignore")
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)


# --- ours -------------------------------------------------------------------------------------------------------------


class NullWorkload:
    """The job as a workload says it: a sum and what to divide it by."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace

    def info(self) -> WorkloadInfo:
        return WorkloadInfo(name="null", summary="One linear layer", train_samples=1, baseline=null_config(self._pace))

    def model(self) -> nn.Module:
        return make_model()

    def dataset(self, split: Split) -> Rows:  # noqa: ARG002
        return Rows(self._pace, as_mapping)

    def weights(self, batch: Batch) -> Mapping[str, float]:
        return {"mse": float(batch["y"].numel())}

    def loss(self, model: nn.Module, batch: Batch) -> Mapping[str, Term]:
        y = batch["y"]
        return {"mse": Term(functional.mse_loss(model(batch["x"]), y, reduction="sum"), float(y.numel()))}

    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> Mapping[str, float]:  # noqa: ARG002
        return {}


def null_config(pace: Pace, **changes: Any) -> RunConfig:
    kind = pace.job.case.split()[1]
    samples = pace.batches * BATCH
    return RunConfig(
        workload="null",
        micro_batch_size=BATCH,
        optimizer=OptimizerConfig(name=OptimizerName(kind), lr=LR[kind]),
        horizon_samples=samples,
        cadence=Cadence(log_samples=pace.job.steps * BATCH),
        threads=1,
    ).model_copy(update=changes)


def null_source(pace: Pace, job: NullWorkload) -> PacedSource | None:
    """None for the loader of the run itself."""
    if pace.job.case.startswith("loader"):
        return None
    batches = [{"x": x, "y": y, SAMPLE_SEED: torch.arange(BATCH)} for x, y in resident_pairs()]
    return PacedSource(pace, [Group([batch], dict(job.weights(batch))) for batch in batches])


def production(pace: Pace) -> nn.Module:
    """What `tuner train` runs in its worker."""
    job, config = NullWorkload(pace), null_config(pace)
    return train(job, config, null_source(pace, job))


def trainer_alone(pace: Pace, *, journal: bool = False, **changes: Any) -> nn.Module:
    """The engine's loop with no hooks, or with the log of a production run as its only one."""
    job, config = NullWorkload(pace), null_config(pace, **changes)
    with tempfile.TemporaryDirectory(prefix="tuner-loops-") as folder:
        hooks: list[Hook] = [make_journal(config, Path(folder))] if journal else []
        trainer = Trainer(job, config, device=CPU, hooks=hooks, source=null_source(pace, job))
        trainer.run(config.horizon_samples)
    return trainer.model


def make_journal(config: RunConfig, folder: Path) -> Journal:
    adviser = Adviser(config.horizon_samples, config.optimizer.lr, config.loss_bands, unheard)
    return Journal(config.cadence, adviser, folder, PeakMemory(CPU), unheard)


BARE, OURS = "bare loop", "tuner train"
CONTENDERS: dict[str, Contender] = {
    BARE: Contender(bare),
    OURS: Contender(production),
    "tuner, no hooks": Contender(trainer_alone),
    "accelerate": Contender(with_accelerate, ("accelerate",)),
    "ignite": Contender(with_ignite, ("pytorch-ignite",)),
    "Lightning": Contender(with_lightning, ("lightning",)),
    "HF Trainer": Contender(with_transformers, ("transformers", "accelerate")),
}
COSINE = ScheduleConfig(kind=ScheduleKind.COSINE, warmup_samples=1000, final_factor=0.1)
FEATURES: dict[str, Contender] = {
    BARE: CONTENDERS[BARE],
    "no hooks": Contender(trainer_alone),
    "+ journal": Contender(partial(trainer_alone, journal=True)),
    "+ cosine schedule": Contender(partial(trainer_alone, schedule=COSINE), same_data=False),
    "+ clipping": Contender(partial(trainer_alone, max_grad_norm=1e9)),
    "+ averaged weights": Contender(partial(trainer_alone, ema=EmaConfig(half_life_samples=1000))),
}


def find(job: Job) -> Contender:
    return CONTENDERS[job.contender]


def find_feature(job: Job) -> Contender:
    return FEATURES[job.contender]
