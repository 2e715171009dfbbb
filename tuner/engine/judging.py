"""What the model is worth: validation at its cadence, samples and their assessment, curves, and the final table.

None of it touches the training's random state, and none of its time is in a step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tuner import stopping
from tuner.contract.config import Cadence
from tuner.contract.probe import NoticeEvent
from tuner.contract.workload import Trivial
from tuner.engine.curves import draw_curves, draw_quality
from tuner.engine.failure import one_line, release
from tuner.engine.global_random import untouched
from tuner.engine.hooks import Emit, Every, Hook, Phases
from tuner.engine.loader import TensorBatch, to_device, valid_batches
from tuner.engine.scores import RAW, Origin, Scores, with_raw, write_quality
from tuner.engine.step import StepResult
from tuner.engine.table import Table
from tuner.engine.trainer import Trainer


class Abandoned(Exception):
    """The run was asked to stop during an evaluation."""


Through = Callable[[Iterator[TensorBatch]], Iterator[TensorBatch]]


@contextlib.contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """The random states are afterwards as they were."""
    with untouched(device):
        yield


@contextlib.contextmanager
def resting(trainer: Trainer, model: nn.Module) -> Iterator[None]:
    """Maintenance on `model`: no gradients, in eval mode, the random state untouched."""
    was_training = model.training
    model.eval()
    try:
        with aside(trainer.device), torch.no_grad():
            yield
    finally:
        model.train(was_training)


def evaluate(trainer: Trainer, *, raw: bool = False, through: Through = iter) -> dict[str, float]:
    """The workload's own figures on the validation split, of the averaged weights, or of the `raw` ones. The batches go
    `through` whoever looks on, or ends them early."""
    model = trainer.model if raw else trainer.effective_model
    with resting(trainer, model), trainer.arithmetic.autocast():
        found: Mapping[str, float] = trainer.workload.evaluate(model, through(_batches(trainer)))
        return {name: float(value) for name, value in found.items()}


def _batches(trainer: Trainer) -> Iterator[TensorBatch]:
    for batch in valid_batches(trainer.workload, trainer.config):
        if stopping.asked() is not None:
            raise Abandoned
        yield to_device(batch, trainer.device, channels_last=trainer.config.channels_last)


def evaluates_raw(trainer: Trainer) -> bool:
    """Are the weights as trained evaluated too, beside their average?"""
    return trainer.ema is not None and (trainer.ema.config.evaluate_raw or trainer.config.judges_raw)


def write_samples(trainer: Trainer, folder: Path) -> list[Path]:
    """Sample files of the (averaged) model; empty when the workload makes none."""
    if not hasattr(trainer.workload, "sample"):
        return []
    folder.mkdir(parents=True, exist_ok=True)
    with resting(trainer, trainer.effective_model):
        return [Path(path) for path in trainer.workload.sample(trainer.effective_model, folder, trainer.config.seed)]


def assess(trainer: Trainer, folder: Path) -> dict[str, float]:
    """The figures that need generating, of the (averaged) model; empty when the workload has none."""
    if not hasattr(trainer.workload, "assess"):
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    with resting(trainer, trainer.effective_model):
        found: Mapping[str, float] = trainer.workload.assess(trainer.effective_model, folder, trainer.config.seed)
        return {name: float(value) for name, value in found.items()}


@contextlib.contextmanager
def tolerated(what: str, emit: Emit) -> Iterator[None]:
    """What goes wrong in here is told and never ends the run: hours of training hang on it."""
    try:
        yield
    except Exception as error:
        text = f"{what} failed: {one_line(error)}; the run goes on"
        release(error)
        emit(NoticeEvent(level="warning", text=text))


def trivial_figures(workload: Any, device: torch.device, phases: Phases, emit: Emit) -> dict[str, Trivial]:
    """What the workload's figures would be without learning; empty when it does not say."""
    if not hasattr(workload, "trivial"):
        return {}
    with tolerated("trivial", emit), phases.during("assess"), aside(device):
        return dict(workload.trivial())
    return {}


