"""`tuner bench`: what the guides' benchmarks measure, for any workload: data preparation from nothing and from the
cache, inference, training at several micro-batch sizes, and one picture of all of it."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.commands import console as speak
from tuner.commands import setup, turns
from tuner.commands.answer import Remarks
from tuner.commands.places import make_folder
from tuner.commands.setup import Job, JobWords
from tuner.commands.words import count, seconds
from tuner.contract.config import RunConfig
from tuner.contract.errors import ConfigError, JobFailed
from tuner.contract.measurement import Outcome
from tuner.contract.probe import Event, PointReply, ProbeKind, ProbeLimits, ProbeRequest, ProgressEvent
from tuner.contract.result import BenchResult, InferenceResult, InferenceSpeed, TrainingSpeed, plain_json
from tuner.contract.statistics import throughput
from tuner.contract.trust import Trust
from tuner.prepared import size_of

if TYPE_CHECKING:
    from rich.console import Console

    from tuner.probe.runner import SubprocessRunner

AROUND = (0.25, 0.5, 1, 2, 4)
"""Times the baseline's micro-batch size."""

SPEED = "samples_per_s_b"
MOST_SIZES, MOST_SAMPLES = 32, 1 << 20


def run(words: JobWords, micro_batch: str | None, measure: str, out: Path | None, *, as_json: bool) -> None:
    """The whole command. Raises JobFailed (3) when a measurement failed for want of anything but memory."""
    from tuner.report.benchmark import draw

    began = time.monotonic()
    limits = ProbeLimits(measure_s=seconds(measure, "--seconds"), deadline_s=600.0)
    typed = sizes(micro_batch) if micro_batch is not None else None
    name = setup.short_name(words.workload)
    folder = out or Path("runs") / f"bench-{name}"
    make_folder(folder)
    console = speak.make_console(as_json=as_json)
    runner = setup.make_runner(words.isolation, Trust.of(words.workload))
    try:
        job = setup.understand(words, runner)
        who = turns.holder("bench", words.workload)
        with (
            turns.device(who, job.baseline.world_size, console, wait=words.wait),
            tempfile.TemporaryDirectory(prefix="tuner-bench-") as cache,
        ):
            wanted = typed or around(job.baseline.micro_batch_size)
            _introduce(job, console)
            bench = _Bench(words.workload, job, runner, Path(cache), limits, console)
            cold, cached = bench.prepare(), bench.prepare()
            kept = size_of(Path(cache))
            inference = bench.inference()
            training, parameters = bench.training(wanted)
    finally:
        runner.close()
    result = BenchResult(
        workload=job.info.name,
        preset=job.info.preset,
        unit=job.info.unit,
        measured_on=job.description.device.place,
        config=job.baseline,
        parameters=parameters,
        prepare_cold_s=cold,
        prepare_cached_s=cached,
        prepared_bytes=kept,
        inference=inference,
        training=training,
        picture=str(folder / f"{name}_benchmark.png"),
        seconds=time.monotonic() - began,
    )
    try:
        draw(result, Path(result.picture))
    finally:  # a picture that cannot be written costs no figure
        _tell(result, console, as_json=as_json)
    _fail_for_want_of_more_than_memory(result)


def _fail_for_want_of_more_than_memory(result: BenchResult) -> None:
    ends = [(result.inference.outcome, result.inference.message)]
    ends += [(point.outcome, point.message) for point in result.training]
    failed = [message for outcome, message in ends if outcome is not Outcome.OK and not outcome.is_oom]
    if failed:
        raise JobFailed(f"bench: {len(failed)} of {len(ends)} measurements failed, the first with {failed[0]}")


def sizes(text: str) -> tuple[int, ...]:
    """`1,8,32` as numbers. Raises ConfigError."""
    parts = [part.strip() for part in text.split(",")]
    found = [count(part, MOST_SAMPLES) for part in parts]
    known = {value for value in found if value is not None}
    if None in found or len(known) > MOST_SIZES:
        raise ConfigError(
            f"--micro-batch: numbers from 1 are expected, such as 1,8,32; at most {MOST_SIZES} of them, each up to "
            f"{MOST_SAMPLES:,} (got {text[:80]!r})"
        )
    return tuple(sorted(known))


def around(baseline: int) -> tuple[int, ...]:
    return tuple(sorted({*(round(baseline * factor) for factor in AROUND if baseline * factor >= 1)}))


def _introduce(job: Job, console: Console) -> None:
    console.print(f"bench {job.info.name}: {job.info.summary}", style="bold")
    preset = f"preset {job.info.preset}, " if job.info.preset else ""
    console.print(f"{preset}{job.baseline.label}, measured on {job.description.device.place}\n")


