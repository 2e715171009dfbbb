"""The PROFILE probe: where a step of the real loop spends its time, loader included.

Three passes over one trainer: plain steps give the step's time; timed steps give the share of each part; a few steps
under torch.profiler give the trace and the operators. So the profiler's own cost is in no figure.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, record_function

from tuner.contract.config import RunConfig
from tuner.contract.errors import ConfigError
from tuner.contract.measurement import Measurement
from tuner.contract.probe import NoticeEvent
from tuner.engine.bench import Answer, Bench
from tuner.engine.memory import PeakMemory
from tuner.engine.meter import FIRST_STEPS, buffered_steps
from tuner.engine.record import StepRecord
from tuner.engine.step import no_span
from tuner.engine.trainer import Trainer

PARTS = ("data_wait", "transfer", "forward", "backward", "optimizer", "ema", "other")
"""`optimizer`: clipping, the update, clearing gradients. `other`: the loop itself, the sum of the loss terms."""
PROFILED_STEPS = 4
MOST_STEPS = 200
TOP_OPERATORS = 25
WARMUP_SHARE = 1.0
"""Warm-up takes at most this many times `measure_s`."""


@dataclass(frozen=True)
class Operator:
    """One kind of operation in the profiled steps, seconds without those of the operations it called."""

    name: str
    calls: int
    cpu_s: float
    device_s: float


class TimedParts:
    """The span of timed steps: seconds of each part. On a GPU every part is waited for, so that its work counts in it;
    a step is then a little longer than in the plain loop, where parts overlap."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds = dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = self.now()
        try:
            yield
        finally:
            self.seconds[name] += self.now() - began

    def now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def profile(bench: Bench) -> None:
    """Raises nothing: a point that fails is a reply. `values`: share_<part>, step_s, timed_step_s."""
    bench.each_point(lambda config: _profile(bench, config))


def _profile(bench: Bench, config: RunConfig) -> Answer:
    folder = _folder(bench, config)
    memory = bench.peak_memory()
    trainer = Trainer(bench.workload(config), config, device=bench.device, dataset=bench.dataset(config))
    record = StepRecord(trainer.clock)
    try:
        bench.phases.enter("warmup")
        warm = _warm_up(bench, trainer, record)
        bench.phases.enter("measure")
        count = _plain(bench, trainer, record)
        timed = [_timed_step(trainer) for _ in range(count)]
        operators = _trace(trainer, folder / "trace.json.gz")
        values = _values(timed, record.step_s[warm:].tolist())
        _write(folder, timed, operators, values)
        bench.emit(NoticeEvent(text=f"trace, steps and operators of the step: {folder}"))
        return _measurement(bench, trainer, record, memory, warm), values
    finally:
        trainer.close()


def _folder(bench: Bench, config: RunConfig) -> Path:
    """Where this point's files go: `out_dir`, or a folder of its own there when there are several points."""
    request = bench.request
    if not request.out_dir:
        raise ConfigError("out_dir: a profile needs a folder for its trace and tables (got none)")
    folder = Path(request.out_dir)
    if len(request.points) > 1:
        folder /= str(request.points.index(config))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out_dir: {folder} cannot be made: {error.strerror}") from None
    return folder


def _warm_up(bench: Bench, trainer: Trainer, record: StepRecord) -> int:
    """Steps until the loader's buffer is dropped (or `measure_s` is spent); returns how many."""
    wanted, began = FIRST_STEPS + buffered_steps(trainer.config), time.monotonic()
    while trainer.steps < wanted:
        record.add(trainer.step())
        late = time.monotonic() - began > WARMUP_SHARE * bench.request.limits.measure_s
        if late and trainer.steps >= FIRST_STEPS:
            break
    return trainer.steps


def _plain(bench: Bench, trainer: Trainer, record: StepRecord) -> int:
    """Undisturbed steps for `measure_s`, at least `min_steps`; returns how many."""
    limits, began, count = bench.request.limits, time.monotonic(), 0
    while count < MOST_STEPS and (count < limits.min_steps or time.monotonic() - began < limits.measure_s):
        record.add(trainer.step())
        count += 1
    record.drain()
    return count


