"""`tuner optimize`: words -> StudySpec -> the search -> the decision -> best.<gpu>.yaml and the answer."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from tuner import __version__
from tuner.commands import console as speak
from tuner.commands import setup
from tuner.commands.setup import Job, JobWords
from tuner.commands.words import choice, seconds, size_bytes
from tuner.contract.config import RunConfig
from tuner.contract.errors import ConfigError, JobFailed, Stopped
from tuner.contract.gpu import AUTO, DeviceInfo, GpuProfile, detected_profile, gpu_profile
from tuner.contract.probe import Event, ProbeRow, ProgressEvent
from tuner.contract.result import OptimizeResult, SideResult, plain_json
from tuner.contract.space import Knob, knob_value
from tuner.contract.study import MEMORY_MARGIN, Objective, SamplerName, StudySpec
from tuner.contract.tuned import Decision, Promise, Provenance, Side, TunedConfig

if TYPE_CHECKING:
    from rich.console import Console

    from tuner.probe.runner import SubprocessRunner
    from tuner.store.store import StudyStore


@dataclass(frozen=True)
class SearchWords:
    """The search as typed."""

    gpu: str = AUTO
    storage: str | None = None
    study: str | None = None
    fresh: bool = False
    study_file: Path | None = None
    budget: str | None = None
    probes: int | None = None
    sampler: str = "staged"
    objective: str = "time"
    effective_batch: str = "keep"
    micro_batch: int | None = None
    memory_cap: str | None = None
    tune_lr: bool = False
    out: Path | None = None
    seed: int = 0


@dataclass
class Timing:
    """Wall seconds by phase of this command."""

    seconds: dict[str, float] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    def add(self, name: str, value: float) -> None:
        self.seconds[name] = round(self.seconds.get(name, 0.0) + value, 2)

    def finish(self, rows: Sequence[ProbeRow]) -> dict[str, float]:
        for row in rows:
            self.add(row.stage.value, row.seconds)
        self.seconds["total"] = round(time.monotonic() - self.began, 2)
        return self.seconds


def run(words: JobWords, search: SearchWords, *, as_json: bool) -> None:
    """The whole command. Raises TunerError; returns normally for a winner and for an honest `no gain`."""
    check(search)
    console = speak.make_console(as_json=as_json)
    signal.signal(signal.SIGTERM, _stopped)
    timing = Timing()
    runner = setup.make_runner(words.isolation)
    try:
        _run(words, search, runner, console, timing, as_json=as_json)
    except KeyboardInterrupt:
        console.print("\nstopped by Ctrl-C. Finished probes are stored; the same command goes on from here.")
        raise
    finally:
        runner.close()


def _run(
    words: JobWords, search: SearchWords, runner: SubprocessRunner, console: Console, timing: Timing, *, as_json: bool
) -> None:
    from tuner.commands.study_loop import StudyLoop
    from tuner.search.selection import promise, select
    from tuner.store.store import StudyStore

    url = setup.storage_url(search.storage)
    store = StudyStore.open(url)
    store.deliver_spooled()
    job = setup.understand(words, runner, search.study_file)
    spec = open_study(store, build_spec(words, search, job), search)
    timing.add("setup", time.monotonic() - timing.began)
    introduce(spec, job, console)
    timing.add("prepare", setup.prepare(job, words.workload, runner, _Preparing(console)))
    loop = StudyLoop(spec, store, runner, url, console)
    loop.run()
    rows = store.rows(spec.name)
    decision = select(rows, spec)
    promised = promise(rows, spec, decision)
    path = write_best(search, spec, decision, promised, rows)
    result = as_result(spec, decision, rows, path, store.shown_url, timing.finish(rows))
    store.save_decision(spec.name, decision, result.model_dump(mode="json"))
    loop.note(decision)
    if as_json:
        speak.emit_json(plain_json(result))
    tell(console, spec, decision, promised, result)
    if decision.kind == "failed":
        raise JobFailed(decision.reason)


def check(search: SearchWords) -> None:
    """Refuse what can be refused before anything is started."""
    if search.gpu != AUTO:
        gpu_profile(search.gpu)
    choice(SamplerName, search.sampler, "--sampler")
    choice(Objective, search.objective, "--objective")
    if search.micro_batch is not None and search.micro_batch < 1:
        raise ConfigError(f"--micro-batch: at least 1 sample is needed (got {search.micro_batch})")
    named = search.effective_batch in ("keep", "free")
    if not named and not (search.effective_batch.isdigit() and int(search.effective_batch)):
        raise ConfigError(f"--effective-batch: keep, free, or a number from 1 (got {search.effective_batch!r})")
    if search.budget is not None:
        seconds(search.budget, "--budget")
    if search.memory_cap is not None:
        size_bytes(search.memory_cap, "--memory-cap")


def build_spec(words: JobWords, search: SearchWords, job: Job) -> StudySpec:
    """The study's specification: target limits, this machine's limits, the file, the options typed over it."""
    device = job.description.device
    if device.problem:
        raise ConfigError(f"this machine's GPU cannot be used: {device.problem} {device.advice or ''}".rstrip())
    target = detected_profile(device) if search.gpu == AUTO else gpu_profile(search.gpu)
    baseline = fitted_baseline(job.baseline, search, device)
    effective = None if search.effective_batch == "free" else baseline.effective_batch_size
    space, dropped = job.file.space.restrict(target, device, baseline, effective)
    check_baseline(baseline, target)
    return StudySpec(
        name=search.study or f"{setup.short_name(words.workload)}-{job.info.preset or 'default'}-{search.gpu}",
        workload=words.workload,
        options=job.options,
        target=target,
        device=device,
        baseline=baseline,
        space=space,
        dropped=dropped,
        effective_batch=effective,
        batch_coupled=job.info.batch_coupled,
        memory_budget_bytes=memory_budget(target, device),
        memory_cap_bytes=memory_cap(search, target, device),
        objective=choice(Objective, search.objective, "--objective"),
        sampler=choice(SamplerName, search.sampler, "--sampler"),
        budget_s=seconds(search.budget, "--budget") if search.budget else job.file.budget_s,
        max_probes=search.probes,
        measure=job.file.measure,
        gate=job.file.gate,
        lr=job.file.lr.model_copy(update={"tune": search.tune_lr}),
        seed=search.seed,
    )


def fitted_baseline(baseline: RunConfig, search: SearchWords, device: DeviceInfo) -> RunConfig:
    """The baseline with `--micro-batch` and `--effective-batch` applied. Raises ConfigError with the arithmetic."""
    micro = search.micro_batch or baseline.micro_batch_size
    effective = int(search.effective_batch) if search.effective_batch.isdigit() else baseline.effective_batch_size
    if effective % micro:
        divisors = ", ".join(str(n) for n in range(1, effective + 1) if effective % n == 0)
        raise ConfigError(
            f"--effective-batch {effective}: micro-batch size {micro} does not divide it "
            f"({effective} / {micro} leaves {effective % micro}); micro-batch sizes that do: {divisors}"
        )
    update: dict[str, object] = {
        "micro_batch_size": micro,
        "accumulation_steps": effective // micro,
        "seed": search.seed,
    }
    if device.kind == "cpu":
        update["loader"] = baseline.loader.model_copy(update={"pin_memory": False})
    return baseline.model_copy(update=update)


def check_baseline(baseline: RunConfig, target: GpuProfile) -> None:
    """Refuse a baseline that the target cannot run at all, naming the knob."""
    for knob, legal in ((Knob.PRECISION, target.dtypes), (Knob.COMPILE, target.compile_modes)):
        value = knob_value(baseline, knob)
        if value not in legal:
            known = ", ".join(item.value for item in legal)
            raise ConfigError(f"baseline.{knob.value}: {target.label} cannot run {value.value}; it can run: {known}")


def memory_budget(target: GpuProfile, device: DeviceInfo) -> int:
    """The smaller of the target's memory and what is free here, less the margin."""
    limits = [device.free_bytes, *([target.memory_bytes] if target.memory_bytes else [])]
    return int(min(limits) * MEMORY_MARGIN)


