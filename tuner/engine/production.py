"""The production run: the loop with its duties, resumed from its own folder, ended with a result."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tuner import stopping
from tuner.contract.base import parse_json
from tuner.contract.config import RunConfig
from tuner.contract.errors import ConfigError, TunerError
from tuner.contract.fingerprint import compare
from tuner.contract.measurement import Outcome
from tuner.contract.own_files import CHECKPOINTS
from tuner.contract.probe import (
    SAMPLES_REACHED,
    STOPPED_EARLY,
    NoticeEvent,
    PointReply,
    ProbeRequest,
    TrainPlan,
    TrainResult,
)
from tuner.contract.workload import Trivial
from tuner.engine import duties
from tuner.engine.advice import Adviser
from tuner.engine.best import BestKeeper, judged_name
from tuner.engine.checkpoint import Checkpointer, CheckpointError
from tuner.engine.device import environment
from tuner.engine.failure import classify, details, one_line, release
from tuner.engine.folder import run_data
from tuner.engine.hooks import Emit, Heartbeat, Phases
from tuner.engine.journal import Journal
from tuner.engine.judging import Evaluator, Pictures, sum_up, trivial_figures
from tuner.engine.memory import PeakMemory
from tuner.engine.meter import FIRST_STEPS, buffered_steps, round_steps
from tuner.engine.onlookers import Onlookers
from tuner.engine.scores import Origin, Scores
from tuner.engine.stall import StallWatch
from tuner.engine.trainer import Trainer
from tuner.engine.watch import LiveWatch
from tuner.run_lock import RunLock

BROKEN_BY_SIGNAL = (Outcome.CRASHED, Outcome.LOADER_ERROR, Outcome.COMPILE_ERROR)
"""A helper process that a signal to the whole group ended makes the run fail: that is the signal's doing."""
_LESS_MEMORY = " A configuration with less memory (a runner-up in the same YAML) is advised."
ADVICE = {
    Outcome.OOM_DEVICE: _LESS_MEMORY,
    Outcome.OOM_HOST: _LESS_MEMORY,
    Outcome.DIVERGED: " The same command would meet the same end: lower the learning rate, or look at the data, first.",
}


def train(request: ProbeRequest, workload: Any, device: torch.device, emit: Emit) -> None:
    """Run to the horizon, or until stopped. Emits TrainResult and PointReply; of a failed run the PointReply alone."""
    assert request.train is not None
    config = counted_in_samples(request.points[0], workload)
    emit = onlookers = Onlookers(request.points[0], request.train, device, emit)
    phases = Phases(emit)
    run = Production(config, request.train, workload, device, phases, onlookers)
    with stopping.listening():
        try:
            result = run.go()
        except Exception as error:
            outcome, message = classify(error)
            if stopping.asked() is not None and outcome in BROKEN_BY_SIGNAL:
                outcome, message = Outcome.NO_RESULT, f"{STOPPED_EARLY}: {message}"
            detail = details(error)
            text = f"{message}. {run.rescue(error, outcome)}".removesuffix(". ")
            reply = PointReply(
                outcome=outcome, message=text, detail=detail, values=run.reached(), environment=environment(device)
            )
            release(error)
            emit(reply)
        else:
            emit(result)
            emit(PointReply(outcome=Outcome.OK, measurement=result.measurement, environment=environment(device)))
        finally:
            phases.enter("teardown")
            run.close()
            onlookers.close()


def counted_in_samples(config: RunConfig, workload: Any) -> RunConfig:
    """Evaluations, samples and checkpoints that are wanted by the epoch, by the samples of one."""
    if not config.cadence.in_epochs:
        return config
    cadence = config.cadence.in_samples(len(workload.dataset("train")))
    return config.model_copy(update={"cadence": cadence})


