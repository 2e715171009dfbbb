"""Proves the tuner on whatever machine it is started on, in at most nine minutes; writes tables, JSON, YAML, pictures.

    python -m benchmarks.gpu --out gpu-check          all parts (make gpu-check); again: those not done yet
    python -m benchmarks.gpu --part 2 --workload gpt2  one part again, with all of the time
    python -m benchmarks.gpu --parts 1,3              some parts

Without CUDA the same logic runs at tiny size on the CPU in less time, and every heading says so.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import gpu_preflight
from benchmarks.gpu_check import GOODBYE_S, WORKLOADS, Check, Clock, Status, run_program
from benchmarks.gpu_turns import Part, command, run_parts, versions

MINUTES_CUDA, MINUTES_CPU = 9.0, 5.75
"""Of one run of this program, when --minutes names no other."""
LOOK = """
import json, torch
cuda = torch.cuda.is_available()
print(json.dumps({"cuda": cuda, "device": torch.cuda.get_device_name(0) if cuda else "cpu"}))
"""

PARTS: dict[int, Part] = {
    1: Part("doctor and ceilings", "benchmarks.gpu_doctor", "doctor", 30),
    2: Part("baseline against tuned", "benchmarks.gpu_tuned", "tuned", 205),
    3: Part("recorded grids", "benchmarks.gpu_grids", "grids", 60),
    4: Part("a P100 that is not there", "benchmarks.gpu_elsewhere", "elsewhere", 60),
    5: Part("out of memory and hangs, for real", "benchmarks.gpu_faults", "faults", 30),
    6: Part("promise against production", "benchmarks.gpu_promise", "promise", 60),
    7: Part("the loop against its peers", "benchmarks.gpu_others", "loops", 30),
    8: Part("sizes found by others", "benchmarks.gpu_sizes", "sizes", 45),
    9: Part("tests marked gpu", "benchmarks.gpu_others", "gpu_tests", 20),
}


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="folder of everything it writes")
    parser.add_argument("--part", type=int, choices=sorted(PARTS), action="append", help="only this one; repeatable")
    parser.add_argument("--parts", default="", metavar="N,N", help="only these: 1,3")
    parser.add_argument("--minutes", type=float, help="time for all of it (default: 9, or 5.75 without CUDA)")
    parser.add_argument("--workload", choices=WORKLOADS, action="append", help="only this workload; repeatable")
    parser.add_argument("--list", action="store_true", help="what the parts are, and what is recorded in --out")
    given = parser.parse_args(words)
    try:
        named = [int(word) for word in given.parts.split(",") if word.strip()]
    except ValueError:
        parser.error(f"--parts: numbers with commas between are expected: 1,3 (got {given.parts!r})")
    unknown = [number for number in named if number not in PARTS]
    if unknown:
        parser.error(f"--parts: there is no part {unknown[0]}; known: {', '.join(map(str, PARTS))}")
    if given.minutes is not None and given.minutes <= 0:
        parser.error(f"--minutes: more than 0 is needed (got {given.minutes:g})")
    given.asked = sorted({*(given.part or ()), *named})
    return given


def main() -> None:
    began = time.monotonic()
    words = parse()
    if lacking := gpu_preflight.absent():
        sys.exit(
            f"needed and not installed: {', '.join(lacking)}. Install them (make setup), or name their folder in "
            "PYTHONPATH"
        )
    from benchmarks.gpu_report import load

    out: Path = words.out.resolve()
    record = load(out)
    if words.list:
        print("\n".join(listing(record["parts"])))
        return
    numbers = words.asked or unfinished(record["parts"]) or sorted(PARTS)
    run_parts(begin(out, words, began), {number: PARTS[number] for number in numbers}, record)
    print(f"{time.monotonic() - began:.0f} s; everything is in {words.out}")


def begin(out: Path, words: argparse.Namespace, began: float) -> Check:
    """Make the checkout importable for all that is started, ask for CUDA, say what is here and what is missing."""
    out.mkdir(parents=True, exist_ok=True)
    gpu_preflight.make_importable(out / "work")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(out / "work" / "inductor"))
    seen = run_program(("-c", LOOK), 120.0)
    if not seen.result:
        sys.exit(f"torch cannot be started here:\n{seen.log}")
    cuda = bool(seen.result["cuda"])
    minutes: float = words.minutes or (MINUTES_CUDA if cuda else MINUTES_CPU)
    print(f"date     {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}")
    print(f"versions {versions()}\ncommand  {command()}")
    print(f"time     {minutes:g} min on {seen.result['device']}" + ("" if cuda else " (no CUDA here: tiny size)"))
    for line in gpu_preflight.remarks():
        print(f"note     {line}")
    print(flush=True)
    clock = Clock(began + 60 * minutes - min(GOODBYE_S, 3 * minutes))
    chosen = tuple(words.workload or WORKLOADS)
    return Check(out, clock, cuda, str(seen.result["device"]), chosen, gpu_preflight.without_data())


def unfinished(parts: Mapping[str, Mapping[str, Any]]) -> list[int]:
    """Parts that are not recorded as done."""
    return [number for number in sorted(PARTS) if parts.get(str(number), {}).get("status") != Status.DONE]


def listing(parts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [f"{n} {part.title:<36}{parts.get(str(n), {}).get('status', 'not begun')}" for n, part in PARTS.items()]


if __name__ == "__main__":
    main()
