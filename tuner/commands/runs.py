"""`tuner runs`: the production runs of the store, promise beside reality; or one of them with its loss curve."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.commands import console as speak
from tuner.commands import setup
from tuner.commands.run_state import read_status, state_of
from tuner.commands.sparkline import sparkline
from tuner.commands.train_verdict import in_words, judge, quality
from tuner.commands.typed import typed
from tuner.contract.documents import read_bytes
from tuner.contract.errors import ConfigError
from tuner.contract.own_files import newest_checkpoint
from tuner.contract.probe import ProbeReply
from tuner.contract.production import LiveStatus, ProductionRun, RunStatus
from tuner.contract.promise_check import PeakVerdict
from tuner.contract.result import CurvePoint, RunLine, RunResult, RunsResult, TrainResultJson, plain_json
from tuner.contract.tuned import TunedConfig

if TYPE_CHECKING:
    from rich.console import Console

    from tuner.store.store import StudyStore

HEADS = (
    "run",
    "status",
    "workload",
    "configuration",
    "samples",
    "promised",
    "reached",
    "deviation",
    "verdict",
    "peak",
    "folder",
)
STYLES = {RunStatus.FAILED.value: "red", RunStatus.DIED.value: "red", RunStatus.STOPPED.value: "yellow"}
MOST_CURVE = 256 << 20
"""Bytes of a metrics.csv that is drawn."""
ENDED = (RunStatus.STOPPED, RunStatus.FAILED, RunStatus.DIED)


def run(run_id: str | None, workload: str | None, limit: int, storage: str | None, *, as_json: bool) -> None:
    """Raises ConfigError for an unknown run, StoreError for a store that cannot be read."""
    console = speak.make_console(as_json=as_json)
    with setup.open_for_reading(storage) as store:
        if run_id is not None:
            _show_one(_find(store, run_id, storage), console, as_json=as_json)
        else:
            _show_all(store, workload, limit, storage, console, as_json=as_json)
        setup.tell_problems(store, console)


def _find(store: StudyStore, run_id: str, storage: str | None) -> ProductionRun:
    found = store.runs_called(run_id)
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"run {run_id!r}: several begin so: {', '.join(item.id for item in found)}; type more of it")
    for name, why in store.problems.items():
        raise ConfigError(f"{name} cannot be read: {why}")
    newest, _ = store.newest_runs(5)
    known = ", ".join(item.id for item in newest) or f"none yet; make one: {_first(storage)}"
    raise ConfigError(f"run {run_id!r} is not in the store {store.shown_url}; the newest are: {known}")


def _first(storage: str | None) -> str:
    return typed("train", workload="latent_cfg", storage=storage)


def _show_all(
    store: StudyStore, workload: str | None, limit: int, storage: str | None, console: Console, *, as_json: bool
) -> None:
    def wanted(name: str) -> bool:
        return workload is None or workload in (name, setup.short_name(name))

    found, more = store.newest_runs(limit, wanted)
    lines = list(store.readable(found, lambda item: f"run {item.id}", line_of))
    if as_json:
        speak.emit_json(plain_json(RunsResult(runs=tuple(lines), more=more)))
        return
    if not lines:
        of = f" of {workload}" if workload else ""
        console.print(f"no production runs{of} yet; make one: {_first(storage)}")
        return
    console.print(columns(HEADS), style="bold")
    for line in lines:
        console.print(columns(cells(line)), style=STYLES.get(line.status))
    for text in footnotes(lines, more, storage):
        console.print(text, style="dim")


def _show_one(item: ProductionRun, console: Console, *, as_json: bool) -> None:
    line, curve = line_of(item), curve_of(Path(item.out_dir))
    if as_json:
        speak.emit_json(plain_json(RunResult(**dict(line), config=item.config, curve=curve)))
        return
    for text in details(line, item):
        console.print(text)
    for text in curve_text(curve):
        console.print(text)


def line_of(item: ProductionRun) -> RunLine:
    """Promise and reality of one run: from its result, or where it has none from its folder's status.json."""
    out = Path(item.out_dir)
    status = read_status(out)
    own = status if status is not None and status.run == item.id else None
    later = status.run if status is not None and own is None else ""
    state = state_of(item)
    result = _judged(item)
    return RunLine(
        run=item.id,
        workload=item.config.workload,
        label=item.config.label,
        study=item.study,
        status=state.value,
        resumable=state in ENDED and not later and bool(newest_checkpoint(out)),
        reason=_reason(state, result, own, later),
        out_dir=item.out_dir,
        started_at=item.started_at,
        finished_at=item.finished_at,
        goal_samples=own.goal_samples if own else item.config.horizon_samples,
        samples_per_s_interval=result.samples_per_s if result else None,
        promised_samples_per_s=item.promise.samples_per_s if item.promise else None,
        promised_peak_bytes=item.promise.peak_bytes if item.promise else None,
        metrics=dict(result.metrics) if result else (own.metrics if own else {}),
        command=status.command if status else "",
        **(_from_result(result) if result else _from_status(own)),
    )


