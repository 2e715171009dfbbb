"""The gate's verdict against plain loops: pairs of configurations that differ little, who is faster?

python -m benchmarks.honest.sign --rounds 8

Of each pair the ship gate judges the second configuration against the first as it would judge a finalist, and plain
loops give the true ratio, in turns. Wrong = the gate's interval lies on one side of 1, and the loops' on the other.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from dataclasses import dataclass, replace

import torch  # noqa: F401 - imported here so that the plain loops are forked from a process that has it

from benchmarks.honest.plain_loop import Asked, samples_per_s
from benchmarks.honest.turns import config_of, fresh_runner, in_turns, probed
from benchmarks.machine import print_machine, table
from tuner.contract.measurement import Interval
from tuner.contract.statistics import paired_gain
from tuner.contract.study import GateSpec
from tuner.probe.runner import SubprocessRunner

SECONDS = 2.0


@dataclass(frozen=True)
class Pair:
    kind: str
    one: int
    other: int
    """Loader workers of the first and of the second."""
    cores: int
    batches: tuple[int, int] = (16, 16)

    def sides(self) -> tuple[Asked, Asked]:
        first = Asked(self.kind, self.batches[0], self.one, 2, SECONDS)
        return first, replace(first, num_workers=self.other, micro_batch_size=self.batches[1])

    def __str__(self) -> str:
        first, second = self.sides()
        return f"{self.kind} {first.micro_batch_size} w{self.one} -> {second.micro_batch_size} w{self.other}"


PAIRS = (
    Pair("burn", 0, 1, 1),
    Pair("burn", 0, 2, 1),
    Pair("burn", 0, 4, 1),
    Pair("burn", 1, 2, 1),
    Pair("burn", 2, 4, 1),
    Pair("burn", 2, 4, 2),
    Pair("burn", 4, 2, 2),
    Pair("burn", 0, 1, 2),
    Pair("sleep", 0, 1, 2),
    Pair("burn", 0, 0, 2, (16, 8)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="of the gate and of the loops, for each pair")
    parser.add_argument("--cores", nargs="+", type=int, default=[1, 2], help="only pairs that run on so many cores")
    words = parser.parse_args()
    print_machine(f"python -m benchmarks.honest.sign {' '.join(sys.argv[1:])}".strip())
    every = sorted(os.sched_getaffinity(0))
    rows = []
    for pair in (pair for pair in PAIRS if pair.cores in words.cores):
        os.sched_setaffinity(0, every[-pair.cores :])
        with fresh_runner() as runner:
            gate, truth = judged(pair, words.rounds, runner)
        rows.append((str(pair), str(pair.cores), shown(truth), shown(gate), verdict(gate, truth)))
        print("| " + " | ".join(rows[-1]) + " |", flush=True)
    os.sched_setaffinity(0, every)
    print("\n" + table(("pair", "cores", "plain loops", "gate", "verdict"), rows))
    print(f"\nproven and wrong: {sum(row[-1].startswith('WRONG') for row in rows)} of {len(rows)}")


def judged(pair: Pair, rounds: int, runner: SubprocessRunner) -> tuple[Interval, Interval]:
    """Ratio second / first: by the gate at its own error level, and by the loops at 95 %."""
    gates, loops = [], []
    first, second = pair.sides()

    def rate(asked: Asked, number: int) -> float:
        return probed(asked, f"{config_of(asked).digest()}-{number}", runner).samples_per_s

    for number in range(rounds):
        gates.append(in_turns(lambda: rate(first, number), lambda: rate(second, number), number))  # noqa: B023
        loops.append(in_turns(lambda: samples_per_s(first), lambda: samples_per_s(second), number))
    return ratio(gates, 1 - GateSpec().alpha), ratio(loops, 0.95)


def ratio(found: list[tuple[float, float]], confidence: float) -> Interval:
    return paired_gain([second for _, second in found], [first for first, _ in found], confidence)


def shown(found: Interval) -> str:
    return f"{found.value:.3f} ({found.low:.3f}-{found.high:.3f})"


def side(found: Interval) -> int:
    """1 = the second is proven faster, -1 = proven slower, 0 = neither."""
    return int(found.low > 1) - int(found.high < 1)


def verdict(gate: Interval, truth: Interval) -> str:
    if not side(gate):
        return "not proven"
    if side(gate) * side(truth) < 0:
        return "WRONG"
    agreed = "the loops agree" if side(truth) else "the loops cannot tell"
    apart = 100 * math.expm1(math.log(gate.value / truth.value))
    return f"proven, {agreed} ({apart:+.1f} %)"


if __name__ == "__main__":
    main()