def memory_cap(search: SearchWords, target: GpuProfile, device: DeviceInfo) -> int | None:
    """A hard limit for every probe: the one typed, or the target's when the card at hand is bigger."""
    if search.memory_cap is not None:
        return size_bytes(search.memory_cap, "--memory-cap")
    if device.kind == "cuda" and target.memory_bytes and target.memory_bytes < device.memory_bytes:
        return target.memory_bytes
    return None


def open_study(store: StudyStore, spec: StudySpec, search: SearchWords) -> StudySpec:
    """Create the study, or go on with the one of that name when it asks the same question."""
    if search.fresh:
        taken = {summary.name for summary in store.studies()}
        number = 2
        while (name := f"{spec.name}-{number}") in taken:
            number += 1
        spec = spec.model_copy(update={"name": name}) if spec.name in taken else spec
    stored = store.study(spec.name)
    if stored is None:
        store.create_study(spec)
        return spec
    for name in (
        "workload",
        "options",
        "baseline",
        "space",
        "effective_batch",
        "memory_cap_bytes",
        "objective",
        "sampler",
    ):
        if getattr(stored, name) != getattr(spec, name):
            raise ConfigError(
                f"--study {spec.name}: it is stored with another {name} "
                f"({getattr(stored, name)!s:.120}); name a new study with --study, or use --fresh"
            )
    if stored.device.name != spec.device.name or stored.target.name != spec.target.name:
        raise ConfigError(
            f"--study {spec.name}: it was measured on {stored.device.name} for {stored.target.name}; "
            f"this is {spec.device.name} for {spec.target.name}. Name a new study with --study, or use --fresh"
        )
    changes = {
        "budget_s": spec.budget_s if search.budget else stored.budget_s,
        "max_probes": search.probes or stored.max_probes,
    }
    return stored.model_copy(update=changes)


