"""The choice confirmed on the spot: the file's winner, its runner-ups and the baseline measured for some seconds each
on the machine that is to run them, before the long run begins. The one chosen, and why, stay in the run's folder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tuner.commands import console as speak
from tuner.commands import setup
from tuner.commands.train_words import TrainWords
from tuner.contract.choice import CONFIRMED_FILE, Confirmation, FellBack
from tuner.contract.config import RunConfig
from tuner.contract.documents import load_json
from tuner.contract.errors import ConfigError, JobFailed, TunerError
from tuner.contract.gpu import DeviceInfo
from tuner.contract.measurement import Interval, Outcome
from tuner.contract.own_files import replace_text
from tuner.contract.probe import Expected, PointReply, ProbeKind, ProbeLimits, ProbeRequest, Stage
from tuner.contract.study import MEMORY_MARGIN
from tuner.contract.tuned import Confirmed, Promise, TunedConfig

if TYPE_CHECKING:
    from rich.console import Console

    from tuner.probe.runner import SubprocessRunner

ROUNDS = 2
TIE = 0.02
"""The file's own choice stays unless another is faster by more than this, in every round."""
EVALUATE_TIMES = 4
"""An evaluation here may take so many times the seconds of one measurement; of a longer one a part is made."""
MOST_KEPT = 16 << 20
"""Bytes of what a run's folder keeps about choices."""
NOTHING_GAINED = Interval(value=1.0, low=1.0, high=1.0)
Origin = Literal["winner", "runner-up", "baseline"]


@dataclass(frozen=True)
class Settled:
    """What a run goes on with, and what led to it."""

    asked: TunedConfig
    """As the file says."""
    tuned: TunedConfig
    """As it runs: configuration, and the promise that holds for it."""
    expected: Expected | None = None
    confirmed: Confirmation | None = None
    fallbacks: tuple[FellBack, ...] = ()

    @property
    def name(self) -> str:
        """Of what was asked, in the folder's own files."""
        return self.asked.config.digest()


def settle(asked: TunedConfig, words: TrainWords, out: Path, runner: SubprocessRunner, console: Console) -> Settled:
    """Confirm where that is asked for, or where the file was measured elsewhere; what the folder has confirmed before
    stands. Raises JobFailed when none of the configurations runs here."""
    kept = _kept(out, asked) if words.confirm is not False else None
    if asked.provenance is None and not words.confirm and kept is None:
        return Settled(asked, asked)
    device = setup.describe(asked.config.workload, asked.config.options, runner).device
    elsewhere = asked.provenance is not None and asked.provenance.measured_on != device.place
    if kept is not None and kept.device == device.place:
        console.print(f"confirmed on this machine before ({CONFIRMED_FILE}): {kept.reason}")
        return _with(asked, kept)
    if words.confirm or (words.confirm is None and elsewhere):
        found = _confirm(asked, words, device, runner, console)
        _keep(out, found)
        return _with(asked, found)
    known = asked.provenance is not None and not elsewhere
    return Settled(asked, asked, expected_of(asked.promise) if known else None)


def expected_of(promise: Promise | None) -> Expected | None:
    if promise is None:
        return None
    return Expected(
        samples_per_s=promise.samples_per_s,
        peak_bytes=promise.peak_bytes,
        peak_high_bytes=promise.peak_high_bytes,
        reference_s=promise.reference_s,
    )


def _with(asked: TunedConfig, found: Confirmation) -> Settled:
    tuned = asked.model_copy(update={"config": found.chosen, "promise": found.promise})
    return Settled(asked, tuned, expected_of(found.promise), found)


def _kept(out: Path, asked: TunedConfig) -> Confirmation | None:
    """What the folder was confirmed with before; None when that was for another configuration."""
    path = out / CONFIRMED_FILE
    found = load_json(Confirmation, path, MOST_KEPT)
    if found is None or found.asked != asked.config.digest():
        return None
    check_kept(found.chosen, asked, f"{path}: chosen")
    return found


def check_kept(chosen: RunConfig, asked: TunedConfig, source: str) -> None:
    """What a folder keeps may only say how the training asked for is computed. Raises ConfigError."""
    expected = as_computed(asked.config, chosen)
    if expected == chosen.canonical():
        return
    own, other = (config.model_dump(mode="json") for config in (expected or asked.config, chosen.canonical()))
    key = next((name for name in own if own[name] != other[name]), "configuration")
    raise ConfigError(
        f"{source}.{key}: it is another training than the one asked for ({other.get(key)!s:.80}, asked for was "
        f"{own.get(key)!s:.80}); remove the file to go on with what was asked for"
    )


