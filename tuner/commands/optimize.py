"""`tuner optimize`: words -> StudySpec -> the search -> the decision -> best.<gpu>.yaml and the answer."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tuner import stopping
from tuner.commands import answer, same_data, setup, turns
from tuner.commands import console as speak
from tuner.commands.places import check_file
from tuner.commands.ranks import spread
from tuner.commands.setup import Job, JobWords
from tuner.commands.shipping import best_path, write_best
from tuner.commands.typed import OPTION, retyped
from tuner.commands.words import choice, count, rechecked, seconds, size_bytes
from tuner.contract.base import NAME_PATTERN
from tuner.contract.config import CompileMode, RunConfig
from tuner.contract.errors import ConfigError, JobFailed, StoreError
from tuner.contract.gpu import AUTO, DeviceInfo, GpuProfile, gpu_profile
from tuner.contract.measurement import Outcome
from tuner.contract.probe import ProbeKind, ProbeRequest, ProbeRow
from tuner.contract.result import AaResult, OptimizeResult, SideResult, plain_json
from tuner.contract.space import Dropped, Knob, SearchSpace, knob_value
from tuner.contract.study import MEMORY_MARGIN, PARETO_SUFFIX, LrSpec, Objective, SamplerName, StudySpec
from tuner.contract.trust import Trust
from tuner.contract.tuned import Decision, Promise, Side
from tuner.export.tuned import BEGINNINGS, origin

if TYPE_CHECKING:
    from rich.console import Console

    from tuner.probe.runner import SubprocessRunner
    from tuner.store.store import StudyStore

AA_SUFFIX = "-aa"
MOST_LETTERS = 128
"""Of a study's name."""
MOST_SAMPLES = 1 << 30
"""In one optimizer step."""
MOST_LISTED = 4096
"""Divisors up to here are named."""


@dataclass(frozen=True)
class SearchWords:
    """The search as typed."""

    gpu: str = AUTO
    storage: str | None = None
    study: str | None = None
    fresh: bool = False
    accept_new_data: bool = False
    study_file: Path | None = field(default=None, metadata={OPTION: "spec"})
    budget: str | None = None
    probes: int | None = None
    sampler: str = "staged"
    objective: str = "time"
    effective_batch: str = "keep"
    micro_batch: int | None = None
    nproc: int | None = None
    memory_cap: str | None = None
    tune_lr: bool = False
    out: Path | None = None
    seed: int = 0
    aa: bool = False


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
    stopping.listen()
    timing = Timing()
    runner = setup.make_runner(words.isolation, Trust.of(words.workload))
    held = ExitStack()
    try:
        with answer.Farewell(console, retyped("optimize", words, search, fresh=search.fresh or None)) as farewell:
            stopping.ends_hard(
                "the probe that was running", lambda: f"Finished probes are stored; go on with: {farewell.command}"
            )
            _run(words, search, runner, console, timing, farewell, held, as_json=as_json)
    finally:
        runner.close()
        held.close()


def _run(
    words: JobWords,
    search: SearchWords,
    runner: SubprocessRunner,
    console: Console,
    timing: Timing,
    farewell: answer.Farewell,
    held: ExitStack,
    *,
    as_json: bool,
) -> None:
    """`held` gets what nobody else may use until all is done."""
    from tuner.commands.pareto import write_pareto
    from tuner.commands.study_loop import StudyLoop
    from tuner.probe.aa import BaselineRunner
    from tuner.search.selection import promise, select
    from tuner.store.store import StudyStore

    out = best_path(words.workload, search.out, search.gpu, aa=search.aa)
    if out is not None:
        check_file(out, BEGINNINGS)
    url = setup.storage_url(search.storage)
    store = StudyStore.open(url)
    store.deliver_spooled()
    job = setup.understand(words, runner, search.study_file, search.gpu)
    ours = [out] if out is not None else []
    data = same_data.fingerprints(job.options, console, ours)
    spec = build_spec(words, search, job).model_copy(update={"data": data})
    runner.admit(request_of(spec))
    if held.enter_context(turns.device(turns.optimizing(spec), spec.baseline.world_size, console, wait=words.wait)):
        job = setup.understand(words, runner, search.study_file, search.gpu)  # another one's memory was not free
        spec = build_spec(words, search, job).model_copy(update={"data": data})
    spec = open_study(store, spec, search)
    held.enter_context(turns.study(url, spec, console, wait=words.wait))
    timing.add("setup", time.monotonic() - timing.began)
    farewell.command = retyped("optimize", words, search, study=spec.name)
    answer.introduce(spec, job, console)
    timing.add("prepare", setup.prepare(job, words.workload, runner, answer.Preparing(console)))
    measuring = same_data.MovedData(runner, spec)
    loop = StudyLoop(spec, store, BaselineRunner(measuring, spec.baseline) if spec.aa else measuring, url, console)
    loop.run()
    if not search.accept_new_data:
        same_data.check_unchanged(spec, job.options, console, ours)
    rows = store.rows(spec.name)
    decision = select(rows, spec)
    promised = promise(rows, spec, decision)
    path, trouble = write_best(out, spec, decision, promised, rows, console)
    result = as_result(spec, decision, promised, rows, path, store.shown_url, timing.finish(rows))
    try:
        store.save_decision(spec.name, decision, result.model_dump(mode="json"))
    except StoreError as error:
        kept = f"; the decision is written to {path}, and the same command stores it" if path else ""
        raise type(error)(f"{error}{kept}") from None
    if as_json:
        speak.emit_json(plain_json(result))
    answer.tell(console, spec, decision, promised, result, storage=search.storage, isolation=words.isolation)
    loop.note(decision)  # beside the answer, and after it: what may be in the way here must not keep it back
    if not spec.aa:
        write_pareto(url, spec, rows)
    if trouble:
        raise JobFailed(trouble)
    if decision.kind == "failed":
        refuse_bad_input(words.workload, rows)
        raise JobFailed(decision.reason)
    if result.aa is not None and result.aa.false_gain:
        raise JobFailed(
            "--aa: a gain was found where nothing differs; gains found on this machine as it is now are not to be "
            "trusted. Make it quieter, or ask for more pairs (gate: {min_pairs: ...} in the study file)"
        )