def _judged(item: ProductionRun) -> TrainResultJson | None:
    reply = ProbeReply(request_id=item.id, points=(), seconds=0.0, train_result=item.result)
    return judge(TunedConfig(config=item.config, promise=item.promise), reply, item.id, Path(item.out_dir))


def _reason(state: RunStatus, result: TrainResultJson | None, own: LiveStatus | None, later: str) -> str:
    if later and state is not RunStatus.RUNNING:
        text = result.reason if result else "ended without a result"
        return f"{text}; its folder was gone on with as {later}"
    if state is RunStatus.DIED:
        return "its process is gone without a word (killed, or its machine went down)"
    return result.reason if result else (own.reason if own else "")


def _from_result(result: TrainResultJson) -> dict[str, Any]:
    return {
        "samples": result.samples,
        "samples_per_s": result.samples_per_s.value if result.samples_per_s else None,
        "host_drift": result.host_drift,
        "deviation": result.deviation,
        "deviation_beyond_drift": result.deviation_beyond_drift,
        "verdict": result.verdict,
        "peak_bytes": result.peak_bytes,
        "peak_deviation": result.peak_deviation,
        "peak_verdict": result.peak_verdict,
        "loss": result.losses.get("total"),
    }


def _from_status(status: LiveStatus | None) -> dict[str, Any]:
    return {
        "samples": status.samples if status else None,
        "samples_per_s": status.mean_samples_per_s if status else None,
        "host_drift": status.host_drift if status else None,
        "deviation": status.deviation if status else None,
        "deviation_beyond_drift": status.deviation_beyond_drift if status else None,
        "verdict": status.verdict if status else None,
        "peak_bytes": (status.peak_bytes or None) if status else None,
        "peak_deviation": status.peak_deviation if status else None,
        "peak_verdict": status.peak_verdict if status else None,
        "loss": status.losses.get("total") if status else None,
    }


def columns(items: Sequence[str]) -> str:
    run, status, workload, label, samples, promised, reached, deviation, verdict, peak, folder = items
    left = f"{run:<12}  {status:<9} {workload:<12} {label:<34} {samples:>21}"
    return f"{left} {promised:>12} {reached:>10} {deviation:>9} {verdict:>7} {peak:>17}  {folder}"


def cells(line: RunLine) -> tuple[str, ...]:
    """One line of the list; `columns` puts it together."""
    promised = line.promised_samples_per_s
    return (
        line.run,
        line.status,
        setup.short_name(line.workload)[:12],
        line.label,
        f"{'-' if line.samples is None else f'{line.samples:,}'} of {line.goal_samples:,}",
        _rate(promised.value if promised else None),
        _rate(line.samples_per_s),
        _percent(_best_deviation(line)),
        line.verdict.value if line.verdict else "-",
        _peaks(line),
        shown_folder(line.out_dir),
    )


def footnotes(lines: Sequence[RunLine], more: int, storage: str | None = None) -> list[str]:
    notes = [
        "samples/s; the deviation is beyond the host's own drift where that is known; peak: reached of promised",
        "verdict: kept = within the promised interval; above = faster than it; below = slower, the promise is not kept",
    ]
    if left := [line.run for line in lines if line.resumable]:
        shows = typed("runs", left[0], storage=storage)
        notes.append(
            f"what has stopped, failed or died with a checkpoint goes on with its own command, as shown by: {shows}"
        )
    if more:
        notes.append(f"{more:,} older ones are not shown; --limit {len(lines) + more} shows all")
    return notes