def introduce(spec: StudySpec, job: Job, console: Console) -> None:
    device = spec.device
    where = device.place if device.kind == "cuda" else f"CPU {device.place}"
    console.print(f"tuner {job.info.name}: {job.info.summary}", style="bold")
    if job.info.preset:
        console.print(f"preset {job.info.preset_note}")
    console.print(f"target {spec.target.label}, measured on {where}, torch {device.torch}")
    if spec.transferred:
        console.print(
            f"The target is not this machine: its limits hold (memory, dtypes, compile modes), "
            f"but every speed below is this machine's. Confirm on a real {spec.target.label} before you rely on it.",
            style="yellow",
        )
    for item in spec.dropped:
        console.print(f"  not tried: {item.knob.value} {item.value} - {item.reason}", style="dim")
    kept = "free" if spec.effective_batch is None else f"{spec.effective_batch} (kept)"
    console.print(
        f"baseline {spec.baseline.label}, effective batch {kept}, memory budget {speak.mib(spec.memory_budget_bytes)}"
        + (f", hard cap {speak.mib(spec.memory_cap_bytes)}" if spec.memory_cap_bytes else "")
        + f", budget {speak.clock(spec.budget_s)}, study {spec.name}\n"
    )


class _Preparing:
    """Progress of the data preparation: a line at the beginning, the middle and the end of each part."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown: tuple[str, int] | None = None

    def __call__(self, event: Event) -> None:
        if not isinstance(event, ProgressEvent) or not event.total:
            return
        mark = (event.text, 2 * event.done // event.total)
        if mark != self._shown:
            self._shown = mark
            self._console.print(f"  preparing: {event.text} {100 * event.done // event.total} %", style="dim")


def write_best(
    search: SearchWords, spec: StudySpec, decision: Decision, promised: Promise | None, rows: Sequence[ProbeRow]
) -> Path | None:
    """best.<gpu>.yaml, for a winner and for an honest no gain alike; nothing when the baseline itself failed."""
    from tuner.export.tuned import write

    if decision.kind == "failed" or decision.winner is None:
        return None
    path = search.out or Path("studies") / setup.short_name(spec.workload) / f"best.{search.gpu}.yaml"
    write(path, tuned_config(spec, decision, promised, rows))
    return path


def tuned_config(
    spec: StudySpec, decision: Decision, promised: Promise | None, rows: Sequence[ProbeRow]
) -> TunedConfig:
    assert decision.winner is not None
    assert decision.kind != "failed"
    environment = next(row.environment for row in rows if row.environment is not None)
    provenance = Provenance(
        study=spec.name,
        target=spec.target.label,
        measured_on=spec.device.place,
        transfer=spec.transfer,
        decision=decision.kind,
        reason=decision.reason,
        probes=len(rows),
        baseline_digest=spec.baseline.digest(),
        lr_note="; ".join(note for note in decision.notes if note.startswith("lr")),
        environment=environment,
        tuner=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return TunedConfig(
        config=decision.winner.config, promise=promised, provenance=provenance, runner_ups=decision.runner_ups
    )


def as_result(
    spec: StudySpec, decision: Decision, rows: Sequence[ProbeRow], path: Path | None, url: str, spent: dict[str, float]
) -> OptimizeResult:
    return OptimizeResult(
        study=spec.name,
        target=spec.target.label,
        measured_on=spec.device.place,
        transfer=spec.transfer,
        decision=decision.kind,
        reason=decision.reason,
        notes=decision.notes,
        probes=dict(Counter(row.outcome.value for row in rows)),
        dropped=spec.dropped,
        baseline=_side(decision.baseline),
        winner=_side(decision.winner),
        gain=decision.gain,
        config_path=str(path) if path else None,
        storage=url,
        seconds=spent,
    )


def _side(side: Side | None) -> SideResult | None:
    if side is None:
        return None
    return SideResult(config=side.config, samples_per_s=side.samples_per_s, peak_bytes=side.peak_bytes)


def tell(
    console: Console, spec: StudySpec, decision: Decision, promised: Promise | None, result: OptimizeResult
) -> None:
    """The answer, for people."""
    console.print()
    titles = {"winner": "bold green", "no_gain": "bold", "failed": "bold red"}
    console.print(f"{decision.kind.replace('_', ' ')}  {decision.reason}", style=titles[decision.kind])
    for name, side in (("baseline", decision.baseline), ("shipped", decision.winner)):
        if side is not None:
            console.print(
                f"  {name:<9}{side.config.label:<44}{speak.rate(side.samples_per_s, ' samples/s'):>28}"
                f"   peak {speak.mib(side.peak_bytes):>10}   {side.processes} fresh processes"
            )
    if decision.gain is not None:
        console.print(f"  gain     {speak.gain(decision.gain)}, paired and interleaved")
    if promised is not None:
        pays = (
            f"; the tuning pays for itself after {promised.break_even_samples:,} samples"
            if promised.break_even_samples is not None
            else ""
        )
        console.print(f"  promise  {promised.hours:.2f} h to {spec.baseline.horizon_samples:,} samples{pays}")
    for note in decision.notes:
        console.print(f"  note     {note}")
    if result.config_path:
        console.print(f"\nwritten  {result.config_path}")
        console.print(f"train    tuner train --config {result.config_path}")
        console.print(f"look     tuner report {spec.name}    tuner dashboard")
    console.print(
        f"took     {speak.clock(result.seconds['total'])}, {sum(result.probes.values())} measured points", style="dim"
    )


def _stopped(_signum: int, _frame: FrameType | None) -> NoReturn:
    raise Stopped("stopped by SIGTERM; finished probes are stored, the same command goes on")
