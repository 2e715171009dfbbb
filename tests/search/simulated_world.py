"""A made-up training job: SIMULATION, no hardware behind it. It answers probe requests with raw measurements.

Step time follows k*alpha + B*beta + omega with factors per flag, a loader beside it, noise between processes and
between steps, memory that grows with the micro-batch, and failures on demand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tuner.contract.base import Scalar
from tuner.contract.config import CompileMode, OptimizerConfig, Precision, RunConfig
from tuner.contract.gpu import DeviceInfo, GpuProfile
from tuner.contract.measurement import Environment, EvaluationPart, Measurement, MemoryPeak, Outcome
from tuner.contract.probe import Listener, PointReply, ProbeKind, ProbeReply, ProbeRequest, ProbeRow
from tuner.contract.space import SearchSpace
from tuner.contract.study import LrSpec, StudySpec
from tuner.contract.tuned import Decision
from tuner.search.planner import Ask, Done, next_probe, sampler_request
from tuner.search.sampler import proposed
from tuner.search.selection import select

GIB = 1 << 30
ENVIRONMENT = Environment(tuner="0", python="3", torch="2", device="simulated", cpu="simulated", cpu_count=4, threads=4)
Fault = Callable[[ProbeRequest, RunConfig, int], Outcome | None]
"""(request, point, how many requests came before) -> the failure to inject."""


@dataclass(frozen=True)
class World:
    """Seconds, bytes and ratios of the made-up job."""

    alpha: float = 0.010
    beta: float = 0.002
    omega: float = 0.004
    data_per_sample: float = 0.0005
    """Loader seconds per sample and worker; without workers they add to the step."""
    contention: float = 0.0
    """Relative slow-down of the computation per worker."""
    flag_factors: dict[object, float] = field(default_factory=dict)
    """Factor on compute time by precision, compile mode, `channels_last`, `fused`, `checkpointing`."""
    fixed_bytes: float = 1 * GIB
    sample_bytes: float = 0.1 * GIB
    capacity_bytes: float = 16 * GIB
    process_noise: float = 0.01
    step_noise: float = 0.02
    host_noise: float = 0.0
    """Log spread of the host's own speed from probe to probe, which its reference work feels too."""
    misfit: float = 0.0
    """Relative size of a fixed random factor per configuration that no model knows of."""
    relative_l2: float = 1e-7
    why_not_equivalent: Mapping[str, float] = field(default_factory=dict)
    """What else the equivalence probe measured."""
    compile_s: float = 60.0
    losses: Callable[[float], tuple[float, float]] = lambda lr: (1.0, 0.5)
    """lr -> loss of the first quarter of an lr probe's steps, and of its last."""
    model_factor: Callable[[Mapping[str, Scalar]], float] = lambda options: 1.0
    """Options -> factor on compute time and on memory per sample."""
    noise_scale: float | None = 500.0
    """Gradient noise scale in samples; None = it cannot be told."""
    evaluation: Callable[[RunConfig], EvaluationPart | None] = lambda config: None
    """What a soak says of its evaluation."""
    score: Callable[[Mapping[str, Scalar], int], float] = lambda options, seed: 0.0
    """Options and seed -> the metric `score` after training."""

    def compute_s(self, config: RunConfig) -> float:
        k, samples = config.accumulation_steps, config.micro_batch_size * config.accumulation_steps
        return (k * self.alpha + samples * self.beta + self.omega) * self._factor(config)

    def _factor(self, config: RunConfig) -> float:
        on = [config.precision, config.compile]
        named = {
            "channels_last": config.channels_last,
            "fused": config.optimizer.fused,
            "checkpointing": config.gradient_checkpointing,
        }
        keys = [*on, *(name for name, value in named.items() if value)]
        return self.model_factor(config.options) * math.prod(self.flag_factors.get(key, 1.0) for key in keys)

    def data_s(self, config: RunConfig) -> float:
        samples = config.micro_batch_size * config.accumulation_steps
        return samples * max(1e-6, self.data_per_sample) / max(1, config.loader.num_workers)

    def step_s(self, config: RunConfig) -> float:
        """True seconds of a production step."""
        workers = config.loader.num_workers
        compute, data = self.compute_s(config) * (1 + self.contention * workers), self.data_s(config)
        own = np.random.default_rng(int(config.digest(), 16)).normal()
        return (max(compute, data) if workers else compute + data) * math.exp(self.misfit * own)

    def rate(self, config: RunConfig) -> float:
        return config.effective_batch_size / self.step_s(config)

    def peak_bytes(self, config: RunConfig) -> float:
        share = 0.3 if config.gradient_checkpointing else 1.0
        model = self.model_factor(config.options)
        return self.fixed_bytes + share * self.sample_bytes * model * config.micro_batch_size

    def traced_bytes(self, config: RunConfig) -> float:
        """Live tensors alone: neither the allocator's waste nor what is held outside it."""
        return (self.peak_bytes(config) - 0.7 * self.fixed_bytes) / 1.15


