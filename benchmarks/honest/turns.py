"""What these benchmarks share: a job and a configuration, as a plain loop and as a probe of the ship gate; in turns."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.honest import jobs
from benchmarks.honest.plain_loop import Asked
from tuner.contract.config import LoaderConfig, RunConfig
from tuner.contract.probe import PointReply, ProbeKind, ProbeLimits, ProbeRequest, Stage
from tuner.contract.statistics import throughput
from tuner.contract.trust import ANY_CODE
from tuner.probe.runner import SubprocessRunner

CLASSES = {"sleep": "Sleeping", "burn": "Burning"}
BURN = "while True: pass"


@dataclass(frozen=True)
class Measured:
    """One probe of the ship gate."""

    samples_per_s: float
    reference_s: tuple[float, ...]


def workload_of(kind: str) -> str:
    return f"benchmarks.honest.jobs:{CLASSES[kind]}"


def config_of(asked: Asked) -> RunConfig:
    """The job's baseline with the micro-batch and the loader asked for, at the same effective batch."""
    base: RunConfig = getattr(jobs, CLASSES[asked.kind])({}).info().baseline
    loader = LoaderConfig(num_workers=asked.num_workers, prefetch_factor=asked.prefetch_factor)
    return base.model_copy(update={"loader": loader, "micro_batch_size": asked.micro_batch_size}).canonical()


def probed(asked: Asked, name: str, runner: SubprocessRunner) -> Measured:
    """As the ship gate measures: a fresh process, the host's reference work, never ended early."""
    request = ProbeRequest(
        id=name,
        kind=ProbeKind.END_TO_END,
        stage=Stage.GATE,
        workload=workload_of(asked.kind),
        points=(config_of(asked),),
        limits=ProbeLimits(measure_s=asked.seconds, half_width=1e-9),
        reference=True,
    )
    reply: PointReply = runner.run(request).points[0]
    if reply.measurement is None:
        raise SystemExit(f"the probe gave no result: {reply.outcome.value}: {reply.message}")
    return Measured(throughput(reply.measurement).value, reply.measurement.reference_s)


def in_turns(first: Callable[[], float], second: Callable[[], float], number: int) -> tuple[float, float]:
    """Both figures; now the one is measured first, now the other."""
    if number % 2:
        one = first()
        return one, second()
    two = second()
    return first(), two


@contextlib.contextmanager
def fresh_runner() -> Iterator[SubprocessRunner]:
    with (
        tempfile.TemporaryDirectory(prefix="tuner-honest-") as folder,
        SubprocessRunner(Path(folder) / "cache", log_dir=Path(folder) / "logs", trust=ANY_CODE) as runner,
    ):
        yield runner


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[None]:
    """So many processes that only compute, each in a session of its own, as long as it is held."""
    burning = [subprocess.Popen([sys.executable, "-c", BURN], start_new_session=True) for _ in range(count)]
    try:
        yield
    finally:
        for process in burning:
            process.kill()
            process.wait()
