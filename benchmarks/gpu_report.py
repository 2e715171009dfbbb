"""What the GPU check leaves behind: check.json, check.yaml, report.md and gpu-check.png, written after every part."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu_check import Table
from benchmarks.gpu_goals import goals
from benchmarks.machine import table
from tuner.contract.documents import write_mapping

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RECORD = "check.json"
Record = dict[str, Any]
"""`parts`: number -> what was recorded of it; every value plain."""


def load(out: Path) -> Record:
    """What earlier runs have recorded in this folder. Raises SystemExit for a file that is no such record."""
    path = out / RECORD
    if not path.is_file():
        return {"parts": {}}
    try:
        found: Record = json.loads(path.read_text(encoding="utf-8"))
        found["parts"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SystemExit(f"--out: {path} is no record of this check ({error}); name another folder") from None
    return found


def save(out: Path, record: Record) -> None:
    """All four files, each written beside and moved."""
    clean = plain(record)
    replace(out / RECORD, json.dumps(clean, indent=1) + "\n")
    replace(out / "check.yaml", write_mapping(clean))
    replace(out / "report.md", markdown(clean))
    draw(clean, out / "gpu-check.png")


def plain(value: Any) -> Any:
    """Plain values with text keys; what is not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def replace(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".new")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def parts_of(record: Record) -> list[tuple[str, Record]]:
    return sorted(record["parts"].items(), key=lambda pair: int(pair[0]))


def markdown(record: Record) -> str:
    rows = [(n, p["title"], p["status"], f"{p['seconds']:.0f}", p["device"], p["date"]) for n, p in parts_of(record)]
    told = [goals({number: part["data"] for number, part in parts_of(record)})]
    blocks = [
        "# GPU check",
        table(("part", "what", "status", "seconds", "on", "date"), rows),
        *(f"## {item.title}\n\n{table(item.heads, item.rows)}" for item in told),
        *(part_text(number, part) for number, part in parts_of(record)),
    ]
    return "\n\n".join(blocks) + "\n"


def part_text(number: str, part: Record) -> str:
    """One part: its heading, tables and notes, as it is printed too."""
    on = "" if part["cuda"] else " (no CUDA here: tiny size on the CPU)"
    blocks = [f"## {number} {part['title']}: {part['status']}{on}"]
    blocks += [f"{item['title']}\n\n{table(item['heads'], item['rows'])}" for item in part["tables"]]
    blocks += ["\n".join(f"- {line}" for line in part["notes"])] if part["notes"] else []
    blocks.append(f"{part['seconds']:.0f} s of {part['share_s']:.0f} s; {part['versions']}; `{part['command']}`")
    return "\n\n".join(blocks)


def as_record(item: Table) -> Record:
    return {
        "title": item.title,
        "heads": list(item.heads),
        "rows": [[shown(cell) for cell in row] for row in item.rows],
    }


def shown(cell: object) -> object:
    if isinstance(cell, dict):
        return "; ".join(f"{name}: {value}" for name, value in cell.items()) or "none"
    return ", ".join(map(str, cell)) if isinstance(cell, list | tuple) else cell


def draw(record: Record, path: Path) -> None:
    """Four panels: gain, what limits (shares of the ceiling and of time), memory predicted, promise."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    data = {number: part["data"] for number, part in parts_of(record)}
    figure = Figure(figsize=(11.0, 7.0), layout="constrained")
    FigureCanvasAgg(figure)
    gain, use, memory, promise = figure.subplots(2, 2).flat
    studies: Record = data.get("2", {}).get("workloads", {})
    draw_gain(gain, studies)
    draw_use(use, studies)
    draw_memory(memory, studies)
    draw_promise(promise, data.get("6", {}).get("runs", {}))
    cpu = any(not part["cuda"] for _, part in parts_of(record))
    figure.suptitle("GPU check" + (" (no CUDA here: tiny size on the CPU)" if cpu else ""))
    figure.savefig(path, dpi=110)


def empty(axes: Axes, title: str, what: Sequence[object]) -> bool:
    axes.set_title(title, loc="left", fontsize=10)
    if not what:
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes)
        axes.set_xticks([])
        axes.set_yticks([])
    return not what


def draw_gain(axes: Axes, studies: Record) -> None:
    known = {name: item["gain"] for name, item in studies.items() if item["gain"]}
    if empty(axes, "tuned over the guide's baseline, same effective batch", list(known)):
        return
    values = [gain["value"] for gain in known.values()]
    below = [gain["value"] - (gain["low"] or 0.0) for gain in known.values()]
    above = [(gain["high"] or gain["value"]) - gain["value"] for gain in known.values()]
    axes.bar(list(known), values, color="#4c78a8", yerr=[below, above], capsize=4)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.axhline(2.0, color="gray", linewidth=0.8, linestyle="--")
    axes.set_ylabel("times samples/s")


def draw_use(axes: Axes, studies: Record) -> None:
    figures = {"of the ceiling": "of_ceiling", "GPU busy": "gpu_utilisation", "data wait": "data_wait"}
    sides = [(f"{name}\n{which}", item[which]) for name, item in studies.items() for which in ("baseline", "shipped")]
    if empty(axes, "how the device is used", sides):
        return
    width = 0.8 / len(figures)
    for place, (label, key) in enumerate(figures.items()):
        heights = [100 * (side[key] or 0.0) for _, side in sides]
        axes.bar([at + width * (place - 1) for at in range(len(sides))], heights, width, label=label)
    axes.set_xticks(range(len(sides)), [label for label, _ in sides], fontsize=7)
    axes.set_ylabel("%")
    axes.legend(fontsize=8)


def draw_memory(axes: Axes, studies: Record) -> None:
    cells = [(name, cell) for name, item in studies.items() for cell in item["memory"]["cells"]]
    if empty(axes, "peak memory, share of the budget: predicted from all other rows", cells):
        return
    for name in dict.fromkeys(name for name, _ in cells):
        own = [cell for of, cell in cells if of == name]
        measured, predicted = [c["measured"] for c in own], [c["predicted"] for c in own]
        bars = [[0.0] * len(own), [max(0.0, c["upper"] - c["predicted"]) for c in own]]
        axes.errorbar(measured, predicted, yerr=bars, fmt="o", markersize=4, capsize=2, label=name)
    most = max(cell["measured"] for _, cell in cells)
    axes.plot([0, most], [0, most], color="black", linewidth=0.8)
    axes.set_xlabel("measured")
    axes.set_ylabel("predicted, with its error bar")
    axes.legend(fontsize=8)


def draw_promise(axes: Axes, runs: Record) -> None:
    bars = [bar for name, run in runs.items() for bar in deviations(name, run)]
    if empty(axes, "production against its promise", bars):
        return
    axes.bar([label for label, _ in bars], [100 * value for _, value in bars], color="#59a14f")
    axes.axhline(0.0, color="black", linewidth=0.8)
    axes.axhspan(-3.0, 3.0, color="gray", alpha=0.2)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_ylabel("deviation, %")


def deviations(name: str, run: Record) -> Iterator[tuple[str, float]]:
    beyond = run["deviation"] if run["deviation_beyond_drift"] is None else run["deviation_beyond_drift"]
    for label, value in (("samples/s", beyond), ("peak", run["peak_deviation"])):
        if value is not None:
            yield f"{name}\n{label}", value
