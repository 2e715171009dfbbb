"""`tuner report`: one self-contained page for a study."""

from __future__ import annotations

from pathlib import Path

from tuner.commands import console as speak
from tuner.commands import setup
from tuner.commands.export import known_study
from tuner.contract.errors import ConfigError
from tuner.report.page import write_report
from tuner.store.store import StudyStore


def run(study: str, out: Path | None, storage: str | None) -> None:
    store = StudyStore.open(setup.storage_url(storage))
    spec = known_study(store, study)
    path = out or Path("studies") / setup.short_name(spec.workload) / f"report.{study}.html"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_report(path, spec, store.rows(study), store.decision(study), store.runs(study))
    except OSError as error:
        raise ConfigError(f"--out: {path} cannot be written: {error.strerror}") from None
    speak.make_console(as_json=False).print(f"written {path}")
