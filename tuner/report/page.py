"""One self-contained HTML page per study: the answer first, then the pictures, then every probe. Needs no network.

All text is escaped on its way into the page, and the page's own policy lets no script run but the two it was built
with.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from tuner.contract.errors import ConfigError
from tuner.contract.explanation import ExplainResult
from tuner.contract.own_files import replace_text
from tuner.contract.probe import ProbeRow
from tuner.contract.production import ProductionRun
from tuner.contract.study import StudySpec
from tuner.contract.tuned import Decision
from tuner.report.explain_figures import explain_figures
from tuner.report.explain_words import bound, not_tried, seconds_text, tables
from tuner.report.figures import gate_figure, loss_figure, memory_figure, seconds_figure, throughput_figure
from tuner.report.frame import frame
from tuner.report.targets import reached, target_results
from tuner.report.words import DASH, answer, reality, side_cells

TEMPLATES = Path(__file__).with_name("templates")


def write_report(
    path: Path,
    spec: StudySpec,
    rows: Sequence[ProbeRow],
    decision: Decision | None,
    runs: Sequence[ProductionRun] = (),
    explanation: ExplainResult | None = None,
) -> Path:
    """Write the page and return its path; an older page there is replaced in one step. Raises ConfigError."""
    return write_page(path, render(spec, rows, decision, runs, explanation))


def write_page(path: Path, text: str) -> Path:
    """Written beside and moved, so that a reader never sees half a page. Raises ConfigError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, text)
    except OSError as error:
        raise ConfigError(f"--out: {path} cannot be written: {error.strerror}") from None
    return path


def render(
    spec: StudySpec,
    rows: Sequence[ProbeRow],
    decision: Decision | None,
    runs: Sequence[ProductionRun] = (),
    explanation: ExplainResult | None = None,
) -> str:
    """The page as text; `explanation` adds the section on why."""
    data = frame(rows, spec)
    made = _figures(data, rows, spec, decision) | (explain_figures(explanation) if explanation else {})
    return filled(
        "report.html.j2",
        made,
        explanation=explanation,
        explained=explained(explanation) if explanation else None,
        spec=spec,
        answer=answer(spec, decision, len(rows)),
        kind=decision.kind if decision else "open",
        sides=_sides(spec, decision),
        targets=[(item.name, item.wanted, reached(item)) for item in target_results(spec, rows, decision)],
        outcomes=_outcomes(data),
        total=f"{float(data['seconds'].sum()):,.0f}",
        columns=_COLUMNS,
        lines=[_cells(line) for line in data.to_dict("records")],
        failures=[line for line in data.to_dict("records") if line["outcome"] != "ok"],
        runs=[reality(run) for run in runs],
        environment=next((row.environment for row in reversed(rows) if row.environment), None),
    )


def filled(template: str, made: Mapping[str, go.Figure | None], **values: Any) -> str:
    """A page from a template, with the figures there is something to show in and the two scripts that may run."""
    page = _environment()
    script = page.get_template("table.js.j2").render()
    library = _plotly_script()
    return page.get_template(template).render(
        **values,
        figures=_shown(made),
        library=Markup(library),
        script=Markup(script),
        hashes=" ".join(_hash(text) for text in (library, script)),
    )


def explained(result: ExplainResult) -> dict[str, Any]:
    """What the section on why shows, in words."""
    return {
        "changes": [(bound(change), change) for change in result.changes],
        "tables": tables(result),
        "not_tried": not_tried(result),
        "seconds": seconds_text(result),
    }


def _environment() -> Environment:
    return Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True)


def _plotly_script() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs()).replace("\r\n", "\n")


def _hash(script: str) -> str:
    """A source of the page's policy: exactly this script may run."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _figures(
    data: pd.DataFrame, rows: Sequence[ProbeRow], spec: StudySpec, decision: Decision | None
) -> dict[str, go.Figure | None]:
    return {
        "throughput": throughput_figure(data),
        "memory": memory_figure(data, spec),
        "gate": gate_figure(rows, spec, decision),
        "loss": loss_figure(rows, spec, decision),
        "seconds": seconds_figure(data),
    }


def _shown(made: Mapping[str, go.Figure | None]) -> list[tuple[str, str, Markup]]:
    """(name, title, data as JSON) of every figure there is something to show in."""
    shown = []
    for name, figure in made.items():
        if figure is not None:
            title = str(figure.layout.title.text)
            figure.update_layout(title=None, margin_t=32)
            shown.append((name, title, Markup(_script_safe(figure.to_json()))))
    return shown


def _script_safe(text: str) -> str:
    """JSON that cannot end the element it stands in."""
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _sides(spec: StudySpec, decision: Decision | None) -> list[tuple[str, str, str, str]]:
    if decision is None:
        return []
    sides = [("Baseline", *side_cells(spec, decision.baseline))]
    if decision.kind == "winner":
        sides.append(("Winner", *side_cells(spec, decision.winner)))
    return sides


def _outcomes(data: pd.DataFrame) -> str:
    counts = data["outcome"].value_counts()
    return ", ".join(f"{count} {name}" for name, count in counts.items())


_COLUMNS = (
    ("number", "#"),
    ("stage", "stage"),
    ("kind", "kind"),
    ("outcome", "outcome"),
    ("label", "configuration"),
    ("lr", "lr"),
    ("samples_per_s", "samples/s"),
    ("interval", "95 % interval"),
    ("step_ms", "step ms"),
    ("data_wait", "data wait"),
    ("peak_mib", "peak MiB"),
    ("memory_used", "of budget"),
    ("loss", "loss"),
    ("seconds", "seconds"),
    ("trial", "trial"),
    ("message", "message"),
)
_FORMATS = {
    "lr": "{:g}",
    "samples_per_s": "{:,.1f}",
    "step_ms": "{:,.1f}",
    "data_wait": "{:.1%}",
    "peak_mib": "{:,.0f}",
    "memory_used": "{:.0%}",
    "loss": "{:.4g}",
    "seconds": "{:.1f}",
    "trial": "{:.0f}",
}


def _cells(line: dict[Any, Any]) -> list[tuple[str, str]]:
    """(text, sort key) of every column."""
    line["interval"] = _interval(line["low"], line["high"])
    return [(_text(key, line[key]), _sort_key(line[key])) for key, _ in _COLUMNS]


def _interval(low: Any, high: Any) -> str:
    return f"{low:,.1f} … {high:,.1f}" if _known(low) and _known(high) else DASH


def _text(key: str, value: Any) -> str:
    if key in _FORMATS:
        return _FORMATS[key].format(value) if _known(value) else DASH
    return str(value)


def _sort_key(value: Any) -> str:
    return json.dumps(float(value)) if isinstance(value, int | float) and _known(value) else str(value)


def _known(value: Any) -> bool:
    return value is not None and not pd.isna(value) and math.isfinite(value)
