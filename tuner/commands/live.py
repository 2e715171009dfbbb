"""The live view of a search: one line per finished probe, and a last line saying what is being measured now."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from tuner.commands.console import Warnings, clock, mib, rate
from tuner.contract.equivalence import causes
from tuner.contract.measurement import Measurement, Outcome
from tuner.contract.probe import Event, PhaseEvent, ProbeKind, ProbeRequest, ProbeRow, ProgressEvent
from tuner.contract.statistics import throughput

if TYPE_CHECKING:
    from rich.console import Console

    from tuner.contract.study import StudySpec

HEADS = ("#", "stage", "configuration", "outcome", "samples/s", "peak", "loss", "took")


def columns(cells: Sequence[str]) -> str:
    """One line of the table, in columns that fit every label."""
    number, stage, label, outcome, speed, peak, loss, took = cells
    left = f"{number:>3}  {stage:<11} {label:<42} {outcome:<11}"
    return f"{left} {speed:>18} {peak:>10} {loss:>8} {took:>7}"


class LiveProbes:
    """Context manager; `begin` and `done` around each probe, `listen` for its events."""

    def __init__(self, console: Console, spec: StudySpec) -> None:
        self._console = console
        self._spec = spec
        self._warnings = Warnings(console)
        self._status = console.status("starting", spinner="dots") if console.is_terminal else None
        self._request: ProbeRequest | None = None
        self._spent_s = 0.0
        self._since = time.monotonic()

    def __enter__(self) -> Self:
        self._console.print(columns(HEADS), style="bold")
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._status is not None:
            self._status.stop()

    def earlier(self, rows: Sequence[ProbeRow]) -> None:
        """Rows of a study that is resumed."""
        for row in rows:
            self._console.print(row_text(row, self._spec), style="dim")
        if rows:
            self._console.print(f"     (resumed: {len(rows)} points are stored and not measured again)")
        self._spent_s += sum(row.seconds for row in rows)

    def begin(self, request: ProbeRequest) -> None:
        self._request = request
        self._since = time.monotonic()
        self._show("starting")

    def listen(self, event: Event) -> None:
        if isinstance(event, PhaseEvent):
            self._show(event.phase)
        elif isinstance(event, ProgressEvent):
            self._show(f"{event.text} {event.done}/{event.total}")
        self._warnings.listen(event)

    def done(self, rows: Sequence[ProbeRow]) -> None:
        for row in rows:
            self._console.print(row_text(row, self._spec), style=_style(row))
            self._spent_s += row.seconds

    def _show(self, phase: str) -> None:
        if self._status is None or self._request is None:
            return
        request = self._request
        what = self._spec.label(request.points[0]) if request.points else request.workload
        more = f" and {len(request.points) - 1} more" if len(request.points) > 1 else ""
        spent = self._spent_s + time.monotonic() - self._since
        self._status.update(
            f"{request.stage.value}: {what}{more} - {phase} - {clock(spent)} spent, of {clock(self._spec.budget_s)}"
        )


def row_text(row: ProbeRow, spec: StudySpec | None = None) -> str:
    """With its study, a row also tells the options searched and the metric of a quality probe."""
    speed = "-"
    loss = "-"
    peak = "-"
    if row.measurement is not None:
        peak = mib(row.measurement.memory.gate_bytes)
        loss = _loss(row.measurement)
        if row.measurement.steady_step_s and row.kind is not ProbeKind.EQUIVALENCE:
            speed = rate(throughput(row.measurement))
    if "relative_l2" in row.values:
        speed = f"rel. L2 {row.values['relative_l2']:.1e}"
    if row.kind is ProbeKind.NOISE:
        speed = f"noise scale {row.values['noise_scale']:.3g}" if "noise_high" in row.values else "-"
    if "final_loss" in row.values:
        loss = f"{row.values['final_loss']:.4f}"
    stage = row.stage.value + (f" {row.pair + 1}" if row.pair is not None else "")
    label = spec.label(row.config) if spec else row.config.label
    if row.kind is ProbeKind.LR:
        label = f"{row.config.batch_label} lr {row.config.optimizer.lr:g}, seed {row.config.seed}"
    if row.kind is ProbeKind.QUALITY:
        label += f", seed {row.config.seed}"
        metric = spec.quality.metric if spec and spec.quality else ""
        speed = f"{metric} {row.values[metric]:.4g}" if metric in row.values else "-"
    cells = (str(row.number), stage, label, row.outcome.value, speed, peak, loss, f"{row.seconds:.1f}s")
    line = columns(cells)
    if row.outcome is not Outcome.OK and row.message:
        line += f"\n     {row.message}"
    if row.index == 0:
        line += "".join(f"\n     {found.line}" for found in causes(row.values))
    return line


def _loss(measurement: Measurement) -> str:
    losses = measurement.losses.get("total", ())
    tail = losses[-max(1, len(losses) // 4) :]
    return f"{sum(tail) / len(tail):.4f}" if tail else "-"


def _style(row: ProbeRow) -> str:
    if row.outcome is Outcome.OK:
        return ""
    return "yellow" if row.outcome.is_oom or row.outcome is Outcome.UNSUPPORTED else "red"
