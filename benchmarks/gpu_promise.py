"""Part 6: the promise of each best.yaml of part 2 against a production run of two minutes, or as long as fits."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from benchmarks.gpu_check import Check, Finding, Status, Table, last_words, worth_doing
from benchmarks.gpu_tuned import best_file, percent, spread
from tuner.export.tuned import load

WANTED_S = 120.0
USEFUL_S = 50.0
"""With less for a run, fewer workloads have one."""
TRAINED = 0.6
"""Share of a run's time that it trains; starting, evaluation, samples and the checkpoint at its end have the rest."""


def promise(check: Check) -> Finding:
    """The workloads that a run of useful length can be had for, in their order."""
    files = {name: best_file(check, name) for name in check.workloads if promises(best_file(check, name))}
    if not files:
        return Finding(Status.NOT_RUN, notes=("part 2 has written no best.yaml with a promise yet",))
    found: dict[str, dict[str, Any]] = dict(check.before.get("runs", {}))
    names = worth_doing(files, found, check.clock.turn_s, USEFUL_S)
    notes = [f"{name}: not run: no time left" for name in files if name not in names]
    for place, name in enumerate(names):
        share_s = check.clock.turn_s / (len(names) - place)
        result, said = one_run(check, name, files[name], share_s)
        if result:
            found[name] = result
        notes += [f"{name}: {line}" for line in said]
    long_enough = [name for name, item in found.items() if item["seconds"] >= WANTED_S]
    status = Status.DONE if check.is_whole(long_enough) else Status.PARTIAL if found else Status.FAILED
    return Finding(status, (table(found),), {"runs": found}, tuple(notes))


def promises(path: Path) -> bool:
    return path.exists() and load(path).promise is not None


def one_run(check: Check, name: str, config: Path, share_s: float) -> tuple[dict[str, Any], list[str]]:
    seconds = min(WANTED_S, TRAINED * share_s)
    out = check.work / f"run-{name}-{time.strftime('%H%M%S')}"
    called = check.tuner(
        "train", "--config", str(config), "--no-confirm", "--out", str(out), "--max-minutes", f"{seconds / 60:.3f}",
        "--storage", check.storage, "--json", limit_s=share_s,
    )  # fmt: skip
    if not called.result:
        return {}, [f"no result; {last_words(called)}"]
    said = [f"the run was {seconds:.0f} s and not {WANTED_S:.0f}: the time is short"] if seconds < WANTED_S else []
    return called.result | {"seconds": seconds}, said


def judged(result: dict[str, Any]) -> float | None:
    """The raw deviation on a GPU; on a CPU that beyond the host's drift, where it is known."""
    beyond = result["deviation_beyond_drift"]
    value: float | None = result["deviation"] if beyond is None else beyond
    return value


def table(found: dict[str, dict[str, Any]]) -> Table:
    heads = ("workload", "trained s", "promised samples/s", "reached", "raw", "host drift", "judged",
             "verdict", "peak")  # fmt: skip
    return Table("promise against production", heads, tuple(row(name, result) for name, result in found.items()))


def row(name: str, result: dict[str, Any]) -> tuple[object, ...]:
    promised, reached, drift = result["promised_samples_per_s"], result["samples_per_s"], result["host_drift"]
    return (
        name,
        f"{result['seconds']:.0f}",
        spread(promised),
        f"{reached['value']:.4g}" if reached else "-",
        signed(result["deviation"]),
        "-" if drift is None else f"{drift:.3f}",
        signed(judged(result)),
        result.get("verdict") or "-",
        signed(result["peak_deviation"]),
    )


def signed(value: float | None) -> str:
    return "-" if value is None else ("+" if value >= 0 else "-") + percent(abs(value))
