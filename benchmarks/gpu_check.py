"""What every part of the GPU check is given: a folder, a share of the time, and a way to run programs within it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from benchmarks.machine import Called

ROOT = Path(__file__).resolve().parents[1]
WORKLOADS = ("latent_cfg", "gpt2", "sd_kanji", "graph")
GOODBYE_S = 15.0
"""How long a program that was told to stop may take to write what it has."""
STOPPED = (-signal.SIGTERM, -signal.SIGKILL, -signal.SIGINT)
"""Exit codes of a program that was stopped and did not say so itself."""
LEAST_S = 8.0
"""A part with less time than this is not begun."""


class Status(StrEnum):
    """How a part ended. `partial`: cut short, and the same command goes on."""

    DONE = "done"
    PARTIAL = "partial"
    FAILED = "failed"
    NOT_RUN = "not run"


@dataclass(frozen=True)
class Table:
    """One table of a part, as it is printed."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[object, ...], ...]


@dataclass(frozen=True)
class Finding:
    """What a part found out."""

    status: Status
    tables: tuple[Table, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    """Plain values alone: it is written as JSON and YAML."""
    notes: tuple[str, ...] = ()


@dataclass
class Clock:
    """The time of one run of the check: every part may use its share of what is left."""

    ends: float
    turn_ends: float = 0.0

    @classmethod
    def of_minutes(cls, minutes: float) -> Clock:
        ends = time.monotonic() + 60 * minutes
        return cls(ends, ends)

    @property
    def left_s(self) -> float:
        return max(0.0, self.ends - time.monotonic())

    @property
    def turn_s(self) -> float:
        """What is left of the present part's share."""
        return max(0.0, min(self.turn_ends, self.ends) - time.monotonic())

    def begin_turn(self, weight: float, later: float) -> float:
        """Give the next part its share: its weight among its own and that of the parts after it. Seconds."""
        share = self.left_s * weight / (weight + later)
        self.turn_ends = time.monotonic() + share
        return share


@dataclass
class Check:
    """One run of the check."""

    out: Path
    clock: Clock
    cuda: bool
    device: str = "cpu"
    """The GPU's name. What another device recorded in the same folder is not built upon."""
    workloads: tuple[str, ...] = WORKLOADS
    missing: Mapping[str, str] = field(default_factory=dict)
    """Workload -> which package its data lacks here."""
    kept: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Part number -> what was recorded on this device."""
    before: Mapping[str, Any] = field(default_factory=dict)
    """The same of the part that is run now, from an earlier time."""

    def know(self, parts: Mapping[str, Mapping[str, Any]], number: int) -> None:
        """Remember what this device has recorded, before part `number` is run."""
        self.kept = {name: part["data"] for name, part in parts.items() if part["device"] == self.device}
        self.before = self.kept.get(str(number), {})

    @property
    def work(self) -> Path:
        """Files that are needed to go on, but that nobody reads."""
        folder = self.out / "work"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def storage(self) -> str:
        return f"sqlite:///{self.out / 'studies.db'}"

    @property
    def preset(self) -> str:
        return "full" if self.cuda else "tiny"

    def runnable(self) -> list[str]:
        return [name for name in self.workloads if name not in self.missing]

    def is_whole(self, names: Iterable[str]) -> bool:
        """Are these all the workloads that can be run here?"""
        return set(names) >= set(WORKLOADS) - set(self.missing)

    def data_of(self, part: int) -> Mapping[str, Any]:
        return self.kept.get(str(part), {})

    def tuner(self, *words: str, limit_s: float | None = None) -> Called:
        """`tuner WORDS`, its JSON read; stopped at the end of the part's share, or after `limit_s`."""
        return run_program(("-m", "tuner.cli", *words), self.clock.turn_s if limit_s is None else limit_s)

    def program(self, *words: str, limit_s: float | None = None, stop: signal.Signals = signal.SIGTERM) -> Called:
        """`python WORDS`, likewise."""
        return run_program(words, self.clock.turn_s if limit_s is None else limit_s, stop)


def worth_doing(names: Iterable[str], done: Iterable[str], turn_s: float, useful_s: float) -> list[str]:
    """Those that the time is enough for, `useful_s` each, one at least; what was done before comes last."""
    finished = set(done)
    ordered = sorted(names, key=lambda name: name in finished)
    return ordered[: max(1, int(turn_s // useful_s))]


def run_program(words: Sequence[str], limit_s: float, stop: signal.Signals = signal.SIGTERM) -> Called:
    """Run `python WORDS` for at most `limit_s`, then ask it to stop with `stop`, then kill it.

    What it printed on stdout is read as JSON where it is that; `log` is what it printed beside. Never raises for how
    the program ended; a KeyboardInterrupt ends it too.
    """
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"COLUMNS": "150", "PYTHONUNBUFFERED": "1"},
    )
    try:
        out, err = _until(process, max(1.0, limit_s), stop)
    except BaseException:
        _until(process, 0.0, stop)
        raise
    result = read_json(out)
    return Called(process.returncode, time.monotonic() - began, result, err if result else out + err)


def _until(process: subprocess.Popen[str], limit_s: float, stop: signal.Signals) -> tuple[str, str]:
    try:
        return process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        process.send_signal(stop)
    try:
        return process.communicate(timeout=GOODBYE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()


def read_json(text: str) -> dict[str, Any]:
    """The object printed on stdout; a list of them as `{"rows": [...]}`; empty when it is neither."""
    at = min((place for mark in "{[" if (place := text.find(mark)) >= 0), default=-1)
    if at < 0:
        return {}
    try:
        found = json.loads(text[at:])
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {"rows": found}


def last_words(called: Called, characters: int = 300) -> str:
    """How a program ended, in one line."""
    if called.code in STOPPED:
        return "stopped at the end of its time"
    lines = [line.strip() for line in called.log.splitlines() if line.strip()]
    return f"exit code {called.code}: {' / '.join(lines[-2:])[-characters:]}"
