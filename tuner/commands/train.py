"""`tuner train`: the parent of a production run. It spawns the worker, shows its progress, alone writes the store,
and at the end holds the promise against what was reached."""

from __future__ import annotations

import contextlib
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from tuner import stopping
from tuner.commands import console as speak
from tuner.commands import same_data, setup, turns
from tuner.commands.encodings import written_down
from tuner.commands.places import check_folder, make_folder, refuse_foreign
from tuner.commands.ranks import spread_tuned
from tuner.commands.run_state import close_status, kept_words, marked, with_kept
from tuner.commands.train_confirm import Settled, settle
from tuner.commands.train_fallback import advice, gone_on, next_leaner
from tuner.commands.train_progress import RunProgress, introduce
from tuner.commands.train_verdict import judge, quality, verdict
from tuner.commands.train_words import TrainWords, check_words
from tuner.commands.typed import from_anywhere
from tuner.contract.config import RunConfig
from tuner.contract.documents import load_document, load_json, read_file
from tuner.contract.errors import ConfigError, JobFailed, Stopped, StoreError
from tuner.contract.fingerprint import DATA_FILE, MOST_KEPT, Fingerprint, RunData, compare
from tuner.contract.measurement import Outcome
from tuner.contract.own_files import newest_checkpoint, refuse_links
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
    stopping.listen()
    if words.out is not None:
        check_folder(words.out)
    console = speak.make_console(as_json=as_json)
    given = from_file(words.config, words.trust) if words.config else None
    store = StudyStore.open(setup.storage_url(words.storage))
    ranks = words.nproc or (given.config.world_size if given else 1)
    isolation = "fresh" if ranks > 1 else words.isolation  # several ranks start through torchrun
    runner = setup.make_runner(isolation, words.trust)
    held = ExitStack()
    try:
        tuned = given or baseline_of(words, runner)
        out = words.out or Path("runs") / f"{setup.short_name(tuned.config.workload)}-{tuned.config.digest()}"
        out = same_data.fresh_folder(out) if words.fresh else out
        make_folder(out)
        refuse_links(out)
        refuse_foreign(out)
        stopping.ends_hard("what was trained since the newest checkpoint", lambda: kept_words(out, words.again(out)))
        data = learns_from(tuned, words, out, console)
        check_run_folder(out, tuned.config, data)
        tuned, said = spread_tuned(tuned, words.nproc)
        if said:
            console.print(said)
        who = turns.holder("train", tuned.config.workload, alone=False)
        held.enter_context(turns.device(who, tuned.config.world_size, console, wait=words.wait))
        settled = gone_on(settle(tuned, words, out, runner, console), out, console)
        began = time.monotonic()
        while True:
            left = words.after(time.monotonic() - began)
            reply, result, unnoted = attempt(settled, left, words.again(out), out, data, store, runner, console)
            leaner = next_leaner(settled, reply.points[0], out, console) if words.fallback else None
            if leaner is None:
                break
            settled = leaner
    finally:
        runner.close()
        held.close()
    finish(reply, result, settled, words, out, console, as_json=as_json)
    if unnoted is not None:
        raise type(unnoted)(f"the run has ended well, but {unnoted}; to have it noted: {words.again(out)}")


def attempt(
    settled: Settled,
    words: TrainWords,
    again: str,
    out: Path,
    data: tuple[Fingerprint, ...],
    store: StudyStore,
    runner: SubprocessRunner,
    console: Console,
) -> tuple[ProbeReply, TrainResultJson | None, StoreError | None]:
    """One configuration's part of the run, from the folder's newest checkpoint on, noted in the store; what came of it,
    and why its end could not be noted."""
    tuned = settled.tuned
    asked = as_request(tuned.config, words, out, data)
    runner.admit(asked)
    introduce(tuned, goal(tuned.config, words), out, console)
    study = tuned.provenance.study if tuned.provenance else None
    recorded = store.add_run(tuned.config, written_down(out, "--out"), study=study, promise=tuned.promise)
    request = introduced(asked, settled, recorded.id, from_anywhere(again))
    with marked(out, recorded.id):
        with RunProgress(console, goal(tuned.config, words)) as progress:
            reply = with_kept(runner.run(request, progress.listen), out)
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


def learns_from(tuned: TunedConfig, words: TrainWords, out: Path, console: Console) -> tuple[Fingerprint, ...]:
    """Its data, held against what the run in `out` has learned from and what it was tuned on. Raises ConfigError."""
    data = same_data.fingerprints(tuned.config.options, console, [out])
    same_data.check_run(out, tuned.config.options, data, accept=words.accept_new_data)
    same_data.tell_of_tuning(tuned, data, console)
    return data


def check_run_folder(out: Path, config: RunConfig, data: tuple[Fingerprint, ...]) -> None:
    """What the worker would find out at its start, before anything is measured for this run. Raises ConfigError for a
    folder that another process writes, or that holds another run."""
    with RunLock(out):
        saved = None
        with contextlib.suppress(ConfigError):
            saved = load_document(RunConfig, read_file(out / CONFIG_FILE), CONFIG_FILE)
        if saved is None or not newest_checkpoint(out):
            return
        kept = load_json(RunData, out / DATA_FILE, MOST_KEPT)
        same = compare(kept.data, data).same if kept is not None else frozenset()
        if other := config.another_run(saved, same):
            raise ConfigError(f"--out: {out} holds checkpoints of another run ({other}); give this run its own")


def goal(config: RunConfig, words: TrainWords) -> int:
    return min(config.horizon_samples, words.max_samples or config.horizon_samples)


def as_request(config: RunConfig, words: TrainWords, out: Path, data: tuple[Fingerprint, ...]) -> ProbeRequest:
    plan = TrainPlan(
        out_dir=written_down(out, "--out"),
        max_samples=words.max_samples,
        max_seconds=words.max_seconds,
        background_checkpoints=words.background_checkpoints,
        tensorboard=words.tensorboard,
        data=data,
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
        return RunStatus.STOPPED if reply.points[0].message.startswith(STOPPED_EARLY) else RunStatus.FAILED
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
        if point.message.startswith(STOPPED_EARLY):
            raise Stopped(f"{point.message}. {kept_words(out, words.again(out))}")
        if point.outcome is Outcome.BAD_INPUT:
            raise setup.failed_setup(settled.tuned.config.workload, point.message, point.detail)
        further = (f"\n{point.detail.rstrip()}" if point.detail else "") + advice(settled, point, words, out)
        raise JobFailed(f"training ended with {point.outcome.value}: {point.message}{further}")
    if as_json:
        speak.emit_json(plain_json(result))
    for line in (*verdict(result, settled.tuned.promise), *quality(result, settled.tuned.config)):
        console.print(line)
    if not result.finished:
        raise Stopped(f"{result.reason}; go on with: {words.again(out)}")
