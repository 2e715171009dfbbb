"""What a study's probes cost beside measuring: the fixed cost of each process, from the rows in the store.

python -m benchmarks.overhead latent_cfg-tiny-p100
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter

from benchmarks.machine import print_machine, table
from tuner.contract.probe import ProbeRow
from tuner.store.store import StudyStore

MEASURING = ("warmup", "measure")
BUILDING = ("build", "compile")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study")
    parser.add_argument("--storage", default="sqlite:///studies/studies.db")
    words = parser.parse_args()
    print_machine(f"python -m benchmarks.overhead {words.study} --storage {words.storage}")
    rows = StudyStore.open(words.storage).rows(words.study)
    processes = first_points(rows)
    print(table(("kind", "processes", "fixed s (median)", "fixed s (max)"), by_kind(processes)))
    total = sum(row.seconds for row in rows)
    fixed = sum(row.fixed_s for row in processes)
    building, measuring = phases(rows, BUILDING), phases(rows, MEASURING)
    print(f"\nmedian fixed cost of a probe's process: {statistics.median(row.fixed_s for row in processes):.2f} s")
    print(f"of {total:.0f} s in probes: fixed {share(fixed, total)}, building {share(building, total)}, "
          f"warm-up and measuring {share(measuring, total)}")  # fmt: skip
    print("outcomes: " + ", ".join(f"{name} {count}" for name, count in Counter(r.outcome.value for r in rows).items()))


def first_points(rows: tuple[ProbeRow, ...]) -> list[ProbeRow]:
    """One row per process: its fixed cost is written on each of its points."""
    return [row for row in rows if row.index == 0]


def by_kind(processes: list[ProbeRow]) -> list[tuple[object, ...]]:
    kinds = sorted({row.kind.value for row in processes})
    found = [(kind, [row.fixed_s for row in processes if row.kind.value == kind]) for kind in kinds]
    return [(kind, len(costs), f"{statistics.median(costs):.2f}", f"{max(costs):.2f}") for kind, costs in found]


def phases(rows: tuple[ProbeRow, ...], names: tuple[str, ...]) -> float:
    return sum(row.measurement.phases_s.get(name, 0.0) for row in rows if row.measurement for name in names)


def share(part: float, total: float) -> str:
    return f"{part:.0f} s ({100 * part / total:.0f} %)" if total else f"{part:.0f} s"


if __name__ == "__main__":
    main()
