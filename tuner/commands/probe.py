"""`tuner probe`: one configuration measured by hand. Nothing is stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.commands import console as speak
from tuner.commands import profile, setup, turns
from tuner.commands.answer import Remarks
from tuner.commands.encodings import written_down
from tuner.commands.places import make_folder
from tuner.commands.ranks import spread
from tuner.commands.setup import Job, JobWords
from tuner.commands.words import assignments, choice, rechecked, seconds, size_bytes
from tuner.contract.base import Scalar
from tuner.contract.config import RunConfig
from tuner.contract.equivalence import EQUIVALENT, EquivalenceReply, Figure, causes, equivalent, remarks
from tuner.contract.errors import ConfigError, JobFailed
from tuner.contract.measurement import Measurement, Outcome
from tuner.contract.probe import PointReply, ProbeKind, ProbeLimits, ProbeReply, ProbeRequest
from tuner.contract.result import plain_json
from tuner.contract.space import Knob, knob_value, with_knobs
from tuner.contract.statistics import throughput
from tuner.contract.trust import Trust

if TYPE_CHECKING:
    from rich.console import Console

BY_HAND = (
    ProbeKind.END_TO_END,
    ProbeKind.COMPUTE,
    ProbeKind.LOADER,
    ProbeKind.EQUIVALENCE,
    ProbeKind.TRACE,
    ProbeKind.LR,
    ProbeKind.NOISE,
    ProbeKind.PROFILE,
)
WORLD_SIZE = "world_size"
"""May be set like a knob, though the search never changes it."""


@dataclass(frozen=True)
class ProbeWords:
    """What to measure, as typed."""

    kind: ProbeKind
    changes: tuple[str, ...]
    seconds: str
    deadline: str
    memory_cap: str | None
    out: Path | None


def run(words: JobWords, asked: ProbeWords, *, as_json: bool) -> None:
    """The whole command. Raises JobFailed (3) when the probe's outcome is not ok."""
    folder = profile_folder(words, asked)
    knobs = known_knobs(assignments(asked.changes, "--set"))
    limits = ProbeLimits(
        measure_s=seconds(asked.seconds, "--seconds"),
        deadline_s=seconds(asked.deadline, "--deadline"),
        memory_bytes=size_bytes(asked.memory_cap, "--memory-cap") if asked.memory_cap else None,
    )
    console = speak.make_console(as_json=as_json)
    runner = setup.make_runner(words.isolation, Trust.of(words.workload))
    try:
        job = setup.understand(words, runner)
        config = changed(job.baseline, knobs)
        request = as_request(asked.kind, words, job, config, limits)
        placed = request.model_copy(update={"out_dir": written_down(folder, "--out") if folder else ""})
        with turns.device(turns.holder("probe", words.workload), config.world_size, console, wait=words.wait):
            setup.prepare(job, words.workload, runner, Remarks(console))
            reply = runner.run(placed, speak.Warnings(console).listen)
    finally:
        runner.close()
    answer(reply, asked.kind, config, console, as_json=as_json)
    if folder is not None:
        for line in profile.lines(reply.points[0].values, folder):
            console.print(line)


def asked_kind(kind: str | None, *, profile: bool) -> ProbeKind:
    """--kind, or --profile. Raises ConfigError."""
    if profile and kind not in (None, ProbeKind.PROFILE.value):
        raise ConfigError(f"--profile: it is a kind of its own; leave out --kind {kind}")
    wanted = ProbeKind.PROFILE if profile else choice(ProbeKind, kind or ProbeKind.END_TO_END.value, "--kind")
    if wanted not in BY_HAND:
        raise ConfigError(f"--kind: {kind} is not for use by hand; known: {', '.join(k.value for k in BY_HAND)}")
    return wanted


def profile_folder(words: JobWords, asked: ProbeWords) -> Path | None:
    """Where a profile goes; None for every other kind. Raises ConfigError."""
    if asked.kind is not ProbeKind.PROFILE:
        if asked.out is not None:
            raise ConfigError("--out: it belongs to --profile; other probes write no files")
        return None
    folder = asked.out or Path("runs") / f"profile-{setup.short_name(words.workload)}"
    make_folder(folder)
    return folder


def known_knobs(knobs: dict[str, Scalar]) -> dict[str, Scalar]:
    names = {WORLD_SIZE, *(knob.value for knob in Knob)}
    for name in knobs:
        if name not in names:
            raise ConfigError(f"--set: unknown knob {name!r}; known: {', '.join(sorted(names))}")
    return knobs


def changed(baseline: RunConfig, knobs: Mapping[str, Scalar]) -> RunConfig:
    """The baseline with knobs set; the effective batch is kept unless it is set too. Raises ConfigError."""
    ranks = knobs.get(WORLD_SIZE, baseline.world_size)
    if not isinstance(ranks, int) or ranks < 1:
        raise ConfigError(f"--set world_size: a number from 1 is expected (got {ranks!r})")
    values = {Knob(name): _typed(baseline, Knob(name), knobs[name]) for name in knobs if name != WORLD_SIZE}
    micro = values.get(Knob.MICRO_BATCH_SIZE, baseline.micro_batch_size)
    if not isinstance(micro, int) or micro < 1:
        raise ConfigError(f"--set micro_batch_size: a number from 1 is expected (got {micro!r})")
    alone = baseline.model_copy(
        update={"world_size": 1, "accumulation_steps": baseline.accumulation_steps * baseline.world_size}
    )
    try:
        config = spread(with_knobs(alone, values), ranks, "--set world_size")
    except ValueError as error:
        raise ConfigError(f"--set: {error}; set effective_batch_size too, or choose a divisor") from None
    return rechecked(config, "--set")


