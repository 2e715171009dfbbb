"""Promise against reality, at the end of a production run: as figures, and in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from tuner.commands import console as speak
from tuner.contract.config import RunConfig
from tuner.contract.measurement import Interval
from tuner.contract.probe import ProbeReply, TrainResult
from tuner.contract.result import TrainResultJson
from tuner.contract.statistics import drift, throughput
from tuner.contract.tuned import Promise, TunedConfig


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
        skipped_steps=result.skipped_steps,
        not_finite_steps=result.not_finite_steps,
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


def _not_finite(result: TrainResultJson) -> list[str]:
    """Steps that were not what they should be; none says nothing."""
    lines = []
    if result.skipped_steps:
        lines.append(f"  skipped   {result.skipped_steps:,} updates, as their gradient was not finite (fp16)")
    elif result.not_finite_steps:
        lines.append(f"  not finite: the loss of {result.not_finite_steps:,} steps")
    return lines


def quality(result: TrainResultJson, config: RunConfig) -> list[str]:
    """The metrics beside what they would be without learning, and the best evaluation of the run."""
    lines = [f"  quality   {_against(name, value, result)}" for name, value in result.metrics.items()]
    if config.quality is not None and result.best:
        samples = round(result.best.get("samples", 0))
        value = result.best.get("value", math.nan)
        raw = "raw_" if config.judges_raw else ""
        lines.append(
            f"  best      {raw}{config.quality.metric} {value:.4g} at {samples:,} samples, kept in checkpoints/best"
        )
    return lines


def _against(name: str, value: float, result: TrainResultJson) -> str:
    trivial = result.trivial.get(name)
    if trivial is None:
        return f"{name} {value:.4g}"
    verdict = "better" if trivial.beaten_by(value) else "NOT better"
    return f"{name} {value:.4g} against {trivial.value:.4g} ({trivial.text}): {verdict}"
