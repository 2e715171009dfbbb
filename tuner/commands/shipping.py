"""Where best.<gpu>.yaml goes, and where a decision goes when that place does not take it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.commands import setup
from tuner.commands.places import write_beside
from tuner.contract.errors import TunerError
from tuner.contract.probe import ProbeRow
from tuner.contract.study import StudySpec
from tuner.contract.tuned import Decision, Promise
from tuner.export.tuned import dump, tuned_config, write

if TYPE_CHECKING:
    from rich.console import Console


def best_path(workload: str, out: Path | None, gpu: str, *, aa: bool) -> Path | None:
    """best.<gpu>.yaml; None for an A/A run without --out."""
    if out is not None or aa:
        return out
    return Path("studies") / setup.short_name(workload) / f"best.{gpu}.yaml"


def write_best(
    path: Path | None,
    spec: StudySpec,
    decision: Decision,
    promised: Promise | None,
    rows: Sequence[ProbeRow],
    console: Console,
) -> tuple[Path | None, str]:
    """For a winner and for an honest no gain alike; nothing when the baseline itself failed. Where it was written, and
    what to say when that is not `path`: a decision that took hours to find is written where there is room for it."""
    if path is None or decision.kind == "failed" or decision.winner is None:
        return None, ""
    tuned = tuned_config(spec, decision, promised, rows)
    try:
        write(path, tuned)
    except TunerError as error:
        kept = write_beside(f"{spec.name}.{path.name}", dump(tuned))
        if kept is None:
            console.print(dump(tuned), markup=False, soft_wrap=True)
        where = f"written to {kept} instead" if kept else "shown above"
        return kept, f"{error}. The decision is {where}; it is in the store too, and `tuner export` writes it again"
    return path, ""