def refuse_bad_input(workload: str, rows: Sequence[ProbeRow]) -> None:
    """Raises WorkloadError when what ended the study is in the user's data: nothing was wrong with the search."""
    last = rows[-1] if rows else None
    if last is not None and last.outcome is Outcome.BAD_INPUT:
        raise setup.failed_setup(workload, last.message, "")


def request_of(spec: StudySpec) -> ProbeRequest:
    """What the search begins with: refused before anything is stored where this machine cannot run it."""
    return ProbeRequest(id="baseline", kind=ProbeKind.END_TO_END, workload=spec.workload, points=(spec.baseline,))


def check(search: SearchWords) -> None:
    """Refuse what can be refused before anything is started."""
    if search.gpu != AUTO:
        gpu_profile(search.gpu)
    choice(SamplerName, search.sampler, "--sampler")
    choice(Objective, search.objective, "--objective")
    check_name(search)
    if search.micro_batch is not None and not 1 <= search.micro_batch <= MOST_SAMPLES:
        raise ConfigError(f"--micro-batch: a number from 1 to {MOST_SAMPLES:,} is needed (got {search.micro_batch})")
    if search.effective_batch not in ("keep", "free") and count(search.effective_batch, MOST_SAMPLES) is None:
        raise ConfigError(
            f"--effective-batch: keep, free, or a number from 1 to {MOST_SAMPLES:,} is expected "
            f"(got {search.effective_batch[:80]!r})"
        )
    if search.out is not None:
        check_file(search.out, BEGINNINGS)
    if search.budget is not None:
        seconds(search.budget, "--budget")
    if search.memory_cap is not None:
        size_bytes(search.memory_cap, "--memory-cap")


def check_name(search: SearchWords) -> None:
    """What the store keeps beside a study has a name of its own; an A/A study must not be taken for another."""
    name = search.study or ""
    if search.study is not None and not re.fullmatch(NAME_PATTERN, name):
        raise ConfigError(f"--study: 1 to 128 letters, digits, `.`, `_` and `-` are expected (got {name[:160]!r})")
    if name.endswith(PARETO_SUFFIX):
        raise ConfigError(f"--study {name}: names ending in {PARETO_SUFFIX} are the store's own; choose another")
    if name.endswith(AA_SUFFIX) and not search.aa:
        raise ConfigError(f"--study {name}: names ending in {AA_SUFFIX} are for A/A runs; add --aa, or choose another")
    if search.aa and search.effective_batch == "free":
        raise ConfigError("--effective-batch free: an A/A run keeps the baseline's effective batch; leave it out")


def check_objective(objective: Objective, device: DeviceInfo) -> None:
    """Refuse an objective that nothing here can measure."""
    if objective is Objective.ENERGY and device.power_reading is None:
        raise ConfigError(
            f"--objective energy: nothing tells the power of {device.place}; a GPU with a power reading in NVML is "
            "needed (`nvidia-smi` shows watts). Use --objective time, throughput or memory here"
        )