class SimulatedRunner:
    """A ProbeRunner on a `World`: nothing is run, the clock is made up, noise follows from the seed."""

    def __init__(self, world: World, seed: int = 0, fault: Fault | None = None, fixed_s: float = 0.8) -> None:
        self._world = world
        self._seed = seed
        self._fault = fault or (lambda *_: None)
        self._fixed_s = fixed_s
        self.requests: list[ProbeRequest] = []
        self._compiled: set[tuple[CompileMode, int]] = set()
        self._host = 1.0

    def run(self, request: ProbeRequest, listener: Listener | None = None) -> ProbeReply:
        self.requests.append(request)
        rng = np.random.default_rng([self._seed, len(self.requests)])
        drift = math.exp(self._world.process_noise * rng.standard_normal())
        self._host = math.exp(self._world.host_noise * rng.standard_normal()) if self._world.host_noise else 1.0
        drift *= self._host
        points: list[PointReply] = []
        for index, config in enumerate(request.points):
            points.append(self._point(request, config, index, drift, rng))
            if points[-1].outcome in (Outcome.CRASHED, Outcome.TIMEOUT):
                missed = range(index + 1, len(request.points))
                points += [PointReply(index=i, outcome=Outcome.NO_RESULT, message="not reached") for i in missed]
                break
        share = self._fixed_s / len(points)
        timed = [point.model_copy(update={"seconds": point.seconds + share}) for point in points]
        return ProbeReply(
            request_id=request.id,
            points=tuple(timed),
            seconds=sum(point.seconds for point in timed),
            fixed_s=self._fixed_s,
        )

    def close(self) -> None:
        pass

    def _point(
        self, request: ProbeRequest, config: RunConfig, index: int, drift: float, rng: np.random.Generator
    ) -> PointReply:
        fault = self._fault(request, config, len(self.requests) - 1)
        if fault is None and request.kind not in (ProbeKind.LOADER, ProbeKind.TRACE):
            fault = Outcome.OOM_DEVICE if self._world.peak_bytes(config) > self._world.capacity_bytes else None
        if fault is not None:
            return PointReply(index=index, outcome=fault, message=f"injected {fault.value}", seconds=1.0)
        if request.kind is ProbeKind.EQUIVALENCE:
            values = {"relative_l2": self._world.relative_l2, **self._world.why_not_equivalent} if index else {}
            return PointReply(index=index, outcome=Outcome.OK, values=values, seconds=0.6)
        if request.kind is ProbeKind.TRACE:
            values = {"predicted_peak_bytes": self._world.traced_bytes(config)}
            return PointReply(index=index, outcome=Outcome.OK, values=values, seconds=1.0)
        if request.kind is ProbeKind.NOISE:
            return self._noise(request, config, index)
        if request.kind is ProbeKind.LR:
            return self._losses(request, config, index, rng)
        if request.kind is ProbeKind.QUALITY:
            assert request.samples is not None
            values = {"score": self._world.score(config.options, config.seed)}
            seconds = request.samples / self._world.rate(config)
            return PointReply(index=index, outcome=Outcome.OK, values=values, seconds=seconds)
        measurement, seconds = self._measured(request, config, drift, rng)
        return PointReply(
            index=index, outcome=Outcome.OK, measurement=measurement, seconds=seconds, environment=ENVIRONMENT
        )

    def _noise(self, request: ProbeRequest, config: RunConfig, index: int) -> PointReply:
        assert request.samples is not None
        phi, values = self._world.noise_scale, {"noise_low": 40.0, "warm_samples": float(request.samples)}
        if phi is not None:
            values |= {"noise_scale": phi, "noise_low": 0.8 * phi, "noise_high": 1.3 * phi}
        seconds = request.samples / self._world.rate(config)
        return PointReply(index=index, outcome=Outcome.OK, values=values, seconds=seconds)

    def _losses(self, request: ProbeRequest, config: RunConfig, index: int, rng: np.random.Generator) -> PointReply:
        first, final = self._world.losses(config.optimizer.lr)
        noise = math.exp(0.001 * np.random.default_rng(config.seed).standard_normal())
        assert request.samples is not None
        seconds = request.samples / self._world.rate(config)
        if not math.isfinite(final):
            return PointReply(index=index, outcome=Outcome.DIVERGED, message="the loss was not finite", seconds=seconds)
        losses = loss_curve(first * noise, final * noise)
        return PointReply(index=index, outcome=Outcome.OK, measurement=losses, seconds=seconds)

    def _measured(
        self, request: ProbeRequest, config: RunConfig, drift: float, rng: np.random.Generator
    ) -> tuple[Measurement, float]:
        world, loader = self._world, request.kind is ProbeKind.LOADER
        if loader:
            step, samples = world.data_s(config) / config.accumulation_steps, config.micro_batch_size
        else:
            alone = request.kind is ProbeKind.COMPUTE
            step, samples = world.compute_s(config) if alone else world.step_s(config), config.effective_batch_size
        measured = 0.6 * request.limits.measure_s
        count = int(np.clip(measured / step, request.limits.min_steps, 60))
        times = step * drift * np.exp(world.step_noise * rng.standard_normal(count))
        warm, compile_s = 3, self._compile_seconds(config, loader)
        peak = world.peak_bytes(config) * (1 + 0.005 * rng.standard_normal())
        memory = MemoryPeak(
            process_bytes=GIB,
            reserved_bytes=int(peak),
            allocated_bytes=int(0.9 * peak),
            evaluation=world.evaluation(config) if request.soak else None,
        )
        measurement = Measurement(
            samples_per_step=samples,
            step_s=(*(2 * step,) * warm, *(float(t) for t in times)),
            data_wait_s=() if loader else (0.0,) * (warm + count),
            warmup_steps=warm,
            memory=memory,
            phases_s={"build": 0.3, "compile": compile_s, "measure": measured},
            reference_s=(0.01 * self._host, 0.0101 * self._host) if request.reference else (),
        )
        spent = max(request.limits.measure_s, math.fsum(measurement.steady_step_s))
        return measurement, 0.6 + spent + compile_s + (3.0 if request.soak else 0.0)

    def _compile_seconds(self, config: RunConfig, loader: bool) -> float:
        if loader or config.compile is CompileMode.EAGER:
            return 0.0
        key = (config.compile, config.micro_batch_size)
        seconds = 4.0 if key in self._compiled else self._world.compile_s
        self._compiled.add(key)
        return seconds


