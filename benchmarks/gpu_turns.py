"""The parts of the GPU check in turn: each within its share of the time, its failure recorded, its finding kept."""

from __future__ import annotations

import shlex
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from benchmarks.gpu_check import LEAST_S, Check, Finding, Status
from benchmarks.gpu_preflight import installed
from benchmarks.gpu_report import Record, as_record, part_text, plain, save


@dataclass(frozen=True)
class Part:
    title: str
    module: str
    """Imported only when the part runs, so that a broken one costs the others nothing."""
    function: str
    weight: float
    """Seconds of nine minutes; of a shorter run, or one of fewer parts, as many in proportion."""

    def run(self, check: Check) -> Finding:
        found: Callable[[Check], Finding] = getattr(import_module(self.module), self.function)
        return found(check)


def run_parts(check: Check, parts: Mapping[int, Part], record: Record) -> None:
    """Run `parts` in their order. A part that could not be run leaves what was recorded of it before."""
    known, waiting = record["parts"], sum(part.weight for part in parts.values())
    for number, part in parts.items():
        waiting -= part.weight
        check.know(known, number)
        found = recorded(check, part, check.clock.begin_turn(part.weight, waiting))
        before = known.get(str(number), {"status": Status.NOT_RUN})
        if found["status"] == Status.NOT_RUN and before["status"] != Status.NOT_RUN:
            found = before | {"notes": [*before["notes"], *(f"this time not run: {note}" for note in found["notes"])]}
        known[str(number)] = found
        save(check.out, record)
        print(part_text(str(number), plain(found)) + "\n", flush=True)


def recorded(check: Check, part: Part, share_s: float) -> dict[str, Any]:
    """Run a part; whatever it raises is recorded as its failure."""
    began = time.monotonic()
    if share_s < LEAST_S:
        found = Finding(Status.NOT_RUN, notes=(f"{share_s:.0f} s are no time for it; name it alone: --part",))
    else:
        found = guarded(check, part)
    return {
        "title": part.title,
        "status": found.status.value,
        "cuda": check.cuda,
        "device": check.device,
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "versions": versions(),
        "command": command(),
        "seconds": time.monotonic() - began,
        "share_s": share_s,
        "notes": list(found.notes),
        "tables": [as_record(item) for item in found.tables],
        "data": dict(found.data),
    }


def guarded(check: Check, part: Part) -> Finding:
    try:
        return part.run(check)
    except Exception as error:
        where = [line.strip() for line in traceback.format_exc().splitlines() if "File " in line]
        return Finding(Status.FAILED, data=check.before, notes=(f"{type(error).__name__}: {error}", *where[-3:]))


def versions() -> str:
    named = [f"{name} {installed(name) or 'unknown'}" for name in ("torch", "diffusers", "optuna")]
    return ", ".join([f"Python {sys.version.split()[0]}", *named])


def command() -> str:
    return f"python -m benchmarks.gpu {shlex.join(sys.argv[1:])}".strip()
