"""`tuner train`: the parent of a production run. It spawns the worker, shows its progress, alone writes the store,
and at the end holds the promise against what was reached."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.commands import console as speak
from tuner.commands import setup
from tuner.commands.encodings import written_down
from tuner.commands.ranks import spread_tuned
from tuner.commands.run_state import close_status, has_checkpoint, marked
from tuner.commands.train_confirm import Settled, settle
from tuner.commands.train_fallback import advice, gone_on, next_leaner
from tuner.commands.train_progress import RunProgress, introduce
from tuner.commands.train_verdict import judge, quality, verdict
from tuner.commands.train_words import TrainWords, check_words
from tuner.commands.typed import from_anywhere
from tuner.contract.config import RunConfig
from tuner.contract.documents import load_document, read_file
from tuner.contract.errors import ConfigError, JobFailed, Stopped, StoreError
from tuner.contract.measurement import Outcome
from tuner.contract.probe import STOPPED_EARLY, ProbeKind, ProbeLimits, ProbeReply, ProbeRequest, Stage, TrainPlan
from tuner.contract.production import CONFIG_FILE, RunStatus
from tuner.contract.result import TrainResultJson, plain_json
from tuner.contract.trust import Trust
from tuner.contract.tuned import TunedConfig
from tuner.run_lock import RunLock

if TYPE_CHECKING:
    from rich.console import Console

    from tuner.probe.runner import SubprocessRunner
    from tuner.store.store import StudyStore


def run(words: TrainWords, *, as_json: bool) -> None:
    """The whole command. Raises Stopped (75) when stopped before its end, JobFailed (3) when the job failed."""
    from tuner.store.store import StudyStore

    check_words(words)
    console = speak.make_console(as_json=as_json)
    given = from_file(words.config, words.trust) if words.config else None
    store = StudyStore.open(setup.storage_url(words.storage))
    ranks = words.nproc or (given.config.world_size if given else 1)
    isolation = "fresh" if ranks > 1 else words.isolation  # several ranks start through torchrun
    runner = setup.make_runner(isolation, words.trust)
    try:
        tuned = given or baseline_of(words, runner)
        out = words.out or Path("runs") / f"{setup.short_name(tuned.config.workload)}-{tuned.config.digest()}"
        make_folder(out)
        check_folder(out, tuned.config)
        tuned, said = spread_tuned(tuned, words.nproc)
        if said:
            console.print(said)
        settled = gone_on(settle(tuned, words, out, runner, console), out, console)
        began = time.monotonic()
        while True:
            left = words.after(time.monotonic() - began)
            reply, result, unnoted = attempt(settled, left, words.again(out), out, store, runner, console)
            leaner = next_leaner(settled, reply.points[0], out, console) if words.fallback else None
            if leaner is None:
                break
            settled = leaner
    finally:
        runner.close()
    finish(reply, result, settled, words, out, console, as_json=as_json)
    if unnoted is not None:
        raise type(unnoted)(f"the run has ended well, but {unnoted}; to have it noted: {words.again(out)}")


def attempt(
    settled: Settled,
    words: TrainWords,
    again: str,
    out: Path,
    store: StudyStore,
    runner: SubprocessRunner,
    console: Console,
) -> tuple[ProbeReply, TrainResultJson | None, StoreError | None]:
    """One configuration's part of the run, from the folder's newest checkpoint on, noted in the store; what came of it,
    and why its end could not be noted."""
    tuned = settled.tuned
    asked = as_request(tuned.config, words, out)
    runner.admit(asked)
    introduce(tuned, goal(tuned.config, words), out, console)
    study = tuned.provenance.study if tuned.provenance else None
    recorded = store.add_run(tuned.config, written_down(out, "--out"), study=study, promise=tuned.promise)
    request = introduced(asked, settled, recorded.id, from_anywhere(again))
    with marked(out, recorded.id):
        with RunProgress(console, goal(tuned.config, words)) as progress:
            reply = runner.run(request, progress.listen)
        close_status(out, recorded.id, reply)
        result = judge(tuned, reply, recorded.id, out)
        unnoted = noted(store, recorded.id, reply)
    if unnoted is not None:
        console.print(f"  warning: {unnoted}", style="yellow")
    led_here = {"confirmed": settled.confirmed, "fallbacks": settled.fallbacks}
    return reply, result.model_copy(update=led_here) if result is not None else None, unnoted


def noted(store: StudyStore, run_id: str, reply: ProbeReply) -> StoreError | None:
    """What hours of training came to is told even where the store is out of reach by then."""
    try:
        store.finish_run(run_id, status(reply), reply.train_result)
    except StoreError as error:
        return error
    return None


def from_file(path: Path, trust: Trust) -> TunedConfig:
    """A file may name registered workloads; code of its own choosing only when the user says so."""
    from tuner.export.tuned import load
    from tuner.registry import check_name

    tuned = load(path)
    trust.check(tuned.config.workload, f"{path}: workload")
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


def check_folder(out: Path, config: RunConfig) -> None:
    """What the worker would find out at its start, before anything is measured for this run. Raises ConfigError for a
    folder that cannot be written, that another process writes, or that holds another run."""
    with RunLock(out):
        saved = None
        with contextlib.suppress(ConfigError):
            saved = load_document(RunConfig, read_file(out / CONFIG_FILE), CONFIG_FILE)
        if saved is not None and has_checkpoint(out) and (other := config.another_run(saved)):
            raise ConfigError(f"--out: {out} holds checkpoints of another run ({other}); give this run its own")


def goal(config: RunConfig, words: TrainWords) -> int:
    return min(config.horizon_samples, words.max_samples or config.horizon_samples)


def as_request(config: RunConfig, words: TrainWords, out: Path) -> ProbeRequest:
    plan = TrainPlan(
        out_dir=written_down(out, "--out"),
        max_samples=words.max_samples,
        max_seconds=words.max_seconds,
        background_checkpoints=words.background_checkpoints,
        tensorboard=words.tensorboard,
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


def introduced(request: ProbeRequest, settled: Settled, run_id: str, command: str) -> ProbeRequest:
    """The request with what the run's folder is to say of it."""
    assert request.train is not None
    told = {"promise": settled.tuned.promise, "expected": settled.expected, "run_id": run_id, "command": command}
    return request.model_copy(update={"train": request.train.model_copy(update=told)})


def status(reply: ProbeReply) -> RunStatus:
    if reply.train_result is None:
        return RunStatus.STOPPED if reply.points[0].message == STOPPED_EARLY else RunStatus.FAILED
    return RunStatus.FINISHED if reply.train_result.finished else RunStatus.STOPPED


def finish(
    reply: ProbeReply,
    result: TrainResultJson | None,
    settled: Settled,
    words: TrainWords,
    out: Path,
    console: Console,
    *,
    as_json: bool,
) -> None:
    """Say how it ended, in words, JSON, and exit code."""
    if result is None:
        point = reply.points[0]
        if point.message == STOPPED_EARLY:
            raise Stopped(f"stopped before the training had begun; go on with: {words.again(out)}")
        if point.outcome is Outcome.BAD_INPUT:
            raise setup.failed_setup(settled.tuned.config.workload, point.message, point.detail)
        further = advice(settled, point, words, out) + (f"\n{point.detail.rstrip()}" if point.detail else "")
        raise JobFailed(f"training ended with {point.outcome.value}: {point.message}{further}")
    if as_json:
        speak.emit_json(plain_json(result))
    for line in (*verdict(result, settled.tuned.promise), *quality(result, settled.tuned.config)):
        console.print(line)
    if not result.finished:
        raise Stopped(f"{result.reason}; go on with: {words.again(out)}")