ALL_PRECISIONS = (Precision.FP32, Precision.TF32, Precision.FP16, Precision.BF16)


def loss_curve(first: float, final: float) -> Measurement:
    """What an lr probe measured whose total loss fell (or rose) from `first` to `final`."""
    total = (*(first,) * 8, *np.geomspace(first, final, 16).tolist(), *(final,) * 8)
    return Measurement(
        samples_per_step=16, step_s=(0.01,) * 32, losses={"total": total}, memory=MemoryPeak(process_bytes=GIB)
    )


def make_spec(**changes: object) -> StudySpec:
    """A study of an 8x2 baseline on a simulated 16 GiB GPU; keywords replace fields of the spec."""
    target = GpuProfile(
        name="simulated", label="Simulated", kind="cuda", memory_bytes=16 * GIB, capability=(8, 0),
        dtypes=ALL_PRECISIONS, compile_modes=tuple(CompileMode),
    )  # fmt: skip
    device = DeviceInfo(
        kind="cuda", name="Simulated", capability=(8, 0), memory_bytes=16 * GIB, free_bytes=16 * GIB,
        host_bytes=64 * GIB, host_free_bytes=32 * GIB, cpu_name="simulated", cpu_count=8, torch="2",
        dtypes=ALL_PRECISIONS,
    )  # fmt: skip
    baseline = make_baseline()
    space = SearchSpace(
        micro_batch_size=(1, 2, 4, 8, 16),
        precision=(Precision.FP32, Precision.FP16),
        channels_last=(False, True),
        fused=(False, True),
        gradient_checkpointing=(False, True),
        num_workers=(0, 1, 2, 4),
        prefetch_factor=(2, 4),
    )
    fields: dict[str, object] = {
        "name": "simulated", "workload": "simulated", "target": target, "device": device, "baseline": baseline,
        "space": space, "effective_batch": 16, "memory_budget_bytes": int(0.92 * 16 * GIB), "budget_s": 240.0,
        "lr": LrSpec(enabled=False),
    }  # fmt: skip
    return StudySpec.model_validate({**fields, **changes})