class Production:
    """One process's part of a production run."""

    def __init__(
        self,
        config: RunConfig,
        plan: TrainPlan,
        workload: Any,
        device: torch.device,
        phases: Phases,
        onlookers: Onlookers,
    ) -> None:
        emit: Emit = onlookers
        self._onlookers = onlookers
        self._config = config
        self._plan = plan
        self._workload = workload
        self._device = device
        self._phases = phases
        self._emit = emit
        self._out = Path(plan.out_dir)
        self._began = time.monotonic()
        self._checkpointer = Checkpointer(self._out / CHECKPOINTS, plan.keep)
        self._memory = PeakMemory(device)
        self._adviser = Adviser(config.horizon_samples, config.optimizer.lr, config.loss_bands, emit)
        self._adviser.earlier = self._earlier
        self._journal = Journal(config.cadence, self._adviser, self._out, self._memory, emit)
        self._journal.forget_lines = onlookers.forget_lines
        self._keeper = duties.Keeper(
            self._checkpointer, config.cadence, self._journal, phases, emit, {"config": config.to_json()},
            background=plan.background_checkpoints,
        )  # fmt: skip
        self._lock = RunLock(self._out)
        self._learned = compare(run_data(self._out).data, plan.data)
        self._scores = Scores(self._out, emit)
        self._best = self._best_keeper()
        self._trivial: dict[str, Trivial] = {}
        self._reference = duties.ReferenceWork(plan.reference_every_s, phases)
        self._stall = StallWatch(plan.stall_s, emit)
        self._live = LiveWatch(plan, lambda: self._journal.record, self._reference.seconds, self._memory, phases, emit)
        self._trainer: Trainer | None = None
        self._resumed_from = 0

    def go(self) -> TrainResult:
        """Raises what the workload raises, Diverged, ConfigError for a folder of another run and for a quality metric
        that nobody gives, CheckpointError."""
        self._out.mkdir(parents=True, exist_ok=True)
        self._lock.acquire()
        self._phases.enter("build")
        self._trivial = trivial_figures(self._workload, self._device, self._phases, self._emit)
        trainer = self._build()
        self._resume(trainer)
        self._scores.restore(trainer.samples)
        if self._best is not None and trainer.rank.leads:
            with self._phases.during("evaluate"):
                self._best.check_metric(trainer, self._trivial)
        goal = self.goal
        if trainer.rank.leads:
            self._onlookers.begin(goal, trainer.samples, lambda: self._reference.seconds)
        self._phases.enter("measure")
        trainer.run(goal)
        sum_up(self._scores, self._trivial, self._out, self._emit)
        return self._result(trainer, goal)

    @property
    def goal(self) -> int:
        return min(self._config.horizon_samples, self._plan.max_samples or self._config.horizon_samples)

    def _build(self) -> Trainer:
        cadence, phases, emit = self._config.cadence, self._phases, self._emit
        self._scores.judges = [self._onlookers, self, *([self._best] if self._best is not None else [])]
        hooks = [
            self._journal,
            Heartbeat(self._emit, self.goal, "training"),
            duties.StopFlag(),
            duties.Deadline(self._plan.max_seconds),
            self._keeper,
            self._reference,
            self._live,
            self._stall,
            *([self._best] if self._best is not None else []),
            Evaluator(cadence, self._scores, phases, emit),
            Pictures(
                cadence,
                self._out,
                self._journal.table,
                self._scores,
                self._trivial,
                phases,
                emit,
                show=self._onlookers.show,
            ),
        ]
        trainer = Trainer(self._workload, self._config, device=self._device, hooks=hooks)
        phases.on_break = trainer.rest
        self._trainer = trainer
        return trainer

    def _best_keeper(self) -> BestKeeper | None:
        if self._config.quality is None:
            return None
        keeper = BestKeeper(self._config, self._scores, self._checkpointer, self._keeper.save_best, self._emit)
        keeper.know_data(self._plan.data, lambda: run_data(self._out).since)
        return keeper

    def _earlier(self) -> str:
        """The checkpoint that advice may name."""
        best = self._best.kept if self._best is not None else ""
        kept = self._checkpointer.all()
        return best or (f"checkpoints/{kept[-1].name}" if kept else "")

    def see(self, trainer: Trainer, origin: Origin, found: Mapping[str, float]) -> None:  # noqa: ARG002
        """New validation figures: hold the guide's advice against them."""
        quality = self._config.quality
        known = {name: figure.higher_is_better for name, figure in self._trivial.items()}
        directions = {judged_name(self._config): quality.higher_is_better} if quality is not None else known
        named = {name: higher for name, higher in directions.items() if name in found}
        if named:
            self._adviser.figures(self._scores.history, named)

    def _resume(self, trainer: Trainer) -> None:
        self._checkpointer.sweep()
        state = self._checkpointer.latest(lambda text: self._emit(NoticeEvent(level="warning", text=text)))
        if state is None:
            return
        self._compare(parse_json(RunConfig, state["config"], "checkpoint"))
        for change in self._learned.changes:
            self._emit(NoticeEvent(level="warning", text=f"going on with other data than the checkpoint's: {change}"))
        self._load(trainer, state)
        self._journal.load_state_dict(state["log"])
        self._resumed_from = trainer.samples
        self._emit(NoticeEvent(text=f"resumed at {trainer.samples:,} samples from {self._checkpointer.directory}"))

    def _load(self, trainer: Trainer, state: dict[str, Any]) -> None:
        """Raises ConfigError for a checkpoint of another model, which other data may have led to."""
        try:
            trainer.load_state_dict(state)
        except (RuntimeError, ValueError, KeyError) as error:
            if not self._learned.changes:
                raise
            raise ConfigError(
                f"{self._out}: the checkpoint does not fit what the workload makes of the new data "
                f"({one_line(error)}); start the run anew beside it with --fresh"
            ) from error

    def _compare(self, saved: RunConfig) -> None:
        """Raises ConfigError when the folder holds another run; tells which settings have changed."""
        if other := self._config.another_run(saved, self._learned.same):
            raise ConfigError(
                f"{self._out}: holds checkpoints of another run ({other}); give this run a folder of its own with --out"
            )
        before, now = saved.model_dump(mode="json"), self._config.model_dump(mode="json")
        before["options"] |= {name: now["options"].get(name) for name in self._learned.same}
        changed = [key for key in now if before[key] != now[key]]
        if changed:
            text = f"resuming with other settings than the checkpoint's: {', '.join(changed)}"
            self._emit(NoticeEvent(level="warning", text=text))

    def _result(self, trainer: Trainer, goal: int) -> TrainResult:
        early = self._best is not None and bool(self._best.ended) and trainer.stop_reason == self._best.ended
        finished = early or trainer.samples >= goal
        done = "the horizon" if goal == self._config.horizon_samples else "--max-samples"
        measurement = self._journal.record.measurement(
            self._config.effective_batch_size,
            trainer.rank.largest(self._memory.read()),
            most_warmup=FIRST_STEPS + buffered_steps(self._config),
            round_steps=round_steps(self._config),
            reference_s=self._reference.seconds,
            phases_s=self._phases.seconds(),
            parameters=trainer.parameter_count,
            flops_per_sample=trainer.flops_per_sample,
        )
        return TrainResult(
            samples=trainer.samples,
            step=trainer.steps,
            finished=finished,
            reason=f"reached {done}" if trainer.samples >= goal else trainer.stop_reason or "stopped",
            resumed_from=self._resumed_from,
            elapsed_s=time.monotonic() - self._began,
            epoch_samples=len(self._workload.dataset("train")),
            measurement=measurement,
            metrics=self._scores.metrics,
            trivial=self._trivial,
            best=self._best.best if self._best is not None else {},
            skipped_steps=self._journal.finite.skipped,
            not_finite_steps=self._journal.finite.not_finite,
        )

    def reached(self) -> dict[str, float]:
        """Where a run that failed had come to; empty before it was built."""
        return {SAMPLES_REACHED: float(self._trainer.samples)} if self._trainer is not None else {}

    def rescue(self, error: Exception, outcome: Outcome) -> str:
        """After a failure: keep what can be kept, and say where the same command would go on."""
        self._keeper.settle()
        trainer = self._trainer
        worth_saving = outcome.is_oom or stopping.asked() is not None
        if trainer is not None and worth_saving and not trainer.updating and trainer.samples > self._resumed_from:
            release(error)
            trainer.optimizer.zero_grad(set_to_none=True)
            try:
                self._keeper.save(trainer)
            except (TunerError, RuntimeError, MemoryError) as second:
                self._emit(NoticeEvent(level="warning", text=f"no last checkpoint: {second}"))
        kept = self._checkpointer.all()
        advice = ADVICE.get(outcome, "")
        if isinstance(error, ConfigError | CheckpointError):
            return advice.strip()
        return (f"The checkpoint {kept[0].name} is kept." if kept else "There is no checkpoint yet.") + advice

    def close(self) -> None:
        self._stall.close()
        self._journal.close()
        self._keeper.settle()
        if self._trainer is not None:
            self._trainer.close()
        self._lock.release()
