"""Promise against reality, at the end of a production run: as figures, and in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from tuner.commands import console as speak
from tuner.contract.config import RunConfig
from tuner.contract.probe import ProbeReply, TrainResult
from tuner.contract.promise_check import PeakVerdict, Verdict, check_promise
from tuner.contract.result import TrainResultJson
from tuner.contract.statistics import throughput
from tuner.contract.tuned import Promise, TunedConfig
from tuner.contract.workload import ERROR, SURE


def judge(tuned: TunedConfig, reply: ProbeReply, run_id: str, out: Path) -> TrainResultJson | None:
    """Promise against reality; None when the run gave no result."""
    result = reply.train_result
    if result is None:
        return None
    measured = throughput(result.measurement) if result.measurement.steady_step_s else None
    promise = tuned.promise
    peak = result.measurement.memory.gate_bytes
    held = check_promise(promise, measured.value if measured else None, result.measurement.reference_s, peak)
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
        peak_bytes=peak,
        promised_peak_bytes=promise.peak_bytes if promise else None,
        losses=_last_losses(result),
        metrics=result.metrics,
        trivial=result.trivial,
        best=result.best,
        skipped_steps=result.skipped_steps,
        not_finite_steps=result.not_finite_steps,
        **dict(held),
    )


def _last_losses(result: TrainResult) -> dict[str, float]:
    return {
        name: _mean(values[-max(1, len(values) // 10) :])
        for name, values in result.measurement.losses.items()
        if values
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


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
    lines += _not_finite(result)
    lines += [f"  fell back {step.ended.label} -> {step.chosen.label}: {step.why}" for step in result.fallbacks]
    return lines if promise is None else lines + _held(result, promise)


def _held(result: TrainResultJson, promise: Promise) -> list[str]:
    lines = [f"  promised  {speak.rate(promise.samples_per_s, ' samples/s')}, peak {speak.mib(promise.peak_bytes)}"]
    if result.deviation is not None and result.verdict is not None:
        text = f"  deviation {100 * result.deviation:+.1f} % raw"
        if result.deviation_beyond_drift is not None and result.host_drift is not None:
            text += (
                f", {100 * result.deviation_beyond_drift:+.1f} % beyond the host's own drift "
                f"(it ran at {100 * result.host_drift:.1f} % of its speed at the time of the promise)"
            )
        lines.append(f"{text}: the promise is {in_words(result.verdict)}")
    if result.peak_deviation is not None:
        high = speak.mib(promise.peak_high_bytes)
        over = f", ABOVE its error bar ({high})" if result.peak_verdict is PeakVerdict.ABOVE else ""
        stands_on = f" ({promise.peak_from})" if promise.peak_from else ""
        lines.append(f"  peak      {100 * result.peak_deviation:+.1f} % of the promised peak{stands_on}{over}")
    return lines


def in_words(verdict: Verdict) -> str:
    """For the end of a sentence that begins with `the promise is`."""
    match verdict:
        case Verdict.KEPT:
            return "kept"
        case Verdict.ABOVE:
            return "kept and exceeded: faster than its interval"
        case Verdict.BELOW:
            return "NOT kept: slower than the lower end of its interval"


def _not_finite(result: TrainResultJson) -> list[str]:
    """Steps that were not what they should be; none says nothing."""
    lines = []
    if result.skipped_steps:
        lines.append(f"  skipped   {result.skipped_steps:,} updates, as their loss or gradient was not finite")
    elif result.not_finite_steps:
        lines.append(f"  not finite: the loss of {result.not_finite_steps:,} steps")
    return lines


def quality(result: TrainResultJson, config: RunConfig) -> list[str]:
    """The metrics beside what they would be without learning, and the best evaluation of the run."""
    errors = {name + ERROR for name in result.metrics}
    told = [name for name in result.metrics if name not in errors]
    lines = [f"  quality   {_against(name, result)}" for name in told]
    if config.quality is not None and result.best:
        samples = round(result.best.get("samples", 0))
        value = result.best.get("value", math.nan)
        raw = "raw_" if config.judges_raw else ""
        lines.append(
            f"  best      {raw}{config.quality.metric} {value:.4g} at {samples:,} samples, kept in checkpoints/best"
        )
    return lines


def _against(name: str, result: TrainResultJson) -> str:
    value, error, trivial = result.metrics[name], result.metrics.get(name + ERROR), result.trivial.get(name)
    text = f"{name} {value:.4g}" + (f" (standard error {error:.2g})" if error is not None else "")
    if trivial is None:
        return text
    verdict = "better" if trivial.beaten_by(name, result.metrics) else "NOT better"
    if error is not None and abs(value - trivial.value) <= SURE * error:
        verdict += f", it is within {SURE:g} standard errors"
    return f"{text} against {trivial.value:.4g} ({trivial.text}): {verdict}"
