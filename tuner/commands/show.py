"""`tuner show`: studies, one study's answer, its probes and the runs made from it."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

from tuner.commands import console as speak
from tuner.commands import setup
from tuner.commands.live import HEADS, columns, row_text
from tuner.commands.typed import first_study
from tuner.contract.errors import ConfigError
from tuner.store.store import StudyStore

if TYPE_CHECKING:
    from rich.console import Console


def run(study: str | None, probes: bool, storage: str | None, *, as_json: bool) -> None:
    store = setup.open_for_reading(storage)
    console = speak.make_console(as_json=as_json)
    if study is None:
        _all(store, storage, console, as_json=as_json)
    else:
        _one(store, study, probes, console, as_json=as_json)
    setup.tell_problems(store, console)


def _all(store: StudyStore, storage: str | None, console: Console, *, as_json: bool) -> None:
    found = store.studies()
    if as_json:
        listed = [{"study": item.name, "probes": item.probes, "decision": item.decision} for item in found]
        speak.emit_json(json.dumps({"studies": listed}, indent=2))
        return
    if not found and not store.problems:
        console.print(f"no studies yet; make one: {first_study(storage)}")
    for item in found:
        console.print(f"{item.name:<40} {item.probes:>4} points   {item.decision or 'unfinished'}")


def _one(store: StudyStore, study: str, probes: bool, console: Console, *, as_json: bool) -> None:
    spec = store.study(study)
    if spec is None:
        known = ", ".join(store.study_names()) or "none"
        raise ConfigError(f"study {study!r} is not in the store; known: {known}")
    rows = store.readable_rows(study)
    decision = store.readable_decision(study)
    runs = store.runs(study)
    if as_json:
        data = {
            "spec": spec.model_dump(mode="json"),
            "decision": decision.model_dump(mode="json") if decision else None,
            "outcomes": Counter(row.outcome.value for row in rows),
            "runs": [run.model_dump(mode="json") for run in runs],
        }
        speak.emit_json(json.dumps(data, indent=2))
        return
    console.print(f"{study}  {spec.workload} for {spec.target.label}, measured on {spec.device.cpu_name}")
    console.print(f"baseline {spec.baseline.label}")
    console.print(decision.reason if decision else "no decision yet; the same `tuner optimize` command goes on")
    if probes:
        console.print(columns(HEADS), style="bold")
        for row in rows:
            console.print(row_text(row, spec))
    for run in runs:
        console.print(f"run {run.id}: {run.status}, {run.out_dir}")