def _keep(out: Path, found: Confirmation) -> None:
    try:
        replace_text(out / CONFIRMED_FILE, found.model_dump_json(indent=2) + "\n", durable=True)
    except OSError as error:
        raise TunerError(f"{out / CONFIRMED_FILE}: cannot be written: {error.strerror}") from None


def as_computed(config: RunConfig, other: RunConfig) -> RunConfig | None:
    """`config` computed as `other` is: the same training at the same effective batch, optimizer and schedule. None
    where `other` is another training."""
    if other.options != config.options or other.effective_batch_size != config.effective_batch_size:
        return None
    ranks_samples = other.micro_batch_size * config.world_size
    if config.effective_batch_size % ranks_samples or other.optimizer.name != config.optimizer.name:
        return None
    update = {
        "micro_batch_size": other.micro_batch_size,
        "accumulation_steps": config.effective_batch_size // ranks_samples,
        "precision": other.precision,
        "compile": other.compile,
        "gradient_checkpointing": other.gradient_checkpointing,
        "channels_last": other.channels_last,
        "loader": other.loader,
        "threads": other.threads,
        "optimizer": config.optimizer.model_copy(update={"fused": other.optimizer.fused}),
    }
    return config.model_copy(update=update).canonical()


def candidates(asked: TunedConfig) -> list[tuple[Origin, RunConfig]]:
    """The file's choice first, each configuration once."""
    named: list[tuple[Origin, RunConfig]] = [("winner", asked.config.canonical())]
    others: list[tuple[Origin, RunConfig | None]] = [("runner-up", config) for config in asked.runner_ups]
    for origin, other in [*others, ("baseline", asked.baseline)]:
        config = as_computed(asked.config, other) if other is not None else None
        if config is not None and config not in [known for _, known in named]:
            named.append((origin, config))
    return named


def _confirm(
    asked: TunedConfig, words: TrainWords, device: DeviceInfo, runner: SubprocessRunner, console: Console
) -> Confirmation:
    sides = [Confirmed(origin=origin, config=config, outcome=Outcome.OK) for origin, config in candidates(asked)]
    count = len(sides)
    console.print(
        f"confirming on {device.place}: {count} configuration{'s' if count > 1 else ''}, {words.confirm_s:g} s each, "
        f"{ROUNDS} rounds in fresh processes"
    )
    budget = int(device.free_bytes * MEMORY_MARGIN)
    for number in range(ROUNDS):
        order = range(count) if number % 2 == 0 else range(count - 1, -1, -1)
        for place in order:
            if sides[place].outcome is Outcome.OK:
                sides[place] = _measured(sides[place], _request(sides[place].config, words, number), budget, runner)
    _show(sides, console)
    chosen, reason = choose(sides)
    console.print(reason)
    return Confirmation(
        asked=asked.config.digest(),
        device=device.place,
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        sides=tuple(sides),
        chosen=chosen.config,
        reason=reason,
        promise=_promise(chosen, sides, device),
    )


def _measured(side: Confirmed, request: ProbeRequest, budget: int, runner: SubprocessRunner) -> Confirmed:
    """A configuration for a bigger machine than this one is one that does not run here."""
    try:
        reply = runner.run(request)
    except ConfigError as error:
        return side.model_copy(update={"outcome": Outcome.UNSUPPORTED, "message": str(error)})
    return _extended(side, reply.points[0], budget)


def _request(config: RunConfig, words: TrainWords, number: int) -> ProbeRequest:
    """The last round evaluates, samples and saves too, so that the peak is production's."""
    return ProbeRequest(
        id=f"confirm-{config.digest()}-{number}",
        kind=ProbeKind.END_TO_END,
        stage=Stage.CONFIRM,
        workload=config.workload,
        options=config.options,
        points=(config,),
        limits=ProbeLimits(measure_s=words.confirm_s, evaluate_s=EVALUATE_TIMES * words.confirm_s),
        cache_dir=str(setup.cache_dir()),
        pair=number,
        soak=number == ROUNDS - 1,
        reference=True,
    )


def _extended(side: Confirmed, reply: PointReply, budget: int) -> Confirmed:
    """`side` with one more measurement, or with what ended it."""
    from tuner.contract.statistics import throughput

    measured = reply.measurement
    if reply.outcome is not Outcome.OK or measured is None or not measured.steady_step_s:
        failed = reply.outcome if reply.outcome is not Outcome.OK else Outcome.NO_RESULT
        return side.model_copy(update={"outcome": failed, "message": reply.message})
    peak = max(measured.memory.gate_bytes, side.peak_bytes or 0)
    update = {
        "samples_per_s": (*side.samples_per_s, throughput(measured).value),
        "peak_bytes": peak,
        "peaks": (*side.peaks, measured.memory),
        "reference_s": (*side.reference_s, *measured.reference_s),
    }
    if peak > budget:
        on_gpu = measured.memory.reserved_bytes is not None
        outcome = Outcome.OOM_DEVICE if on_gpu else Outcome.OOM_HOST
        text = f"it needs {speak.mib(peak)}, and {speak.mib(budget)} may be used here"
        return side.model_copy(update={**update, "outcome": outcome, "message": text})
    return side.model_copy(update=update)


