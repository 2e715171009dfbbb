"""`tuner train`: the parent of a production run. It spawns the worker, shows its progress, alone writes the store,
and at the end holds the promise against what was reached."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from tuner.commands import console as speak
from tuner.commands import setup
from tuner.commands.setup import JobWords
from tuner.contract.config import RunConfig
from tuner.contract.errors import ConfigError, JobFailed, Stopped
from tuner.contract.measurement import Interval
from tuner.contract.probe import (
    Event,
    NoticeEvent,
    PhaseEvent,
    ProbeKind,
    ProbeLimits,
    ProbeReply,
    ProbeRequest,
    ProgressEvent,
    Stage,
    TrainEvent,
    TrainPlan,
    TrainResult,
)
from tuner.contract.production import RunStatus
from tuner.contract.result import TrainResultJson, plain_json
from tuner.contract.statistics import drift, throughput
from tuner.contract.tuned import Promise, TunedConfig

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

    from tuner.probe.runner import SubprocessRunner


@dataclass(frozen=True)
class TrainWords:
    """The run as typed: by a file, or by a workload, whose baseline is then trained."""

    config: Path | None = None
    job: JobWords | None = None
    out: Path | None = None
    max_samples: int | None = None
    max_hours: float | None = None
    max_minutes: float | None = None
    storage: str | None = None
    allow_code: bool = False
    isolation: str = "forkserver"

    @property
    def max_seconds(self) -> float | None:
        if self.max_hours and self.max_minutes:
            raise ConfigError("--max-hours and --max-minutes: give one of them")
        return (self.max_hours or 0.0) * 3600 + (self.max_minutes or 0.0) * 60 or None

    @property
    def source(self) -> str:
        """The options that name the job, to be typed again."""
        if self.job is None:
            return f"--config {self.config}"
        words = ["--workload", self.job.workload]
        words += ["--preset", self.job.preset] if self.job.preset else []
        words += ["--data", str(self.job.data)] if self.job.data else []
        words += [word for option in self.job.options for word in ("-o", option)]
        return shlex.join(words)


def run(words: TrainWords, *, as_json: bool) -> None:
    """The whole command. Raises Stopped (75) when stopped before its end, JobFailed (3) when the job failed."""
    from tuner.store.store import StudyStore

    check_words(words)
    console = speak.make_console(as_json=as_json)
    given = from_file(words.config, words.allow_code) if words.config else None
    store = StudyStore.open(setup.storage_url(words.storage))
    runner = setup.make_runner(words.isolation)
    try:
        tuned = given or baseline_of(words, runner)
        out = words.out or Path("runs") / f"{setup.short_name(tuned.config.workload)}-{tuned.config.digest()}"
        make_folder(out)
        introduce(tuned, words, out, console)
        study = tuned.provenance.study if tuned.provenance else None
        recorded = store.add_run(tuned.config, str(out), study=study, promise=tuned.promise)
        with _Progress(console, goal(tuned.config, words)) as progress:
            reply = runner.run(as_request(tuned.config, words, out), progress.listen)
        result = judge(tuned, reply, recorded.id, out)
        store.finish_run(recorded.id, status(reply), reply.train_result)
    finally:
        runner.close()
    finish(reply, result, tuned, words, console, as_json=as_json)


def job_words(
    workload: str | None, preset: str | None, data: Path | None, options: tuple[str, ...], isolation: str
) -> JobWords | None:
    """None without a workload. Raises ConfigError for words that only mean something beside one."""
    if workload is not None:
        return JobWords(workload=workload, preset=preset, data=data, options=options, isolation=isolation)
    for option, value in (("--preset", preset), ("--data", data), ("--option", options)):
        if value:
            raise ConfigError(f"{option}: it belongs to --workload; a --config file holds its own options")
    return None


def check_words(words: TrainWords) -> None:
    """Raises ConfigError unless the job is named once."""
    if (words.config is None) == (words.job is None):
        raise ConfigError("train: name the job by --config FILE, or by --workload NAME (its baseline); one of the two")
    _ = words.max_seconds


def from_file(path: Path, allow_code: bool) -> TunedConfig:
    """A file may name registered workloads; code of its own choosing only when the user says so."""
    from tuner.export.tuned import load
    from tuner.registry import check_name

    tuned = load(path)
    if ":" in tuned.config.workload and not allow_code:
        raise ConfigError(
            f"{path}: workload: it names code to import ({tuned.config.workload}); "
            "if you trust this file, say so with --allow-code"
        )
    check_name(tuned.config.workload)
    return tuned


def baseline_of(words: TrainWords, runner: SubprocessRunner) -> TunedConfig:
    """What the workload's users run today, with the study file's tier and preset for this machine."""
    assert words.job is not None
    return TunedConfig(config=setup.understand(words.job, runner).baseline)


def make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: {out} cannot be made: {error.strerror}") from None


def goal(config: RunConfig, words: TrainWords) -> int:
    return min(config.horizon_samples, words.max_samples or config.horizon_samples)


def as_request(config: RunConfig, words: TrainWords, out: Path) -> ProbeRequest:
    plan = TrainPlan(
        out_dir=str(out.resolve()),
        max_samples=words.max_samples,
        max_seconds=words.max_seconds,
    )
    return ProbeRequest(
        id=f"train-{config.digest()}",
        kind=ProbeKind.TRAIN,
        stage=Stage.PRODUCTION,
        workload=config.workload,
        options=config.options,
        points=(config,),
        limits=ProbeLimits(deadline_s=1800.0),
        cache_dir=str(setup.cache_dir()),
        train=plan,
    )


def introduce(tuned: TunedConfig, words: TrainWords, out: Path, console: Console) -> None:
    config = tuned.config
    preset = config.options.get("preset")
    console.print(f"training {config.workload}" + (f", preset {preset}" if preset else "") + f": {config.label}")
    if preset == "tiny":
        console.print(
            "tiny is the rehearsal size: the same program with a small model, quick on a CPU; full is the real one."
        )
    until = goal(config, words)
    console.print(f"{until:,} samples at effective batch {config.effective_batch_size}, into {out}")
    if tuned.promise is not None:
        promise = tuned.promise
        console.print(
            f"promised {speak.rate(promise.samples_per_s, ' samples/s')}, peak {speak.mib(promise.peak_bytes)}, "
            f"{speak.clock(until / promise.samples_per_s.value)} of steps"
        )
    if tuned.provenance is not None and tuned.provenance.transfer == "unverified":
        console.print(
            f"chosen for {tuned.provenance.target} but measured on {tuned.provenance.measured_on}: "
            "the promise holds for that machine only",
            style="yellow",
        )


class _Progress:
    """The worker's events as a progress bar with ETA on a terminal, as lines in a log."""

    def __init__(self, console: Console, total: int) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = console
        self._total = total
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID = self._bar.add_task("starting", total=total, note="")
        self._next_line = 0.0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def listen(self, event: Event) -> None:
        if isinstance(event, TrainEvent):
            self._trained(event)
        elif isinstance(event, NoticeEvent):
            style = "yellow" if event.level == "warning" else "dim"
            self._console.print(f"  {event.text}", style=style)
        elif isinstance(event, PhaseEvent):
            self._bar.update(self._task, description=event.phase)
        elif isinstance(event, ProgressEvent) and event.total:
            self._bar.update(self._task, note=f"{event.text} {100 * event.done // event.total} %")

    def _trained(self, event: TrainEvent) -> None:
        loss = event.losses.get("total", math.nan)
        note = f"{event.samples_per_s:,.0f} samples/s  loss {loss:.4f}  peak {speak.mib(event.peak_bytes)}"
        self._bar.update(self._task, description="training", completed=event.samples, note=note)
        if not self._console.is_terminal and event.elapsed_s >= self._next_line:
            self._next_line = event.elapsed_s + 10.0
            left = (self._total - event.samples) / event.samples_per_s if event.samples_per_s > 0 else math.inf
            eta = speak.clock(left) if math.isfinite(left) else "?"
            self._console.print(f"  {event.samples:>10,} samples  step {event.step:>8,}  {note}  ETA {eta}")