def study_name(words: JobWords, search: SearchWords, preset: str) -> str:
    ranks = f"-x{search.nproc}" if (search.nproc or 1) > 1 else ""
    made = f"{setup.short_name(words.workload)}-{preset or 'default'}-{search.gpu}{ranks}"
    name = search.study or re.sub(r"[^A-Za-z0-9._-]", "_", made)
    suffix = AA_SUFFIX if search.aa and not name.endswith(AA_SUFFIX) else ""
    return name[: MOST_LETTERS - len(suffix)] + suffix


def build_spec(words: JobWords, search: SearchWords, job: Job) -> StudySpec:
    """The study's specification: target limits, this machine's limits, the file, the options typed over it."""
    device = job.description.device
    if device.problem:
        raise ConfigError(f"this machine's GPU cannot be used: {device.problem} {device.advice or ''}".rstrip())
    objective = choice(Objective, search.objective, "--objective")
    check_objective(objective, device)
    target = job.target
    baseline = fitted_baseline(job.baseline, search, device)
    effective = None if search.effective_batch == "free" else baseline.effective_batch_size
    space, dropped = job.file.space.restrict(target, device, baseline, effective)
    cap = memory_cap(search, target, device)
    if cap is not None and device.kind == "cpu":
        space, starved = without_compiling(space, baseline)
        dropped = (*dropped, *starved)
    check_baseline(baseline, target)
    check_levers(space, baseline)
    if search.tune_lr:
        check_rates(space, baseline, job.file.lr)
    return StudySpec(
        name=study_name(words, search, job.info.preset),
        workload=words.workload,
        options=job.options,
        target=target,
        device=device,
        baseline=baseline,
        space=space,
        dropped=dropped,
        effective_batch=effective,
        batch_coupled=job.info.batch_coupled,
        memory_budget_bytes=under_cap(memory_budget(target, device, baseline.world_size), cap, device),
        memory_cap_bytes=cap,
        objective=objective,
        sampler=choice(SamplerName, search.sampler, "--sampler"),
        budget_s=seconds(search.budget, "--budget") if search.budget else job.file.budget_s,
        max_probes=search.probes,
        measure=job.file.measure,
        gate=job.file.gate,
        lr=job.file.lr.model_copy(update={"tune": search.tune_lr}),
        quality=job.file.quality,
        targets=job.file.targets,
        tier=setup.tier_text(job),
        aa=search.aa,
        seed=search.seed,
    )


def without_compiling(space: SearchSpace, baseline: RunConfig) -> tuple[SearchSpace, tuple[Dropped, ...]]:
    """`space` without the compile modes the baseline does not use itself: a cap on host memory holds for the compiler
    too, whose threads and processes then cannot start (seen: one probe that computed for 12 minutes)."""
    gone = [mode for mode in space.compile if mode not in (CompileMode.EAGER, baseline.compile)]
    why = "--memory-cap on a CPU leaves the compiler itself no memory"
    dropped = tuple(Dropped(knob=Knob.COMPILE, value=mode.value, reason=why, because="device") for mode in gone)
    kept = tuple(mode for mode in space.compile if mode not in gone)
    return space.model_copy(update={"compile": kept}), dropped


def fitted_baseline(baseline: RunConfig, search: SearchWords, device: DeviceInfo) -> RunConfig:
    """The baseline with `--micro-batch` and `--effective-batch` applied. Raises ConfigError with the arithmetic."""
    micro = search.micro_batch or baseline.micro_batch_size
    effective = count(search.effective_batch, MOST_SAMPLES) or baseline.effective_batch_size
    if effective % micro:
        divisors = ", ".join(str(n) for n in range(1, min(effective, MOST_LISTED) + 1) if effective % n == 0)
        raise ConfigError(
            f"--effective-batch {effective}: micro-batch size {micro} does not divide it "
            f"({effective} / {micro} leaves {effective % micro}); micro-batch sizes that do: {divisors}"
        )
    update: dict[str, object] = {
        "micro_batch_size": micro,
        "accumulation_steps": effective // micro,
        "world_size": 1,
        "seed": search.seed,
    }
    if device.kind == "cpu":
        update["loader"] = baseline.loader.model_copy(update={"pin_memory": False})
    ranks = search.nproc or baseline.world_size
    option = "--nproc" if search.nproc else "baseline.world_size:"
    fitted = rechecked(baseline.model_copy(update=update), "--effective-batch, --micro-batch")
    return spread(fitted, ranks, option)