def choose(sides: Sequence[Confirmed]) -> tuple[Confirmed, str]:
    """The fastest here; a tie leaves the file's own choice. Raises JobFailed when none ran."""
    sound = [side for side in sides if side.outcome is Outcome.OK]
    if not sound:
        tried = "; ".join(f"{side.origin} {side.config.label}: {side.outcome.value}: {side.message}" for side in sides)
        raise JobFailed(
            f"--confirm: none of the file's configurations could be run on this machine ({tried}); tune on it with "
            "`tuner optimize`, or start one anyway with --no-confirm"
        )
    best, own = max(sound, key=mean_rate), sides[0]
    if own.outcome is not Outcome.OK:
        reason = f"the file's choice ended with {own.outcome.value} here ({own.message}), so the fastest other one runs"
        return best, f"{reason}: {best.config.label}, {mean_rate(best):,.4g} samples/s"
    if best is own or not _clearly_faster(best, own):
        beside = "" if len(sound) == 1 else ", the fastest of them" if best is own else f"; {_no_better(best)}"
        return own, f"confirmed: {own.config.label} reaches {mean_rate(own):,.4g} samples/s here{beside}"
    share = 100 * (mean_rate(best) / mean_rate(own) - 1)
    return best, (
        f"the {best.origin} {best.config.label} is {share:.1f} % faster here than the file's choice "
        f"({mean_rate(best):,.4g} against {mean_rate(own):,.4g} samples/s), so it runs"
    )


def _no_better(side: Confirmed) -> str:
    return f"{side.config.label} with {mean_rate(side):,.4g} is not clearly faster"


def mean_rate(side: Confirmed) -> float:
    """Geometric mean over the rounds; 0 when nothing was measured."""
    rates = side.samples_per_s
    return math.exp(sum(map(math.log, rates)) / len(rates)) if rates else 0.0


def _clearly_faster(side: Confirmed, own: Confirmed) -> bool:
    pairs = zip(side.samples_per_s, own.samples_per_s, strict=True)
    return all(mine > (1 + TIE) * theirs for mine, theirs in pairs)


def _promise(chosen: Confirmed, sides: Sequence[Confirmed], device: DeviceInfo) -> Promise:
    """What was just measured. How far processes differ is taken from all configurations together: two rounds of one
    alone would hardly tell."""
    from tuner.contract.statistics import paired_gain, pooled_prediction
    from tuner.search.selection import expected_peak, peak_words

    sound = [side for side in sides if side.outcome is Outcome.OK]
    rate = pooled_prediction(chosen.samples_per_s, [side.samples_per_s for side in sound])
    baseline = next((side for side in sound if side.origin == "baseline"), None)
    other = baseline is not None and baseline is not chosen
    peak = expected_peak(chosen.peaks, device.kind)
    return Promise(
        samples_per_s=rate,
        peak_bytes=peak.value,
        peak_low_bytes=peak.low,
        peak_high_bytes=peak.high,
        peak_from=peak_words(chosen.peaks),
        hours=chosen.config.horizon_samples / rate.value / 3600,
        gain=paired_gain(chosen.samples_per_s, baseline.samples_per_s) if baseline and other else NOTHING_GAINED,
        reference_s=chosen.reference_s,
        confirmed_on=device.place,
        confirmed=tuple(sides),
    )


def _show(sides: Sequence[Confirmed], console: Console) -> None:
    width = max(len(side.config.label) for side in sides)
    for side in sides:
        rates = "  ".join(f"{rate:>10,.4g}" for rate in side.samples_per_s)
        told = "samples/s" if side.outcome is Outcome.OK else f"{side.outcome.value}: {side.message}"
        peak = speak.mib(side.peak_bytes) if side.peak_bytes is not None else ""
        console.print(f"  {side.origin:<10}{side.config.label:<{width}}  {rates} {told}  {peak}".rstrip())


def with_fallbacks(settled: Settled, config: RunConfig, fallbacks: tuple[FellBack, ...]) -> Settled:
    """Another configuration from here on; no promise holds for it."""
    tuned = settled.tuned.model_copy(update={"config": config, "promise": None})
    return replace(settled, tuned=tuned, expected=None, fallbacks=fallbacks)
