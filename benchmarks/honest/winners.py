"""Is what is shipped really faster? The whole search on a job whose loader binds, and its winner against plain loops.

taskset -c 1 python -m benchmarks.honest.winners --runs 10

On one core workers bring nothing to a data set that computes. A false winner = shipped with a gain, and its plain loop
is proven slower than the baseline's.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch  # noqa: F401 - imported here so that the plain loops are forked from a process that has it

from benchmarks.honest.plain_loop import Asked, samples_per_s
from benchmarks.honest.sign import ratio, shown, side
from benchmarks.honest.turns import CLASSES, in_turns, workload_of
from benchmarks.machine import print_machine, table, tuner
from tuner.contract.base import parse
from tuner.contract.measurement import Interval

STUDY = """
workload: {workload}
space: {{num_workers: [0, 1, 2]}}
budget_s: {budget}
gate: {{min_pairs: 4, max_pairs: 8, finalists: 1, measure_s: 2.0}}
"""
LOOPS = 6
"""Pairs of plain loops for each winner."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", choices=list(CLASSES), default="burn")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--budget", type=float, default=90.0)
    words = parser.parse_args()
    print_machine(f"python -m benchmarks.honest.winners {' '.join(sys.argv[1:])}".strip())
    print(f"cores    {len(os.sched_getaffinity(0))} usable\n", flush=True)
    rows, false = [], 0
    for number in range(words.runs):
        result = searched(words.job, words.budget)
        workers, gain = shipped(result)
        truth = true_ratio(words.job, workers) if workers else None
        wrong = truth is not None and side(truth) < 0
        false += wrong
        rows.append((str(number + 1), result["decision"], f"w{workers}", gain, shown(truth) if truth else "-"))
        print("| " + " | ".join(rows[-1]) + (" | FALSE |" if wrong else " |"), flush=True)
    print("\n" + table(("run", "decision", "shipped", "gate", "plain loops"), rows))
    print(f"\nfalse winners: {false} of {words.runs}")


def searched(kind: str, budget: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="tuner-winners-") as name:
        folder = Path(name)
        (folder / "study.yaml").write_text(STUDY.format(workload=workload_of(kind), budget=budget))
        called = tuner(
            "optimize", "--workload", workload_of(kind), "--gpu", "auto", "--spec", str(folder / "study.yaml"),
            "--storage", f"sqlite:///{folder}/studies.db", "--out", str(folder / "best.yaml"), "--json",
        )  # fmt: skip
    if not called.result:
        raise SystemExit(f"no result (exit code {called.code}):\n{called.log}")
    return called.result


def shipped(result: dict[str, Any]) -> tuple[int, str]:
    """Loader workers of what is shipped, and the gate's gain."""
    config = result["winner"]["config"] if result.get("winner") else result["baseline"]["config"]
    gain = result.get("gain")
    told = shown(parse(Interval, gain)) if gain else "-"
    return int(config["loader"]["num_workers"]), told


def true_ratio(kind: str, workers: int) -> Interval:
    """Plain loops with so many workers over those without, in turns."""
    base, other = Asked(kind, 16, 0, 2, 2.0), Asked(kind, 16, workers, 2, 2.0)
    found = [in_turns(lambda: samples_per_s(base), lambda: samples_per_s(other), n) for n in range(LOOPS)]
    return ratio(found, 0.95)


if __name__ == "__main__":
    main()
