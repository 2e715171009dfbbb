"""A decision as TunedConfig, and TunedConfig <-> best.<gpu>.yaml, written beside and moved, so that a reader never
sees half a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tuner import __version__
from tuner.contract.base import parse
from tuner.contract.config import RunConfig
from tuner.contract.documents import read_file, read_mapping, write_mapping
from tuner.contract.errors import TunerError
from tuner.contract.own_files import replace_text
from tuner.contract.probe import ProbeKind, ProbeRow
from tuner.contract.study import StudySpec
from tuner.contract.tuned import Decision, Origin, Promise, Provenance, TunedConfig

SCHEMA_LINE = "yaml-language-server: $schema=../../docs/schema/tuned.json"
BEGINNINGS = ("# yaml-language-server", "config:", "workload:")
"""Of a file that is one of these: ours, somebody's edited copy, a bare configuration."""


def tuned_config(
    spec: StudySpec, decision: Decision, promised: Promise | None, rows: Sequence[ProbeRow]
) -> TunedConfig:
    """The document of a decision that ships something."""
    assert decision.winner is not None
    assert decision.kind != "failed"
    environment = next(row.environment for row in rows if row.environment is not None)
    provenance = Provenance(
        **origin(spec, decision),
        decision=decision.kind,
        probes=len(rows),
        baseline_digest=spec.baseline.digest(),
        lr_note="; ".join(note for note in decision.notes if note.startswith("lr")),
        data=tuple(item.brief for item in spec.data),
        data_changes=spec.data_changes,
        environment=environment,
        tuner=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return TunedConfig(
        config=spec.in_place(decision.winner.config),
        promise=promised,
        provenance=provenance,
        runner_ups=tuple(spec.in_place(config) for config in decision.runner_ups),
        runner_up_peaks=tuple(_largest_peak(config, rows) for config in decision.runner_ups),
        baseline=spec.in_place(decision.baseline.config) if decision.baseline is not None else None,
    )


def _largest_peak(config: RunConfig, rows: Sequence[ProbeRow]) -> int | None:
    """Of the configuration's whole runs, evaluation and all where it was soaked."""
    peaks = [
        row.measurement.memory.gate_bytes
        for row in rows
        if row.kind is ProbeKind.END_TO_END and row.config == config and row.measurement is not None
    ]
    return max(peaks, default=None)


def origin(spec: StudySpec, decision: Decision) -> dict[str, Any]:
    """The fields of `Origin`, as the YAML and `--json` both begin."""
    return Origin(
        study=spec.name,
        target=spec.target.label,
        tier=spec.tier,
        measured_on=spec.device.place,
        transfer=spec.transfer,
        reason=decision.reason,
    ).model_dump()


def dump(tuned: TunedConfig) -> str:
    """YAML text; the comment on top says in words what the file promises."""
    data = json.loads(tuned.model_dump_json(exclude_none=True))
    return write_mapping(data, comment=headline(tuned))


def headline(tuned: TunedConfig) -> str:
    lines = [SCHEMA_LINE]
    if tuned.provenance is not None:
        lines.append(" ".join(tuned.provenance.reason.split()))
        lines.append(f"target: {tuned.provenance.target}; measured on: {tuned.provenance.measured_on}")
        if tuned.provenance.transfer == "unverified":
            lines.append(
                "The target is not the machine measured on: speeds below are that machine's, not the target's."
            )
    return "\n".join(lines)


def load(path: Path) -> TunedConfig:
    """Read a best.<gpu>.yaml, or a bare RunConfig. Raises ConfigError with the path inside the file."""
    data = read_mapping(read_file(path), str(path))
    if "config" in data:
        return parse(TunedConfig, data, str(path))
    return TunedConfig(config=parse(RunConfig, data, str(path)))


def write(path: Path, tuned: TunedConfig) -> None:
    """Write atomically. Raises TunerError when the folder cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, dump(tuned), durable=True)
    except OSError as error:
        raise TunerError(f"{path}: cannot be written: {error.strerror}; name another place with --out") from None