def _typed(baseline: RunConfig, knob: Knob, value: Scalar) -> Any:
    """The value in the knob's own type (enums from their text)."""
    own: Any = type(knob_value(baseline, knob))
    if own in (bool, int) and type(value) is not own:
        raise ConfigError(f"--set {knob.value}: a value of type {own.__name__} is expected (got {value!r})")
    if own is float and not isinstance(value, int | float):
        raise ConfigError(f"--set {knob.value}: a number is expected (got {value!r})")
    try:
        return own(value)
    except ValueError:
        known = ", ".join(str(member) for member in own) if hasattr(own, "__members__") else own.__name__
        raise ConfigError(f"--set {knob.value}: unknown value {value!r}; known: {known}") from None


def as_request(kind: ProbeKind, words: JobWords, job: Job, config: RunConfig, limits: ProbeLimits) -> ProbeRequest:
    points: tuple[RunConfig, ...] = (config,)
    if kind is ProbeKind.EQUIVALENCE:
        whole_micro = config.effective_batch_size // config.world_size
        whole = config.model_copy(update={"micro_batch_size": whole_micro, "accumulation_steps": 1})
        if config.accumulation_steps == 1 and config.micro_batch_size > 1:
            config = with_knobs(config, {Knob.MICRO_BATCH_SIZE: config.micro_batch_size // 2})
        points = (config, whole)
    return ProbeRequest(
        id="by-hand",
        kind=kind,
        workload=words.workload,
        options=job.options,
        points=points,
        limits=limits,
        cache_dir=str(setup.cache_dir()),
        samples=job.file.lr.samples if kind in (ProbeKind.LR, ProbeKind.NOISE) else None,
    )


def answer(reply: ProbeReply, kind: ProbeKind, config: RunConfig, console: Console, *, as_json: bool) -> None:
    point = reply.points[0]
    if as_json:
        speak.emit_json(plain_json(EquivalenceReply.of(reply) if kind is ProbeKind.EQUIVALENCE else reply))
    console.print(f"{point.outcome.value}  {config.label}  {point.message}")
    if point.measurement is not None:
        _measured(point.measurement, console)
    for name, value in point.values.items():
        if kind is not ProbeKind.PROFILE and (kind is not ProbeKind.EQUIVALENCE or name == Figure.RELATIVE_L2):
            console.print(f"  {name:<22}{value:.6g}")
    console.print(f"  took {speak.clock(reply.seconds)}, of it {reply.fixed_s:.2f} s fixed cost", style="dim")
    if point.outcome is Outcome.BAD_INPUT:
        raise setup.failed_setup(config.workload, point.message, point.detail)
    if point.outcome is not Outcome.OK:
        raise JobFailed(_failure(point))
    if kind is ProbeKind.EQUIVALENCE:
        _equivalence(point.values, console)
    if kind is ProbeKind.NOISE:
        console.print(f"  {noise_words(point.values, config)}")


def _measured(measurement: Measurement, console: Console) -> None:
    if measurement.steady_step_s:
        console.print(f"  {'throughput':<22}{speak.rate(throughput(measurement), ' samples/s')}")
        mean = sum(measurement.steady_step_s) / len(measurement.steady_step_s)
        console.print(f"  {'step':<22}{1000 * mean:.2f} ms over {len(measurement.steady_step_s)} steps")
    if measurement.data_wait_s and sum(measurement.step_s):
        console.print(
            f"  {'data wait':<22}{100 * sum(measurement.data_wait_s) / sum(measurement.step_s):.1f} % of the step"
        )
    growth = measurement.memory.process_bytes - measurement.memory.base_bytes
    console.print(
        f"  {'peak memory':<22}{speak.mib(measurement.memory.gate_bytes)} (+{speak.mib(growth)} over the imports)"
    )
    for name, values in measurement.losses.items():
        console.print(f"  {'loss ' + name:<22}{values[0]:.4f} → {values[-1]:.4f}")
    spent = ", ".join(f"{name} {value:.2f} s" for name, value in measurement.phases_s.items())
    console.print(f"  {'phases':<22}{spent}")


def _equivalence(values: Mapping[str, float], console: Console) -> None:
    """Raises JobFailed where the cuts differ, with one line for each cause."""
    for note in remarks(values):
        console.print(f"  note: {note.line}")
    apart = values.get(Figure.RELATIVE_L2, float("nan"))
    if equivalent(values):
        console.print(f"  equivalent: the accumulated gradient equals the whole batch's ({apart:.1e} < {EQUIVALENT:g})")
        return
    lines = [
        f"not equivalent: the accumulated gradient differs by {apart:.1e} (limit {EQUIVALENT:g}), so accumulation "
        "changes the training here",
        *(found.line for found in causes(values)),
    ]
    raise JobFailed("\n  ".join(lines))


def noise_words(values: Mapping[str, float], config: RunConfig) -> str:
    """The noise scale as a sentence."""
    low, batch = values.get("noise_low", 0.0), config.effective_batch_size
    if "noise_scale" not in values or "noise_high" not in values:
        return f"the gradient does not stand out from its noise: the noise scale is at least {low:.3g} samples"
    phi, high = values["noise_scale"], values["noise_high"]
    share = phi / (phi + batch)
    return (
        f"gradient noise scale {phi:.3g} samples ({low:.3g} to {high:.3g}): at the effective batch of {batch} a sample "
        f"teaches {share:.2f} of what it would alone"
    )


def _failure(point: PointReply) -> str:
    detail = f"\n{point.detail.rstrip()}" if point.detail and not point.outcome.is_oom else ""
    return f"the probe ended with {point.outcome.value}: {point.message}{detail}"
