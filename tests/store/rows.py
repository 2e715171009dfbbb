"""A small made-up study, always the same: what the store and the report are tested with."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

from tuner.contract.config import CompileMode, OptimizerConfig, Precision, RunConfig
from tuner.contract.gpu import DeviceInfo, GpuProfile
from tuner.contract.measurement import Environment, Interval, Measurement, MemoryPeak, Outcome
from tuner.contract.probe import (
    PointReply,
    ProbeKind,
    ProbeReply,
    ProbeRequest,
    ProbeRow,
    Score,
    Stage,
    TrainResult,
)
from tuner.contract.production import ProductionRun, RunStatus
from tuner.contract.space import Knob, SearchSpace, with_knobs
from tuner.contract.study import StudySpec
from tuner.contract.tuned import Decision, Promise, Side
from tuner.search.score import score

MIB = 1 << 20
BASELINE = RunConfig(
    workload="latent_cfg",
    options={"preset": "tiny"},
    micro_batch_size=8,
    accumulation_steps=2,
    optimizer=OptimizerConfig(lr=3e-4),
    horizon_samples=100_000,
)
WINNER = with_knobs(BASELINE, {Knob.MICRO_BATCH_SIZE: 16, Knob.FUSED: True})
SPACE = SearchSpace(
    micro_batch_size=(1, 2, 4, 8, 16),
    fused=(False, True),
    channels_last=(False, True),
    num_workers=(0, 2),
    prefetch_factor=(2, 4),
)


@dataclass(frozen=True)
class Exchange:
    """What `add_reply` is given."""

    request: ProbeRequest
    reply: ProbeReply
    trial: int | None = None


def target() -> GpuProfile:
    return GpuProfile(
        name="p100",
        label="Tesla P100 16 GB",
        kind="cuda",
        memory_bytes=16_280 * MIB,
        capability=(6, 0),
        dtypes=(Precision.FP32, Precision.FP16),
        compile_modes=(CompileMode.EAGER, CompileMode.CUDAGRAPHS),
    )


def device() -> DeviceInfo:
    return DeviceInfo(
        kind="cpu",
        name="Example CPU",
        memory_bytes=24_000 * MIB,
        free_bytes=20_000 * MIB,
        host_bytes=24_000 * MIB,
        host_free_bytes=20_000 * MIB,
        cpu_name="Example CPU",
        cpu_count=2,
        torch="2.13.0",
        dtypes=(Precision.FP32, Precision.BF16),
    )


def example_spec(name: str = "latent_cfg-tiny-p100") -> StudySpec:
    return StudySpec(
        name=name,
        workload="latent_cfg",
        options={"preset": "tiny"},
        target=target(),
        device=device(),
        baseline=BASELINE,
        space=SPACE,
        effective_batch=16,
        memory_budget_bytes=1_000 * MIB,
        budget_s=300.0,
    )


def environment() -> Environment:
    return Environment(
        tuner="0.1.0", python="3.11.4", torch="2.13.0", device="cpu", cpu="Example CPU", cpu_count=2, threads=2
    )


def measured(config: RunConfig, seed: int, *, speed: float = 1.0, steps: int = 40) -> Measurement:
    """Step time 10 ms + 4 ms a sample, a fifth less with the fused optimizer, 2 % noise, memory 300 + 30 b MiB."""
    rng = random.Random(seed)
    once = (0.010 + 0.004 * config.micro_batch_size) * config.accumulation_steps / speed
    if config.optimizer.fused:
        once *= 0.8
    times = tuple(once * rng.gauss(1.0, 0.02) for _ in range(steps))
    return Measurement(
        samples_per_step=config.effective_batch_size,
        step_s=times,
        data_wait_s=tuple(0.05 * value for value in times),
        losses={"total": tuple(1.0 / (1 + 0.05 * step) for step in range(steps))},
        warmup_steps=4,
        memory=MemoryPeak(process_bytes=(300 + 30 * config.micro_batch_size) * MIB, base_bytes=200 * MIB),
        phases_s={"start": 0.2, "build": 0.3, "measure": sum(times)},
        reference_s=tuple(0.01 * rng.gauss(1.0, 0.02) for _ in range(5)),
    )


def point(config: RunConfig, seed: int, index: int = 0, *, speed: float = 1.0) -> PointReply:
    return PointReply(
        index=index,
        outcome=Outcome.OK,
        measurement=measured(config, seed, speed=speed),
        environment=environment(),
        seconds=2.5,
    )


def failed(outcome: Outcome, message: str, index: int = 0, detail: str = "") -> PointReply:
    return PointReply(
        index=index, outcome=outcome, message=message, detail=detail, environment=environment(), seconds=1.0
    )


def exchange(
    request_id: str,
    kind: ProbeKind,
    stage: Stage,
    configs: Iterable[RunConfig],
    points: Iterable[PointReply],
    *,
    pair: int | None = None,
    trial: int | None = None,
) -> Exchange:
    answers = tuple(points)
    request = ProbeRequest(
        id=request_id,
        kind=kind,
        stage=stage,
        workload="latent_cfg",
        options={"preset": "tiny"},
        points=tuple(configs),
        pair=pair,
    )
    reply = ProbeReply(
        request_id=request_id, points=answers, seconds=sum(item.seconds for item in answers) + 0.5, fixed_s=0.5
    )
    return Exchange(request, reply, trial)


def end_to_end(
    request_id: str, stage: Stage, config: RunConfig, seed: int, *, pair: int | None = None, speed: float = 1.0
) -> Exchange:
    return exchange(request_id, ProbeKind.END_TO_END, stage, [config], [point(config, seed, speed=speed)], pair=pair)


def example_exchanges() -> tuple[Exchange, ...]:
    """Every kind of outcome a report has to show."""
    return (
        end_to_end("baseline", Stage.BASELINE, BASELINE, 1),
        *_compute(),
        exchange(
            "loader-0",
            ProbeKind.LOADER,
            Stage.LOADER,
            [BASELINE],
            [failed(Outcome.LOADER_ERROR, "worker 1 died: bus error")],
        ),
        end_to_end("verify-winner", Stage.VERIFY, WINNER, 30),
        exchange(
            "verify-big",
            ProbeKind.END_TO_END,
            Stage.VERIFY,
            [_sized(64, effective=64)],
            [failed(Outcome.OOM_HOST, "can't allocate memory: 1200 MiB", detail="Traceback\n  line 1")],
        ),
        *_lr(),
        *_gate(),
    )


def _sized(micro: int, *, fused: bool = False, effective: int = 16) -> RunConfig:
    return with_knobs(BASELINE, {Knob.MICRO_BATCH_SIZE: micro, Knob.FUSED: fused, Knob.EFFECTIVE_BATCH_SIZE: effective})


def _compute() -> Iterable[Exchange]:
    for fused in (False, True):
        configs = [_sized(micro, fused=fused) for micro in (4, 8, 16)]
        points = [point(config, 10 + index, index) for index, config in enumerate(configs)]
        yield exchange(f"compute-{fused}", ProbeKind.COMPUTE, Stage.BATCH, configs, points)
    yield exchange(
        "compute-crash",
        ProbeKind.COMPUTE,
        Stage.FLAGS,
        [with_knobs(BASELINE, {Knob.CHANNELS_LAST: True})],
        [failed(Outcome.CRASHED, "killed by signal 11")],
    )


def _lr() -> Iterable[Exchange]:
    for factor in (1.0, 3.0):
        config = with_knobs(WINNER, {Knob.LR: 3e-4 * factor})
        yield exchange(f"lr-{factor}", ProbeKind.LR, Stage.LR, [config], [point(config, 40 + int(factor))])


def _gate() -> Iterable[Exchange]:
    for pair in range(6):
        yield end_to_end(f"gate-a-{pair}", Stage.GATE, BASELINE, 50 + pair, pair=pair)
        yield end_to_end(f"gate-b-{pair}", Stage.GATE, WINNER, 70 + pair, pair=pair)


def example_rows() -> tuple[ProbeRow, ...]:
    """The rows the store makes of `example_exchanges`; no database needed."""
    rows: list[ProbeRow] = []
    for item in example_exchanges():
        for answer in item.reply.points:
            rows.append(_row(len(rows), item, answer))
    return tuple(rows)


def scored(row: ProbeRow) -> Score:
    """What the search says a row of the example is worth."""
    return score(example_spec(), example_rows(), row)


def _row(number: int, item: Exchange, answer: PointReply) -> ProbeRow:
    return ProbeRow(
        number=number,
        request_id=item.request.id,
        index=answer.index,
        kind=item.request.kind,
        stage=item.request.stage,
        config=item.request.points[answer.index],
        pair=item.request.pair,
        outcome=answer.outcome,
        message=answer.message,
        detail=answer.detail,
        measurement=answer.measurement,
        values=answer.values,
        environment=answer.environment,
        seconds=answer.seconds,
        fixed_s=item.reply.fixed_s / len(item.reply.points),
        finished_at="2026-01-02T03:04:05+00:00",
        trial=item.trial,
    )


def interval(value: float, reach: float) -> Interval:
    return Interval(value=value, low=value * (1 - reach), high=value * (1 + reach))


def example_decision() -> Decision:
    return Decision(
        kind="winner",
        reason="16x1 needs half as many passes as 8x2. Six interleaved pairs agree.",
        baseline=Side(config=BASELINE, samples_per_s=interval(190, 0.01), peak_bytes=540 * MIB, processes=6),
        winner=Side(config=WINNER, samples_per_s=interval(270, 0.01), peak_bytes=780 * MIB, processes=6),
        gain=interval(1.42, 0.02),
        notes=("speed was measured on Example CPU, not on a Tesla P100 16 GB",),
    )


def example_promise() -> Promise:
    return Promise(
        samples_per_s=interval(270, 0.03),
        peak_bytes=780 * MIB,
        peak_low_bytes=750 * MIB,
        peak_high_bytes=810 * MIB,
        hours=0.1,
        gain=interval(1.42, 0.02),
        reference_s=(0.01, 0.0101, 0.0099),
    )


def example_result() -> TrainResult:
    return TrainResult(
        samples=1600,
        step=100,
        finished=True,
        reason="horizon reached",
        elapsed_s=6.2,
        measurement=measured(WINNER, 90, steps=100),
    )


def example_runs() -> tuple[ProductionRun, ...]:
    """One finished run with a promise, and one that is still going on without any."""
    open_run = ProductionRun(
        id="run-2",
        study="latent_cfg-tiny-p100",
        config=WINNER,
        out_dir="runs/two",
        started_at="2026-01-02T04:00:00+00:00",
    )
    done = {
        "id": "run-1",
        "out_dir": "runs/one",
        "promise": example_promise(),
        "status": RunStatus.FINISHED,
        "result": example_result(),
    }
    return open_run.model_copy(update=done), open_run
