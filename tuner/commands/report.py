"""`tuner report`: one self-contained page for a study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tuner.commands import console as speak
from tuner.commands import setup
from tuner.commands.export import known_study
from tuner.commands.places import check_file
from tuner.contract.errors import ConfigError, JobFailed
from tuner.contract.explanation import ExplainResult
from tuner.contract.probe import ProbeRow
from tuner.contract.study import StudySpec
from tuner.contract.tuned import Decision
from tuner.report.page import write_report
from tuner.search.explain import explain

BEGINS = ("<!",)
"""How an older page is known: another file is not replaced."""


def run(study: str, out: Path | None, storage: str | None) -> None:
    if out is not None:
        check_file(out, ours=BEGINS)
    store = setup.open_for_reading(storage)
    spec = known_study(store, study)
    path = out or Path("studies") / setup.short_name(spec.workload) / f"report.{study}.html"
    check_file(path, ours=BEGINS)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows, decision = store.readable_rows(study), store.readable_decision(study)
        write_report(path, spec, rows, decision, store.runs(study), _why(spec, rows, decision))
    except OSError as error:
        raise ConfigError(f"--out: {path} cannot be written: {error.strerror}") from None
    console = speak.make_console(as_json=False)
    setup.tell_problems(store, console)
    console.print(f"written {path}")


def _why(spec: StudySpec, rows: Sequence[ProbeRow], decision: Decision | None) -> ExplainResult | None:
    """None where nothing can be explained: not even the baseline was measured."""
    try:
        return explain(spec, rows, decision)
    except (JobFailed, ConfigError):
        return None