def details(line: RunLine, item: ProductionRun) -> list[str]:
    """One run, in words."""
    until = f" to {item.finished_at}" if item.finished_at else ""
    texts = [
        f"run {line.run}: {line.workload}, {line.label}",
        f"  status    {line.status}" + (f": {line.reason}" if line.reason else ""),
        f"  begun     {item.started_at}{until}" + (f", from study {item.study}" if item.study else ""),
        f"  samples   {cells(line)[4]}, effective batch {item.config.effective_batch_size}",
        f"  reached   {_reached(line)} samples/s, peak {speak.mib(line.peak_bytes)}",
    ]
    texts += _promise_lines(line)
    result = _judged(item)
    if result is not None:
        texts += quality(result, item.config)
    else:
        texts += [f"  quality   {name} {_number(value)}" for name, value in line.metrics.items()]
    texts.append(f"  folder    {shown_folder(line.out_dir)}")
    if line.resumable:
        texts.append(f"  go on     {line.command or 'with the same command and --out'}")
    return texts


def _reached(line: RunLine) -> str:
    interval = line.samples_per_s_interval
    return speak.rate(interval) if interval is not None else _rate(line.samples_per_s)


def _promise_lines(line: RunLine) -> list[str]:
    if line.promised_samples_per_s is None:
        return ["  promised  nothing: its configuration came without a promise"]
    peak = speak.mib(line.promised_peak_bytes)
    texts = [f"  promised  {speak.rate(line.promised_samples_per_s)} samples/s, peak {peak}"]
    if line.deviation is not None:
        drift = f", the host itself at {100 * line.host_drift:.1f} % of its speed then" if line.host_drift else ""
        beyond = line.deviation_beyond_drift
        rest = f", {_percent(beyond)} beyond its drift" if beyond is not None else ""
        over = " (above its error bar)" if line.peak_verdict is PeakVerdict.ABOVE else ""
        peak = f"; peak {_percent(line.peak_deviation)}{over}"
        texts.append(f"  deviation {_percent(line.deviation)} raw{drift}{rest}{peak}")
    if line.verdict is not None:
        so_far = "so far " if line.status == RunStatus.RUNNING.value else ""
        texts.append(f"  verdict   {so_far}{in_words(line.verdict)}")
    return texts


def curve_of(out: Path) -> tuple[CurvePoint, ...]:
    """The total loss over samples, from metrics.csv; empty when there is none."""
    try:
        text = read_bytes(out / "metrics.csv", MOST_CURVE).decode("utf-8")
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    except (OSError, UnicodeDecodeError, csv.Error, ConfigError):
        return ()
    whole = [row for row in rows if re.fullmatch(r"[0-9]{1,18}", row.get("samples") or "")]
    return tuple(CurvePoint(samples=int(row["samples"]), loss=_finite(row.get("total"))) for row in whole)


def _finite(text: str | None) -> float | None:
    try:
        value = float(text or "nan")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def curve_text(curve: Sequence[CurvePoint]) -> list[str]:
    values = [math.nan if point.loss is None else point.loss for point in curve]
    drawn = sparkline(values)
    if not drawn:
        return ["  loss      no log line yet"]
    known = [value for value in values if math.isfinite(value)]
    span = f"{curve[0].samples:,} to {curve[-1].samples:,} samples"
    return [
        f"  loss      {drawn}",
        f"            {known[0]:.4g} to {known[-1]:.4g}, least {min(known):.4g}; {span}",
    ]


def shown_folder(out_dir: str) -> str:
    """Relative where it lies below the current folder."""
    here = Path.cwd()
    path = Path(out_dir)
    return str(path.relative_to(here)) if path.is_relative_to(here) else out_dir


def _best_deviation(line: RunLine) -> float | None:
    return line.deviation if line.deviation_beyond_drift is None else line.deviation_beyond_drift


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:+.1f} %"


def _peaks(line: RunLine) -> str:
    if line.peak_bytes is None:
        return "-"
    reached = f"{line.peak_bytes / (1 << 20):,.0f}"
    if line.promised_peak_bytes is None:
        return f"{reached} MiB"
    return f"{reached} of {line.promised_peak_bytes / (1 << 20):,.0f} MiB"


def _number(value: float | None) -> str:
    return "not a finite number" if value is None else f"{value:.4g}"
