"""Hypothesis strategies for the contract's types."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from tuner.contract.config import (
    Cadence,
    CompileMode,
    EmaConfig,
    LoaderConfig,
    LossBands,
    OptimizerConfig,
    OptimizerName,
    Precision,
    RunConfig,
    ScheduleConfig,
    ScheduleKind,
)
from tuner.contract.measurement import Interval, Measurement, MemoryPeak, Outcome, Telemetry
from tuner.contract.probe import (
    NoticeEvent,
    PhaseEvent,
    PointReply,
    ProbeKind,
    ProbeLimits,
    ProbeRequest,
    ProgressEvent,
    Stage,
    TrainEvent,
    TrainPlan,
)
from tuner.contract.space import SearchSpace
from tuner.contract.tuned import Promise, TunedConfig

finite = st.floats(allow_nan=False, allow_infinity=False)
positive = st.floats(min_value=1e-12, max_value=1e12)
counts = st.integers(0, 1 << 40)
share = st.floats(0, 1)
# Words that YAML 1.1 would have read as something else, beside any text at all.
tricky = st.sampled_from(
    ["off", "on", "yes", "no", "null", "~", "3e-4", "1:30", "0x1f", "2026-01-01", "*a", "&a", "- a", ""]
)
texts = st.one_of(tricky, st.text(max_size=30))
scalars: st.SearchStrategy[Any] = st.one_of(texts, st.integers(-(1 << 60), 1 << 60), finite, st.booleans(), st.none())
options = st.dictionaries(texts, scalars, max_size=4)

optimizers = st.builds(
    OptimizerConfig,
    name=st.sampled_from(OptimizerName),
    lr=st.floats(1e-12, 100),
    betas=st.tuples(st.floats(0, 0.9999), st.floats(0, 0.9999)),
    eps=st.floats(1e-30, 1),
    weight_decay=st.floats(0, 10),
    momentum=st.floats(0, 0.99),
    fused=st.booleans(),
)
loaders = st.builds(
    LoaderConfig,
    num_workers=st.integers(0, 256),
    prefetch_factor=st.integers(1, 64),
    pin_memory=st.booleans(),
    persistent_workers=st.booleans(),
)
configs = st.builds(
    RunConfig,
    workload=st.sampled_from(["latent_cfg", "pkg.jobs:Job", "a-b.c"]),
    options=options,
    micro_batch_size=st.integers(1, 1 << 20),
    accumulation_steps=st.integers(1, 1 << 16),
    world_size=st.integers(1, 1 << 16),
    precision=st.sampled_from(Precision),
    compile=st.sampled_from(CompileMode),
    gradient_checkpointing=st.booleans(),
    channels_last=st.booleans(),
    loader=loaders,
    optimizer=optimizers,
    schedule=st.builds(ScheduleConfig, kind=st.sampled_from(ScheduleKind), warmup_samples=counts, final_factor=share),
    ema=st.one_of(st.none(), st.builds(EmaConfig, half_life_samples=st.integers(1, 1 << 40), warmup_ratio=share)),
    max_grad_norm=st.one_of(st.none(), positive),
    horizon_samples=st.integers(1, 1 << 50),
    cadence=st.builds(
        Cadence, log_samples=counts, evaluate_samples=counts, sample_samples=counts, checkpoint_samples=counts
    ),
    loss_bands=st.one_of(
        st.none(), st.builds(LossBands, normal_low=finite, normal_high=finite, warn_low=finite, warn_high=finite)
    ),
    threads=st.integers(0, 1024),
    seed=st.integers(0, (1 << 31) - 1),
)
peaks = st.builds(
    MemoryPeak,
    process_bytes=counts,
    base_bytes=counts,
    allocated_bytes=st.one_of(st.none(), counts),
    reserved_bytes=st.one_of(st.none(), counts),
    context_bytes=st.one_of(st.none(), counts),
)
measurements = st.builds(
    Measurement,
    samples_per_step=st.integers(1, 1 << 20),
    step_s=st.lists(positive, max_size=6).map(tuple),
    data_wait_s=st.lists(positive, max_size=6).map(tuple),
    losses=st.dictionaries(texts, st.lists(st.floats(allow_nan=False), max_size=4).map(tuple), max_size=2),
    warmup_steps=st.integers(0, 6),
    memory=peaks,
    phases_s=st.dictionaries(st.sampled_from(["build", "measure"]), positive),
    telemetry=st.one_of(st.none(), st.builds(Telemetry, gpu_utilization=st.one_of(st.none(), share))),
    parameters=st.one_of(st.none(), counts),
    flops_per_sample=st.one_of(st.none(), positive),
)
replies = st.builds(
    PointReply,
    index=st.integers(0, 100),
    outcome=st.sampled_from(Outcome),
    message=texts,
    detail=st.text(max_size=200),
    measurement=st.one_of(st.none(), measurements),
    values=st.dictionaries(texts, st.floats(allow_nan=False), max_size=3),
    seconds=finite,
)
requests = st.builds(
    ProbeRequest,
    id=st.text(min_size=1, max_size=40),
    kind=st.sampled_from(ProbeKind),
    stage=st.sampled_from(Stage),
    workload=st.sampled_from(["latent_cfg", "pkg:Job"]),
    options=options,
    points=st.lists(configs, max_size=2).map(tuple),
    limits=st.builds(ProbeLimits, measure_s=positive, memory_bytes=st.one_of(st.none(), st.integers(1, 1 << 40))),
    device=st.sampled_from(["auto", "cpu", "cuda"]),
    train=st.one_of(st.none(), st.builds(TrainPlan, out_dir=texts)),
)
events = st.one_of(
    replies,
    st.builds(PhaseEvent, phase=texts),
    st.builds(ProgressEvent, done=counts, total=counts, text=texts),
    st.builds(NoticeEvent, level=st.sampled_from(["info", "warning"]), text=texts),
    st.builds(TrainEvent, samples=counts, step=counts, elapsed_s=positive, samples_per_s=positive),
)
intervals = st.builds(Interval, value=finite, low=st.floats(allow_nan=False), high=st.floats(allow_nan=False))
rates = st.lists(st.floats(1e-6, 1e12), min_size=3, max_size=3).map(
    lambda drawn: Interval(low=min(drawn), value=sorted(drawn)[1], high=max(drawn))
)
spaces = st.builds(
    SearchSpace,
    micro_batch_size=st.lists(st.integers(1, 4096), max_size=4).map(tuple),
    precision=st.lists(st.sampled_from(Precision), max_size=3).map(tuple),
    fused=st.lists(st.booleans(), max_size=2).map(tuple),
    lr=st.lists(st.floats(1e-9, 1), max_size=3).map(tuple),
)
_tuned = st.builds(
    TunedConfig,
    config=configs,
    promise=st.one_of(
        st.none(),
        st.builds(
            Promise,
            samples_per_s=rates,
            peak_bytes=counts,
            peak_low_bytes=counts,
            peak_high_bytes=counts,
            hours=positive,
            gain=rates,
        ),
    ),
    provenance=st.none(),
    runner_ups=st.just(()),
)
tuned = st.tuples(_tuned, st.lists(configs, max_size=1)).map(
    lambda drawn: drawn[0].model_copy(
        update={
            "runner_ups": tuple(config.model_copy(update={"workload": drawn[0].config.workload}) for config in drawn[1])
        }
    )
)