class Evaluator(Hook):
    """Evaluates at its cadence and at the end."""

    def __init__(self, cadence: Cadence, scores: Scores, phases: Phases, emit: Emit) -> None:
        self._cadence = cadence
        self._scores = scores
        self._phases = phases
        self._emit = emit
        self._every = Every(0)
        self._at = -1

    def on_start(self, trainer: Trainer) -> None:
        """An evaluation that was due with the checkpoint but did not come to its end is made up for."""
        self._every = Every(self._cadence.evaluate_samples, self._scores.last_at.get(Origin.EVALUATE, 0))
        self._at = self._scores.last_at.get(Origin.EVALUATE, trainer.samples)
        if self._every.due(trainer.samples):
            self._evaluate(trainer)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:  # noqa: ARG002
        if self._every.due(trainer.samples):
            self._evaluate(trainer)

    def on_end(self, trainer: Trainer) -> None:
        if self._cadence.evaluate_samples and trainer.samples != self._at and stopping.asked() is None:
            self._evaluate(trainer)

    def _evaluate(self, trainer: Trainer) -> None:
        """Given up when a signal asks the run to stop; it is made up for when the run goes on."""
        self._at = trainer.samples
        try:
            with self._phases.during("evaluate"):
                found = evaluate(trainer)
                if evaluates_raw(trainer):
                    found |= {RAW + name: value for name, value in evaluate(trainer, raw=True).items()}
        except Abandoned:
            trainer.heed()
            return
        self._emit(NoticeEvent(text=f"evaluated at {trainer.samples:,} samples: {_shown(found)}"))
        self._scores.add(trainer, Origin.EVALUATE, found)


class Pictures(Hook):
    """Samples, their assessment and the curves at the sample cadence, and at the end."""

    def __init__(
        self,
        cadence: Cadence,
        out_dir: Path,
        log: Table,
        scores: Scores,
        trivial: Mapping[str, Trivial],
        phases: Phases,
        emit: Emit,
        show: Callable[[int, Sequence[Path]], None] = lambda _samples, _files: None,
    ) -> None:
        self._cadence = cadence
        self._out_dir = out_dir
        self._log = log
        self._scores = scores
        self._trivial = trivial
        self._phases = phases
        self._emit = emit
        self._show = show
        """Told of every new set of sample files."""
        self._every = Every(0)
        self._at = -1

    def on_start(self, trainer: Trainer) -> None:
        """What was due with the checkpoint but did not come to its end is made up for."""
        before = max(0, trainer.samples - trainer.config.effective_batch_size)
        self._every = Every(self._cadence.sample_samples, before)
        self._at = trainer.samples
        if self._every.due(trainer.samples) and not self._made(trainer):
            self._all(trainer)

    def _made(self, trainer: Trainer) -> bool:
        if hasattr(trainer.workload, "assess"):
            return self._scores.last_at.get(Origin.ASSESS) == trainer.samples
        return any(self._folder(trainer).glob("*"))

    def after_step(self, trainer: Trainer, result: StepResult) -> None:  # noqa: ARG002
        if self._every.due(trainer.samples):
            self._all(trainer)

    def _all(self, trainer: Trainer) -> None:
        self._at = trainer.samples
        self._sample(trainer)
        self._assess(trainer)
        self._draw(trainer)

    def on_end(self, trainer: Trainer) -> None:
        if trainer.samples == self._at:
            return
        if stopping.asked() is None:  # otherwise whoever asked does not wait for long
            if self._cadence.sample_samples:
                self._sample(trainer)
            if self._cadence.sample_samples or self._cadence.evaluate_samples:
                self._assess(trainer)
        self._draw(trainer)

    def _folder(self, trainer: Trainer) -> Path:
        return self._out_dir / "samples" / f"{trainer.samples:012d}"

    def _sample(self, trainer: Trainer) -> None:
        with tolerated(f"samples at {trainer.samples:,} samples", self._emit), self._phases.during("sample"):
            files = write_samples(trainer, self._folder(trainer))
            if files:
                self._emit(NoticeEvent(text=f"{len(files)} sample file(s) in {files[0].parent}"))
                self._show(trainer.samples, files)

    def _assess(self, trainer: Trainer) -> None:
        found: dict[str, float] = {}
        with tolerated(f"the assessment at {trainer.samples:,} samples", self._emit), self._phases.during("assess"):
            found = assess(trainer, self._folder(trainer))
        if found:
            self._emit(NoticeEvent(text=f"assessed at {trainer.samples:,} samples: {_shown(found)}"))
            self._scores.add(trainer, Origin.ASSESS, found)

    def _draw(self, trainer: Trainer) -> None:
        with tolerated(f"curves at {trainer.samples:,} samples", self._emit), self._phases.during("sample"):
            tables = [table.rows() for table in self._scores.tables.values()]
            draw_curves(self._log.rows(), tables, self._out_dir / "curves.png", self._trivial)


def sum_up(scores: Scores, trivial: Mapping[str, Trivial], out_dir: Path, emit: Emit) -> None:
    """quality.csv and quality.png, at the end of a run. What is said of it is the parent's."""
    if not scores.metrics:
        return
    known = with_raw(trivial)
    with tolerated("the table of figures", emit):
        write_quality(scores.metrics, known, out_dir / "quality.csv")
        draw_quality(scores.metrics, known, out_dir / "quality.png")


def _shown(found: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in found.items())
