"""`tuner explain`: why this configuration, from the stored study alone: limits, fits, memory, what would be faster."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.commands import console as speak
from tuner.commands import setup
from tuner.commands.export import known_study
from tuner.commands.places import check_folder
from tuner.commands.typed import first_study, typed
from tuner.contract.config import RunConfig
from tuner.contract.errors import ConfigError
from tuner.contract.explanation import Change, ExplainResult
from tuner.contract.result import plain_json
from tuner.report.explain_words import Table, bound, not_tried, seconds_text, tables
from tuner.search.explain import explain
from tuner.store.store import StudyStore

if TYPE_CHECKING:
    from rich.console import Console


def run(study: str | None, config: Path | None, out: Path | None, storage: str | None, *, as_json: bool) -> None:
    """Raises ConfigError for a study or a file that says nothing, JobFailed before the baseline was measured."""
    if out is not None:
        check_folder(out)
    name, wanted = (study, None) if config is None else _from_file(study, config, storage)
    store = setup.open_for_reading(storage)
    spec = known_study(store, name or _only(store, storage))
    console = speak.make_console(as_json=as_json)
    rows, decision = store.readable_rows(spec.name), store.readable_decision(spec.name)
    setup.tell_problems(store, console)
    result = explain(spec, rows, decision, wanted)
    if as_json:
        speak.emit_json(plain_json(result))
    else:
        tell(result, console)
    if out is not None:
        from tuner.report.explain_page import write_explanation

        for path in write_explanation(out, result):
            console.print(f"written {path}")


def _from_file(study: str | None, path: Path, storage: str | None) -> tuple[str, RunConfig]:
    """The study a configuration came from, and the configuration."""
    from tuner.export.tuned import load

    tuned = load(path)
    name = study or (tuned.provenance.study if tuned.provenance else None)
    if name is None:
        raise ConfigError(
            f"--config: {path} does not say which study it came from (it has no `provenance`); name it: "
            + typed("explain", "STUDY", config=path, storage=storage)
        )
    return name, tuned.config


def _only(store: StudyStore, storage: str | None) -> str:
    """The one study of the store, where none was named."""
    names = [summary.name for summary in store.studies()]
    if len(names) != 1:
        known = ", ".join(names) or f"none; make one: {first_study(storage)}"
        raise ConfigError(f"explain: name a study, or --config best.GPU.yaml; known studies: {known}")
    return names[0]


def tell(result: ExplainResult, console: Console) -> None:
    """The answer on one screen, then the tables behind it."""
    console.print(result.label, style="bold")
    speed = speak.rate(result.samples_per_s, " samples/s")
    console.print(f"study {result.study} for {result.target}, measured on {result.measured_on}: {speed}", style="dim")
    if result.transfer == "unverified":
        console.print("Speeds, shares and bounds below are those of the machine measured on.", style="yellow")
    console.print(result.reason)
    console.print(f"\n{result.headline}", style="bold")
    for limit in result.limits:
        console.print(f"  {'*' if limit.limits else ' '} {limit.name:<16} {limit.text}")
    console.print(f"    {'model use':<16} {result.model_use.text}")
    _tell_changes(result.changes, console)
    for table in tables(result):
        _tell_table(table, console)
    for line in not_tried(result):
        console.print(f"  not tried: {line}", style="dim")
    console.print(f"  probing took {speak.clock(sum(result.seconds.values()))}: {seconds_text(result)}", style="dim")


def _tell_changes(changes: Sequence[Change], console: Console) -> None:
    console.print("\nWhat would have to change to go faster (bounds from the fitted model)", style="bold")
    if not changes:
        console.print("  nothing that the model knows of promises half a percent")
    for change in changes:
        console.print(f"  {bound(change):<40} {change.what}")
        for more in (change.basis, change.hindrance):
            if more:
                console.print(f"      {more}", style="dim")


def _tell_table(table: Table, console: Console) -> None:
    """Columns as wide as their cells, the last one free."""
    console.print(f"\n{table.title}", style="bold")
    last = len(table.heads) - 1
    every = (table.heads, *table.lines)
    widths = [max(len(line[at]) for line in every) if at < last else 0 for at in range(last + 1)]
    for number, line in enumerate(every if table.lines else ()):
        cells = "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True))
        console.print(f"  {cells.rstrip()}", style=None if number else "dim")
    if table.note:
        console.print(f"  {table.note}")
