"""A production run on the terminal: what it will do, and its events as a progress bar, or as lines in a log."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Self

from tuner.commands import console as speak
from tuner.commands.answer import Remarks
from tuner.contract.probe import Event, NoticeEvent, PhaseEvent, ProgressEvent, TrainEvent
from tuner.contract.tuned import TunedConfig

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID


def introduce(tuned: TunedConfig, until: int, out: Path, console: Console) -> None:
    config = tuned.config
    preset = config.options.get("preset")
    console.print(f"training {config.workload}" + (f", preset {preset}" if preset else "") + f": {config.label}")
    if preset == "tiny":
        console.print(
            "tiny is the rehearsal size: the same program with a small model, quick on a CPU; full is the real one."
        )
    console.print(f"{until:,} samples at effective batch {config.effective_batch_size}, into {out}")
    if tuned.promise is not None:
        promise = tuned.promise
        console.print(
            f"promised {speak.rate(promise.samples_per_s, ' samples/s')}, peak {speak.mib(promise.peak_bytes)}, "
            f"{speak.clock(until / promise.samples_per_s.value)} of steps"
        )
    confirmed = tuned.promise is not None and tuned.promise.confirmed_on is not None
    if tuned.provenance is not None and tuned.provenance.transfer == "unverified" and not confirmed:
        console.print(
            f"chosen for {tuned.provenance.target} but measured on {tuned.provenance.measured_on}: "
            "the promise holds for that machine only",
            style="yellow",
        )


class RunProgress:
    """The worker's events as a progress bar with ETA on a terminal, as lines in a log."""

    def __init__(self, console: Console, total: int) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = console
        self._remarks = Remarks(console)
        self._total = total
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID = self._bar.add_task("starting", total=total, note="")
        self._next_line = 0.0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def listen(self, event: Event) -> None:
        self._remarks(event)
        if isinstance(event, TrainEvent):
            self._trained(event)
        elif isinstance(event, NoticeEvent):
            style = "yellow" if event.level == "warning" else "dim"
            self._console.print(f"  {event.text}", style=style)
        elif isinstance(event, PhaseEvent):
            self._bar.update(self._task, description=event.phase)
        elif isinstance(event, ProgressEvent) and event.total:
            self._bar.update(self._task, note=f"{event.text} {100 * event.done // event.total} %")

    def _trained(self, event: TrainEvent) -> None:
        loss = event.losses.get("total", math.nan)
        note = f"{event.samples_per_s:,.0f} samples/s  loss {loss:.4f}  peak {speak.mib(event.peak_bytes)}"
        self._bar.update(self._task, description="training", completed=event.samples, note=note)
        if not self._console.is_terminal and event.elapsed_s >= self._next_line:
            self._next_line = event.elapsed_s + 10.0
            left = (self._total - event.samples) / event.samples_per_s if event.samples_per_s > 0 else math.inf
            eta = speak.clock(left) if math.isfinite(left) else "?"
            self._console.print(f"  {event.samples:>10,} samples  step {event.step:>8,}  {note}  ETA {eta}")