def judge(tuned: TunedConfig, reply: ProbeReply, run_id: str, out: Path) -> TrainResultJson | None:
    """Promise against reality; None when the run gave no result."""
    result = reply.train_result
    if result is None:
        return None
    measured = throughput(result.measurement) if result.measurement.steady_step_s else None
    promise = tuned.promise
    moved = drift(result.measurement.reference_s, promise.reference_s) if promise else None
    peak = result.measurement.memory.gate_bytes
    return TrainResultJson(
        run=run_id,
        out_dir=str(out),
        samples=result.samples,
        finished=result.finished,
        reason=result.reason,
        resumed_from=result.resumed_from,
        elapsed_s=result.elapsed_s,
        step_s=result.measurement.samples_per_step / measured.value if measured else None,
        steps_per_epoch=result.epoch_samples / result.measurement.samples_per_step if result.epoch_samples else None,
        epochs_per_min=60 * measured.value / result.epoch_samples if measured and result.epoch_samples else None,
        samples_per_s=measured,
        promised_samples_per_s=promise.samples_per_s if promise else None,
        host_drift=moved,
        deviation=_deviation(measured, promise, 1.0),
        deviation_beyond_drift=_deviation(measured, promise, moved),
        peak_bytes=peak,
        promised_peak_bytes=promise.peak_bytes if promise else None,
        peak_deviation=peak / promise.peak_bytes - 1 if promise and promise.peak_bytes else None,
        losses=_last_losses(result),
        metrics=result.metrics,
        trivial=result.trivial,
        best=result.best,
    )


