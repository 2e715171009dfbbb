"""The shipped study files, shortened to the time at hand, and the study that `tuner optimize` made of each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_check import ROOT, Check
from tuner.contract.documents import read_file, read_mapping, write_mapping
from tuner.contract.probe import ProbeRow
from tuner.contract.study import StudySpec
from tuner.contract.tuned import Decision
from tuner.search.selection import select
from tuner.store.store import StudyStore

CODEC = ("-o", "vae_steps=0")
"""latent_cfg: its codec stays the linear one, which spares minutes and changes no shape and no step."""
REHEARSED: dict[str, Any] = {
    "precision": ["fp32"], "compile": ["eager"], "gradient_checkpointing": [False], "num_workers": [0],
    "prefetch_factor": [2], "lr": [],
}  # fmt: skip
"""Knobs that a rehearsal on a CPU leaves at one value."""


@dataclass(frozen=True)
class Length:
    """How long the probes of a study are, by the seconds there are for it."""

    name: str
    from_s: float
    measure_s: float
    compute_s: float
    min_steps: int
    pairs: int

    @property
    def note(self) -> str:
        return (
            f"{self.name}: probes measure {self.measure_s:g} s (the study's own: 5 s), the ship gate takes "
            f"{self.pairs} to {2 * self.pairs} pairs (6 to 12) for 1 finalist (2), no lr stage"
        )


LENGTHS = (
    Length("long", 300.0, 3.0, 1.5, 8, 6),
    Length("middle", 110.0, 2.0, 1.0, 6, 5),
    Length("short", 45.0, 1.0, 0.5, 5, 3),
    Length("rehearsal", 0.0, 0.4, 0.25, 4, 2),
)
"""From the longest down; the first for which there is time holds."""


def length_for(seconds: float) -> Length:
    return next(length for length in LENGTHS if seconds >= length.from_s)


def study_file(check: Check, workload: str, length: Length, *, keep: tuple[str, ...] = ()) -> Path:
    """The shipped study file with the keys of its preset replaced; on a CPU fewer knobs, but for those in `keep`."""
    given = ROOT / "studies" / workload / "study.yaml"
    data = read_mapping(read_file(given), str(given))
    preset = data["presets"][check.preset]
    preset["measure"] = {
        "measure_s": length.measure_s, "compute_s": length.compute_s, "min_steps": length.min_steps,
        "deadline_s": 300.0,
    }  # fmt: skip
    preset["gate"] = {
        "min_pairs": length.pairs, "max_pairs": 2 * length.pairs, "finalists": 1, "measure_s": length.measure_s,
    }  # fmt: skip
    preset["lr"] = {"enabled": False}
    if not check.cuda:
        cut = {knob: values for knob, values in REHEARSED.items() if knob not in keep and knob in data["space"]}
        preset["space"] = preset.get("space", {}) | cut
    path = check.work / f"{workload}-{length.name}.study.yaml"
    path.write_text(write_mapping(data, f"{given.name} of {workload}, shortened by the GPU check"), encoding="utf-8")
    return path


def job_words(check: Check, workload: str) -> list[str]:
    """The job as every command here names it."""
    return ["--workload", workload, "--preset", check.preset, *(CODEC if workload == "latent_cfg" else ())]


@dataclass(frozen=True)
class Studied:
    """One study as it stands in the check's store."""

    spec: StudySpec
    rows: tuple[ProbeRow, ...]
    decision: Decision
    """The stored one, or what the rows would decide by now."""
    finished: bool


def studied(check: Check, name: str) -> Studied | None:
    """The study called `name`; None where it was not begun."""
    with StudyStore.open(check.storage) as store:
        spec = store.study(name)
        if spec is None:
            return None
        rows, decision = store.rows(name), store.decision(name)
    return Studied(spec, rows, decision or select(rows, spec), decision is not None)


def probing_s(check: Check, name: str) -> float:
    """Seconds that the probes of the study called `name` have taken so far."""
    found = studied(check, name)
    return sum(row.seconds for row in found.rows) if found is not None else 0.0
