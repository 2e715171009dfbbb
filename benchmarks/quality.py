"""Does it learn? Every workload's tiny baseline, trained for a while, against its metrics without any learning.

python -m benchmarks.quality --seconds 150
python -m benchmarks.quality --workload gpt2 --workload graph
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from benchmarks.machine import Called, print_machine, table, tuner
from tuner.contract.workload import ERROR, SURE

CLEARLY = 0.1
"""Share of the way from trivial to perfect that counts as clear; perfect is 1 for what should be high, 0 for what
should be low. A trivial value of 1 or more that should be higher must be exceeded by this share of itself."""
HEADS = ("workload", "metric", "reached", "trivial", "clearly better?", "samples")


def main() -> None:
    words = parse()
    known = described()
    wanted = words.workload or sorted(known)
    print_machine(f"python -m benchmarks.quality --seconds {words.seconds:g} --workload {' '.join(wanted)}")
    rows: list[tuple[object, ...]] = []
    failed: list[str] = []
    for name in wanted:
        print(f"training {name} (tiny) for {words.seconds:g} s ...", file=sys.stderr, flush=True)
        called = trained(name, words.seconds)
        if not called.result:
            raise SystemExit(f"{name} gave no result (exit code {called.code}):\n{called.log}")
        shown = judged(name, called.result)
        rows += shown
        print(f"  {'; '.join(f'{row[1]} {row[2]}: {row[4]}' for row in shown)}", file=sys.stderr, flush=True)
        failed += [name] if not passed(shown, known.get(name, "")) else []
    print(table(HEADS, rows))
    print(f"\nclearly better than without learning: {len(wanted) - len(failed)} of {len(wanted)}")
    if failed:
        raise SystemExit(f"not clearly better: {', '.join(failed)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", action="append", help="a registered name; repeatable (default: all)")
    parser.add_argument("--seconds", type=float, default=150.0, help="length of each training")
    return parser.parse_args()


def described() -> dict[str, str]:
    """Registered workload -> the metric its baseline judges by; empty = it names none."""
    called = tuner("workloads", "--json", timeout_s=300.0)
    return {info["name"]: (info["baseline"]["quality"] or {}).get("metric", "") for info in called.result["workloads"]}


def trained(name: str, seconds: float) -> Called:
    """The workload's tiny baseline, in a folder of its own that is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="tuner-quality-") as folder:
        return tuner(
            "train", "--workload", name, "--preset", "tiny", "--max-minutes", str(seconds / 60), "--json",
            "--out", f"{folder}/run", "--storage", f"sqlite:///{folder}/studies.db",
        )  # fmt: skip


def judged(name: str, result: Mapping[str, Any]) -> list[tuple[object, ...]]:
    """A row for every metric that has something to be compared with."""
    rows: list[tuple[object, ...]] = []
    for metric, trivial in result["trivial"].items():
        value = result["metrics"].get(metric)
        reached = "-" if value is None else f"{value:.4g}"
        beside = f"{trivial['value']:.4g} ({trivial['text']})"
        error = result["metrics"].get(metric + ERROR, 0.0)
        rows.append((name, metric, reached, beside, verdict(value, trivial, error), f"{result['samples']:,}"))
    return rows


def verdict(value: float | None, trivial: Mapping[str, Any], error: float = 0.0) -> str:
    """`yes`, `a little`, or `NO`: what lies within the noise that its standard error tells of is no better."""
    without = float(trivial["value"])
    if value is None:
        return "NO"
    if trivial["higher_is_better"]:
        better = value - without
        room = 1 - without if without < 1 else abs(without)
    else:
        better, room = without - value, abs(without)
    if not better > SURE * error:
        return "NO"
    return "yes" if better >= CLEARLY * room else "a little"


def passed(rows: list[tuple[object, ...]], metric: str) -> bool:
    """The metric the workload judges by is clearly better; where it names none, all are."""
    verdicts = {row[1]: row[4] for row in rows}
    asked = [verdicts[metric]] if metric in verdicts else list(verdicts.values())
    return bool(asked) and all(said == "yes" for said in asked)


if __name__ == "__main__":
    main()