def _deviation(measured: Interval | None, promise: Promise | None, host: float | None) -> float | None:
    if measured is None or promise is None or host is None:
        return None
    return measured.value / promise.samples_per_s.value / host - 1


def _last_losses(result: TrainResult) -> dict[str, float]:
    return {
        name: _mean(values[-max(1, len(values) // 10) :])
        for name, values in result.measurement.losses.items()
        if values
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def status(reply: ProbeReply) -> RunStatus:
    if reply.train_result is None:
        return RunStatus.FAILED
    return RunStatus.FINISHED if reply.train_result.finished else RunStatus.STOPPED


def finish(
    reply: ProbeReply,
    result: TrainResultJson | None,
    tuned: TunedConfig,
    words: TrainWords,
    console: Console,
    *,
    as_json: bool,
) -> None:
    """Say how it ended, in words, JSON, and exit code."""
    if result is None:
        point = reply.points[0]
        detail = f"\n{point.detail.rstrip()}" if point.detail else ""
        raise JobFailed(f"training ended with {point.outcome.value}: {point.message}{detail}")
    if as_json:
        speak.emit_json(plain_json(result))
    for line in (*verdict(result, tuned.promise), *quality(result, tuned.config)):
        console.print(line)
    if not result.finished:
        raise Stopped(f"{result.reason}; go on with: tuner train {words.source} --out {shlex.quote(result.out_dir)}")


def verdict(result: TrainResultJson, promise: Promise | None) -> list[str]:
    """What was reached, beside what was promised."""
    head = f"\n{result.samples:,} samples ({result.reason}) in {speak.clock(result.elapsed_s)}"
    lines = [f"{head}; everything is in {result.out_dir}"]
    lines.append(f"  reached   {speak.rate(result.samples_per_s, ' samples/s')}, peak {speak.mib(result.peak_bytes)}")
    if result.step_s is not None and result.steps_per_epoch is not None and result.epochs_per_min is not None:
        lines.append(
            f"  steps     {1000 * result.step_s:.3g} ms each, {result.steps_per_epoch:,.0f} an epoch, "
            f"{result.epochs_per_min:.3g} epochs a minute"
        )
    if promise is None or result.deviation is None:
        return lines
    lines.append(f"  promised  {speak.rate(promise.samples_per_s, ' samples/s')}, peak {speak.mib(promise.peak_bytes)}")
    text = f"  deviation {100 * result.deviation:+.1f} % raw"
    if result.deviation_beyond_drift is not None and result.host_drift is not None:
        text += (
            f", {100 * result.deviation_beyond_drift:+.1f} % beyond the host's own drift "
            f"(it ran at {100 * result.host_drift:.1f} % of its speed at the time of the promise)"
        )
    judged = result.deviation if result.deviation_beyond_drift is None else result.deviation_beyond_drift
    lines.append(text + (": the promise is kept" if abs(judged) <= 0.03 else ": the promise is NOT kept (3 %)"))
    if result.peak_deviation is not None:
        lines.append(f"  peak      {100 * result.peak_deviation:+.1f} % of the promised peak")
    return lines


def quality(result: TrainResultJson, config: RunConfig) -> list[str]:
    """The metrics beside what they would be without learning, and the best evaluation of the run."""
    lines = [f"  quality   {_against(name, value, result)}" for name, value in result.metrics.items()]
    if config.quality is not None and result.best:
        samples = round(result.best.get("samples", 0))
        value = result.best.get("value", math.nan)
        lines.append(
            f"  best      {config.quality.metric} {value:.4g} at {samples:,} samples, kept in checkpoints/best"
        )
    return lines


def _against(name: str, value: float, result: TrainResultJson) -> str:
    trivial = result.trivial.get(name)
    if trivial is None:
        return f"{name} {value:.4g}"
    verdict = "better" if trivial.beaten_by(value) else "NOT better"
    return f"{name} {value:.4g} against {trivial.value:.4g} ({trivial.text}): {verdict}"