def _timed_step(trainer: Trainer) -> dict[str, float]:
    """Seconds of each part of one step; their sum is the whole step."""
    parts = TimedParts(trainer.device)
    trainer.annotate(parts)
    began = parts.now()
    try:
        trainer.step()
    finally:
        trainer.annotate(no_span)
    parts.seconds["other"] = max(0.0, parts.now() - began - sum(parts.seconds.values()))
    trainer.clock.take(wait=True)
    return parts.seconds


def _trace(trainer: Trainer, path: Path) -> list[Operator]:
    """A few steps under torch.profiler: the trace goes to `path` (Chrome's format, for chrome://tracing or Perfetto),
    the operators come back, the most expensive first."""
    activities = [ProfilerActivity.CPU]
    if trainer.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    trainer.annotate(record_function)
    try:
        with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
            for number in range(PROFILED_STEPS):
                with record_function(f"step {number}"):
                    trainer.step()
            if trainer.device.type == "cuda":
                torch.cuda.synchronize(trainer.device)
    finally:
        trainer.annotate(no_span)
    profiler.export_chrome_trace(str(path))
    spans = {*PARTS, *(f"step {number}" for number in range(PROFILED_STEPS))}
    found = [
        Operator(event.key, event.count, 1e-6 * event.self_cpu_time_total, 1e-6 * event.self_device_time_total)
        for event in profiler.key_averages()
        if event.key not in spans
    ]
    return sorted(found, key=lambda operator: -max(operator.device_s, operator.cpu_s * (trainer.device.type == "cpu")))


def _values(timed: Sequence[Mapping[str, float]], plain_s: Sequence[float]) -> dict[str, float]:
    total = sum(sum(step.values()) for step in timed)
    shares = {f"share_{part}": sum(step[part] for step in timed) / total for part in PARTS}
    return {**shares, "step_s": sum(plain_s) / len(plain_s), "timed_step_s": total / len(timed)}


def _write(
    folder: Path, timed: Sequence[Mapping[str, float]], operators: Sequence[Operator], values: Mapping[str, float]
) -> None:
    """steps.csv (a row for each timed step), operators.csv (each kind of operation), profile.txt (both in short)."""
    heads = ("step", *(f"{part}_s" for part in PARTS), "total_s")
    rows = [
        (number, *(f"{step[p]:.9f}" for p in PARTS), f"{sum(step.values()):.9f}") for number, step in enumerate(timed)
    ]
    _write_csv(folder / "steps.csv", heads, rows)
    columns = ("operator", "calls_per_step", "self_cpu_s_per_step", "self_device_s_per_step")
    _write_csv(folder / "operators.csv", columns, [_per_step(operator) for operator in operators])
    (folder / "profile.txt").write_text(table(values, operators), encoding="utf-8")


def _per_step(operator: Operator) -> tuple[str, ...]:
    figures = (operator.calls, operator.cpu_s, operator.device_s)
    return (operator.name, *(f"{figure / PROFILED_STEPS:.9g}" for figure in figures))


def _write_csv(path: Path, heads: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as target:
        writer = csv.writer(target, lineterminator="\n")
        writer.writerow(heads)
        writer.writerows(rows)


def table(values: Mapping[str, float], operators: Sequence[Operator]) -> str:
    """For people: the parts of the step, and its most expensive operators."""
    lines = [f"a step takes {1e3 * values['step_s']:.3f} ms", "", f"{'part':<12}{'share':>8}"]
    lines += [f"{part:<12}{100 * values[f'share_{part}']:>6.1f} %" for part in PARTS]
    lines += ["", f"{'operator':<56}{'calls':>8}{'CPU ms':>10}{'GPU ms':>10}   per step, without what it calls"]
    for operator in operators[:TOP_OPERATORS]:
        calls, cpu_s, device_s = (
            figure / PROFILED_STEPS for figure in (operator.calls, operator.cpu_s, operator.device_s)
        )
        lines.append(f"{operator.name[:54]:<56}{calls:>8.4g}{1e3 * cpu_s:>10.3f}{1e3 * device_s:>10.3f}")
    return "\n".join(lines) + "\n"


def _measurement(bench: Bench, trainer: Trainer, record: StepRecord, memory: PeakMemory, warm: int) -> Measurement:
    return record.measurement(
        trainer.config.effective_batch_size,
        memory.read(),
        least_warmup=warm,
        phases_s=bench.phases.seconds(),
        parameters=trainer.parameter_count,
        flops_per_sample=trainer.flops_per_sample,
    )
