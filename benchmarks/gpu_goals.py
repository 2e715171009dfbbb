"""What the GPU check is for: each goal beside what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from benchmarks.gpu_check import WORKLOADS, Table
from benchmarks.gpu_promise import judged, signed
from benchmarks.gpu_tuned import GUIDES, percent, spread

Data = Mapping[str, Mapping[str, Any]]
"""Part number -> what it recorded."""
SPEED_UP, OVER_OTHERS, KEPT, PREDICTED, SEARCH_S = 2.0, 1.2, 0.03, 0.05, 600.0
HEADS = ("figure", "goal", "workload", "measured", "kept")
Line = tuple[str, str, str, str, bool | None]
"""Figure, goal, workload, measured, whether it is kept (None = not known)."""


def goals(data: Data) -> Table:
    """A line for every goal and workload, those not measured too."""
    lines = [line for name in WORKLOADS for of in EACH for line in of(data, name)]
    ordered = sorted(lines, key=lambda line: [item[0] for item in lines].index(line[0]))
    shown = tuple((*line[:4], {True: "yes", False: "no", None: "-"}[line[4]]) for line in ordered)
    return Table("goals", HEADS, shown)


def _study(data: Data, name: str) -> Mapping[str, Any] | None:
    found: Mapping[str, Any] | None = data.get("2", {}).get("workloads", {}).get(name)
    return found


def speed(data: Data, name: str) -> Iterator[Line]:
    item = _study(data, name)
    goal = f">= {SPEED_UP:g}x, or the limit named (guide: {GUIDES[name]})"
    if item is None or item["gain"] is None:
        yield "tuned over baseline", goal, name, "not measured" if item is None else item["decision"], None
        return
    measured = f"{spread(item['gain'], 3)}; limited by {item['limit']}"
    yield "tuned over baseline", goal, name, measured, item["gain"]["value"] >= SPEED_UP


def others(data: Data, name: str) -> Iterator[Line]:
    found: Mapping[str, Any] = data.get("8", {}).get("workloads", {}).get(name, {})
    for rule, item in found.items():
        value = 1.0 if item["same"] else item["gain"]["value"] if item["gain"] else None
        measured = "the same configuration" if item["same"] else spread(item["gain"], 3)
        kept = None if value is None else value > OVER_OTHERS
        yield "tuned over the size others find", f"> {OVER_OTHERS:g}x", name, f"{rule}: {measured}", kept


def promise(data: Data, name: str) -> Iterator[Line]:
    result: dict[str, Any] | None = data.get("6", {}).get("runs", {}).get(name)
    deviation = judged(result) if result else None
    for figure, value in (("throughput", deviation), ("peak memory", result["peak_deviation"] if result else None)):
        kept = None if value is None else abs(value) <= KEPT
        yield (
            f"promise: {figure}",
            f"within {percent(KEPT)}",
            name,
            "not measured" if value is None else signed(value),
            kept,
        )


def memory(data: Data, name: str) -> Iterator[Line]:
    item = _study(data, name)
    error = item["memory"]["shipped_error"] if item else None
    ooms = sum(count for outcome, count in item["outcomes"].items() if outcome.startswith("oom")) if item else 0
    measured = "not measured" if error is None else f"{signed(error)}; {ooms} probes ran out of memory"
    kept = None if error is None else abs(error) <= PREDICTED
    yield "memory predicted before running", f"within {percent(PREDICTED)}", name, measured, kept


def search(data: Data, name: str) -> Iterator[Line]:
    item = _study(data, name)
    seconds = item["seconds"] if item else None
    ended = bool(item and item["finished"])
    measured = "not measured" if seconds is None else f"{seconds:.0f} s" + ("" if ended else ", not finished")
    yield "search time", f"<= {SEARCH_S:.0f} s", name, measured, seconds <= SEARCH_S if seconds and ended else None


def use(data: Data, name: str) -> Iterator[Line]:
    item = _study(data, name)
    side = item["shipped"] if item else {}
    known = {"MFU": (side.get("mfu") or {}).get("value"), "of the ceiling": side.get("of_ceiling")}
    told = ", ".join(f"{what} {percent(share)}" for what, share in known.items() if share is not None)
    yield "MFU of the tuned run", "given, with the limit", name, told or "unknown", None


EACH: tuple[Callable[[Data, str], Iterator[Line]], ...] = (speed, others, promise, memory, search, use)