class _Bench:
    """One request after another, with a cache of its own."""

    def __init__(
        self, workload: str, job: Job, runner: SubprocessRunner, cache: Path, limits: ProbeLimits, console: Console
    ) -> None:
        self._workload = workload
        self._job = job
        self._runner = runner
        self._cache = cache
        self._limits = limits
        self._console = console
        self._remarks = Remarks(console)

    def prepare(self) -> float:
        """Seconds of preparing the data, the process's start not counted. Raises WorkloadError."""
        reply = self._runner.run(self._request(ProbeKind.PREPARE, ()), self._listen)
        for point in reply.points:
            if point.outcome is not Outcome.OK:
                raise setup.failed_setup(self._workload, point.message, point.detail)
        return max(0.0, reply.seconds - reply.fixed_s)

    def inference(self) -> InferenceResult:
        reply = self._runner.run(self._request(ProbeKind.INFERENCE, (self._job.baseline,))).points[0]
        values = reply.values
        if reply.outcome is not Outcome.OK:
            return InferenceResult(outcome=reply.outcome, message=reply.message)
        sizes_s = {int(name.removeprefix(SPEED)): value for name, value in values.items() if name.startswith(SPEED)}
        return InferenceResult(
            outcome=reply.outcome,
            latency_p50_s=values["latency_b1_p50_s"],
            latency_p95_s=values["latency_b1_p95_s"],
            speeds=tuple(InferenceSpeed(batch_size=n, samples_per_s=sizes_s[n]) for n in sorted(sizes_s)),
            peak_bytes=int(values["peak_bytes"]),
        )

    def training(self, wanted: Sequence[int]) -> tuple[tuple[TrainingSpeed, ...], int | None]:
        """A point per micro-batch size, and the model's parameters."""
        points = tuple(_with_micro_batch(self._job.baseline, size) for size in wanted)
        replies = self._runner.run(self._request(ProbeKind.COMPUTE, points)).points
        counted = [reply.measurement.parameters for reply in replies if reply.measurement is not None]
        made = tuple(as_speed(size, reply) for size, reply in zip(wanted, replies, strict=True))
        return made, next((count for count in counted if count is not None), None)

    def _request(self, kind: ProbeKind, points: tuple[RunConfig, ...]) -> ProbeRequest:
        return ProbeRequest(
            id=f"bench-{kind.value}",
            kind=kind,
            workload=self._workload,
            options=self._job.options,
            points=points,
            limits=self._limits.model_copy(update={"deadline_s": 1800.0}) if not points else self._limits,
            cache_dir=str(self._cache),
        )

    def _listen(self, event: Event) -> None:
        self._remarks(event)
        if isinstance(event, ProgressEvent) and event.total and event.done == event.total:
            self._console.print(f"  prepared: {event.text}", style="dim")


def _with_micro_batch(baseline: RunConfig, size: int) -> RunConfig:
    return baseline.model_copy(update={"micro_batch_size": size, "accumulation_steps": 1})


def as_speed(size: int, reply: PointReply) -> TrainingSpeed:
    measured = reply.measurement
    if reply.outcome is not Outcome.OK or measured is None or not measured.steady_step_s:
        return TrainingSpeed(micro_batch_size=size, outcome=reply.outcome, message=reply.message)
    return TrainingSpeed(
        micro_batch_size=size,
        outcome=reply.outcome,
        samples_per_s=throughput(measured),
        median_step_s=statistics.median(measured.steady_step_s),
        peak_bytes=measured.memory.gate_bytes,
    )


def _tell(result: BenchResult, console: Console, *, as_json: bool) -> None:
    if as_json:
        speak.emit_json(plain_json(result))
    size = f"{result.parameters:,} parameters" if result.parameters is not None else ""
    console.print(f"{result.workload} {result.preset}  {size}".rstrip())
    console.print(
        f"  {'preparation':<14}{result.prepare_cold_s:.2f} s from nothing, "
        f"{result.prepare_cached_s:.2f} s from the cache ({speak.size(result.prepared_bytes)})"
    )
    _tell_inference(result.inference, console)
    console.print(f"  {'training':<14}{'micro-batch':>11}{'step':>13}{'samples/s':>22}{'peak':>14}")
    for point in result.training:
        console.print(_line(point))
    console.print(f"  {'picture':<14}{result.picture}")
    console.print(f"  took {speak.clock(result.seconds)}", style="dim")


def _tell_inference(result: InferenceResult, console: Console) -> None:
    if result.latency_p50_s is None or result.latency_p95_s is None:
        console.print(f"  {'inference':<14}{result.outcome.value}: {result.message}")
        return
    console.print(
        f"  {'inference':<14}{1000 * result.latency_p50_s:.2f} ms for one sample (95 % within "
        f"{1000 * result.latency_p95_s:.2f} ms), peak {speak.mib(result.peak_bytes)}"
    )
    speeds = ", ".join(f"{speed.samples_per_s:,.1f} at batch {speed.batch_size}" for speed in result.speeds)
    console.print(f"  {'':<14}samples/s: {speeds}")


def _line(point: TrainingSpeed) -> str:
    lead = f"  {'':<14}{point.micro_batch_size:>11}"
    if point.median_step_s is None:
        return f"{lead}  {point.outcome.value}: {point.message}"
    step = f"{1000 * point.median_step_s:>10.2f} ms"
    return f"{lead}{step}{speak.rate(point.samples_per_s):>22}{speak.mib(point.peak_bytes):>14}"
