"""Part 3: grids recorded on this device, for replays: latent_cfg and gpt2 over a small space."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from benchmarks.gpu_check import LEAST_S, Check, Finding, Status, Table, last_words, worth_doing
from benchmarks.gpu_studies import CODEC
from tuner.contract.documents import write_mapping
from tuner.contract.errors import ConfigError
from tuner.probe.recording import read
from tuner.probe.replay import Grid, ReplayRunner
from tuner.search.offline import run_study

REPEATS = 2
USEFUL_S = 30.0
"""With less for a grid, one of them has the whole turn: its peaks must be measured in one go."""
ON_CUDA: dict[str, dict[str, Any]] = {
    "latent_cfg": {
        "micro_batch_size": [4, 8, 16], "precision": ["fp32", "tf32"], "channels_last": [False, True],
        "fused": [False, True], "num_workers": [0, 2],
    },
    "gpt2": {
        "micro_batch_size": [8, 16, 32], "precision": ["fp32", "fp16"], "gradient_checkpointing": [False, True],
        "fused": [False, True], "num_workers": [0, 4],
    },
}  # fmt: skip
"""48 configurations each, no compiling; precisions that every card since 2017 has are enough for gpt2."""
ON_CPU: dict[str, dict[str, Any]] = {
    "latent_cfg": {"micro_batch_size": [8, 16]},
    "gpt2": {"micro_batch_size": [16, 32]},
}
BASELINES = {
    "latent_cfg": {"micro_batch_size": 8, "accumulation_steps": 2},
    "gpt2": {"micro_batch_size": 16, "accumulation_steps": 2},
}


def grids(check: Check) -> Finding:
    """Each grid has half of the time; an unfinished one is kept as it is and goes on with the same command."""
    rows: list[tuple[object, ...]] = []
    data, notes = {}, []
    finished = [name for name in ON_CUDA if path_of(check, name).exists()]
    wanted = [name for name in ON_CUDA if name in check.runnable()]
    names = worth_doing(wanted, finished, check.clock.turn_s, USEFUL_S)
    notes += [f"{name}: no time left in this run" for name in wanted if name not in names]
    for place, name in enumerate(names):
        share_s = check.clock.turn_s / (len(names) - place)
        if share_s < LEAST_S:
            notes.append(f"{name}: not run: no time left")
            continue
        out = path_of(check, name)
        said = "" if out.exists() else record(check, name, out, share_s)
        data[name] = state(out)
        notes += [f"{name}: {line}" for line in (said, *data[name]["notes"]) if line]
        rows.append((name, data[name]["state"], data[name]["probes"], data[name]["cells"], data[name]["replay"]))
    heads = ("grid", "state", "probes", "configurations", "a search replayed on it")
    whole = len(data) == len(ON_CUDA) and all(item["state"] == "finished" for item in data.values())
    table = Table("recorded grids", heads, tuple(rows))
    return Finding(
        Status.DONE if whole else Status.PARTIAL if data else Status.NOT_RUN, (table,), {"grids": data}, tuple(notes)
    )


def path_of(check: Check, name: str) -> Path:
    return check.out / f"grid-{name}.jsonl.gz"


def record(check: Check, name: str, out: Path, share_s: float) -> str:
    """Run the recorder until it is done or its time is over; what it said when it did not finish."""
    path = check.work / f"grid-{name}.study.yaml"
    path.write_text(write_mapping(study(check, name)), encoding="utf-8")
    called = check.program(
        "-m", "benchmarks.grids.record", str(path), "--preset", check.preset, "--repeats", str(REPEATS),
        "--minutes", f"{0.8 * share_s / 60:.2f}", "--out", str(out), limit_s=share_s, stop=signal.SIGINT,
    )  # fmt: skip
    return "" if called.code == 0 else last_words(called)


def study(check: Check, name: str) -> dict[str, Any]:
    options = {"preset": check.preset}
    codec = {CODEC[1].partition("=")[0]: 0} if name == "latent_cfg" else {}
    seconds = 0.7 if check.cuda else 0.3
    return {
        "workload": name,
        "options": options | codec,
        "baseline": {
            **BASELINES[name], "precision": "fp32", "compile": "eager", "loader": {"num_workers": 0},
            "optimizer": {"fused": False},
        },
        "space": (ON_CUDA if check.cuda else ON_CPU)[name],
        "budget_s": 600,
        "measure": {"measure_s": seconds, "compute_s": seconds / 2, "min_steps": 4},
        "gate": {"min_pairs": 2, "max_pairs": 6, "finalists": 1, "measure_s": seconds},
    }  # fmt: skip


def state(out: Path) -> dict[str, Any]:
    """What lies on the disk: a finished recording is also searched once, as a replay."""
    growing = out.with_name(out.name.removesuffix(".gz") + ".part")
    path = out if out.exists() else growing
    nothing = {"state": "not begun", "probes": 0, "cells": 0, "replay": "-", "notes": []}
    if not path.exists():
        return nothing
    try:
        grid, probes = Grid.load(path), len(read(path)[1])
    except ConfigError as error:
        return nothing | {"state": "unreadable", "notes": [str(error)]}
    found = {"state": "unfinished", "probes": probes, "cells": len(grid.cells), "replay": "-", "notes": []}
    if path is out:
        found |= {"state": "finished", "replay": replayed(grid)}
    return found


def replayed(grid: Grid) -> str:
    """Which configuration our own search names on the recording."""
    _, decision = run_study(grid.spec, ReplayRunner(grid, seed=0))
    if decision.winner is None:
        return decision.reason
    gain = f", {decision.gain.value:.2f}x" if decision.gain is not None else ""
    return f"{decision.kind}: {grid.spec.label(decision.winner.config)}{gain}"
