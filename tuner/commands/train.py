"""`tuner train`: the parent of a production run. It spawns the worker, shows its progress, alone writes the store,
and at the end holds the promise against what was reached."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.commands import console as speak
from tuner.commands import setup
from tuner.commands.train_progress import RunProgress, introduce
from tuner.commands.train_verdict import judge, quality, verdict
from tuner.commands.train_words import TrainWords, check_words
from tuner.contract.config import RunConfig
from tuner.contract.errors import ConfigError, JobFailed, Stopped
from tuner.contract.probe import ProbeKind, ProbeLimits, ProbeReply, ProbeRequest, Stage, TrainPlan
from tuner.contract.production import RunStatus
from tuner.contract.result import TrainResultJson, plain_json
from tuner.contract.tuned import TunedConfig

if TYPE_CHECKING:
    from rich.console import Console

    from tuner.probe.runner import SubprocessRunner


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
        introduce(tuned, goal(tuned.config, words), out, console)
        study = tuned.provenance.study if tuned.provenance else None
        recorded = store.add_run(tuned.config, str(out), study=study, promise=tuned.promise)
        with RunProgress(console, goal(tuned.config, words)) as progress:
            reply = runner.run(as_request(tuned.config, words, out), progress.listen)
        result = judge(tuned, reply, recorded.id, out)
        store.finish_run(recorded.id, status(reply), reply.train_result)
    finally:
        runner.close()
    finish(reply, result, tuned, words, console, as_json=as_json)


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
