"""Probes against plain loops: samples/s of the same job and configuration, in turns, as ratios.

python -m benchmarks.honest.meter --pairs 20
python -m benchmarks.honest.meter --jobs burn --workers 0 2 4 --busy 1      # beside one busy neighbour
taskset -c 1 python -m benchmarks.honest.meter                               # on one core

A ratio of 1.03 = the probe says 3 % more than the loop reaches. Probes are measured as the ship gate measures: with the
host's reference work, in fresh processes, never ended early.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch  # noqa: F401 - imported here so that the plain loops can be forked from a process that has it

from benchmarks.honest.jobs import BATCH
from benchmarks.honest.plain_loop import Asked, samples_per_s
from benchmarks.machine import print_machine, table
from tuner.contract.config import LoaderConfig, RunConfig
from tuner.contract.probe import ProbeKind, ProbeLimits, ProbeRequest, Stage
from tuner.contract.statistics import paired_gain, throughput
from tuner.probe.runner import SubprocessRunner

CLASSES = {"sleep": "Sleeping", "burn": "Burning"}
BURN = "while True: pass"


def main() -> None:
    words = parse()
    print_machine(f"python -m benchmarks.honest.meter {' '.join(sys.argv[1:])}".strip())
    print(f"cores    {len(os.sched_getaffinity(0))} usable, {words.busy} busy neighbours\n", flush=True)
    rows = []
    with (
        neighbours(words.busy),
        tempfile.TemporaryDirectory(prefix="tuner-meter-") as folder,
        SubprocessRunner(Path(folder) / "cache", log_dir=Path(folder) / "logs") as runner,
    ):
        for kind, workers in itertools.product(words.jobs, words.workers):
            rows.append(compared(kind, workers, words, runner))
            print("| " + " | ".join(rows[-1]) + " |", flush=True)
    heads = ("job", "workers", "pairs", "plain loop, samples/s", "probe / loop (95 %)", "median", "worst")
    print("\n" + table(heads, rows))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=list(CLASSES), default=list(CLASSES))
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2, 4, 8, 16, 32])
    parser.add_argument("--prefetch", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measured stretch")
    parser.add_argument("--busy", type=int, default=0, help="busy loops to run beside")
    return parser.parse_args()


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[None]:
    """So many processes that only compute, as long as it is held."""
    burning = [subprocess.Popen([sys.executable, "-c", BURN]) for _ in range(count)]
    try:
        yield
    finally:
        for process in burning:
            process.kill()
            process.wait()


def compared(kind: str, workers: int, words: argparse.Namespace, runner: SubprocessRunner) -> tuple[str, ...]:
    asked = Asked(kind, BATCH, workers, words.prefetch, words.seconds)
    found = [pair(asked, number, runner) for number in range(words.pairs)]
    loops, probes = [loop for loop, _ in found], [probe for _, probe in found]
    ratios = sorted(probe / loop for probe, loop in zip(probes, loops, strict=True))
    gain = paired_gain(probes, loops)
    worst = max(ratios, key=lambda ratio: abs(ratio - 1))
    middle = f"{gain.value:.3f} ({gain.low:.3f}-{gain.high:.3f})"
    return (
        kind, str(workers), str(words.pairs), f"{statistics.median(loops):,.0f}", middle,
        f"{statistics.median(ratios):.3f}", f"{worst:.3f}",
    )  # fmt: skip


def pair(asked: Asked, number: int, runner: SubprocessRunner) -> tuple[float, float]:
    """Samples/s of the loop and of the probe; now the one first, now the other."""
    if number % 2:
        return samples_per_s(asked), probed(asked, number, runner)
    probe = probed(asked, number, runner)
    return samples_per_s(asked), probe


def probed(asked: Asked, number: int, runner: SubprocessRunner) -> float:
    """Samples/s of one end-to-end probe, as the ship gate takes it."""
    request = ProbeRequest(
        id=f"{asked.kind}-{asked.num_workers}-{number}",
        kind=ProbeKind.END_TO_END,
        stage=Stage.GATE,
        workload=f"benchmarks.honest.jobs:{CLASSES[asked.kind]}",
        points=(config_of(asked),),
        limits=ProbeLimits(measure_s=asked.seconds, half_width=1e-9),
        reference=True,
    )
    reply = runner.run(request).points[0]
    if reply.measurement is None:
        raise SystemExit(f"the probe gave no result: {reply.outcome.value}: {reply.message}")
    return throughput(reply.measurement).value


def config_of(asked: Asked) -> RunConfig:
    from benchmarks.honest import jobs

    base: RunConfig = getattr(jobs, CLASSES[asked.kind])({}).info().baseline
    loader = LoaderConfig(num_workers=asked.num_workers, prefetch_factor=asked.prefetch_factor)
    return base.model_copy(update={"loader": loader}).canonical()


if __name__ == "__main__":
    main()
