"""Part 1: what the device is, whether torch can use it, and what it can do at best: the ceilings for MFU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.gpu_check import Check, Finding, Status, Table, last_words
from tuner.contract.gpu import gpu_profiles

KEYS = ("kind", "name", "capability", "driver", "cuda", "torch", "arch_list", "memory_bytes", "free_bytes",
        "power_reading", "compile_problems", "problem")  # fmt: skip


def doctor(check: Check) -> Finding:
    asked = check.tuner("doctor", "--json", "--storage", check.storage)
    if not asked.result:
        return Finding(Status.FAILED, notes=(f"tuner doctor gave no answer; {last_words(asked)}",))
    device = asked.result["device"]
    known = Table("what is here", ("device", "value"), tuple((key, device.get(key)) for key in KEYS))
    measured = check.program("-m", "benchmarks.gpu_ceilings")
    data = {"device": device, "profile": asked.result["profile"], "ceilings": measured.result}
    if not measured.result:
        return Finding(Status.PARTIAL, (known,), data, (f"no ceilings; {last_words(measured)}",))
    notes = (f"problem: {device['problem']} {device['advice']}",) if device["problem"] else ()
    status = Status.FAILED if device["problem"] else Status.DONE
    return Finding(status, (known, ceilings(measured.result, asked.result["profile"])), data, notes)


def ceilings(measured: Mapping[str, Any], profile: str) -> Table:
    """Measured beside what the table of GPUs says."""
    known = gpu_profiles().get(profile)
    peaks = known.peak_flops if known is not None else {}
    bandwidth = known.bandwidth_bytes_per_s if known is not None else None
    rows: list[tuple[object, ...]] = [
        _row(f"matrix product {precision}, TFLOP/s", flops / 1e12, _scaled(peaks.get(precision), 1e12))
        for precision, flops in measured["matmul_flops"].items()
    ]
    rows.append(_row("copy within memory, GB/s", measured["copy_bytes_per_s"] / 1e9, _scaled(bandwidth, 1e9)))
    if measured["to_device_bytes_per_s"]:
        rows.append(_row("pinned host memory to the device, GB/s", measured["to_device_bytes_per_s"] / 1e9, None))
    rows.append(_row("launch of a small operation, us", 1e6 * measured["launch_s"], None))
    return Table("ceilings", ("what", "measured", "gpus.yaml", "share"), tuple(rows))


def _scaled(value: float | None, unit: float) -> float | None:
    return value / unit if value else None


def _row(what: str, measured: float, claimed: float | None) -> tuple[object, ...]:
    share = f"{100 * measured / claimed:.0f} %" if claimed else "-"
    return what, f"{measured:.3g}", f"{claimed:.4g}" if claimed else "-", share