def check_baseline(baseline: RunConfig, target: GpuProfile) -> None:
    """Refuse a baseline that the target cannot run at all, naming the knob."""
    for knob, legal in ((Knob.PRECISION, target.dtypes), (Knob.COMPILE, target.compile_modes)):
        value = knob_value(baseline, knob)
        if value not in legal:
            known = ", ".join(item.value for item in legal)
            raise ConfigError(f"baseline.{knob.value}: {target.label} cannot run {value.value}; it can run: {known}")


def check_levers(space: SearchSpace, baseline: RunConfig) -> None:
    """The model that others are compared with must be known: its own value of every option that is searched."""
    for name, values in space.options.items():
        if name not in baseline.options:
            listed = ", ".join(str(value) for value in values)
            raise ConfigError(
                f"space.options.{name}: which of {listed} the baseline's model has is not said; "
                f"write it into the study file (options: {{{name}: ...}}) or name it with -o {name}=..."
            )


def check_rates(space: SearchSpace, baseline: RunConfig, asked: LrSpec) -> None:
    """--tune-lr chooses among rates that somebody has listed."""
    own = baseline.optimizer.lr
    if not asked.enabled:
        raise ConfigError("--tune-lr: the study file turns the lr stage off (lr: {enabled: false}); take that line out")
    if not set(space.values(Knob.LR, baseline)) - {own}:
        listed = ", ".join(f"{rate:.1e}" for rate in (own / 3, own, 3 * own, 10 * own))
        raise ConfigError(
            f"--tune-lr: the study lists no rate besides the baseline's {own:g}; "
            f"write some into the study file (--spec), for example space: {{lr: [{listed}]}}"
        )


def memory_budget(target: GpuProfile, device: DeviceInfo, ranks: int = 1) -> int:
    """For one rank: the smaller of the target's memory and what is free here, less the margin. Ranks on a CPU share."""
    free = device.free_bytes if device.kind == "cuda" else device.free_bytes // ranks
    limits = [free, *([target.memory_bytes] if target.memory_bytes else [])]
    return int(min(limits) * MEMORY_MARGIN)


def under_cap(budget_bytes: int, cap_bytes: int | None, device: DeviceInfo) -> int:
    """On a GPU a hard cap bounds the budget too, as both are held against what the allocator takes. On a CPU a cap is
    on growth above the imported process, and `StudySpec.memory_used` counts that."""
    if cap_bytes is None or device.kind != "cuda":
        return budget_bytes
    return min(budget_bytes, int(cap_bytes * MEMORY_MARGIN))


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
        taken = set(store.study_names())
        number = 2
        while (name := f"{spec.name}-{number}") in taken:
            number += 1
        spec = spec.model_copy(update={"name": name}) if spec.name in taken else spec
    stored = store.study(spec.name)
    if stored is None:
        store.create_study(spec)
        return spec
    compared = same_data.check_study(stored, spec, accept=search.accept_new_data)
    spec = same_data.as_asked_before(spec, stored, compared)
    for name in (
        "workload",
        "options",
        "baseline",
        "space",
        "quality",
        "effective_batch",
        "memory_cap_bytes",
        "objective",
        "sampler",
        "aa",
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
    data = {"data": spec.data, "data_changes": (*stored.data_changes, *compared.changes)}
    if spec.data and data != {name: getattr(stored, name) for name in data}:
        stored = stored.model_copy(update=data)
        store.replace_spec(stored)
    changes = {
        "budget_s": spec.budget_s if search.budget else stored.budget_s,
        "max_probes": search.probes or stored.max_probes,
    }
    return stored.model_copy(update=changes)


def as_result(
    spec: StudySpec,
    decision: Decision,
    promised: Promise | None,
    rows: Sequence[ProbeRow],
    path: Path | None,
    url: str,
    spent: dict[str, float],
) -> OptimizeResult:
    from tuner.report.targets import target_results

    return OptimizeResult(
        **origin(spec, decision),
        decision=decision.kind,
        notes=decision.notes,
        probes=dict(Counter(row.outcome.value for row in rows)),
        dropped=spec.dropped,
        baseline=_side(decision.baseline),
        winner=_side(decision.winner),
        gain=decision.gain,
        speedup=decision.speedup,
        objective=spec.objective,
        break_even_samples=promised.break_even_samples if promised is not None else None,
        aa=aa_result(decision) if spec.aa else None,
        targets=target_results(spec, rows, decision),
        config_path=str(path) if path else None,
        storage=url,
        seconds=spent,
    )


def aa_result(decision: Decision) -> AaResult:
    return AaResult(false_gain=decision.kind == "winner", search_maximum=decision.search_maximum)


def _side(side: Side | None) -> SideResult | None:
    if side is None:
        return None
    return SideResult(config=side.config, samples_per_s=side.samples_per_s, peak_bytes=side.peak_bytes)
