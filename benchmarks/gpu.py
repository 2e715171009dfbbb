"""Proves the tuner on whatever machine it is started on, in at most nine minutes; writes tables and JSON.

    python -m benchmarks.gpu --out gpu-check          (= make gpu-check)
    python -m benchmarks.gpu --part 3                 one part again

Parts: 1 doctor; 2 latent_cfg, its guide's baseline against tuned; 3 a real out-of-memory at a cap; 4 the promise
against a short production run. Without CUDA the same logic runs at tiny size on the CPU, and every heading says so.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.machine import print_machine, table, tuner

LIMIT_S = 540.0


class Check:
    """One run of this program: where it writes, and how much of the nine minutes is left."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.storage = f"sqlite:///{out}/studies.db"
        self.best = out / "best.yaml"
        self._deadline = time.monotonic() + LIMIT_S
        out.mkdir(parents=True, exist_ok=True)

    @property
    def left_s(self) -> float:
        return max(30.0, self._deadline - time.monotonic())

    def keep(self, name: str, data: dict[str, Any]) -> None:
        (self.out / f"{name}.json").write_text(json.dumps(data, indent=2), encoding="utf-8")

    def kept(self, name: str) -> dict[str, Any]:
        path = self.out / f"{name}.json"
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return found


def doctor(check: Check) -> str:
    called = tuner("doctor", "--json", "--storage", check.storage, timeout_s=check.left_s)
    check.keep("1-doctor", called.result | {"exit_code": called.code})
    device = called.result.get("device", {})
    rows = [(key, device.get(key)) for key in ("kind", "name", "capability", "torch", "cuda", "driver", "problem")]
    return table(("doctor", "value"), rows)


def optimize(check: Check) -> str:
    """Baseline against tuned on this machine's own profile; about half of the time."""
    budget = f"{max(60, int(check.left_s * 0.28))}s"
    called = tuner(
        "optimize", "--workload", "latent_cfg", "--gpu", "auto", "--budget", budget, "--json", "--study", "gpu-check",
        "--out", str(check.best), "--storage", check.storage, timeout_s=check.left_s, echo=True,
    )  # fmt: skip
    check.keep("2-optimize", called.result | {"exit_code": called.code})
    if not called.result:
        return f"optimize gave no result: {called.log[-2000:]}"
    rows = [side_row(name, called.result[name]) for name in ("baseline", "winner") if called.result.get(name)]
    gain = called.result.get("gain") or {}
    lines = [table(("side", "configuration", "samples/s", "interval", "peak MiB"), rows)]
    lines.append(f"gain {gain.get('value')} ({gain.get('low')} - {gain.get('high')}); {called.result['decision']}")
    lines.append(f"outcomes {called.result['probes']}; seconds {called.result['seconds']}")
    return "\n".join(lines)


def side_row(name: str, side: dict[str, Any]) -> tuple[object, ...]:
    config, speed = side["config"], side["samples_per_s"] or {}
    label = f"{config['micro_batch_size']}x{config['accumulation_steps']} {config['precision']} {config['compile']}"
    peak = side["peak_bytes"]
    return (name, label, speed.get("value"), f"{speed.get('low')} - {speed.get('high')}", peak and peak // (1 << 20))


def out_of_memory(check: Check) -> str:
    """Two probes at the same size: one under a cap it cannot meet, one free. The first must be a typed outcome."""
    cuda = check.kept("1-doctor").get("device", {}).get("kind") == "cuda"
    cap, batch = ("1GiB", 512) if cuda else ("64MiB", 256)
    rows = []
    for name, extra in (("capped", ("--memory-cap", cap)), ("free", ())):
        called = tuner(
            "probe", "-w", "latent_cfg", "--kind", "compute", "--seconds", "2s", "--json", *extra,
            "--set", f"micro_batch_size={batch}", "--set", f"effective_batch_size={batch}", timeout_s=check.left_s,
        )  # fmt: skip
        point = called.result.get("points", [{}])[0]
        check.keep(f"3-oom-{name}", called.result)
        rows.append(
            (name, cap if extra else "none", point.get("outcome"), (point.get("message") or "")[:60], called.code)
        )
    return table(("probe", "cap", "outcome", "message", "exit code"), rows)


def promise(check: Check) -> str:
    seconds = min(120.0, check.left_s * 0.6)
    called = tuner(
        "train", "--config", str(check.best), "--out", str(check.out / f"run-{int(time.time())}"), "--json",
        "--max-hours", str(seconds / 3600), "--storage", check.storage, timeout_s=check.left_s + 60,
    )  # fmt: skip
    check.keep("4-promise", called.result | {"exit_code": called.code})
    keys = ("samples", "elapsed_s", "deviation", "host_drift", "deviation_beyond_drift", "peak_deviation")
    return table(("promise", "value"), [(key, called.result.get(key)) for key in keys])


PARTS: dict[int, tuple[str, Callable[[Check], str]]] = {
    1: ("doctor", doctor),
    2: ("baseline against tuned", optimize),
    3: ("out of memory, for real", out_of_memory),
    4: ("promise against production", promise),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-check"))
    parser.add_argument("--part", type=int, choices=sorted(PARTS), action="append", help="only this part; repeatable")
    words = parser.parse_args()
    print_machine(f"python -m benchmarks.gpu --out {words.out}" + "".join(f" --part {n}" for n in words.part or ()))
    os.environ["COLUMNS"] = "150"
    check = Check(words.out)
    began = time.monotonic()
    report: list[str] = []
    for number in words.part or sorted(PARTS):
        title, part = PARTS[number]
        text = part(check)
        cpu = check.kept("1-doctor").get("device", {}).get("kind") != "cuda"
        report.append(
            f"## {number} {title}" + (" (no CUDA here: tiny size on the CPU)" if cpu else "") + f"\n\n{text}\n"
        )
        print(report[-1], flush=True)
    (words.out / "report.md").write_text("\n".join(report), encoding="utf-8")
    print(f"{time.monotonic() - began:.0f} s; everything is in {words.out}")


if __name__ == "__main__":
    main()
