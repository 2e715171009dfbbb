"""Promise against reality: production runs with a best.<gpu>.yaml, each in a fresh folder.

python -m benchmarks.promise --config studies/latent_cfg/best.p100.yaml --runs 3 --seconds 130
python -m benchmarks.promise --workloads sd_kanji latent_cfg gpt2 graph --runs 5 --json promise.json

With --workloads each is tuned first (preset tiny), and its file is used; several files take turns, run by run, so that
a drifting host favours none. A file whose horizon ends before --seconds is used with a longer one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import print_machine, table, tuner
from tuner.contract.promise_check import Verdict
from tuner.export.tuned import headline, load, write

MARGIN = 0.03
"""Of the throughput, beyond the host's drift: a figure of our own; the run's verdict says whether it is kept."""
PEAK_MARGIN = 0.05


def main() -> None:
    words = parse()
    asked = f"--workloads {' '.join(words.workloads)}" if words.workloads else f"--config {' '.join(words.config)}"
    print_machine(f"python -m benchmarks.promise {asked} --runs {words.runs} --seconds {words.seconds:g}")
    results = earlier(words.json)
    with tempfile.TemporaryDirectory(prefix="tuner-promise-") as name:
        folder = Path(name)
        files = [tuned(workload, folder, words) for workload in words.workloads] or [Path(it) for it in words.config]
        lasting = [longer(file, folder / f"{number}.yaml", words.seconds) for number, file in enumerate(files)]
        for number in range(words.runs):
            for config, of in lasting:
                if sum(1 for result in results if result["of"] == of) <= number:
                    results.append({"of": of, **one_run(config, folder, words.seconds)})
                    print("| " + " | ".join(str(cell) for cell in row(number + 1, results[-1])) + " |", flush=True)
                    keep(words.json, results)
    print("\n" + text_of(results))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", default=["studies/latent_cfg/best.p100.yaml"])
    parser.add_argument("--workloads", nargs="+", default=[], help="tune these first, instead of --config")
    parser.add_argument("--gpu", default="p100", help="what --workloads are tuned for")
    parser.add_argument("--runs", type=int, default=3, help="of each file")
    parser.add_argument("--seconds", type=float, default=130.0, help="length of each run")
    parser.add_argument("--json", help="keep every result here, and go on from them")
    return parser.parse_args()


def tuned(workload: str, folder: Path, words: argparse.Namespace) -> Path:
    """The workload's best file: that of an earlier call with the same --json, or a new search."""
    place = Path(words.json).parent if words.json else folder
    best = place / f"best.{workload}.{words.gpu}.yaml"
    if not best.exists():
        storage = f"sqlite:///{folder}/{workload}.db"
        called = tuner(
            "optimize", "--workload", workload, "--gpu", words.gpu, "--preset", "tiny", "--out", str(best),
            "--storage", storage, "--json",
        )  # fmt: skip
        if not best.exists():
            raise SystemExit(f"{workload}: no best file (exit code {called.code}):\n{called.log}")
        print(f"{workload}: tuned in {called.seconds:.0f} s: {headline(load(best)).splitlines()[1]}", flush=True)
    return best


def longer(file: Path, copy: Path, seconds: float) -> tuple[Path, str]:
    """A copy whose horizon a run of `seconds` does not reach, and the workload's name."""
    best = load(file)
    rate = best.promise.samples_per_s.high if best.promise is not None else 0.0
    horizon = max(best.config.horizon_samples, round(2 * rate * seconds))
    write(copy, best.model_copy(update={"config": best.config.model_copy(update={"horizon_samples": horizon})}))
    return copy, best.config.workload


def one_run(config: Path, folder: Path, seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="run-", dir=folder) as out:
        called = tuner(
            "train", "--config", str(config), "--no-confirm", "--out", f"{out}/run",
            "--max-minutes", f"{seconds / 60:.3f}", "--storage", f"sqlite:///{out}/studies.db", "--json",
        )  # fmt: skip
    if not called.result:
        raise SystemExit(f"{config} gave no result (exit code {called.code}):\n{called.log}")
    return called.result


def earlier(path: str | None) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    if path is not None and Path(path).exists():
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    return found


def keep(path: str | None, results: Sequence[dict[str, Any]]) -> None:
    if path is not None:
        Path(path).write_text(json.dumps(results, indent=2), encoding="utf-8")


HEADS = (
    "workload",
    "run",
    "promised samples/s",
    "reached",
    "raw",
    "host drift",
    "beyond drift",
    "verdict",
    "peak promised",
    "reached",
    "peak",
)


def text_of(results: Sequence[dict[str, Any]]) -> str:
    """Every run, and per workload how many kept the promise."""
    names = list(dict.fromkeys(result["of"] for result in results))
    runs = {name: [result for result in results if result["of"] == name] for name in names}
    rows = [row(number, result) for found in runs.values() for number, result in enumerate(found, 1)]
    heads = ("workload", "runs", "within 3 % beyond drift", "raw within 3 %", "kept", "peak within 5 %")
    kept = [(name, *counts(found)) for name, found in runs.items()]
    whole = [("all", *counts(results))] if len(kept) > 1 else []
    return f"{table(HEADS, rows)}\n\n{table(heads, kept + whole)}"


def counts(results: Sequence[dict[str, Any]]) -> tuple[int, int, int, int, int]:
    return (
        len(results),
        sum(abs(judged(result)) <= MARGIN for result in results),
        sum(abs(result["deviation"]) <= MARGIN for result in results),
        sum(verdict_of(result) in (Verdict.KEPT, Verdict.ABOVE) for result in results),
        sum(abs(result["peak_deviation"]) <= PEAK_MARGIN for result in results),
    )


def judged(result: dict[str, Any]) -> float:
    value = result["deviation"] if result["deviation_beyond_drift"] is None else result["deviation_beyond_drift"]
    return float(value)


def verdict_of(result: dict[str, Any]) -> str:
    """Of a result kept before there were verdicts, `-`."""
    return result.get("verdict") or "-"


def row(number: int, result: dict[str, Any]) -> tuple[object, ...]:
    promised = result["promised_samples_per_s"]
    return (
        result["of"],
        number,
        f"{promised['value']:.1f} ({promised['low']:.1f}-{promised['high']:.1f})",
        f"{result['samples_per_s']['value']:.1f}",
        percent(result["deviation"]),
        "unknown" if result["host_drift"] is None else f"{result['host_drift']:.3f}",
        percent(result["deviation_beyond_drift"]),
        verdict_of(result),
        f"{result['promised_peak_bytes'] / (1 << 20):.0f} MiB",
        f"{result['peak_bytes'] / (1 << 20):.0f} MiB",
        percent(result["peak_deviation"]),
    )


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:+.1f} %"


if __name__ == "__main__":
    main()
