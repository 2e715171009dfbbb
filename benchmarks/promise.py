"""Promise against reality: production runs with a best.<gpu>.yaml, each in a fresh folder.

python -m benchmarks.promise --config studies/latent_cfg/best.p100.yaml --runs 3 --seconds 130
"""

from __future__ import annotations

import argparse
import json
import tempfile
from typing import Any

from benchmarks.machine import print_machine, table, tuner


def main() -> None:
    words = parse()
    print_machine(f"python -m benchmarks.promise --config {words.config} --runs {words.runs} --seconds {words.seconds}")
    results = [one_run(words.config, words.seconds, number) for number in range(words.runs)]
    print(table(HEADS, [row(number + 1, result) for number, result in enumerate(results)]))
    inside = sum(in_interval(result) for result in results)
    kept = sum(abs(judged(result)) <= 0.03 for result in results)
    print(f"\nwithin 3 % (beyond the host's drift where it is known): {kept} of {len(results)}")
    print(f"raw figure inside the promised interval: {inside} of {len(results)}")
    if words.json:
        with open(words.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=2)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="studies/latent_cfg/best.p100.yaml")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=130.0, help="length of each run")
    parser.add_argument("--json", help="also write every result here")
    return parser.parse_args()


HEADS = (
    "run",
    "promised samples/s",
    "reached",
    "raw",
    "host drift",
    "beyond drift",
    "peak promised",
    "reached",
    "peak",
)


def one_run(config: str, seconds: float, number: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="tuner-promise-") as folder:
        called = tuner(
            "train", "--config", config, "--out", f"{folder}/run", "--max-hours", str(seconds / 3600), "--json",
            "--storage", f"sqlite:///{folder}/studies.db",
        )  # fmt: skip
    if not called.result:
        raise SystemExit(f"run {number + 1} gave no result (exit code {called.code}):\n{called.log}")
    return called.result


def judged(result: dict[str, Any]) -> float:
    value = result["deviation"] if result["deviation_beyond_drift"] is None else result["deviation_beyond_drift"]
    return float(value)


def in_interval(result: dict[str, Any]) -> bool:
    promised = result["promised_samples_per_s"]
    return bool(promised["low"] <= result["samples_per_s"]["value"] <= promised["high"])


def row(number: int, result: dict[str, Any]) -> tuple[object, ...]:
    promised = result["promised_samples_per_s"]
    return (
        number,
        f"{promised['value']:.1f} ({promised['low']:.1f}-{promised['high']:.1f})",
        f"{result['samples_per_s']['value']:.1f}",
        percent(result["deviation"]),
        "unknown" if result["host_drift"] is None else f"{result['host_drift']:.3f}",
        percent(result["deviation_beyond_drift"]),
        f"{result['promised_peak_bytes'] / (1 << 20):.0f} MiB",
        f"{result['peak_bytes'] / (1 << 20):.0f} MiB",
        percent(result["peak_deviation"]),
    )


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:+.1f} %"


if __name__ == "__main__":
    main()
