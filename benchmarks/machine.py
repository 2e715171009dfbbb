"""The lines every benchmark begins with, and the one way it calls the tuner: as a user would, reading its JSON."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

PACKAGES = ("torch", "diffusers", "optuna", "numpy")


@dataclass(frozen=True)
class Called:
    """One finished `tuner` command."""

    code: int
    seconds: float
    result: dict[str, Any]
    """Its JSON; empty when it printed none."""
    log: str


def print_machine(command: str) -> None:
    """Date, host, versions, command."""
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    print(f"date     {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}")
    print(f"machine  {cpu_name()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}")
    print(f"versions Python {platform.python_version()}, {versions}")
    print(f"command  {command}\n", flush=True)


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def tuner(*words: str, timeout_s: float = 1800.0, echo: bool = False) -> Called:
    """Run `tuner WORDS`; with `--json` among them its object is read. Never raises for its exit code."""
    began = time.monotonic()
    process = subprocess.run(
        [sys.executable, "-m", "tuner.cli", *words], capture_output=True, text=True, timeout=timeout_s, check=False
    )
    if echo:
        print(process.stderr if "--json" in words else process.stdout, flush=True)
    result = json.loads(process.stdout) if "--json" in words and process.stdout.strip() else {}
    return Called(process.returncode, time.monotonic() - began, result, process.stderr)


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    cells = [[str(cell) for cell in row] for row in (heads, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(heads))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
