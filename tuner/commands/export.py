"""`tuner export`: a study's winner as YAML or JSON, or its probes as CSV."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tuner.commands import console as speak
from tuner.commands import encodings, setup
from tuner.commands.places import check_file
from tuner.contract.errors import ConfigError, JobFailed
from tuner.contract.own_files import replace_text
from tuner.contract.result import plain_json
from tuner.store.store import StudyStore

if TYPE_CHECKING:
    from tuner.contract.study import StudySpec
    from tuner.contract.tuned import TunedConfig

FORMATS = ("yaml", "json", "csv")
BEGINS = 12
"""Letters by which an older export is known: another file is not replaced."""


def run(study: str, format_: str, out: Path | None, storage: str | None) -> None:
    if format_ not in FORMATS:
        raise ConfigError(f"--format: unknown format {format_!r}; known: {', '.join(FORMATS)}")
    if out is not None:
        check_file(out)
    store = setup.open_for_reading(storage)
    spec = known_study(store, study)
    text = _csv(store, spec) if format_ == "csv" else _tuned_text(winner(store, spec), format_)
    if out is None:
        encodings.write_document(text, speak.write_out)
        return
    check_file(out, ours=(text[:BEGINS],))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_text(out, text, durable=True)
    except OSError as error:
        raise ConfigError(f"--out: {out} cannot be written: {error.strerror}") from None


def known_study(store: StudyStore, study: str) -> StudySpec:
    spec = store.study(study)
    if spec is None:
        known = ", ".join(store.study_names()) or "none"
        raise ConfigError(f"study {study!r} is not in the store; known: {known}")
    return spec


def winner(store: StudyStore, spec: StudySpec) -> TunedConfig:
    """The stored decision as the document `train` reads. Raises JobFailed while there is none."""
    from tuner.export.tuned import tuned_config
    from tuner.search.selection import promise

    decision = store.decision(spec.name)
    if decision is None or decision.kind == "failed":
        raise JobFailed(f"study {spec.name} has no configuration to export yet; run its `tuner optimize` command again")
    rows = store.rows(spec.name)
    return tuned_config(spec, decision, promise(rows, spec, decision), rows)


def _tuned_text(tuned: TunedConfig, format_: str) -> str:
    from tuner.export.tuned import dump

    return dump(tuned) if format_ == "yaml" else plain_json(tuned) + "\n"


def _csv(store: StudyStore, spec: StudySpec) -> str:
    from tuner.report.frame import frame

    rows = store.readable_rows(spec.name)
    setup.tell_problems(store, speak.make_console(as_json=True))
    return str(frame(rows, spec).to_csv(index=False))
