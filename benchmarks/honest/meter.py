"""Probes against plain loops: samples/s of the same job and configuration, in turns, as ratios.

python -m benchmarks.honest.meter --pairs 20
python -m benchmarks.honest.meter --jobs burn --workers 0 2 4 --busy 1      # beside one busy neighbour
taskset -c 1 python -m benchmarks.honest.meter                               # on one core

A ratio of 1.03 = the probe says 3 % more than the loop reaches.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys

import torch  # noqa: F401 - imported here so that the plain loops are forked from a process that has it

from benchmarks.honest.jobs import BATCH
from benchmarks.honest.plain_loop import Asked, samples_per_s
from benchmarks.honest.turns import CLASSES, fresh_runner, in_turns, neighbours, probed
from benchmarks.machine import print_machine, table
from tuner.contract.statistics import paired_gain
from tuner.probe.runner import SubprocessRunner


def main() -> None:
    words = parse()
    print_machine(f"python -m benchmarks.honest.meter {' '.join(sys.argv[1:])}".strip())
    print(f"cores    {len(os.sched_getaffinity(0))} usable, {words.busy} busy neighbours\n", flush=True)
    rows = []
    with neighbours(words.busy), fresh_runner() as runner:
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


def compared(kind: str, workers: int, words: argparse.Namespace, runner: SubprocessRunner) -> tuple[str, ...]:
    asked = Asked(kind, BATCH, workers, words.prefetch, words.seconds)

    def loop() -> float:
        return samples_per_s(asked)

    def probe() -> float:
        return probed(asked, f"{kind}-{workers}", runner).samples_per_s

    found = [in_turns(loop, probe, number) for number in range(words.pairs)]
    ratios = [measured / plain for plain, measured in found]
    mean = paired_gain([measured for _, measured in found], [plain for plain, _ in found])
    return (
        kind,
        str(workers),
        str(words.pairs),
        f"{statistics.median(plain for plain, _ in found):,.0f}",
        f"{mean.value:.3f} ({mean.low:.3f}-{mean.high:.3f})",
        f"{statistics.median(ratios):.3f}",
        f"{max(ratios, key=lambda ratio: abs(ratio - 1)):.3f}",
    )


if __name__ == "__main__":
    main()