def make_baseline(**changes: object) -> RunConfig:
    fields: dict[str, object] = {
        "workload": "simulated", "micro_batch_size": 8, "accumulation_steps": 2, "horizon_samples": 2_400_000,
        "optimizer": OptimizerConfig(lr=1e-4),
    }  # fmt: skip
    return RunConfig.model_validate({**fields, **changes})


def rows_of(request: ProbeRequest, reply: ProbeReply, number: int) -> list[ProbeRow]:
    """The rows a store would keep of a reply."""
    return [
        ProbeRow(
            number=number + point.index, request_id=request.id, index=point.index, kind=request.kind,
            stage=request.stage, config=request.points[point.index], pair=request.pair, soak=request.soak,
            outcome=point.outcome, message=point.message, measurement=point.measurement, values=point.values,
            environment=point.environment, seconds=point.seconds, fixed_s=reply.fixed_s / len(reply.points),
        )
        for point in reply.points
    ]  # fmt: skip


@dataclass
class Ended:
    """A study driven to its end."""

    spec: StudySpec
    rows: list[ProbeRow]
    requests: list[ProbeRequest]
    reason: str
    decision: Decision

    @property
    def seconds(self) -> float:
        return sum(row.seconds for row in self.rows)

    def of_stage(self, *names: str) -> list[ProbeRequest]:
        return [request for request in self.requests if request.stage.value in names]


def drive(
    spec: StudySpec,
    world: World,
    *,
    seed: int = 0,
    fault: Fault | None = None,
    rows: Sequence[ProbeRow] = (),
    propose: Callable[[int], dict[str, object]] | None = None,
    most: int = 300,
) -> Ended:
    """Ask, run, keep, until the planner is done."""
    runner, kept = SimulatedRunner(world, seed, fault), list(rows)
    for turn in range(most):
        plan = next_probe(spec, kept)
        if isinstance(plan, Done):
            return Ended(spec, kept, runner.requests, plan.reason, select(kept, spec))
        if isinstance(plan, Ask):
            plan = sampler_request(spec, kept, propose(turn)) if propose else proposed(spec, kept)
        kept += rows_of(plan, runner.run(plan), len(kept))
    raise AssertionError(f"the planner asked for more than {most} probes")
