"""What `tuner probe --profile` says of its finds: the parts of a step, its costliest operators, the trace to open."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

SHARE = "share_"
SHOWN = 12
"""Operators in the table; operators.csv has all."""


def lines(values: Mapping[str, float], folder: Path) -> list[str]:
    """For people. Empty when the probe gave no shares."""
    shares = {name.removeprefix(SHARE): value for name, value in values.items() if name.startswith(SHARE)}
    if not shares:
        return []
    step_s = values.get("step_s", 0.0)
    found = [f"\n  {'part of a step':<40}{'share':>9}{'time':>12}"]
    found += [
        f"  {name.replace('_', ' '):<40}{100 * share:>7.1f} %{1000 * share * step_s:>9.2f} ms"
        for name, share in shares.items()
    ]
    return [*found, *_operators(folder / "operators.csv"), *_where(folder)]


def _operators(path: Path) -> list[str]:
    """The costliest first, as the file has them; times on a GPU only where there are any."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        times = {"CPU": "self_cpu_s_per_step", "GPU": "self_device_s_per_step"}
        shown = [name for name, column in times.items() if any(float(row[column]) for row in rows)]
        found = [
            f"  {row['operator'][:38]:<40}{float(row['calls_per_step']):>9.4g}"
            + "".join(f"{1000 * float(row[times[name]]):>9.2f} ms" for name in shown)
            for row in rows[:SHOWN]
        ]
    except (OSError, KeyError, ValueError) as error:
        return [f"  operators: {path} cannot be read: {error}"]
    return [f"\n  {'operator (without what it calls)':<40}{'calls':>9}" + "".join(f"{n:>12}" for n in shown), *found]


def _where(folder: Path) -> list[str]:
    traces = sorted(folder.glob("trace.json*"))
    tables = ", ".join(path.name for path in sorted(folder.glob("*.csv")))
    found = [f"\n  trace     {trace} (open it at https://ui.perfetto.dev, or in chrome://tracing)" for trace in traces]
    return [*found, f"  tables    {tables} in {folder}"]
