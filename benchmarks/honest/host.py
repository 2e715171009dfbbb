"""Does the host's reference work, done before and after a probe's steps, tell how fast the host was for the steps?

python -m benchmarks.honest.host --rounds 8

Fresh processes of a few configurations in turns, on a host that others use; per configuration the spread of log speed
between processes, as measured and with the reference work taken out (slope one), and the slope that fits best.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
from pathlib import Path

from benchmarks.honest.turns import fresh_runner
from benchmarks.machine import print_machine, table
from tuner.contract.config import LoaderConfig, RunConfig
from tuner.contract.probe import ProbeKind, ProbeLimits, ProbeRequest, Stage
from tuner.contract.statistics import throughput
from tuner.probe.runner import SubprocessRunner

Point = tuple[float, float]
"""Log seconds of the reference work, log samples/s."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=["latent_cfg", "graph", "gpt2"])
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 2])
    parser.add_argument("--rounds", type=int, default=8)
    words = parser.parse_args()
    print_machine(f"python -m benchmarks.honest.host {' '.join(sys.argv[1:])}".strip())
    print(f"load     {os.getloadavg()[0]:.1f} at the start\n", flush=True)
    with fresh_runner() as runner:
        cache = Path(os.environ.get("TUNER_CACHE", "~/.cache/tuner")).expanduser()
        bases = {name: prepared(name, cache, runner) for name in words.workloads}
        found: dict[tuple[str, int], list[Point]] = {}
        for number in range(words.rounds):
            for name, base in bases.items():
                for workers in words.workers:
                    config = base.model_copy(update={"loader": LoaderConfig(num_workers=workers)}).canonical()
                    found.setdefault((name, workers), []).append(measured(config, number, cache, runner))
    rows = [(name, str(workers), *line(points)) for (name, workers), points in found.items()]
    heads = ("workload", "workers", "processes", "spread as measured", "with the host taken out", "slope")
    print(table(heads, rows))


def prepared(name: str, cache: Path, runner: SubprocessRunner) -> RunConfig:
    """The tiny preset's baseline, its data made."""
    words = {"workload": name, "options": {"preset": "tiny"}, "stage": Stage.SETUP, "cache_dir": str(cache)}
    reply = runner.run(ProbeRequest(id=f"{name}-describe", kind=ProbeKind.DESCRIBE, **words))  # type: ignore[arg-type]
    runner.run(ProbeRequest(id=f"{name}-prepare", kind=ProbeKind.PREPARE, **words))  # type: ignore[arg-type]
    if reply.description is None or reply.description.info is None:
        raise SystemExit(f"{name} could not be described")
    return reply.description.info.baseline


def measured(config: RunConfig, number: int, cache: Path, runner: SubprocessRunner) -> Point:
    request = ProbeRequest(
        id=f"{config.digest()}-{number}",
        kind=ProbeKind.END_TO_END,
        stage=Stage.GATE,
        workload=config.workload,
        options=config.options,
        points=(config,),
        limits=ProbeLimits(measure_s=3.0, half_width=1e-9),
        cache_dir=str(cache),
        reference=True,
    )
    reply = runner.run(request).points[0]
    if reply.measurement is None:
        raise SystemExit(f"the probe gave no result: {reply.outcome.value}: {reply.message}")
    work = statistics.fmean(reply.measurement.reference_s)
    return math.log(work), math.log(throughput(reply.measurement).value)


def line(points: list[Point]) -> tuple[str, ...]:
    work, speed = [x for x, _ in points], [y for _, y in points]
    taken_out = [x + y for x, y in points]
    slope = statistics.linear_regression(work, speed).slope
    spreads = (f"{100 * statistics.stdev(values):.1f} %" for values in (speed, taken_out))
    return str(len(points)), *spreads, f"{-slope:.2f}"


if __name__ == "__main__":
    main()
